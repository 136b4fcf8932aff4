"""`impl="reference"`: dense attention from the definition of the mask, the oracle of every other implementation.

It materialises [Hq, T, T] scores and shares no mask code with the fused path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.layout import PrefixLayout


def dense_mask(layout: PrefixLayout, device: torch.device | str = "cpu") -> Tensor:
    """The mask by definition, bool [T, T]: row i sees row j when j's segment is an ancestor of i's, or when both are in
    one segment and j does not come after i."""
    segment = [s for s, length in enumerate(layout.lengths) for _ in range(length)]
    family: list[set[int]] = []
    for s, parent in enumerate(layout.parents):
        family.append({s} if parent < 0 else family[parent] | {s})
    ancestor_or_self = torch.tensor([[b in family[a] for b in range(len(layout))] for a in range(len(layout))])
    rows = torch.tensor(segment, dtype=torch.long)
    order = torch.arange(len(segment))
    seen = ancestor_or_self[rows][:, rows] & (order[None, :] <= order[:, None])
    return seen.to(device)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, softmax_scale: float) -> Tensor:
    """Dense attention q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv], differentiable.

    Computed in fp32 (fp64 for fp64 input) and returned in the dtype of ``q``.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    key = k.to(compute).repeat_interleave(repeat, dim=1)
    value = v.to(compute).repeat_interleave(repeat, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.to(compute) * softmax_scale, key)
    scores = scores.masked_fill(~dense_mask(layout, q.device), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).to(q.dtype)


class ReferenceAttention:
    """See `megatron_prefix.attention.kernels.WholeLayout`."""

    def refusal(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int, backward: bool
    ) -> str | None:
        """Takes all."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, calls: AttentionCalls, softmax_scale: float) -> Tensor:
        """See `reference_attention`."""
        return reference_attention(q, k, v, calls.layout, softmax_scale)
