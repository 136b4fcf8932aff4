"""Split trees for tests: packs within any limit, and the attention of a tree's packs."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix import RolloutGroup, RolloutTree
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.grouped import grouped_attention
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.prefix_cache import PrefixCache
from megatron_prefix.packing import Pack
from megatron_prefix.rollout_tree import node_rows, num_rows
from megatron_prefix.splitting import pack_and_split, plan_splits

Group = RolloutGroup | RolloutTree


def split_or_skip(groups: Sequence[Group], limit: int, num_parts: int = 1) -> list[Pack]:
    """The packs, where the limit allows any."""
    try:
        return pack_and_split(groups, max_tokens_per_pack=limit, num_parts=num_parts)
    except ValueError as error:
        assert "max_tokens_per_pack" in str(error), error
        assume(False)
        raise


def limits(groups: Sequence[Group]) -> st.SearchStrategy[int]:
    most = max(num_rows(g if isinstance(g, RolloutTree) else RolloutTree.from_group(g)) for g in groups)
    return st.integers(1, most + 1)


def rows_in_tree(tree: RolloutTree, limit: int, num_parts: int) -> list[Tensor]:
    """Of each pack of a split tree, its rows in the tree's unsplit pack."""
    (split,) = plan_splits([tree], max_tokens_per_pack=limit, num_parts=num_parts)
    assert split is not None
    lengths = [len(node_rows(tree, i)) for i in range(len(tree.nodes))]
    starts = list(accumulate(lengths, initial=0))
    nodes = [split.prefix, *split.parts] if sum(lengths[i] for i in split.prefix) else split.parts
    return [torch.cat([torch.arange(starts[i], starts[i + 1]) for i in part]) for part in nodes]


def split_attention(kernel: Kernel, packs: list[Pack], index: list[Tensor]) -> Any:
    """Attention of a tree's packs, each on its rows ``index`` of the unsplit pack."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = packs[0].prefix
        cache = PrefixCache(0 if shared is None else shared.num_rows)
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
        scale = q.shape[-1] ** -0.5
        for pack, rows in zip(packs, index, strict=True):
            calls, mine = AttentionCalls.build(pack.layout, q.device), (q[rows], k[rows], v[rows])
            if pack.is_prefix:
                keys = cache.export(1, mine[1], mine[2], kernel)
                part = grouped_attention(mine[0], *keys, calls, scale, kernel)
            else:
                cached = None if shared is None else cache.keys(1)
                part = grouped_attention(*mine, calls, scale, kernel, cached)
            # Backward runs what was made last first: the parts before the prefix, as the schedule does.
            out = out.index_add(0, rows, part)
        return out

    return attention
