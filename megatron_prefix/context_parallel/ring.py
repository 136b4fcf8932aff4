"""The ring of context parallelism: keys go to the ranks that read them, step by step, and their gradients come back.

Partial attentions are merged by log-sum-exp in fp32. Backward sends the keys again rather than keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.calls import AttentionCalls, Rows, VarlenCall
from megatron_prefix.attention.grouped import CachedKeys, as_read
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.merge import merge_into
from megatron_prefix.collectives import Group, Pending, Traffic, group_size, start_all_to_all, start_exchange
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
