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

from megatron_prefix.attention.calls import AttentionCalls, Rows, VarlenCall
from megatron_prefix.attention.grouped import CachedKeys, as_read, fit_kernel
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.merge import merge_into
from megatron_prefix.attention.prefix_cache import SplitLayer
from megatron_prefix.collectives import (
    Group,
    Pending,
    Traffic,
    group_rank,
    group_size,
    start_all_to_all,
    start_exchange,
)
from megatron_prefix.context_parallel.comm_types import Heads, HeadSplit, check_comm_type
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.layout import PartLayout


@dataclass(frozen=True)
class RingStep:
    """One step of a rank: rows for ``dst`` leave, the rows of ``src`` that this rank reads come, calls on them."""

    dst: int
    src: int
    sent: Rows | None
    num_received: int
    calls: tuple[VarlenCall, ...]


@dataclass(frozen=True)
class RingCalls:
    """Kernel calls of one rank: those on its own rows (and its cached keys), and those of every step.

    ``key_order`` is int64 [key rows]: see `CpPlan.key_order`; None where the rank's keys are those of its own rows.
    """

    own: AttentionCalls
    steps: tuple[RingStep, ...]
    key_order: Tensor | None = None

    @classmethod
    def build(cls, plan: CpPlan, rank: int, device: torch.device) -> RingCalls:
        """The calls of ``rank`` with their index tensors on ``device``."""
        steps = []
        for i in range(1, plan.cp_size):
            dst, src = (rank + i) % plan.cp_size, (rank - i) % plan.cp_size
            sent, read = plan.remote(dst, rank), plan.remote(rank, src)
            calls = tuple(
                VarlenCall(
                    q=Rows.build([(r.q_start, r.q_end) for r in call], device),
                    kv=Rows.build([(r.k_start, r.k_end) for r in call], device),
                    causal=False,
                )
                for call in read.calls
            )
            steps.append(RingStep(dst, src, Rows.build(sent.rows, device) if sent.rows else None, read.num_rows, calls))
        own = AttentionCalls.build(plan.local_layouts[rank], device)
        order = (
            torch.tensor(plan.key_order(rank), dtype=torch.long).to(device)
            if isinstance(own.layout, PartLayout)
            else None
        )
        return cls(own, tuple(steps), order)

    def all_keys(self, own: Tensor, cached: Tensor | None) -> Tensor:
        """The rank's key rows in tree order: its own, and those in its cache."""
        return own if self.key_order is None or cached is None else torch.cat([cached, own])[self.key_order]

    def add_all(self, grad: Tensor, own: Tensor, cached: Tensor | None) -> None:
        """Add gradients of `all_keys` to those of its own rows and of those in its cache, in place."""
        if self.key_order is None or cached is None:
            own += grad
            return
        together = torch.empty_like(grad)
        together[self.key_order] = grad
        cached += together[: len(cached)]
        own += together[len(cached) :]


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


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    softmax_scale: float,
    kernel: Kernel,
    cached: CachedKeys | None = None,
) -> Tensor:
    """Attention of one rank's rows to its own keys and to those that ``ring`` brings, differentiable.

    Args:
        q, k, v: this rank's rows, as `fit_kernel` makes them.
        cached: keys that ``ring.calls.own.cached`` reads; their gradients are added to it, not returned.

    Returns:
        [T_r, Hq, Dv] of the v given.
    """
    return _RingAttention.apply(q.contiguous(), k, v, ring, softmax_scale, kernel, cached)


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


class Ring:
    """Moves keys to the ranks that read them, and their gradients back."""

    def __init__(self, calls: RingCalls, group: Group, at_once: bool, traffic: Traffic | None) -> None:
        self.calls, self.group, self.at_once, self.traffic = calls, group, at_once, traffic

    def keys(self, k: Tensor, v: Tensor) -> KeysInFlight:
        """Start sending; steps are then waited for in order."""
        return KeysInFlight(self, torch.cat([k, v], dim=-1))

    def gradients(self, dk: Tensor, dv: Tensor) -> GradientsInFlight:
        """Collects gradients of received keys and adds those of sent keys to dk and dv."""
        return GradientsInFlight(self, dk, dv)

    def all_to_all(self, by_rank: dict[int, Tensor], counts: dict[int, int], like: Tensor) -> dict[int, Pending]:
        """One collective of buffers [n, H, W]; by source rank, views of what came (all wait for the one work)."""
        ranks = range(group_size(self.group))
        width = like.shape[1] * like.shape[2]
        parts = [by_rank[r].reshape(-1) if r in by_rank else like.new_empty(0) for r in ranks]
        received = [counts.get(r, 0) * width for r in ranks]
        pending = start_all_to_all(
            torch.cat(parts), [part.numel() for part in parts], received, self.group, self.traffic
        )
        views = pending.received.split(received)
        return {
            r: Pending(views[r].view(-1, *like.shape[1:]), pending.sent, pending.works, pending.traffic)
            for r in ranks
            if r in counts
        }


