"""Train on prefix groups with every shared prefix encoded once: a plug-in for megatron-core.

Names are imported when they are first asked for: planning needs only the standard library, attention and the loss need
torch, and layer specs, `PrefixPackedSeqParams` and `response_log_probs` need megatron-core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_prefix.version import __version__

if TYPE_CHECKING:
    from megatron_prefix.attention import prefix_grouped_attention
    from megatron_prefix.balancing import StepPlanner
    from megatron_prefix.cost_model import CostModel
    from megatron_prefix.layout import PrefixLayout
    from megatron_prefix.loss import BatchTotals, LossConfig, RolloutPairs, grpo_loss
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec, with_prefix_attention
    from megatron_prefix.mcore.log_probs import response_log_probs
    from megatron_prefix.mcore.packed import PrefixPackedSeqParams
    from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
    from megatron_prefix.mcore.tokens import groups_on_this_rank
    from megatron_prefix.packing import Pack, pack_groups
    from megatron_prefix.prefix_trie import share_prefixes
    from megatron_prefix.rollout_group import TokenCount
    from megatron_prefix.rollout_tree import RolloutTree, TreeNode
    from megatron_prefix.rollouts import RolloutGroup, read_rollouts, write_rollouts
    from megatron_prefix.sampler import PrefixGroupSampler
    from megatron_prefix.splitting import pack_and_split
    from megatron_prefix.streaming import RolloutStream
    from megatron_prefix.trajectory import Trajectory

_MODULES = {
    "BatchTotals": "loss",
    "CostModel": "cost_model",
    "LossConfig": "loss",
    "Pack": "packing",
    "PrefixGroupSampler": "sampler",
    "PrefixLayout": "layout",
    "PrefixPackedSeqParams": "mcore.packed",
    "RolloutGroup": "rollouts",
    "RolloutPairs": "loss",
    "RolloutStream": "streaming",
    "RolloutTree": "rollout_tree",
    "StepPlanner": "balancing",
    "TokenCount": "rollout_group",
    "Trajectory": "trajectory",
    "TreeNode": "rollout_tree",
    "forward_backward_prefix_groups": "mcore.schedule",
    "groups_on_this_rank": "mcore.tokens",
    "grpo_loss": "loss",
    "pack_and_split": "splitting",
    "pack_groups": "packing",
    "pack_sequences": "sequence_packs",
    "plan_micro_batches": "sequence_packs",
    "prefix_gpt_layer_spec": "mcore.layer_specs",
    "prefix_grouped_attention": "attention",
    "read_rollouts": "rollouts",
    "response_log_probs": "mcore.log_probs",
    "share_prefixes": "prefix_trie",
    "with_prefix_attention": "mcore.layer_specs",
    "write_rollouts": "rollouts",
}

__all__ = [
    "BatchTotals",
    "CostModel",
    "LossConfig",
    "Pack",
    "PrefixGroupSampler",
    "PrefixLayout",
    "PrefixPackedSeqParams",
    "RolloutGroup",
    "RolloutPairs",
    "RolloutStream",
    "RolloutTree",
    "StepPlanner",
    "TokenCount",
    "Trajectory",
    "TreeNode",
    "__version__",
    "forward_backward_prefix_groups",
    "groups_on_this_rank",
    "grpo_loss",
    "pack_and_split",
    "pack_groups",
    "pack_sequences",
    "plan_micro_batches",
    "prefix_gpt_layer_spec",
    "prefix_grouped_attention",
    "read_rollouts",
    "response_log_probs",
    "share_prefixes",
    "with_prefix_attention",
    "write_rollouts",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
