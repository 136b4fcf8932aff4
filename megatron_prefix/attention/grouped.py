"""Prefix-grouped attention as one autograd function: self + ancestors, merged by log-sum-exp.

Forward: a causal varlen call over all segments, then one unmasked call per tree level (the descendants of each segment
against that segment's keys), merged in fp32. Backward: the same calls with the merged output and log-sum-exp, so that
each call's probabilities are those of the whole row, and dK/dV of a prefix are summed over its subtree by the kernel.
Flat prefix groups need two calls and no copy of any key; the area computed is exactly the area of the mask.
Sources: Prefix Grouper (arXiv 2506.05433) for the split, FlashAttention for the merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.kernels import KERNELS, WHOLE_LAYOUT, Kernel, resolve_impl
from megatron_prefix.attention.merge import merge_into
from megatron_prefix.layout import PrefixLayout


def prefix_grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention over a pack of prefix groups, differentiable in q, k and v.

    Args:
        q: [T, Hq, D], T = ``layout.num_rows``.
        k: [T, Hkv, D]; Hkv divides Hq (grouped-query heads are not expanded).
        v: [T, Hkv, Dv]; Dv may differ from D.
        layout: the segments of the pack.
        softmax_scale: factor of the scores, above 0; 1 / sqrt(D) when None.
        impl: "auto" (by device), "sdpa" (CPU), "te" (Transformer Engine), "flash" (torch's own), "flash2", "flash3" or
            "flash4" (with their packages), "flex" (CUDA; forward on the CPU), or "reference" (dense, any device).

    Returns:
        [T, Hq, Dv] in the dtype of q.

    Raises:
        ValueError: an unknown impl, shapes or dtypes that do not fit, or tensors that the impl cannot take.
    """
    check_tensors(q, k, v, layout.num_rows)
    scale = resolve_scale(softmax_scale, q.shape[-1])
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1], v.shape[-1])
    return layout_attention(q, k, v, AttentionCalls.build(layout, q.device), scale, name)


def layout_attention(q: Tensor, k: Tensor, v: Tensor, calls: AttentionCalls, softmax_scale: float, impl: str) -> Tensor:
    """`prefix_grouped_attention` by the resolved ``impl`` with the calls of a micro-batch already built.

    Raises:
        ValueError: tensors that the impl cannot take.
    """
    if impl not in WHOLE_LAYOUT:
        return grouped_attention(q, k, v, calls, softmax_scale, KERNELS[impl])
    assert not calls.cached, "a part without its cache"
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    refusal = WHOLE_LAYOUT[impl].refusal(q.device, q.dtype, q.shape[-1], v.shape[-1], backward)
    if refusal:
        raise ValueError(refusal)
    return WHOLE_LAYOUT[impl].attend(q, k, v, calls, softmax_scale)


@dataclass
class CachedKeys:
    """Keys and values of rows that another micro-batch computed, and the sums of their gradients.

    Attributes:
        k, v: [C, Hkv, D] as `fit_kernel` makes them, without a graph.
        sum_dtype: of the sums of their gradients.
        sums: dk and dv, of the shape of k and v: every backward that reads the keys adds its share in place. None
            before the first one.
    """

    k: Tensor
    v: Tensor
    sum_dtype: torch.dtype
    sums: tuple[Tensor, Tensor] | None = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The sums of gradients, 0 at first."""
        if self.sums is None:
            dtype = self.sum_dtype
            self.sums = (torch.zeros_like(self.k, dtype=dtype), torch.zeros_like(self.v, dtype=dtype))
        return self.sums


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: AttentionCalls,
    softmax_scale: float,
    kernel: Kernel,
    cached: CachedKeys | None = None,
) -> Tensor:
    """`layout_attention` by a kernel. Shapes must have been checked.

    Args:
        cached: keys that ``calls.cached`` reads; their gradients are added to it, not returned.

    Raises:
        ValueError: tensors that the kernel cannot take.
    """
    assert cached is not None or not calls.cached, "a part without its cache"
    width_v = v.shape[-1]
    q, k, v = fit_kernel(q, k, v, kernel)
    if q.shape[0] == 0:
        return q.new_zeros(0, q.shape[1], width_v) + (q.sum() + k.sum() + v.sum())  # no rows, yet part of the graph
    out = _GroupedAttention.apply(q, k, v, calls, softmax_scale, kernel, cached)
    return out[..., :width_v]


def fit_kernel(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as ``kernel`` takes them: one head dim where it needs that (v's output has padding columns then).

    Raises:
        ValueError: tensors that the kernel cannot take.
    """
    width, width_v = q.shape[-1], v.shape[-1]
    refusal = kernel.refusal(q.device, q.dtype, width, width_v)
    if refusal:
        raise ValueError(refusal)
    if width != width_v and not kernel.mixed_head_dims:
        # Zero columns change no score and no output column that is kept.
        wide = max(width, width_v)
        q, k, v = pad(q, (0, wide - width)), pad(k, (0, wide - width)), pad(v, (0, wide - width_v))
    return as_read(q, kernel), as_read(k, kernel), as_read(v, kernel)


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The factor of the scores: the given one, or 1 / sqrt(head_dim).

    Raises:
        ValueError: a factor that is not above 0: kernels mask scores before they scale them.
    """
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale must be a finite number above 0, got {softmax_scale}")
    return scale


def as_read(x: Tensor, kernel: Kernel) -> Tensor:
    """``x`` as ``kernel`` reads it: contiguous, or with free strides between heads and rows."""
    return x if x.stride(-1) == 1 and not kernel.contiguous else x.contiguous()


def check_tensors(q: Tensor, k: Tensor, v: Tensor, num_rows: int) -> None:
    """Refuse q, k, v whose shapes, dtypes or devices do not fit together or the layout."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be [T, heads, head_dim], got shape {tuple(x.shape)}")
        if x.shape[0] != num_rows:
            raise ValueError(f"{name} has {x.shape[0]} rows, the layout has {num_rows}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; they must match")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the key-value heads must be equal for k and v and divide the query heads, got "
            f"q {q.shape[1]}, k {k.shape[1]}, v {v.shape[1]}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have one head dim, got {q.shape[2]} and {k.shape[2]}")


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        calls: AttentionCalls,
        softmax_scale: float,
        kernel: Kernel,
        cached: CachedKeys | None,
    ) -> Tensor:
        out, lse = kernel.forward(q, k, v, calls.own, softmax_scale)
        for call in calls.ancestors:
            merge_into(out, lse, call.q, kernel.forward(q, k, v, call, softmax_scale))
        if cached is not None:
            for call in calls.cached:
                merge_into(out, lse, call.q, kernel.forward(q, cached.k, cached.v, call, softmax_scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.softmax_scale, ctx.kernel, ctx.cached = calls, softmax_scale, kernel, cached
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = as_read(dout, ctx.kernel)
        # fp32 sums: a prefix key collects one part from its own segment and one from its subtree.
        total = torch.promote_types(q.dtype, torch.float32)
        grads = tuple(torch.zeros_like(x, dtype=total) for x in (q, k, v))
        for call in (ctx.calls.own, *ctx.calls.ancestors):
            ctx.kernel.backward(grads, dout, (q, k, v), out, lse, call, ctx.softmax_scale)
        if ctx.cached is not None:
            keys = ctx.cached
            for call in ctx.calls.cached:
                sums = (grads[0], *keys.gradients())
                ctx.kernel.backward(sums, dout, (q, keys.k, keys.v), out, lse, call, ctx.softmax_scale)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return dq, dk, dv, None, None, None, None
