"""Groups larger than a micro-batch: the prefix once, the responses in parts that read its keys.

A split group becomes one pack of its prefix (rows without targets) and several packs of response subtrees
(`PartLayout`). In a tree the prefix is every node whose subtree does not fit a micro-batch, so children may be spread
at any level.
Plain Python on lengths and tokens: every rank and pipeline stage builds the same packs without communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_prefix.layout import PartLayout, PrefixLayout
from megatron_prefix.packing import (
    Pack,
    PackRows,
    SharedPrefix,
    check_sampler_log_probs,
    group_name,
    pack_groups,
)
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree, node_rows, num_rows, segments


@dataclass(frozen=True)
class Split:
    """How a group that does not fit a micro-batch is cut.

    Attributes:
        tree: the group.
        prefix: its nodes that are encoded once, in order; a plain group's prompt.
        parts: the other nodes, by micro-batch.
    """

    tree: RolloutTree
    prefix: list[int]
    parts: list[list[int]]


def plan_splits(
    groups: Sequence[RolloutGroup | RolloutTree], *, max_tokens_per_pack: int | None, num_parts: int = 1
) -> list[Split | None]:
    """How `pack_and_split` cuts each group; None for those that fit a micro-batch. Builds no pack.

    Raises:
        ValueError: as `pack_and_split`.
    """
    if not groups:
        raise ValueError("there is nothing to pack: no rollout groups were given")
    if max_tokens_per_pack is not None and max_tokens_per_pack < 1:
        raise ValueError(f"max_tokens_per_pack must be at least 1, got {max_tokens_per_pack}")
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, got {num_parts}")
    splits: list[Split | None] = []
    for i, group in enumerate(groups):
        tree = group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)
        if max_tokens_per_pack is None or num_rows(tree) <= max_tokens_per_pack:
            splits.append(None)
        else:
            splits.append(_cut(tree, max_tokens_per_pack, num_parts, group_name(group, i)))
    return splits


def pack_and_split(
    groups: Sequence[RolloutGroup | RolloutTree],
    *,
    max_tokens_per_pack: int | None,
    normalize_std: bool = True,
    num_parts: int = 1,
) -> list[Pack]:
    """Micro-batches of a step: groups that fit packed as by `pack_groups`, larger ones split.

    Each split group is its prefix's pack, directly followed by its parts; whole groups come last. `pair_order` finds
    the pairs again.

    Args:
        groups: prefix groups, or rollout trees for multi-turn trajectories.
        max_tokens_per_pack: most rows of one micro-batch; None puts everything into one.
        normalize_std: see `pack_groups`.
        num_parts: parts of a split group to aim at, of as even size as the order of the responses allows. The limit
            may make more of them; 1 fills as few as it allows.

    Raises:
        ValueError: no groups, a limit or number of parts below 1, a response or a prefix that is itself over the
            limit, or sampler log-probs in some groups only.
    """
    splits = plan_splits(groups, max_tokens_per_pack=max_tokens_per_pack, num_parts=num_parts)
    check_sampler_log_probs(groups)
    cut = [split for split in splits if split is not None]
    packs = [pack for split in cut for pack in packs_of_split(split, normalize_std=normalize_std)]
    whole = [group for group, split in zip(groups, splits, strict=True) if split is None]
    if whole:
        packs += pack_groups(whole, max_tokens_per_pack=max_tokens_per_pack, normalize_std=normalize_std)
    return packs


def pair_order(groups: Sequence[RolloutGroup | RolloutTree], *, max_tokens_per_pack: int | None) -> Tensor:
    """Where the pairs of the groups, in order of group, rollout and token, stand among those of `pack_and_split`.

    Returns:
        int64 [pairs]: ``torch.cat(values of each pack's pairs)[pair_order(...)]`` has the order of `pack_groups` and
        `repeated_packs`, whatever was split.

    Raises:
        ValueError: as `pack_and_split`.
    """
    splits = plan_splits(groups, max_tokens_per_pack=max_tokens_per_pack)
    found: dict[tuple[int, int], list[int]] = {}
    first = 0
    for i in split_first(splits):
        split = splits[i]
        if split is None:
            group = groups[i]
            tree = group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)
            packs = [list(range(len(tree.nodes)))]
        else:
            tree, packs = split.tree, [split.prefix, *split.parts]
        for nodes in packs:
            for rollout, count in sorted(_trained(tree, nodes).items()):
                found.setdefault((i, rollout), []).extend(range(first, first + count))
                first += count
    return torch.tensor([at for _, pairs in sorted(found.items()) for at in pairs], dtype=torch.long)


def split_first(splits: Sequence[Split | None]) -> list[int]:
    """Indices of the groups in the order of their packs."""
    return sorted(range(len(splits)), key=lambda i: splits[i] is None)


def packs_of_split(split: Split, *, normalize_std: bool = True) -> list[Pack]:
    """The packs of a split group: its prefix's, where it has rows, and its parts'."""
    builder = _Builder(split, split.tree.advantages(normalize_std=normalize_std))
    packs = [builder.part(n) for n in range(len(split.parts))]
    # A prompt of one token shares no row, and its parts then stand alone.
    return [builder.prefix_pack(), *packs] if builder.shared is not None else packs


def prefix_nodes(tree: RolloutTree, limit: int, name: str) -> list[int]:
    """The nodes whose subtrees have more rows than ``limit``: the prefix of a group that is split.

    Raises:
        ValueError: a single node, or the prefix, has more rows than the limit; names the group as ``name``.
    """
    below = subtree_rows(tree)
    prefix = [i for i in range(len(tree.nodes)) if below[i] > limit]
    leaves = set(range(len(tree.nodes))) - {node.parent for node in tree.nodes}
    for i in prefix:
        node = tree.nodes[i]
        if i in leaves:
            raise ValueError(
                f"group {name}: node {i} has {len(node.tokens)} tokens, max_tokens_per_pack is {limit}; raise it to at "
                f"least {len(node.tokens)}, or cut the response"
            )
    shared = sum(len(node_rows(tree, i)) for i in prefix)
    if shared > limit:
        raise ValueError(
            f"group {name}: its prefix has {shared} rows, max_tokens_per_pack is {limit}; raise it to at least {shared}"
        )
    return prefix


def subtrees_below(tree: RolloutTree, prefix: Iterable[int]) -> list[list[int]]:
    """Nodes of each subtree under a prefix, in order: what a part of a split group is made of."""
    shared = set(prefix)
    found: list[list[int]] = []
    for i, node in enumerate(tree.nodes):
        if i not in shared:
            if node.parent in shared or node.parent < 0:
                found.append([])
            found[-1].append(i)
    return found


def _cut(tree: RolloutTree, limit: int, num_parts: int, name: str) -> Split:
    prefix = prefix_nodes(tree, limit, name)
    below = subtree_rows(tree)
    parts = _fill_parts(tree, set(prefix), below, limit)
    if len(parts) < num_parts:
        parts = _even_parts(tree, set(prefix), below, num_parts)
    return Split(tree, prefix, parts)


def _even_parts(tree: RolloutTree, prefix: set[int], below: list[int], num_parts: int) -> list[list[int]]:
    """Subtrees under the prefix, in order, in at most ``num_parts`` parts, the largest as small as that allows."""
    tops = [i for i, node in enumerate(tree.nodes) if i not in prefix and (node.parent < 0 or node.parent in prefix)]
    subtrees = [below[i] for i in tops]
    low, high = max(subtrees), sum(subtrees)
    while low < high:
        middle = (low + high) // 2
        if len(_fill_parts(tree, prefix, below, middle)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    return _fill_parts(tree, prefix, below, low)


def _fill_parts(tree: RolloutTree, prefix: set[int], below: list[int], limit: int) -> list[list[int]]:
    """Subtrees under the prefix, in order, as few parts as that order allows; each part's nodes."""
    parts: list[list[int]] = []
    free = 0
    for i, node in enumerate(tree.nodes):
        if i in prefix:
            continue
        if node.parent < 0 or node.parent in prefix:
            if not parts or below[i] > free:
                parts.append([])
                free = limit
            free -= below[i]
        parts[-1].append(i)
    return parts


def subtree_rows(tree: RolloutTree) -> list[int]:
    """Rows of the subtree of each node."""
    rows = [len(node_rows(tree, i)) for i in range(len(tree.nodes))]
    for i in reversed(range(len(rows))):
        if tree.nodes[i].parent >= 0:
            rows[tree.nodes[i].parent] += rows[i]
    return rows


def _trained(tree: RolloutTree, nodes: Iterable[int]) -> dict[int, int]:
    """Trained tokens of every rollout that has some in these nodes."""
    counts: Counter[int] = Counter()
    for node in (tree.nodes[i] for i in nodes):
        kept = len(node.tokens) if node.loss_mask is None else sum(map(bool, node.loss_mask))
        if kept:
            counts.update(dict.fromkeys(node.rollouts, kept))
    return dict(counts)


class _Builder:
    """Builds the packs of one split tree. A rollout's trained tokens may be in the prefix and in one part."""

    def __init__(self, split: Split, advantages: list[float]) -> None:
        self.tree, self.prefix, self.parts, self.advantages = split.tree, split.prefix, split.parts, advantages
        tree, prefix = split.tree, split.prefix
        # Of the prefix, which parts find in the cache: the segment of each node, and the rows of each segment.
        self.segment, self.cached, _ = segments(tree, prefix)
        self.shared = SharedPrefix(sum(self.cached)) if sum(self.cached) else None
        self.trained = [_trained(tree, nodes) for nodes in (prefix, *split.parts)]
        self.lengths = [sum(counts.get(r, 0) for counts in self.trained) for r in range(len(tree.rewards))]
        # Where a rollout is counted in the batch: the last pack with trained tokens of it.
        self.home = {rollout: n for n, counts in enumerate(self.trained) for rollout in counts}

    def prefix_pack(self) -> Pack:
        """The rows of the prefix, whose keys the parts read."""
        rows = PackRows()
        numbers = self._numbers(0)
        found: dict[int, int] = {-1: -1}
        for i in self.prefix:
            node = self.tree.nodes[i]
            found[i] = rows.add_node(found[node.parent], self.tree, i, numbers, joined=node.joined)
        return self._pack(rows, PrefixLayout(rows.lengths, rows.parents), 0)

    def part(self, number: int) -> Pack:
        """Part ``number``: its nodes, below those of the prefix."""
        rows = PackRows()
        numbers = self._numbers(number + 1)
        found: dict[int, int] = {-1: -1}
        in_prefix: dict[int, int] = {}  # segment of the part: the same one in the prefix's pack
        for i in sorted([*self.prefix, *self.parts[number]]):
            node = self.tree.nodes[i]
            above = found[node.parent]
            # The prefix's rows are in the cache: what is joined to it is a segment of its own.
            joined = node.joined and (i in self.segment) == (node.parent in self.segment)
            if i not in self.segment:
                found[i] = rows.add_node(above, self.tree, i, numbers, joined=joined)
            elif joined:
                found[i] = above
            else:
                found[i] = rows.add_segment(above)
                in_prefix[found[i]] = self.segment[i]
        first = list(accumulate(self.cached, initial=0))
        lengths = [self.cached[in_prefix[s]] if s in in_prefix else 0 for s in range(len(rows.lengths))]
        starts = [first[in_prefix[s]] if s in in_prefix else 0 for s in range(len(rows.lengths))]
        return self._pack(rows, PartLayout(rows.lengths, rows.parents, lengths, starts), number + 1)

    def _numbers(self, pack: int) -> dict[int, int]:
        """Number in the pack of each rollout that is trained there."""
        return {rollout: n for n, rollout in enumerate(sorted(self.trained[pack]))}

    def _pack(self, rows: PackRows, layout: PrefixLayout, pack: int) -> Pack:
        members = sorted(self.trained[pack])
        lengths = [self.lengths[r] for r in members]
        whole = lengths == [self.trained[pack][r] for r in members]
        return rows.pack(
            layout,
            [self.advantages[r] for r in members],
            [self.tree.rewards[r] for r in members],
            self.shared,
            lengths,
            None if whole else sum(self.home[r] == pack for r in members),
        )
