"""Python sources of packages that cannot be installed here, from pip's index: tests run them over CPU stand-ins.

Kept under the git-ignored ``.pytest_cache``, so that an archive is downloaded once per checkout.
"""

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
_KEPT = {".py", ".txt", ""}  # no native sources, which are most of an archive
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


@cache
def _download(requirement: str, folder: Path) -> str | None:
    """Fill ``folder``, or say why not; asked once per process, as a missing network costs seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--dest", place, requirement]
        done = subprocess.run(command, env=os.environ | _SETTINGS, capture_output=True, text=True, check=False)
        archives = [path for path in Path(place).iterdir() if path.is_file()]
        if done.returncode or len(archives) != 1:
            errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
            outcome = f"exit status {done.returncode}, {len(archives)} archives"
            return errors[0].partition(" (from")[0] if errors else outcome
        unpacked = Path(place, "unpacked")
        _unpack(archives[0], unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another test run was faster
                raise
    return None


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if Path(name).suffix in _KEPT])
        return
    with tarfile.open(archive) as sources:
        sources.extractall(folder, [each for each in sources if Path(each.name).suffix in _KEPT], filter="data")
