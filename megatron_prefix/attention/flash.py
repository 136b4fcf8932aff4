"""Kernels whose launch is one varlen call of a flash attention library, and `impl="flash"`, which is torch's own.

`FlashKernel` owns the rows: it takes them (a view; where a call's ranges leave gaps they are gathered once, never once
per response), turns the log-sum-exp and adds the gradients where the rows stand. A `FlashLibrary` owns the launch.
Source of `impl="flash"`: ``aten::_flash_attention_forward`` and ``aten::_flash_attention_backward``, which are
FlashAttention-2 inside torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class FlashLibrary(Protocol):
    """The launches of one library. Shapes: Tq and Tk rows of a call, standing together; bf16 or fp16.

    The last dimension of q, k and v has stride 1, the others any; dout, out and lse are contiguous.
    """

    mixed_head_dims: bool
    """See `megatron_prefix.attention.kernels.Kernel`."""

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """See `megatron_prefix.attention.kernels.Kernel`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, Hq, Dv], lse [Hq, Tq] (fp32, natural log)."""

    def backward(
        self,
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) like ``qkv`` from dout and out [Tq, Hq, Dv] and lse [Hq, Tq]."""


class FlashKernel:
    """See `megatron_prefix.attention.kernels.Kernel`."""

    contiguous = False

    def __init__(self, library: FlashLibrary) -> None:
        self.functions = library
        self.mixed_head_dims = library.mixed_head_dims

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """What the library refuses."""
        return self.functions.refusal(device, dtype, head_dim, head_dim_v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """One launch for the whole call.

        Raises:
            ValueError: a log-sum-exp that is not [Hq, Tq]: the library's version lays it out in another way.
        """
        rows = call.q.take(q)
        out, lse = self.functions.forward(rows, call.kv.take(k), call.kv.take(v), call, softmax_scale)
        if lse.shape != (rows.shape[1], rows.shape[0]):
            raise ValueError(
                f"the log-sum-exp of {rows.shape[0]} rows and {rows.shape[1]} heads has shape {tuple(lse.shape)}, "
                "not [heads, rows]; install another version of the flash attention package, or use impl='flash'"
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
        rows = (call.q, call.kv, call.kv)
        q, k, v = (each.take(x) for each, x in zip(rows, qkv, strict=True))
        dout, out = call.q.take(dout).contiguous(), call.q.take(out).contiguous()
        lse = call.q.take(lse).transpose(0, 1).contiguous()
        parts = self.functions.backward(dout, (q, k, v), out, lse, call, softmax_scale)
        for each, grad, part in zip(rows, grads, parts, strict=True):
            each.add(grad, part)


@dataclass(frozen=True)
class FlashLimits:
    """What a flash attention library takes.

    Attributes:
        impl: its name among the implementations.
        majors: compute capabilities (9 is sm90) that its forward and backward run on.
        hardware: those in words.
        elsewhere: the implementation for other GPUs.
        devices: types of device; "meta" checks shapes.
        head_dims: of the compute capability (None: unknown) and the head dims of q and v, the dims that it takes in
            words where it takes not these; all take multiples of 8 up to 256 only.
    """

    impl: str
    majors: Container[int]
    hardware: str
    elsewhere: str
    devices: tuple[str, ...] = ("cuda",)
    head_dims: Callable[[int | None, int, int], str | None] | None = None

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """Why such tensors cannot be taken, with the remedy, or None. The GPU is asked where there is one."""
        if device.type not in self.devices:
            return f"impl={self.impl!r} runs on CUDA, the tensors are on {device}; use impl='sdpa'"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"impl={self.impl!r} takes bf16 or fp16, got {dtype}; use impl='reference' or cast"
        for width in (head_dim, head_dim_v):
            if width > 256 or width % 8:
                return (
                    f"impl={self.impl!r} takes head dims up to 256 that are multiples of 8, got {width}; "
                    "use impl='reference'"
                )
        major = compute_capability(device)
        if major is not None and major not in self.majors:
            return f"impl={self.impl!r} needs {self.hardware}, this one is sm{major}x; use impl={self.elsewhere!r}"
        special = self.head_dims(major, head_dim, head_dim_v) if self.head_dims else None
        return f"impl={self.impl!r} takes {special}; use impl={self.elsewhere!r}" if special else None


def compute_capability(device: torch.device) -> int | None:
    """The major compute capability of a GPU; None where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)[0]


class AtenFlash:
    """torch's own varlen flash attention: no package beside torch needed. Shapes are checkable on ``meta``."""

    mixed_head_dims = False
    limits = FlashLimits("flash", range(8, 100), "a GPU from sm80 on", "reference", devices=("cuda", "meta"))

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """CUDA tensors (or meta, to check shapes) of bf16 or fp16 with a head dim of at most 256, a multiple of 8."""
        width = max(head_dim, head_dim_v)  # the narrower one is padded
        return self.limits.refusal(device, dtype, width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """See `FlashLibrary`."""
        out, lse, *_ = _forward(
            q,
            k,
            v,
            call.q.cu_seqlens,
            call.kv.cu_seqlens,
            call.q.max_seqlen,
            call.kv.max_seqlen,
            0.0,
            call.causal,
            False,
            scale=softmax_scale,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashLibrary`; deterministic where torch's algorithms have to be."""
        # Without dropout the kernel draws no random number: its state tensors are only placeholders.
        rng_state = torch.empty(2, dtype=torch.uint64, device=dout.device)
        unused = torch.empty(0, dtype=torch.uint64, device=dout.device)
        return _backward(
            dout,
            *qkv,
            out,
            lse,
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
