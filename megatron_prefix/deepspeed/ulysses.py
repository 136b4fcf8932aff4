"""Context parallelism by DeepSpeed-Ulysses: its `DistributedAttention` around prefix-grouped attention of whole packs.

Each rank gives its rows of all heads and computes some heads over all rows of the pack. Source: DeepSpeed-Ulysses
(arXiv 2309.14509). ``cp_comm_type="a2a"`` is this package's own exchange of the same kind, which pads no rows, swaps
keys and values once for queries of several ranks, and takes split groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad

from megatron_prefix.attention.grouped import layout_attention
from megatron_prefix.collectives import group_size
from megatron_prefix.context_parallel.attention import CpShare
from megatron_prefix.mcore.core_attention import PrefixCoreAttention
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.packed import LayerSettings, PrefixPackedSeqParams


def ulysses_layer_spec(config: TransformerConfig, *, impl: str = "auto", use_te: bool = False) -> ModuleSpec:
    """`prefix_gpt_layer_spec` whose context parallelism is DeepSpeed's. Arguments and errors are those of that."""
    spec = prefix_gpt_layer_spec(config, impl=impl, use_te=use_te)
    spec.submodules.self_attention.submodules.core_attention = partial(UlyssesCoreAttention, impl=impl)
    return spec


class UlyssesCoreAttention(PrefixCoreAttention):
    """Prefix-grouped attention that exchanges heads for rows by DeepSpeed.

    Arguments are those of `PrefixCoreAttention`; the layer's cp_comm_type has no meaning. Calls raise ValueError for a
    split group, and for heads that do not divide by the context-parallel ranks.
    """

    def _attend(self, packed: PrefixPackedSeqParams, q: Tensor, k: Tensor, v: Tensor, layer: LayerSettings) -> Tensor:
        share = packed.share
        if share is None:
            return packed.attend(q, k, v, layer)
        if packed.prefix_cache is not None:
            raise ValueError("Ulysses attention takes no split groups: use cp_comm_type a2a, or larger micro-batches")
        k, v = _repeated(q, k, v, group_size(share.group))
        counts = [len(share.plan.rows(rank)) for rank in range(group_size(share.group))]
        missing = max(counts) - len(q)  # all ranks give as many rows
        whole = _WholePack(share, max(counts), layer)
        rows = [pad(x, (0, 0, 0, 0, 0, missing)).unsqueeze(1) for x in (q, k, v)]
        return DistributedAttention(whole, share.group, scatter_idx=2, gather_idx=0)(*rows, 1)[: len(q), 0]


def _repeated(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Keys and values with at least one head per rank, each for the same queries as before."""
    heads, key_heads = q.shape[1], k.shape[1]
    times = max(1, ranks // key_heads)
    if (key_heads * times) % ranks or heads % (key_heads * times):
        raise ValueError(
            f"Ulysses attention: {heads} query and {key_heads} key heads do not divide over {ranks} context-parallel "
            "ranks; use fewer, or cp_comm_type p2p"
        )
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


class _WholePack(nn.Module):
    """Local attention: [ranks * rows, 1, heads, D] in rank order, padded, each -> the same."""

    def __init__(self, share: CpShare, rows: int, layer: LayerSettings) -> None:
        super().__init__()
        self.share, self.layer = share, layer
        place = torch.empty(share.plan.layout.num_rows, dtype=torch.long)
        for rank in range(group_size(share.group)):
            owned = torch.tensor(share.plan.rows(rank), dtype=torch.long)
            place[owned] = rank * rows + torch.arange(len(owned))
        self.place = place.to(share.device, non_blocking=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        q, k, v = (x.squeeze(1).index_select(0, self.place) for x in (query, key, value))
        out = layout_attention(q, k, v, self.share.whole_calls, self.layer.softmax_scale, self.layer.impl)
        return out.new_zeros(len(query), *out.shape[1:]).index_copy(0, self.place, out).unsqueeze(1)
