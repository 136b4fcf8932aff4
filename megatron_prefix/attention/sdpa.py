"""`impl="sdpa"`: torch's fused CPU flash kernel, range by range.

Source: ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward, which give and take the log-sum-exp and
handle grouped-query heads themselves. Real fused numerics wherever there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SdpaKernel:
    """See `megatron_prefix.attention.kernels.Kernel`."""

    mixed_head_dims = False
    contiguous = False

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """CPU tensors of fp64, fp32, bf16 or fp16 only."""
        if device.type != "cpu":
            return f"impl='sdpa' runs on the CPU, the tensors are on {device}; use impl='flash'"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"impl='sdpa' takes fp64, fp32, bf16 or fp16, got {dtype}; cast"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """One kernel launch per run of equal ranges (siblings of one length are one batch)."""
        outs, lses = [], []
        for q_rows, kv_rows, batch in _batches(call):
            out, lse = _forward(
                _to_bhsd(q[q_rows], batch),
                _to_bhsd(k[kv_rows], batch),
                _to_bhsd(v[kv_rows], batch),
                0.0,
                call.causal,
                scale=softmax_scale,
            )
            outs.append(_from_bhsd(out))
            lses.append(lse.transpose(1, 2).flatten(0, 1))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))

    def backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> None:
        """The kernel's backward per batch of ranges, added where the rows stand."""
        (q, k, v), (dq, dk, dv) = qkv, grads
        for q_rows, kv_rows, batch in _batches(call):
            lse_rows = lse[q_rows].unflatten(0, (batch, -1)).transpose(1, 2)
            parts = _backward(
                _to_bhsd(dout[q_rows], batch),
                _to_bhsd(q[q_rows], batch),
                _to_bhsd(k[kv_rows], batch),
                _to_bhsd(v[kv_rows], batch),
                _to_bhsd(out[q_rows], batch),
                lse_rows,
                0.0,
                call.causal,
                scale=softmax_scale,
            )
            for total, rows, part in zip((dq, dk, dv), (q_rows, kv_rows, kv_rows), parts, strict=True):
                total[rows] += _from_bhsd(part)


def _batches(call: VarlenCall) -> Iterator[tuple[slice, slice, int]]:
    """(query rows, key rows, batch) of each launch: neighbouring causal ranges of one length become one batch."""
    if not call.causal:
        for q, kv in zip(call.q.ranges, call.kv.ranges, strict=True):
            yield slice(*q), slice(*kv), 1
        return
    # Segments without rows are left out of a call, so the causal ranges are one slice of the pack.
    for _, group in groupby(call.q.ranges, key=lambda r: r[1] - r[0]):
        ranges = list(group)
        rows = slice(ranges[0][0], ranges[-1][1])
        yield rows, rows, len(ranges)


def _to_bhsd(x: Tensor, batch: int) -> Tensor:
    """[batch * S, H, D] -> [batch, H, S, D] as a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _from_bhsd(x: Tensor) -> Tensor:
    """[batch, H, S, D] -> [batch * S, H, D]."""
    return x.transpose(1, 2).flatten(0, 1)
