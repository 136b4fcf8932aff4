"""Made-up frameworks with a patch each, for tests of `megatron_prefix.patching`."""

import subprocess
from pathlib import Path

from tests.pin_patch import pin

TARGET = """title = "Frame"
version_file = "version.txt"
version_pattern = '^(\\S+)'
"""
MANIFEST = """repository = "https://example.org/frame"
commit = "0123456789abcdef0123456789abcdef01234567"
date = 2026-11-28
versions = ["1.2"]
"""
Tree = dict[str, bytes]


def write_tree(folder: Path, files: Tree) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_tree(folder: Path) -> Tree:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def make_patch(folder: Path, before: Tree, after: Tree) -> tuple[Path, Path]:
    """(patches folder, pristine tree) of a framework "frame", release v1.2, whose patch makes `after` of `before`."""
    before = before | {"version.txt": b"1.2\n"}
    release = folder / "patches" / "frame" / "v1.2"
    release.mkdir(parents=True)
    (release.parent / "target.toml").write_text(TARGET)
    (release / "upstream.toml").write_text(MANIFEST)
    (release / "1.patch").write_text("Why: a header that git skips.\n\n")
    repository = write_tree(folder / "repository", before)
    _git(repository, "init", "--quiet")
    _git(repository, "add", "-A")
    write_tree(repository, after)
    _git(repository, "add", "--intent-to-add", "-A")
    with (release / "1.patch").open("ab") as patch:
        patch.write(_git(repository, "diff", "-U1", "--no-renames"))
    tree = write_tree(folder / "tree", before)
    pin(release, "frame", tree)
    return folder / "patches", tree


def _git(folder: Path, *words: str) -> bytes:
    command = ["git", "-c", "core.autocrlf=false", "-c", "core.safecrlf=false", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
