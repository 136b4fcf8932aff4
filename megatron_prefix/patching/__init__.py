"""Patches for the frameworks that people run: which one fits a source tree, and applying and reverting it.

    patch = find_patch("megatron-lm", tree)
    apply_patch(patch, tree)  # or revert_patch(patch, tree), inspect_tree(patch, tree)

The patches lie in `patches/<target>/<release>/` of the checkout, in `megatron_prefix/patches/` when installed.
"""

from megatron_prefix.patching.manifest import Patch, all_patches, find_patch, needs_no_patch, patches_folder
from megatron_prefix.patching.tree import TreeState, apply_patch, check_patch, inspect_tree, revert_patch

__all__ = [
    "Patch",
    "TreeState",
    "all_patches",
    "apply_patch",
    "check_patch",
    "find_patch",
    "inspect_tree",
    "needs_no_patch",
    "patches_folder",
    "revert_patch",
]
