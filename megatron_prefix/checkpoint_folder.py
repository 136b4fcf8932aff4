"""Checkpoint folders as files: their names, what makes one whole, what is kept. Plain Python.

A checkpoint is written to `incomplete_folder`, gets a manifest of all its files, and is renamed. So a folder under its
final name was once whole; the manifest tells whether it still is.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST_FILE = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_LEFT_OVER = re.compile(r"step_\d{6,}\.[0-9a-f]{8}\.(incomplete|removed)")
_READ_AT_ONCE = 2**22  # bytes


def step_folder(directory: str | Path, step: int) -> Path:
    """The folder of a step: `directory/step_NNNNNN`."""
    return Path(directory) / f"step_{step:06d}"


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in `directory`, by step; partly written folders are not seen."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint of the highest step in `directory`, or None; partly written folders are not seen."""
    return next(reversed(checkpoints(directory)), None)


def incomplete_folder(path: Path) -> Path:
    """Where a checkpoint is written. Never twice the same: a killed run's writers may live on for a moment."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")


def remove_leftovers(directory: Path) -> None:
    """Remove what killed runs left half written or half removed.

    Raises:
        OSError: it cannot be removed.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)


def keep_last(directory: Path, count: int) -> None:
    """Remove all checkpoints but the ``count`` of the highest steps; 0 keeps all.

    Each is renamed first, so that no half removed folder has a checkpoint's name.

    Raises:
        OSError: one cannot be removed.
    """
    for path in checkpoints(directory)[:-count] if count else ():
        away = path.with_name(f"{path.name}.{secrets.token_hex(4)}.removed")
        path.rename(away)
        shutil.rmtree(away)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, for someone to look at, and return where it is. Raises OSError."""
    return path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.damaged"))


@dataclass(frozen=True)
class FileSum:
    """What the manifest says of a file: its size and the CRC-32 of its contents."""

    bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Reads the file; one that was just written comes from memory. Raises OSError."""
        size = crc = 0
        with path.open("rb") as file:
            while part := file.read(_READ_AT_ONCE):
                size, crc = size + len(part), zlib.crc32(part, crc)
        return cls(size, crc)


def files_of(folder: Path) -> list[str]:
    """Paths of all files inside ``folder`` but the manifest, relative to it, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST_FILE)


def sums_of(folder: Path, names: Sequence[str]) -> dict[str, FileSum]:
    """Sums of these files, each forced to the disk. Raises OSError."""
    for name in names:
        _sync(folder / name)
    return {name: FileSum.of(folder / name) for name in names}


def complete(incomplete: Path, path: Path, sums: Mapping[str, FileSum]) -> None:
    """Give a folder its manifest and its final name; it survives a power failure afterwards. Raises OSError."""
    manifest = incomplete / MANIFEST_FILE
    manifest.write_text(json.dumps({name: asdict(sums[name]) for name in sorted(sums)}, indent=1) + "\n", "utf-8")
    for each in (manifest, *(folder for folder in incomplete.rglob("*") if folder.is_dir()), incomplete):
        _sync(each)
    if path.is_dir():
        path.rmdir()  # an empty one, which the caller may have made
    incomplete.rename(path)
    _sync(path.parent)


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None where they are as they were written.

    Args:
        folder: a checkpoint.
        part, parts: contents are read of every ``parts``-th file only, from number ``part``: ranks share the work.
            Sizes are compared for all.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        sums = {name: FileSum(**values) for name, values in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read: {error}"
    for number, (name, expected) in enumerate(sums.items()):
        file = folder / name
        try:
            size = file.stat().st_size
            if size != expected.bytes:
                return f"{name} has {size} bytes, {expected.bytes} were written"
            if number % parts == part and FileSum.of(file) != expected:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _sync(path: Path) -> None:
    """Force a file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
