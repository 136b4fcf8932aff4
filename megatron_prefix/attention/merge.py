"""Merging two attentions of the same queries over disjoint keys."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.calls import Rows


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two key sets from the attentions over each.

    With L = logaddexp(lse_a, lse_b): out = out_a * exp(lse_a - L) + out_b * exp(lse_b - L). Computed in the dtype of
    the log-sum-exp (fp32, or fp64). A row that sees no key on either side (both -inf) stays -inf, with zero output.

    Args:
        out_a, out_b: [T, H, D], any floating dtype.
        lse_a, lse_b: [T, H], natural log, fp32 or fp64.

    Returns:
        out [T, H, D] in the dtype of ``out_a`` and lse [T, H].
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf would be NaN; any finite stand-in gives exp(-inf) = 0, which is the right weight.
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a = (lse_a - finite).exp().unsqueeze(-1)
    weight_b = (lse_b - finite).exp().unsqueeze(-1)
    # Two fused multiply-adds on one temporary: this runs over every response row of every layer.
    out = (out_a * weight_a).addcmul_(out_b.to(weight_b.dtype), weight_b)
    return out.to(out_a.dtype), lse


def merge_into(out: Tensor, lse: Tensor, rows: Rows, part: tuple[Tensor, Tensor]) -> None:
    """Merge a further attention ``part`` = (out, lse) of some rows into out [T, H, D] and lse [T, H], in place."""
    merged_out, merged_lse = merge_attention(rows.take(out), rows.take(lse), *part)
    rows.put(out, merged_out)
    rows.put(lse, merged_lse)
