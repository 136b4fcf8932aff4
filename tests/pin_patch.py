"""Fill in the hashes of a patch's manifest, from a pristine upstream tree (for maintainers, see patches/README.md).

python -m tests.pin_patch TARGET RELEASE TREE
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_prefix.patching.manifest import MANIFEST_FILE, patches_folder, read_patch, read_target
from megatron_prefix.patching.tree import run_diffs, sha256


def pin(folder: Path, target: str, tree: Path) -> None:
    """Rewrite the [files] tables of the manifest in `folder` to what its patch files make of `tree`."""
    patch = read_patch(read_target(folder.parents[1], target), folder)
    names = sorted({name for diff in patch.diffs for name in touched(diff)})
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            Path(scratch, name).parent.mkdir(parents=True, exist_ok=True)
            if (tree / name).exists():
                shutil.copy(tree / name, Path(scratch, name))
        run_diffs(patch, Path(scratch), names)
        for name in names:
            before = [f'before = "{sha256(tree / name)}"'] if (tree / name).exists() else []
            lines += ["", f'[files."{name}"]', *before, f'after = "{sha256(Path(scratch, name))}"']
    manifest = folder / MANIFEST_FILE
    head = manifest.read_text(encoding="utf-8").partition("\n[files.")[0].rstrip("\n")
    manifest.write_text("\n".join([head, *lines, ""]), encoding="utf-8")


def touched(diff: Path) -> list[str]:
    """The files that a patch file changes, as git reads it."""
    shown = subprocess.run(["git", "apply", "--numstat", str(diff)], check=True, capture_output=True, text=True)
    return [re.split(r"\t", line, maxsplit=2)[2] for line in shown.stdout.splitlines()]


if __name__ == "__main__":
    name, release, upstream = sys.argv[1:]
    pin(patches_folder() / name / release, name, Path(upstream))
