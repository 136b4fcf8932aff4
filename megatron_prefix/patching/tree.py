"""Applying a patch to a source tree, and reverting it, by whole files.

Every file that the patch touches is pinned by its hash before and after. So a tree is known to the byte: nothing is
applied to a file that somebody changed, and what is reverted is what upstream shipped. The diffs run in a scratch
folder, and only finished files are renamed into the tree; a run that was killed between two renames leaves whole files,
and the next one, forward or back, finds out which is which and finishes.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from enum import Enum
from pathlib import Path

from megatron_prefix.patching.manifest import FilePin, Patch

STAGED = ".{}.megatron-prefix"
"""Name of a finished file before it is renamed: beside its target, thus on the same file system."""


class TreeState(Enum):
    """What the files that a patch touches are, all together."""

    ORIGINAL = "original"
    PATCHED = "patched"
    INTERRUPTED = "interrupted"
    """Some are one, some the other, each whole: a run was killed. Applying and reverting both finish it."""


def inspect_tree(patch: Patch, tree: Path) -> TreeState:
    """Raises ValueError naming the first file that is missing, or neither upstream's nor patched."""
    patched = {name: _is_patched(tree, name, pin, patch) for name, pin in patch.files.items()}
    if all(patched.values()):
        return TreeState.PATCHED
    return TreeState.INTERRUPTED if any(patched.values()) else TreeState.ORIGINAL


def check_patch(patch: Patch, tree: Path) -> TreeState:
    """A dry run of what is left to do, applying or (when all of it is applied) reverting, on copies; returns the state.

    Raises ValueError as `inspect_tree` does.
    """
    found = inspect_tree(patch, tree)
    with tempfile.TemporaryDirectory() as folder:
        goal = TreeState.ORIGINAL if found is TreeState.PATCHED else TreeState.PATCHED
        _prepare(patch, tree, Path(folder), goal)
    return found


def apply_patch(patch: Patch, tree: Path) -> TreeState:
    """Apply all of it, or nothing. Returns the state found: PATCHED means that there was nothing to do.

    Raises ValueError as `inspect_tree` does, or when the tree cannot be written to.
    """
    return _change(patch, tree, TreeState.PATCHED)


def revert_patch(patch: Patch, tree: Path) -> TreeState:
    """Give every file its upstream bytes again. Returns the state found: ORIGINAL means that there was nothing to do.

    Raises ValueError as `apply_patch` does.
    """
    return _change(patch, tree, TreeState.ORIGINAL)


def run_diffs(patch: Patch, folder: Path, names: list[str], *, reverse: bool = False) -> None:
    """Run what the patch files say of these files on the copies in `folder`, backwards when reversed.

    Raises ValueError when git is not installed or refuses.
    """
    # A repository of its own, so that git neither finds another one around the folder nor skips files as outside of it.
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "-c", "core.autocrlf=false"]
    options = ["--whitespace=nowarn", *(["--reverse"] if reverse else []), *(f"--include={name}" for name in names)]
    _run([*git, "init", "--quiet", "--template="], folder)
    for diff in reversed(patch.diffs) if reverse else patch.diffs:
        _run([*git, "apply", *options, str(diff.resolve())], folder)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _change(patch: Patch, tree: Path, goal: TreeState) -> TreeState:
    """Bring every file to the goal; returns the state found."""
    found = inspect_tree(patch, tree)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        names = _prepare(patch, tree, scratch, goal)
        try:
            _swap(patch, tree, scratch, names)
        except OSError as error:
            raise ValueError(f"{tree} cannot be changed, and is as it was: {error}") from error
    return found


def _prepare(patch: Patch, tree: Path, scratch: Path, goal: TreeState) -> list[str]:
    """Make in scratch, from copies, every file that is not at the goal yet; returns their names."""
    revert = goal is TreeState.ORIGINAL
    names = [name for name, pin in patch.files.items() if _is_patched(tree, name, pin, patch) is revert]
    for name in names:
        _copy(tree / name, scratch / name)
    if names:
        run_diffs(patch, scratch, names, reverse=revert)
    for name in names:
        if _is_patched(scratch, name, patch.files[name], patch) is revert:
            raise ValueError(f"the patch for {patch} does not change {name}: its manifest is wrong")
    return names


def _swap(patch: Patch, tree: Path, scratch: Path, names: list[str]) -> None:
    """Put the files of scratch in the place of the tree's: all of them, or none when one refuses (an OSError)."""
    with tempfile.TemporaryDirectory() as folder:
        backup = Path(folder)
        done: list[str] = []
        try:
            _drop_staged(patch, tree)  # of a run that was killed
            for name in names:
                _copy(tree / name, backup / name)
                _stage(scratch / name, tree, name)
            for name in names:
                _take_place(scratch / name, tree, name)
                done.append(name)
        except OSError:
            for name in done:
                _stage(backup / name, tree, name)
                _take_place(backup / name, tree, name)
            raise
        finally:
            _drop_staged(patch, tree)


def _copy(source: Path, target: Path) -> None:
    """Nothing where there is no source."""
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _stage(source: Path, tree: Path, name: str) -> None:
    """Beside the file whose place it will take, with that file's mode, safely on disk."""
    staged = _staged(tree, name)
    _copy(source, staged)
    if staged.exists():
        if (tree / name).exists():
            shutil.copymode(tree / name, staged)
        with staged.open("rb") as written:
            os.fsync(written.fileno())


def _take_place(source: Path, tree: Path, name: str) -> None:
    """What was staged of the source becomes the tree's, in one step; where there is no source the file goes."""
    if source.exists():
        _staged(tree, name).replace(tree / name)
    else:
        (tree / name).unlink()


def _drop_staged(patch: Patch, tree: Path) -> None:
    for name in patch.files:
        _staged(tree, name).unlink(missing_ok=True)


def _staged(tree: Path, name: str) -> Path:
    file = tree / name
    return file.with_name(STAGED.format(file.name))


def _is_patched(tree: Path, name: str, pin: FilePin, patch: Patch) -> bool:
    """Raises ValueError for a file that is neither upstream's nor patched."""
    file = tree / name
    if file.is_symlink():
        raise ValueError(f"{file} is a symbolic link: give the tree that it leads to")
    if not file.exists():
        if pin.before is None:
            return False
        raise ValueError(
            f"{tree} has no {name}, which {patch} changes: a whole source tree is needed, not a part of it"
        )
    digest = sha256(file)
    if digest in pin:
        return digest == pin.after
    unix = hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    if unix in pin:
        raise ValueError(f"{file} has CRLF line endings: check it out again with core.autocrlf=false")
    raise ValueError(
        f"{file} is neither that of {patch.target.title} {patch.release} nor the patched one: undo your changes to it, "
        f"or apply {', '.join(diff.name for diff in patch.diffs)} from {patch.folder} by hand"
    )


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("git is not installed, and applies the patches: install it") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{' '.join(command)}: {error.stderr.strip()}") from error
