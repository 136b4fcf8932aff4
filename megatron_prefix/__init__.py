"""Train on prefix groups with every shared prefix encoded once: a plug-in for megatron-core.

Planning and attention need only torch. `prefix_gpt_layer_spec` and `response_log_probs` import megatron-core when they
are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_prefix.attention import prefix_grouped_attention
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.loss import BatchTotals, LossConfig, grpo_loss
from megatron_prefix.packing import Pack, RolloutTree, TreeNode, pack_groups
from megatron_prefix.rollouts import RolloutGroup, read_rollouts, write_rollouts

if TYPE_CHECKING:
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec, with_prefix_attention
    from megatron_prefix.mcore.log_probs import response_log_probs
    from megatron_prefix.mcore.packed import PrefixPackedSeqParams

_FROM_MEGATRON = {
    "PrefixPackedSeqParams": "megatron_prefix.mcore.packed",
    "prefix_gpt_layer_spec": "megatron_prefix.mcore.layer_specs",
    "response_log_probs": "megatron_prefix.mcore.log_probs",
    "with_prefix_attention": "megatron_prefix.mcore.layer_specs",
}

__all__ = [
    "BatchTotals",
    "LossConfig",
    "Pack",
    "PrefixLayout",
    "PrefixPackedSeqParams",
    "RolloutGroup",
    "RolloutTree",
    "TreeNode",
    "grpo_loss",
    "pack_groups",
    "prefix_gpt_layer_spec",
    "prefix_grouped_attention",
    "read_rollouts",
    "response_log_probs",
    "with_prefix_attention",
    "write_rollouts",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_MEGATRON:
        return getattr(import_module(_FROM_MEGATRON[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
