"""`megatron-prefix patch`: prefix groups for a framework's source tree, applied or reverted."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_prefix.cli.console import print_json, stderr_console
from megatron_prefix.patching import (
    TreeState,
    apply_patch,
    check_patch,
    find_patch,
    needs_no_patch,
    patches_folder,
    revert_patch,
)
from megatron_prefix.patching.manifest import target_names

TARGETS = ", ".join(target_names(patches_folder()))
FOUND = {
    TreeState.ORIGINAL: "not applied",
    TreeState.PATCHED: "applied",
    TreeState.INTERRUPTED: "half applied by a run that was killed: --apply finishes it, --revert undoes it",
}


@click.command("patch")
@click.option("--target", required=True, metavar="NAME", help=f"The framework: {TARGETS}.")
@click.option("--path", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Root of its source tree.")
@click.option("--check", "action", flag_value="check", default=True, help="Say what would be done; change nothing.")
@click.option("--apply", "action", flag_value="apply", help="Apply the patch: all of it or nothing.")
@click.option("--revert", "action", flag_value="revert", help="Give every file its upstream bytes again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
def patch_command(target: str, path: Path, action: str, as_json: bool) -> None:
    """Let a framework train on prefix groups: apply our patch for the version found in DIR.

    DIR may be a git checkout, an unpacked sdist or site-packages. Files that are not exactly upstream's are refused by
    name. Applying or reverting twice changes nothing. Run it once per tree, not once per rank.

    \b
    megatron-prefix patch --target megatron-lm --path Megatron-LM --check
    megatron-prefix patch --target megatron-lm --path Megatron-LM --apply
    """
    console = stderr_console()
    instead = needs_no_patch(target, path)
    if instead is not None:
        console.print(instead, markup=False, soft_wrap=True)
        if as_json:
            print_json({"target": target, "release": None, "found": "needs no patch", "action": action, "files": []})
        return
    patch = find_patch(target, path)
    if action == "check":
        found = check_patch(patch, path)
        text = FOUND[found] + ("; it applies cleanly" if found is TreeState.ORIGINAL else "")
    elif action == "apply":
        found = apply_patch(patch, path)
        text = "already applied" if found is TreeState.PATCHED else "applied"
    else:
        found = revert_patch(patch, path)
        text = "not applied, nothing to revert" if found is TreeState.ORIGINAL else "reverted"
    console.print(f"{patch}, {patch.date}, against {patch.repository} {patch.source}", markup=False, soft_wrap=True)
    for name in patch.files:
        console.print(f"  {name}", markup=False, soft_wrap=True)
    console.print(text, markup=False, soft_wrap=True)
    if as_json:
        found_state = {"target": target, "release": patch.release, "source": patch.source, "found": found.value}
        print_json(found_state | {"action": action, "files": list(patch.files)})
