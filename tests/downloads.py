"""Packages from pip's index that the test environment is without: sources that cannot be installed here, which tests
run over CPU stand-ins or as they are, and what those import.

Kept under the git-ignored ``.pytest_cache``, so that an archive is downloaded once per checkout.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "d" / "downloads"
_WRONG_HASH = "DO NOT MATCH THE HASHES"
_KEPT = {".py", ".txt", ".yaml", ""}  # no native sources, which are most of an archive
_OPTIONS = ("--no-deps", "--no-build-isolation", "--quiet", "--retries=1", "--timeout=15")
# pip asks a source archive's setup.py for its metadata, and flash-attn's would look for nvcc first.
_SETTINGS = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}


def downloaded(requirement: str) -> Path:
    """The folder with the unpacked wheel or source archive of ``requirement``, such as "flash-attn==2.8.3".

    Holds Python and metadata files only. The test is skipped when pip cannot get the archive.
    """
    folder = _CACHE / re.sub(r"[^\w.-]+", "-", requirement)
    if not folder.is_dir():
        reason = _download(requirement, folder)
        if reason:
            pytest.skip(f"pip cannot download {requirement}: {reason}")
    return folder


def downloaded_source(requirement: str, sha256: str) -> Path:
    """The folder that holds the files of exactly this source archive, such as "verl==0.9.1".

    The test is skipped when pip cannot get the archive; another one of this name is an error.
    """
    folder = _CACHE / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if not folder.is_dir():
        reason = _download(requirement, folder, sha256)
        assert reason is None or _WRONG_HASH not in reason, reason
        if reason:
            pytest.skip(f"pip cannot download {requirement}: {reason}")
    (inside,) = folder.iterdir()
    return inside


def installed_beside(name: str, *requirements: str) -> Path:
    """A folder for ``sys.path`` with exactly these packages, without what they depend on.

    Each is "package==version", with " --hash=sha256:..." where its content is pinned. The test is skipped when pip
    cannot get them; an archive with another hash is an error.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = _CACHE / f"{name}-{version}-{digest}"
    if not folder.is_dir():
        reason = _install(requirements, folder)
        assert reason is None or _WRONG_HASH not in reason, reason
        if reason:
            pytest.skip(f"pip cannot install what {name} needs: {reason}")
    return folder


@cache
def _install(requirements: tuple[str, ...], folder: Path) -> str | None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        target = Path(place, "installed")
        for hashed in (True, False):  # pip wants hashes of all requirements of a call or of none
            some = [each for each in requirements if ("--hash=" in each) is hashed]
            wanted = Path(place, "wanted.txt")
            wanted.write_text("\n".join(some))
            reason = some and _pip("install", "--no-compile", "--target", str(target), "--requirement", str(wanted))
            if reason:
                return reason
        return _move(target, folder)


@cache
def _download(requirement: str, folder: Path, sha256: str | None = None) -> str | None:
    """Fill ``folder``, or say why not; asked once per process, as a missing network costs seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        what = [requirement]
        if sha256:
            Path(place, "wanted").mkdir()
            wanted = Path(place, "wanted", "requirements.txt")
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            what = ["--no-binary=:all:", "--requirement", str(wanted)]
        reason = _pip("download", "--dest", place, *what)
        archives = [path for path in Path(place).iterdir() if path.is_file()]
        if reason or len(archives) != 1:
            return reason or f"{len(archives)} archives"
        unpacked = Path(place, "unpacked")
        _unpack(archives[0], unpacked)
        return _move(unpacked, folder)


def _pip(command: str, *arguments: str) -> str | None:
    """Run pip without dependencies; why it failed, if it did."""
    line = [sys.executable, "-m", "pip", command, *_OPTIONS, *arguments]
    done = subprocess.run(line, env=os.environ | _SETTINGS, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
    return errors[0].partition(" (from")[0] if errors else f"exit status {done.returncode}"


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another test run was faster
            raise


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if Path(name).suffix in _KEPT])
        return
    with tarfile.open(archive) as sources:
        sources.extractall(folder, [each for each in sources if Path(each.name).suffix in _KEPT], filter="data")
