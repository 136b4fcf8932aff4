"""A layout's mask as FlexAttention takes it: which blocks of keys a block of queries sees, and one lookup per row.

In depth-first order a layout's mask is one lookup: row kv is seen by row q iff kv <= q < end[kv], where end[kv] is the
row behind the subtree of kv's segment. The rows in between are those that follow kv in its own segment, and those of
its descendants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad


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
