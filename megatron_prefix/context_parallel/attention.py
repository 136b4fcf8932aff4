"""Prefix-grouped attention over context-parallel ranks, for every ``cp_comm_type`` that megatron-core names.

    p2p         each step, the keys that one other rank's queries read go to it directly, while the step before computes
    all_gather  the same keys in one collective, while the rank's own keys are computed
    a2a         heads for rows: every rank computes its heads over the whole pack
    a2a+p2p     heads for rows inside neighbouring ranks, p2p between those groups

All are one algorithm: an exchange of heads for rows over an inner group (of one rank for p2p and all_gather), then a
ring over the outer group (of one rank for a2a). Partial attentions are merged by log-sum-exp in fp32, and backward
sends the keys again rather than keep them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.grouped import fit_kernel
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.prefix_cache import SplitLayer
from megatron_prefix.collectives import Group, Traffic, group_rank, group_size, start_all_to_all
from megatron_prefix.context_parallel.comm_types import Heads, HeadSplit, check_comm_type
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.ring import Ring, RingCalls, ring_attention


@dataclass
class CpShare:
    """One rank's part in a micro-batch under context parallelism.

    Attributes:
        plan: of the pack, over all context-parallel ranks.
        group: those ranks.
        inner, outer: for a2a+p2p, the groups of neighbouring ranks and of their counterparts; None otherwise.
        device: of the tensors.
        traffic: counts bytes where given.
    """

    plan: CpPlan
    group: Group
    device: torch.device
    inner: Group = None
    outer: Group = None
    traffic: Traffic | None = None
    _rings: dict[int, RingCalls] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        """This process among the context-parallel ranks."""
        return group_rank(self.group)

    @cached_property
    def whole_calls(self) -> AttentionCalls:
        """Of a rank that has all rows of the pack, in their order, for some of the heads."""
        return AttentionCalls.build(self.plan.layout, self.device)

    def groups(self, comm_type: str) -> tuple[Group, Group]:
        """(inner group that swaps heads for rows, outer group of the ring); None is a group of one rank.

        Raises:
            ValueError: an unknown cp_comm_type, or a2a+p2p without its two groups.
        """
        check_comm_type(comm_type)
        if comm_type == "a2a":
            return self.group, None
        if comm_type != "a2a+p2p":
            return None, self.group
        if self.inner is None or self.outer is None:
            raise ValueError(
                "cp_comm_type 'a2a+p2p' needs two levels of groups; initialise megatron-core with "
                "hierarchical_context_parallel_sizes=[a2a size, p2p size]"
            )
        return self.inner, self.outer

    def ring(self, inner_size: int) -> RingCalls:
        """The calls of this rank when ``inner_size`` neighbours hold their rows together; built once."""
        if inner_size not in self._rings:
            plan = self.plan.merged(inner_size)
            self._rings[inner_size] = RingCalls.build(plan, self.rank // inner_size, self.device)
        return self._rings[inner_size]

    def inner_rows(self, inner_size: int) -> list[list[int]]:
        """Rows of the pack that each rank of this rank's inner group owns."""
        first = self.rank // inner_size * inner_size
        return [self.plan.rows(rank) for rank in range(first, first + inner_size)]


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    share: CpShare,
    comm_type: str,
    softmax_scale: float,
    kernel: Kernel,
    split: SplitLayer | None = None,
) -> Tensor:
    """Attention of this rank's rows, differentiable.

    Args:
        q: [T_r, Hq, D], this rank's rows in the order of ``share.plan.rows(rank)``; k, v [T_r, Hkv, D].
        share: this rank's part in the micro-batch.
        comm_type: one of `comm_types.COMM_TYPES`.
        softmax_scale: factor of the scores.
        kernel: computes every call.
        split: of a split group: its layer's keys are kept in, or read from, a cache, with the rows and heads that this
            rank computes.

    Returns:
        [T_r, Hq, D]; without rows where ``split`` says that the layer only exports keys.

    Raises:
        ValueError: an unknown comm_type, groups or heads that do not fit it, or tensors that the kernel refuses.
    """
    inner, outer = share.groups(comm_type)
    heads, width = q.shape[1], v.shape[-1]
    q, k, v = fit_kernel(q, k, v, kernel)
    size = group_size(inner)
    swap = None
    if size > 1:
        swap = HeadSwap(share, inner, q.shape[1], k.shape[1])
        q, k, v = swap.to_heads(q, swap.query_heads), swap.to_heads(k, swap.key_heads), swap.to_heads(v, swap.key_heads)
    if split is not None and split.keys_only:
        return split.export_only(k, v, kernel).reshape(0, heads, width)
    if split is not None and not split.reads:
        k, v = split.export(k, v, kernel)
    cached = split.keys() if split is not None and split.reads else None
    ring = Ring(share.ring(size), outer, comm_type == "all_gather", share.traffic)
    out = ring_attention(q, k, v, ring, softmax_scale, kernel, cached)
    return (out if swap is None else swap.to_rows(out))[..., :width]


class HeadSwap:
    """Rows of all heads on each rank of a group <-> some heads of all rows of the group, and back."""

    def __init__(self, share: CpShare, group: Group, query_heads: int, key_heads: int) -> None:
        size = group_size(group)
        split = HeadSplit.build(query_heads, key_heads, size)
        self.query_heads, self.key_heads = split.query_heads, split.key_heads
        self.group, self.rank, self.traffic = group, group_rank(group), share.traffic
        owned = share.inner_rows(size)
        self.counts = [len(rows) for rows in owned]
        together = torch.tensor([row for rows in owned for row in rows], dtype=torch.long)
        self.order = together.argsort().to(share.device)  # rows as they come, rank by rank -> rows of the pack
        self.back = self.order.argsort()

    def to_heads(self, x: Tensor, heads: tuple[Heads, ...]) -> Tensor:
        """[own rows, all heads, D] -> [rows of the group, heads[rank], D]."""
        width = x.shape[2]
        flat = torch.cat([x[:, list(part)].reshape(-1) for part in heads])
        sent = [len(x) * len(part) * width for part in heads]
        received = [count * len(heads[self.rank]) * width for count in self.counts]
        flat = _AllToAll.apply(flat, sent, received, self.group, self.traffic)
        return flat.view(-1, len(heads[self.rank]), width).index_select(0, self.order)

    def to_rows(self, x: Tensor) -> Tensor:
        """[rows of the group, query heads of this rank, D] -> [own rows, all query heads, D]."""
        heads, width = x.shape[1:]
        flat = x.index_select(0, self.back).reshape(-1)
        sent = [count * heads * width for count in self.counts]
        mine = self.counts[self.rank]
        received = [mine * heads * width] * len(self.counts)
        flat = _AllToAll.apply(flat, sent, received, self.group, self.traffic)
        return flat.view(len(self.counts), mine, heads, width).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group, traffic: Traffic | None
    ) -> Tensor:
        ctx.counts, ctx.group, ctx.traffic = (received, sent), group, traffic
        return start_all_to_all(x, sent, received, group, traffic).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.counts
        x = start_all_to_all(grad.contiguous(), sent, received, ctx.group, ctx.traffic).wait()
        return x, None, None, None, None
