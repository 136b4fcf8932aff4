"""`impl="flex"`: torch's FlexAttention over the whole layout, one launch with a block mask.

In depth-first order a layout's mask is one lookup: row kv is seen by row q iff kv <= q < end[kv], where end[kv] is the
row behind the subtree of kv's segment. The rows in between are those that follow kv in its own segment, and those of
its descendants.

Source: FlexAttention (arXiv 2412.05496), ``torch.nn.attention.flex_attention``. Its backward is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

if TYPE_CHECKING:
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


def tree_block_mask(ends: Tensor, block_size: int = 128) -> BlockMask:
    """FlexAttention's mask of rows in depth-first order. Nothing of T x T elements is made, nothing is read back.

    Below the diagonal every key comes before every query, so that a block of keys is seen by some query of a block iff
    its largest end lies behind the first of them, and by all iff its smallest end lies behind the last. On the diagonal
    a row sees itself but no later row; above it nothing is seen. The rows that the last block lacks see nothing: no end
    lies behind them.

    Args:
        ends: int32 [T], the row behind the subtree of each row's segment; T at least 1.
        block_size: rows of a block, at least 2.
    """
    rows = ends.numel()
    blocks = -(-rows // block_size)
    by_block = pad(ends, (0, blocks * block_size - rows)).view(blocks, block_size)
    first = torch.arange(0, blocks * block_size, block_size, device=ends.device).unsqueeze(1)
    below = torch.ones(blocks, blocks, dtype=torch.bool, device=ends.device).tril(-1)
    seen = below & (by_block.amax(1) > first)
    full = below & (by_block.amin(1) > first + block_size - 1)
    partial = seen & ~full | torch.eye(blocks, dtype=torch.bool, device=ends.device)

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < ends[kv])

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=(rows, rows)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, KV] to the number of blocks of each query block, int32 [1, 1, Q], and their indices in front of the
    others, int32 [1, 1, Q, KV]: as FlexAttention takes them."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
