"""Groups larger than a micro-batch: the prefix once, the responses in parts that read its keys.

A split group becomes one pack of its prefix (rows without targets) and several packs of response subtrees
(`PartLayout`). In a tree the prefix is every node whose subtree does not fit a micro-batch, so children may be spread
at any level.
Plain Python on lengths and tokens: every rank and pipeline stage builds the same packs without communication.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prefix.layout import PartLayout, PrefixLayout
from megatron_prefix.loss import group_advantages
from megatron_prefix.packing import (
    Pack,
    PackRows,
    RolloutTree,
    SharedPrefix,
    group_name,
    node_rows,
    num_rows,
    pack_groups,
)
from megatron_prefix.rollout_group import RolloutGroup


def pack_and_split(
    groups: Sequence[RolloutGroup | RolloutTree], *, max_tokens_per_pack: int, normalize_std: bool = True
) -> list[Pack]:
    """Micro-batches of a step: groups that fit packed as by `pack_groups`, larger ones split.

    Each split group is its prefix's pack, directly followed by its parts; whole groups come last.

    Raises:
        ValueError: no groups, a limit below 1, a response or a prefix that is itself over the limit, or a tree whose
            inner nodes are trained and do not fit a micro-batch.
    """
    if not groups:
        raise ValueError("there is nothing to pack: no rollout groups were given")
    if max_tokens_per_pack < 1:
        raise ValueError(f"max_tokens_per_pack must be at least 1, got {max_tokens_per_pack}")
    packs: list[Pack] = []
    whole = []
    for i, group in enumerate(groups):
        tree = group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)
        if num_rows(tree) <= max_tokens_per_pack:
            whole.append(group)
        else:
            packs += _split(tree, max_tokens_per_pack, normalize_std, group_name(group, i))
    if whole:
        packs += pack_groups(whole, max_tokens_per_pack=max_tokens_per_pack, normalize_std=normalize_std)
    return packs


def _split(tree: RolloutTree, limit: int, normalize_std: bool, name: str) -> list[Pack]:
    prefix, parts = _cut(tree, limit, name)
    rows = PackRows()
    segments: dict[int, int] = {}
    for i in prefix:
        segments[i] = rows.add_prompt(segments.get(tree.nodes[i].parent, -1), node_rows(tree, i))
    layout = PrefixLayout(rows.lengths, rows.parents)
    advantages = group_advantages(tree.rewards, normalize_std=normalize_std)
    if not layout.num_rows:  # a prompt of one token shares no row
        return [_part(tree, prefix, layout, nodes, advantages, None) for nodes in parts]
    shared = SharedPrefix(layout.num_rows)
    return [
        rows.pack(layout, [], [], shared),
        *(_part(tree, prefix, layout, nodes, advantages, shared) for nodes in parts),
    ]


def _cut(tree: RolloutTree, limit: int, name: str) -> tuple[list[int], list[list[int]]]:
    """Nodes of the prefix, and of each part."""
    below = _subtree_rows(tree)
    prefix = [i for i in range(len(tree.nodes)) if below[i] > limit]
    leaves = set(range(len(tree.nodes))) - {node.parent for node in tree.nodes}
    for i in prefix:
        node = tree.nodes[i]
        if i in leaves:
            raise ValueError(
                f"group {name}: node {i} has {len(node.tokens)} tokens, max_tokens_per_pack is {limit}; raise it to at "
                f"least {len(node.tokens)}, or cut the response"
            )
        if node.rollouts:
            raise ValueError(
                f"group {name}: node {i} is trained and its subtree of {below[i]} rows is larger than "
                f"max_tokens_per_pack {limit}; splitting below trained tokens is not implemented, raise the limit"
            )
    shared = sum(len(node_rows(tree, i)) for i in prefix)
    if shared > limit:
        raise ValueError(
            f"group {name}: its prefix has {shared} rows, max_tokens_per_pack is {limit}; raise it to at least {shared}"
        )
    return prefix, _fill_parts(tree, set(prefix), below, limit)


def _fill_parts(tree: RolloutTree, prefix: set[int], below: list[int], limit: int) -> list[list[int]]:
    """Subtrees under the prefix, in order, as few parts as that order allows; each part's nodes."""
    parts: list[list[int]] = []
    free = 0
    for i, node in enumerate(tree.nodes):
        if i in prefix:
            continue
        if node.parent in prefix:
            if not parts or below[i] > free:
                parts.append([])
                free = limit
            free -= below[i]
        parts[-1].append(i)
    return parts


def _subtree_rows(tree: RolloutTree) -> list[int]:
    rows = [len(node_rows(tree, i)) for i in range(len(tree.nodes))]
    for i in reversed(range(1, len(rows))):
        rows[tree.nodes[i].parent] += rows[i]
    return rows


def _part(
    tree: RolloutTree,
    prefix: list[int],
    cached: PrefixLayout,
    nodes: list[int],
    advantages: list[float],
    shared: SharedPrefix | None,
) -> Pack:
    """The pack of some subtrees; ``cached`` is the layout of the prefix's pack, whose segments are ``prefix``."""
    members = sorted({rollout for i in nodes for rollout in tree.nodes[i].rollouts})
    numbers = {rollout: n for n, rollout in enumerate(members)}
    position = {i: s for s, i in enumerate(prefix)}
    rows = PackRows()
    segments: dict[int, int] = {-1: -1}
    lengths, starts = [], []
    for i in sorted([*prefix, *nodes]):
        parent = segments[tree.nodes[i].parent]
        if i in position:
            segments[i] = rows.add_prompt(parent, [])
        else:
            segments[i] = rows.add_node(parent, tree, i, numbers)
        lengths.append(cached.lengths[position[i]] if i in position else 0)
        starts.append(cached.starts[position[i]] if i in position else 0)
    layout = PartLayout(rows.lengths, rows.parents, lengths, starts)
    return rows.pack(layout, [advantages[r] for r in members], [tree.rewards[r] for r in members], shared)