class KeysInFlight:
    """Keys and values [n, Hkv, D + Dv] of each step; with p2p the next step's are on their way while one is used."""

    def __init__(self, ring: Ring, kv: Tensor) -> None:
        self.ring, self.kv = ring, kv
        steps = ring.calls.steps
        self.pending: dict[int, Pending] = {}
        if ring.at_once and steps:
            by_rank = {step.dst: step.sent.take(kv) for step in steps if step.sent}
            self.pending = ring.all_to_all(by_rank, {step.src: step.num_received for step in steps}, kv)
        else:
            self._start(0)

    def _start(self, i: int) -> None:
        steps = self.ring.calls.steps
        if i < len(steps):
            step = steps[i]
            sent = step.sent.take(self.kv).contiguous() if step.sent else self.kv.new_empty(0, *self.kv.shape[1:])
            shape = (step.num_received, *self.kv.shape[1:])
            self.pending[step.src] = start_exchange(sent, step.dst, shape, step.src, self.ring.group, self.ring.traffic)

    def wait(self, i: int, width: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Keys [n, Hkv, width] and values of step ``i``, as ``kernel`` reads them."""
        kv = self.pending.pop(self.ring.calls.steps[i].src).wait()
        if not self.ring.at_once:
            self._start(i + 1)
        return as_read(kv[..., :width], kernel), as_read(kv[..., width:], kernel)


class GradientsInFlight:
    """Gradients of received keys go back to their owner; those of keys that this rank sent are added to dk and dv."""

    def __init__(self, ring: Ring, dk: Tensor, dv: Tensor) -> None:
        self.ring, self.dk, self.dv = ring, dk, dv
        self.pending: list[tuple[RingStep, Pending]] = []
        self.held: dict[int, Tensor] = {}

    def send(self, step: RingStep, dkv: Tensor) -> None:
        """Start the way back of dkv [n, Hkv, D + Dv]; what the step before sent has come by now, and is added."""
        if self.ring.at_once:
            self.held[step.src] = dkv
            return
        count = step.sent.num_rows if step.sent else 0
        pending = start_exchange(dkv, step.src, (count, *dkv.shape[1:]), step.dst, self.ring.group, self.ring.traffic)
        self._add_pending()
        self.pending.append((step, pending))

    def finish(self, like: Tensor) -> None:
        """Wait for all that is on its way; ``like`` [n, Hkv, D + Dv] gives shape and dtype."""
        steps = self.ring.calls.steps
        if self.ring.at_once and steps:
            counts = {step.dst: step.sent.num_rows if step.sent else 0 for step in steps}
            came = self.ring.all_to_all(self.held, counts, like)
            self.pending = [(step, came[step.dst]) for step in steps]
        self._add_pending()

    def _add_pending(self) -> None:
        for step, pending in self.pending:
            dkv = pending.wait()
            if step.sent:
                step.sent.add(self.dk, dkv[..., : self.dk.shape[-1]])
                step.sent.add(self.dv, dkv[..., self.dk.shape[-1] :])
        self.pending = []


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring: Ring,
        softmax_scale: float,
        kernel: Kernel,
        cached: CachedKeys | None,
    ) -> Tensor:
        calls = ring.calls
        keys = _start(ring, k, v, cached)
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=_sum_dtype(q))
        if q.shape[0]:
            out, lse = kernel.forward(q, k, v, calls.own.own, softmax_scale)
        for call in calls.own.ancestors:
            merge_into(out, lse, call.q, kernel.forward(q, k, v, call, softmax_scale))
        if cached is not None:
            for call in calls.own.cached:
                merge_into(out, lse, call.q, kernel.forward(q, cached.k, cached.v, call, softmax_scale))
        for i, step in enumerate(calls.steps):
            step_k, step_v = keys.wait(i, k.shape[-1], kernel)
            for call in step.calls:
                merge_into(out, lse, call.q, kernel.forward(q, step_k, step_v, call, softmax_scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.softmax_scale, ctx.kernel, ctx.cached = ring, softmax_scale, kernel, cached
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        calls, cached = ctx.ring.calls, ctx.cached
        dout = dout.contiguous()
        keys = _start(ctx.ring, k, v, cached)
        dq, dk, dv = (torch.zeros_like(x, dtype=_sum_dtype(q)) for x in (q, k, v))
        own = (calls.own.own, *calls.own.ancestors) if q.shape[0] else ()
        for call in own:
            ctx.kernel.backward((dq, dk, dv), dout, (q, k, v), out, lse, call, ctx.softmax_scale)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        all_dk, all_dv = dk, dv
        if cached is not None:
            sums = cached.gradients()
            for call in calls.own.cached:
                grads, qkv = (dq, *sums), (q, cached.k, cached.v)
                ctx.kernel.backward(grads, dout, qkv, out, lse, call, ctx.softmax_scale)
            # Keys that this rank sent lie in its own rows and in its cache.
            all_dk, all_dv = (torch.zeros_like(calls.all_keys(x, y)) for x, y in zip((dk, dv), sums, strict=True))
        back = ctx.ring.gradients(all_dk, all_dv)
        for i, step in enumerate(calls.steps):
            step_k, step_v = keys.wait(i, k.shape[-1], ctx.kernel)
            step_dk, step_dv = (torch.zeros_like(x, dtype=_sum_dtype(q)) for x in (step_k, step_v))
            for call in step.calls:
                grads, qkv = (dq, step_dk, step_dv), (q, step_k, step_v)
                ctx.kernel.backward(grads, dout, qkv, out, lse, call, ctx.softmax_scale)
            back.send(step, torch.cat([step_dk, step_dv], dim=-1).to(k.dtype))
        back.finish(torch.cat([k[:0], v[:0]], dim=-1))
        if cached is not None:
            calls.add_all(all_dk, dk, sums[0])
            calls.add_all(all_dv, dv, sums[1])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _start(ring: Ring, k: Tensor, v: Tensor, cached: CachedKeys | None) -> KeysInFlight:
    """Start sending the rank's keys, those in its cache included."""
    if cached is None:
        return ring.keys(k, v)
    return ring.keys(ring.calls.all_keys(k, cached.k), ring.calls.all_keys(v, cached.v))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
