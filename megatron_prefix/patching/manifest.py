"""What is known of each patch, from `target.toml` and `upstream.toml` (described in patches/README.md)."""

import re
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

TARGET_FILE = "target.toml"
MANIFEST_FILE = "upstream.toml"


class FilePin(NamedTuple):
    """SHA-256 (hex) of a file before and after the patch; before is None for a file that the patch adds."""

    before: str | None
    after: str


@dataclass(frozen=True)
class Target:
    """One framework: where a tree of it says which version it is.

    version_pattern: regular expression searched in version_file; what its groups match, joined by dots, is the version.
    unpatched: versions that need no patch; instead: what their users do.
    """

    name: str
    title: str
    version_file: str
    version_pattern: str
    unpatched: tuple[str, ...] = ()
    instead: str = ""

    def version_of(self, tree: Path) -> str:
        """Raises ValueError when the tree is no folder or says no version."""
        if not tree.is_dir():
            raise ValueError(f"--path {tree} is not a folder: give the root of a {self.title} source tree")
        file = tree / self.version_file
        if not file.is_file():
            raise ValueError(
                f"{tree} has no {self.version_file}: it is not the root of a {self.title} source tree; "
                "give the folder that holds it"
            )
        found = re.search(self.version_pattern, file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found is None:
            raise ValueError(f"{file} does not say a version in the form that {self.title} used so far")
        return ".".join(part for part in found.groups() if part)


@dataclass(frozen=True)
class Patch:
    """One release of one framework, and the patch for it.

    release: its folder's name, the upstream tag or version; versions: what trees of it say in their version file.
    source: what identifies the upstream files, "commit <SHA>" or "sdist sha256 <hash>".
    """

    target: Target
    release: str
    folder: Path
    repository: str
    source: str
    date: date
    versions: tuple[str, ...]
    files: dict[str, FilePin]

    @property
    def diffs(self) -> list[Path]:
        """The patch files in the order in which they apply."""
        return sorted(self.folder.glob("*.patch"))

    def __str__(self) -> str:
        return f"{self.target.name}/{self.release}"


def patches_folder() -> Path:
    """Where the patches lie: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def target_names(root: Path) -> list[str]:
    return sorted(file.parent.name for file in root.glob(f"*/{TARGET_FILE}"))


def read_target(root: Path, name: str) -> Target:
    """Raises ValueError for a target that there is no patch for."""
    if name not in target_names(root):
        raise ValueError(f"no patches for {name!r}: there are some for {', '.join(target_names(root))}")
    return Target(name=name, **_read_toml(root / name / TARGET_FILE))


def all_patches(root: Path, target: str) -> list[Patch]:
    """Every patch for this target, by the name of the release."""
    found = read_target(root, target)
    return [read_patch(found, file.parent) for file in sorted((root / target).glob(f"*/{MANIFEST_FILE}"))]


def read_patch(target: Target, folder: Path) -> Patch:
    values = _read_toml(folder / MANIFEST_FILE)
    return Patch(
        target=target,
        release=folder.name,
        folder=folder,
        repository=values["repository"],
        source=f"commit {values['commit']}" if "commit" in values else f"sdist sha256 {values['sdist_sha256']}",
        date=values["date"],
        versions=tuple(values["versions"]),
        files={name: FilePin(pin.get("before"), pin["after"]) for name, pin in values.get("files", {}).items()},
    )


def find_patch(target: str, tree: Path, *, root: Path | None = None) -> Patch:
    """The patch for the version that the tree says it is. root: `patches_folder()` unless given.

    Raises ValueError when the target or the version is unknown, or the tree is not one of this target.
    """
    root = root or patches_folder()
    known = all_patches(root, target)
    found = read_target(root, target)
    version = found.version_of(tree)
    for patch in known:
        if version in patch.versions:
            return patch
    listed = ", ".join(
        [f"{patch.release} (says {' or '.join(patch.versions)})" for patch in known]
        + [f"{other} (needs none)" for other in found.unpatched]
    )
    raise ValueError(
        f"{tree} is {target} {version}, for which there is no patch. Known: {listed}. "
        "Check out one of them; patches/README.md says how to add a version"
    )


def needs_no_patch(target: str, tree: Path, *, root: Path | None = None) -> str | None:
    """What users of the tree's version do instead, where that version needs no patch; None where it may need one.

    Raises ValueError as `find_patch` does for the target or the tree.
    """
    found = read_target(root or patches_folder(), target)
    version = found.version_of(tree)
    return f"{found.title} {version} needs no patch: {found.instead}" if version in found.unpatched else None


def _read_toml(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return tomllib.load(opened)
