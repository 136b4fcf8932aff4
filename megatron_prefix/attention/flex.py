"""`impl="flex"`: torch's FlexAttention over the whole layout, one launch with a block mask.

Source: FlexAttention (arXiv 2412.05496), ``torch.nn.attention.flex_attention``. Its backward is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron_prefix.attention.calls import AttentionCalls

_ON_CUDA = (torch.float32, torch.bfloat16, torch.float16)
_ON_CPU = (torch.float64, *_ON_CUDA)


class FlexAttention:
    """See `megatron_prefix.attention.kernels.WholeLayout`."""

    def refusal(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int, backward: bool
    ) -> str | None:
        """CUDA tensors of fp32, bf16 or fp16 with head dims from 16 to 256; on the CPU, dense and forward only."""
        if device.type == "cpu":
            if backward:
                return "impl='flex' has no backward on the CPU, because torch has none; use impl='sdpa'"
            if dtype not in _ON_CPU:
                return f"impl='flex' takes fp64, fp32, bf16 or fp16, got {dtype}; cast"
            return None
        if device.type != "cuda":
            return f"impl='flex' runs on CUDA and on the CPU, the tensors are on {device}; use impl='reference'"
        if dtype not in _ON_CUDA:  # the kernel's log-sum-exp is fp32
            return f"impl='flex' takes fp32, bf16 or fp16 on CUDA, got {dtype}; use impl='reference' or cast"
        for width in (head_dim, head_dim_v):
            if not 16 <= width <= 256:
                return f"impl='flex' takes head dims from 16 to 256 on CUDA, got {width}; use impl='reference'"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, calls: AttentionCalls, softmax_scale: float) -> Tensor:
        """One launch: the fused kernel on CUDA, torch's dense implementation of the same on the CPU."""
        if q.shape[0] == 0:
            return q.new_zeros(0, q.shape[1], v.shape[2]) + (q.sum() + k.sum() + v.sum())  # part of the graph
        if not torch.is_grad_enabled():
            q, k, v = q.detach(), k.detach(), v.detach()  # torch's refusal on the CPU asks the tensors, not the mode
        launch: Any = self._compiled if q.is_cuda else flex_attention
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = launch(query, key, value, block_mask=calls.block_mask, scale=softmax_scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        """The fused kernel, compiled at its first launch.

        Packs differ in rows and blocks every micro-batch: with dynamic shapes they share one kernel, instead of a new
        one each until torch gives up and runs unfused. A full graph makes giving up an error.
        """
        return torch.compile(flex_attention, dynamic=True, fullgraph=True)
