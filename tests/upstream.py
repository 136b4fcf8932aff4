"""Python packages of frameworks that tests run unchanged, installed beside the test environment, not into it.

They live under ``sys.prefix/upstream``, once per environment: pip checks the hashes that are given, and nothing of a
framework's own requirements is installed unless it is listed.
"""

import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

_OPTIONS = ("--no-deps", "--only-binary=:all:", "--quiet", "--retries=1", "--timeout=30", "--disable-pip-version-check")


@cache
def installed(name: str, *requirements: str) -> Path:
    """A folder for ``PYTHONPATH`` with the wheels of exactly these requirements.

    Each is "package==version", with " --hash=sha256:..." where the wheel's content is pinned. The test is skipped when
    pip cannot get them; an archive with another hash is an error.
    """
    folder = Path(sys.prefix, "upstream", name)
    listed = folder / "requirements.txt"
    text = "\n".join(requirements)
    if listed.is_file() and listed.read_text() == text:
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        for hashed in (True, False):  # pip wants hashes of all requirements of a call or of none
            some = [each for each in requirements if ("--hash=" in each) is hashed]
            wanted = Path(place, "wanted.txt")
            wanted.write_text("\n".join(some))
            command = [sys.executable, "-m", "pip", "install", *_OPTIONS, "--target", f"{place}/packages"]
            done = subprocess.run([*command, "-r", str(wanted)], capture_output=True, text=True, check=False)
            if done.returncode:
                assert "DO NOT MATCH THE HASHES" not in done.stderr, done.stderr
                pytest.skip(f"pip cannot install {name}: {done.stderr.strip().splitlines()[-1]}")
        Path(place, "packages", listed.name).write_text(text)
        shutil.rmtree(folder, ignore_errors=True)
        Path(place, "packages").rename(folder)
    return folder
