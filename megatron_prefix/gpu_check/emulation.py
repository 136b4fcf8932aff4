"""Context parallelism and split groups in one process, with the kernel calls of the real ones.

Ranks are computed one after another: their keys are handed over instead of sent, and the gradients that they would send
back are added where they belong. What runs on a rank is `ring_attention`, as over real ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention import grouped_attention
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.grouped import fit_kernel
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.prefix_cache import PrefixCache
from megatron_prefix.collectives import Pending
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.ring import (
    GradientsInFlight,
    KeysInFlight,
    Ring,
    RingCalls,
    RingStep,
    ring_attention,
)
from megatron_prefix.gpu_check.cases import Inputs
from megatron_prefix.gpu_check.oracle import NAMES, Results
from megatron_prefix.layout import PartLayout, PrefixLayout


@dataclass(frozen=True)
class _Ranks:
    """All ranks of a plan.

    Attributes:
        calls: of each rank.
        kv: keys and values of each rank's rows, [T_r, Hkv, D + Dv].
        sums: gradients of them that other ranks computed, of the same shapes, fp32 or better.
    """

    calls: Sequence[RingCalls]
    kv: Sequence[Tensor]
    sums: Sequence[Tensor]


class _LocalRing(Ring):
    """The ring as one of the ranks sees it: all keys are there at once."""

    def __init__(self, ranks: _Ranks, rank: int) -> None:
        super().__init__(ranks.calls[rank], None, at_once=True, traffic=None)
        self.ranks, self.rank = ranks, rank

    def keys(self, k: Tensor, v: Tensor) -> KeysInFlight:
        return _LocalKeys(self)

    def gradients(self, dk: Tensor, dv: Tensor) -> GradientsInFlight:
        return _LocalGradients(self)

    def sent_by(self, source: int) -> RingStep:
        """The step in which ``source`` sends to this rank."""
        return next(step for step in self.ranks.calls[source].steps if step.dst == self.rank)


class _LocalKeys(KeysInFlight):
    def __init__(self, ring: _LocalRing) -> None:
        self.ring, self.pending = ring, {}
        for step in ring.calls.steps:
            kv, sent = ring.ranks.kv[step.src], ring.sent_by(step.src).sent
            kv = sent.take(kv).contiguous() if sent else kv[:0]
            self.pending[step.src] = Pending(kv, kv, [])


class _LocalGradients(GradientsInFlight):
    def __init__(self, ring: _LocalRing) -> None:
        self.local = ring

    def send(self, step: RingStep, dkv: Tensor) -> None:
        sent = self.local.sent_by(step.src).sent
        if sent:
            sent.add(self.local.ranks.sums[step.src], dkv)

    def finish(self, like: Tensor) -> None:
        pass


def over_ranks(inputs: Inputs, plan: CpPlan, kernel: Kernel) -> Results:
    """Output and gradients of the whole pack, computed rank by rank."""
    device = inputs.q.device
    rows = [torch.tensor(plan.rows(rank), dtype=torch.long, device=device) for rank in range(plan.cp_size)]
    q, k, v = (x.detach() for x in inputs[:3])
    own = [fit_kernel(q[index], k[index], v[index], kernel) for index in rows]
    kv = [torch.cat([k, v], dim=-1) for _, k, v in own]
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in kv]
    ranks = _Ranks([RingCalls.build(plan, rank, device) for rank in range(plan.cp_size)], kv, sums)
    whole = [torch.empty_like(x) for x in (inputs.dout, *inputs[:3])]
    for rank, tensors in enumerate(own):
        q, k, v = (x.requires_grad_() for x in tensors)
        out = ring_attention(q, k, v, _LocalRing(ranks, rank), inputs.scale, kernel)[..., : inputs.v.shape[-1]]
        grads = torch.autograd.grad(out, (q, k, v), inputs.dout[rows[rank]])
        for total, part in zip(whole, (out.detach(), *grads), strict=True):
            total[rows[rank]] = part[..., : total.shape[-1]]
    width = own[0][1].shape[-1]
    for index, total in zip(rows, sums, strict=True):
        # What other ranks computed for this one's keys, without the columns that padded the head dims.
        for x, part in ((whole[2], total[..., :width]), (whole[3], total[..., width:])):
            x[index] = (x[index] + part[..., : x.shape[-1]]).to(x.dtype)
    return dict(zip(NAMES, whole, strict=True))


SPLIT_LAYOUT = PrefixLayout([200, 60, 70, 1, 129], [-1, 0, 1, 1, 0])
"""A prefix and a turn below it, two responses to the turn and one to the prefix."""


def in_parts(inputs: Inputs, layout: PrefixLayout, kernel: Kernel) -> Results:
    """Output and gradients of a tree like `SPLIT_LAYOUT`: two segments in a cache, the others in two parts."""
    starts = layout.starts
    first, turn, *_ = layout.lengths
    device, cached = inputs.q.device, starts[2]
    parts = {
        (starts[2], starts[4]): PartLayout(
            [0, 0, *layout.lengths[2:4]], [-1, 0, 1, 1], [first, turn, 0, 0], [0, first, 0, 0]
        ),
        (starts[4], starts[5]): PartLayout([0, layout.lengths[4]], [-1, 0], [first, 0], [0, 0]),
    }
    cache = PrefixCache(cached)

    def leaves(start: int, end: int) -> list[Tensor]:
        return [x.detach()[start:end].requires_grad_() for x in inputs[:3]]

    def attend(q: Tensor, k: Tensor, v: Tensor, of: PrefixLayout) -> Tensor:
        calls = AttentionCalls.build(of, device)
        keys = cache.keys(1) if isinstance(of, PartLayout) else None
        return grouped_attention(q, k, v, calls, inputs.scale, kernel, keys)

    prefix = leaves(0, cached)
    prefix_out = attend(prefix[0], *cache.export(1, prefix[1], prefix[2], kernel), PrefixLayout([first, turn], [-1, 0]))
    found = []
    for (start, end), part in parts.items():
        tensors = leaves(start, end)
        out = attend(tensors[0], tensors[1], tensors[2], part)
        found.append((out.detach(), *torch.autograd.grad(out, tensors, inputs.dout[start:end])))
    found.insert(0, (prefix_out.detach(), *torch.autograd.grad(prefix_out, prefix, inputs.dout[:cached])))
    return {name: torch.cat(rows) for name, rows in zip(NAMES, zip(*found, strict=True), strict=True)}
