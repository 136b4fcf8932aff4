"""`impl="flash"`: torch's own CUDA varlen flash attention (no package beside torch needed).

Source: ``aten::_flash_attention_forward`` and ``aten::_flash_attention_backward`` (FlashAttention-2). A call's ranges
must stand together for the kernel: where they leave gaps (several groups in a pack) their rows are gathered once, never
once per response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class FlashKernel:
    """See `megatron_prefix.attention.kernels.Kernel`. Shapes are checkable on the ``meta`` device."""

    mixed_head_dims = False
    contiguous = False

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """CUDA tensors (or meta, to check shapes) of bf16 or fp16 with a head dim of at most 256, a multiple of 8."""
        if device.type not in ("cuda", "meta"):
            return f"impl='flash' runs on CUDA, the tensors are on {device}; use impl='sdpa'"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"impl='flash' takes bf16 or fp16, got {dtype}; use impl='reference' or cast"
        width = max(head_dim, head_dim_v)
        if width > 256 or width % 8:
            return f"impl='flash' takes head dims up to 256 that are multiples of 8, got {width}; use impl='reference'"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """One launch for the whole call."""
        out, lse, *_ = _forward(
            call.q.take(q).contiguous(),
            call.kv.take(k).contiguous(),
            call.kv.take(v).contiguous(),
            call.q.cu_seqlens,
            call.kv.cu_seqlens,
            call.q.max_seqlen,
            call.kv.max_seqlen,
            0.0,
            call.causal,
            False,
            scale=softmax_scale,
        )
        return out, lse.transpose(0, 1)

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
        """One launch for the whole call, added where the rows stand."""
        (q, k, v), (dq, dk, dv) = qkv, grads
        # Without dropout the kernel draws no random number: its state tensors are only placeholders.
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        parts = _backward(
            call.q.take(dout).contiguous(),
            call.q.take(q).contiguous(),
            call.kv.take(k).contiguous(),
            call.kv.take(v).contiguous(),
            call.q.take(out).contiguous(),
            call.q.take(lse).transpose(0, 1).contiguous(),
            call.q.cu_seqlens,
            call.kv.cu_seqlens,
            call.q.max_seqlen,
            call.kv.max_seqlen,
            0.0,
            call.causal,
            rng_state,
            unused,
            scale=softmax_scale,
        )
        call.q.add(dq, parts[0])
        call.kv.add(dk, parts[1])
        call.kv.add(dv, parts[2])
