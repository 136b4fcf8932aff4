"""How much work a pack is: counts of rows and pairs, without building it. Plain Python on lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_prefix.layout import PartLayout, PrefixLayout
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree, node_rows


@dataclass(frozen=True)
class Workload:
    """Counts that a micro-batch's time and memory depend on. Those of two groups in one pack add (``+``).

    Attributes:
        rows: input rows, T.
        target_rows: rows with a target, which the output layer computes.
        pairs: (query, key) pairs of the attention mask.
        merged_rows: over all tree levels, rows whose attention is merged with that of an ancestor's keys.
        levels: tree levels with such rows, each one more varlen call per layer; the most of several groups.
    """

    rows: int = 0
    target_rows: int = 0
    pairs: int = 0
    merged_rows: int = 0
    levels: int = 0

    def __add__(self, other: Workload) -> Workload:
        return Workload(
            self.rows + other.rows,
            self.target_rows + other.target_rows,
            self.pairs + other.pairs,
            self.merged_rows + other.merged_rows,
            max(self.levels, other.levels),
        )

    @classmethod
    def of_layout(cls, layout: PrefixLayout, target_rows: int) -> Workload:
        """Of a pack, also of a split group's prefix or part."""
        ancestors = [*layout.ancestor_levels, *(layout.cached_levels if isinstance(layout, PartLayout) else ())]
        merged = sum(r.q_end - r.q_start for level in ancestors for r in level)
        return cls(layout.num_rows, target_rows, layout.area, merged, len(ancestors))

    @classmethod
    def of_group(cls, group: RolloutGroup | RolloutTree) -> Workload:
        """Of a group that shares its prefix, in a pack of its own."""
        if isinstance(group, RolloutTree):
            targets = sum(len(node.tokens) for node in group.nodes if node.rollouts)
            return cls.of_layout(group.layout, targets)
        return cls.of_lengths(len(group.prompt) - 1, [len(tokens) for tokens in group.responses])

    @classmethod
    def of_lengths(cls, prefix: int, lengths: Sequence[int]) -> Workload:
        """Of a prefix of so many rows and responses of these, in one pack."""
        rows = sum(lengths)
        pairs = _triangle(prefix) + sum(prefix * length + _triangle(length) for length in lengths)
        merged = rows if prefix else 0
        return cls(prefix + rows, rows, pairs, merged, 1 if merged else 0)

    @classmethod
    def of_nodes(cls, tree: RolloutTree, packs: Iterable[Sequence[int]]) -> list[Workload]:
        """Of the packs of a split tree, each given by its nodes; ancestors' keys may be in another of them."""
        packs = [list(nodes) for nodes in packs]
        pack_of = {i: n for n, nodes in enumerate(packs) for i in nodes}
        rows = [len(node_rows(tree, i)) for i in range(len(tree.nodes))]
        # Of each node: the first node of its segment, its level, its position, and the levels of ancestors with keys.
        heads: list[int] = []
        levels: list[int] = []
        positions: list[int] = []
        in_segment = [0] * len(rows)
        for i, node in enumerate(tree.nodes):
            above = node.parent
            joined = node.joined and pack_of[i] == pack_of[above]
            heads.append(heads[above] if joined else i)
            levels.append(0 if above < 0 else levels[above] + (not joined))
            positions.append(0 if above < 0 else positions[above] + rows[above])
            in_segment[heads[i]] += rows[i]
        keyed: list[tuple[int, ...]] = []
        for i, node in enumerate(tree.nodes):
            if heads[i] != i or node.parent < 0:
                keyed.append(keyed[heads[i]] if heads[i] != i else ())
            else:
                above = heads[node.parent]
                keyed.append((*keyed[above], levels[above]) if in_segment[above] else keyed[above])
        found = []
        for nodes in packs:
            mine = [i for i in nodes if rows[i]]
            found.append(
                cls(
                    rows=sum(rows[i] for i in mine),
                    target_rows=sum(rows[i] for i in mine if tree.nodes[i].rollouts),
                    pairs=sum(rows[i] * positions[i] + _triangle(rows[i]) for i in mine),
                    merged_rows=sum(rows[i] * len(keyed[i]) for i in mine),
                    levels=len({level for i in mine for level in keyed[i]}),
                )
            )
        return found

    @classmethod
    def repeated(cls, group: RolloutGroup | RolloutTree) -> Workload:
        """Of the same rollouts as sequences of their own, each with its prefix."""
        if isinstance(group, RolloutTree):
            ends: list[int] = []  # of each node, in its own sequence
            for node in group.nodes:
                ends.append(len(node.tokens) + (ends[node.parent] if node.parent >= 0 else 0))
            lengths = [ends[i] - 1 for i in group.last_nodes]
            targets = sum(len(node.tokens) * len(node.rollouts) for node in group.nodes)
        else:
            targets = sum(len(tokens) for tokens in group.responses)
            lengths = [len(group.prompt) - 1 + len(tokens) for tokens in group.responses]
        return cls(sum(lengths), targets, sum(map(_triangle, lengths)))


def _triangle(rows: int) -> int:
    """Pairs of causal attention over a sequence."""
    return rows * (rows + 1) // 2
