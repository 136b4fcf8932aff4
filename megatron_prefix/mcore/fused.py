"""Whose optimizer and norms a run uses, as megatron-core decided when it was imported.

megatron-core takes Transformer Engine's FusedAdam where that is installed, else NVIDIA apex's, else torch's; its local
layers take apex's layer norm where apex is installed. Read from what was built, so that it cannot differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_prefix.apex import find_apex

_OWNERS = {
    "transformer_engine": "Transformer Engine's",
    "apex": "NVIDIA apex's",
    "megatron": "megatron-core's",
    "torch": "torch's",
}


def describe_implementations(optimizer: Any, chunks: Sequence[nn.Module]) -> str:
    """One line for a start banner: the optimizer, the norms, and what is wrong with an installed apex.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
        chunks: the model's stages on this rank.
    """
    optimizers = [each.optimizer for each in getattr(optimizer, "chained_optimizers", [optimizer])]
    norms = [module for chunk in chunks for module in chunk.modules() if "Norm" in type(module).__name__]
    line = f"optimizer: {_names(optimizers)}; norms: {_names(norms)}"
    apex = find_apex()
    return line if apex.kind in ("none", "nvidia") else f"{line}; {apex.note}"


def _names(objects: Sequence[object]) -> str:
    return ", ".join(sorted({_name(type(each)) for each in objects})) or "none on this rank"


def _name(found: type) -> str:
    """The class and whose it is; of a megatron-core class around one of Transformer Engine's, the latter."""
    if found.__name__ == "FusedLayerNorm":  # megatron-core's, which only calls apex
        return "NVIDIA apex's FusedLayerNorm"
    for root, owner in _OWNERS.items():
        for each in found.__mro__:
            if each.__module__.partition(".")[0] == root:
                return f"{owner} {each.__name__}"
    return found.__name__
