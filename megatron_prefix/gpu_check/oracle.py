"""Dense attention in fp64, and how far from it an implementation may be.

In fp32 and fp64 the limit is a number. In half precision it is what a dense path of that dtype costs itself, twice:
plain torch math with scores and weights in that dtype and the softmax in fp32, as megatron-core's own core attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_prefix.attention import dense_mask, reference_attention
from megatron_prefix.bench.report import HALF_PRECISION_FACTOR, TOLERANCE, relative_difference
from megatron_prefix.gpu_check.cases import Inputs
from megatron_prefix.layout import PrefixLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = dict[str, Tensor]
NAMES = ("out", "dq", "dk", "dv")


def forward_backward(attend: Attend, inputs: Inputs) -> Results:
    """Output and gradients of an attention q, k, v -> out."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), inputs.dout)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


@dataclass(frozen=True)
class Oracle:
    """The exact results of one case, and the limits of relative differences from them, by tensor."""

    exact: Results
    limits: dict[str, float]

    @classmethod
    def build(cls, layout: PrefixLayout, inputs: Inputs) -> Oracle:
        """By `reference_attention` in fp64, whatever the dtype of the inputs."""
        dense = partial(reference_attention, layout=layout, softmax_scale=inputs.scale)
        exact = forward_backward(dense, inputs.exact())
        dtype = inputs.q.dtype
        if dtype in TOLERANCE:
            return cls(exact, dict.fromkeys(exact, TOLERANCE[dtype]))
        own = forward_backward(partial(dense_attention, layout=layout, softmax_scale=inputs.scale), inputs)
        limits = {name: HALF_PRECISION_FACTOR * relative_difference(own[name], exact[name]) for name in exact}
        return cls(exact, limits)

    def judge(self, results: Results) -> dict[str, float]:
        """By tensor, the relative difference over its limit: at most 1 is right, NaN is not.

        Raises:
            ValueError: a result of another shape than the exact one.
        """
        found = {}
        for name, value in self.exact.items():
            if results[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(results[name].shape)}, expected {tuple(value.shape)}")
            difference, limit = relative_difference(results[name], value), self.limits[name]
            found[name] = difference / limit if limit else (math.inf if difference else 0.0)
        return found


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, softmax_scale: float) -> Tensor:
    """Plain torch math in the dtype of q: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv]."""
    repeat = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) * softmax_scale) @ key.transpose(1, 2)
    scores = scores.masked_fill(~dense_mask(layout, q.device), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ value).transpose(0, 1)


def repeated_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, softmax_scale: float) -> Tensor:
    """torch's causal attention over every root-to-leaf sequence: an oracle that knows nothing of masks."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for leaf in layout.leaves:
        spans = [torch.arange(layout.starts[s], layout.starts[s + 1]) for s in layout.branch(leaf)]
        rows = torch.cat(spans).to(q.device)
        query, key, value = (x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        found = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        # A row of several sequences has one output, but a share of its gradient in each: only the last one's counts.
        out = out.index_copy(0, rows, found.squeeze(0).transpose(0, 1))
    return out
