"""Where sharing a prefix does not pay: the cost model declines it, node by node, and says so. Plain Python.

A prefix that is not shared is encoded once for each branch below it, in the branch's own segment: more rows and
pairs, but no merge of attention outputs and, where a whole tree level goes, no varlen call. The loss stays as it is:
a copy keeps those owners of its tokens whose paths go through it, so that each of them is still counted once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prefix.cost_model import CostModel
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree, TreeNode, owned_by, segments
from megatron_prefix.workload import Workload


@dataclass(frozen=True)
class Sharing:
    """What became of a group.

    Attributes:
        tree: the group, sharing what pays.
        shared: prefixes (a prompt, or a turn that rollouts have in common) that are still shared.
        declined: those that are not any more.
        cost: of the tree, modelled.
        cost_shared: with everything shared, as it was given.
        cost_repeated: with nothing shared.
    """

    tree: RolloutTree
    shared: int
    declined: int
    cost: float
    cost_shared: float
    cost_repeated: float


def decline_unprofitable(group: RolloutGroup | RolloutTree, cost: CostModel) -> Sharing:
    """The group without the sharing that costs more than it saves.

    From the deepest tree level up: a prefix is declined when its rows and pairs, once more per branch, cost less than
    merging the attention of all rows below it with its keys; and all prefixes of a level are when together they save
    less than the level's varlen call costs. Every step lowers the modelled cost, as if the group were a pack of its
    own. A prompt of one token shares no row and is never shared; an only child (a group of one response) continues its
    parent's segment.
    """
    given = group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)
    plan = _Plan(_join_only_children(given), cost)
    plan.decline()
    tree = plan.build()
    return Sharing(
        tree=tree,
        shared=sum(plan.is_prefix(s) and not plan.copied[s] for s in range(len(plan.rows))),
        declined=sum(plan.is_prefix(s) and plan.copied[s] for s in range(len(plan.rows))),
        cost=cost.cost(Workload.of_group(tree)),
        cost_shared=cost.cost(Workload.of_group(given)),
        cost_repeated=cost.cost(Workload.repeated(given)),
    )


def share_where_it_pays(
    groups: Sequence[RolloutGroup | RolloutTree], cost: CostModel
) -> tuple[list[RolloutGroup | RolloutTree], list[Sharing]]:
    """The groups as `decline_unprofitable` leaves them, those that share all they can as they were, and what it did."""
    results = [decline_unprofitable(group, cost) for group in groups]
    kept = [
        group if result.shared and not result.declined else result.tree
        for group, result in zip(groups, results, strict=True)
    ]
    return kept, results


def summary(results: Sequence[Sharing]) -> str:
    """One line: of how many groups sharing was declined, and what sharing is modelled to gain."""
    alone = [result for result in results if not result.shared]
    partly = sum(result.shared > 0 and result.declined > 0 for result in results)
    gain = sum(result.cost_repeated for result in results) / sum(result.cost for result in results)
    line = f"sharing prefixes of {len(results)} groups: modelled {gain:.2f}x over repeated prefixes"
    if alone:
        there = sum(result.cost_repeated for result in alone) / sum(result.cost_shared for result in alone)
        line += f"; declined for {len(alone)} of them (one rollout, or a short prefix: modelled {there:.2f}x)"
    return line + (f"; declined in part for {partly}" if partly else "")


def _join_only_children(tree: RolloutTree) -> RolloutTree:
    children = Counter(node.parent for node in tree.nodes)
    nodes = [replace(node, joined=node.parent >= 0 and children[node.parent] == 1) for node in tree.nodes]
    return replace(tree, nodes=tuple(nodes))


class _Plan:
    """Which segments of a tree are copied into their children. All only children are joined, so that a segment has no
    child or several; ``copied`` ones have no rows of their own, and the others are the segments of the new tree."""

    def __init__(self, tree: RolloutTree, cost: CostModel) -> None:
        self.tree, self.cost = tree, cost
        of_node, self.rows, self.parents = segments(tree, range(len(tree.nodes)))
        self.nodes: list[list[TreeNode]] = [[] for _ in self.rows]
        for i, segment in of_node.items():
            self.nodes[segment].append(tree.nodes[i])
        self.last = [of_node[i] for i in tree.last_nodes]  # the segment in which each rollout ends
        self.children: list[list[int]] = [[] for _ in self.rows]
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                self.children[parent].append(segment)
        self.ends = PrefixLayout([1] * len(self.rows), self.parents).subtree_ends
        self.copied = [bool(self.children[s]) and not self.rows[s] for s in range(len(self.rows))]
        # Of each segment: the new tree's segments that hold it, which end in these segments; where a rollout that ends
        # in it ends now; rows of the new tree below it.
        self.holders = [[s] for s in range(len(self.rows))]
        self.end_of = list(range(len(self.rows)))
        self.below = [0] * len(self.rows)

    def is_prefix(self, segment: int) -> bool:
        """Whether it has rows that branches can share."""
        return bool(self.children[segment]) and self.rows[segment] > 0

    def decline(self) -> None:
        """Decide for every prefix, those of the deepest level first."""
        first_positions = PrefixLayout(self.rows, self.parents).first_positions
        by_level: dict[int, list[int]] = {}
        levels: list[int] = []
        for s, parent in enumerate(self.parents):
            levels.append(levels[parent] + 1 if parent >= 0 else -int(self.copied[s]))  # a root without rows is none
            by_level.setdefault(levels[s], []).append(s)
        for level in sorted(by_level, reverse=True):
            savings = {}
            for s in reversed(by_level[level]):
                self.below[s] = sum(self.rows[c] * len(self.holders[c]) + self.below[c] for c in self.children[s])
                if self.copied[s]:
                    self._copy(s)
                elif self.children[s]:
                    savings[s] = self._saving(s, first_positions[s], level)
            whole_level = sum(max(saving, 0.0) for saving in savings.values()) < self.cost.level
            for s, saving in savings.items():
                if whole_level or saving < 0:
                    self._copy(s)

    def _saving(self, segment: int, rows_above: int, level: int) -> float:
        """What sharing the segment saves, beside its part in a varlen call."""
        holders = [holder for child in self.children[segment] for holder in self.holders[child]]
        rows, more = self.rows[segment], len(holders) - 1
        targets = 0
        for node in self.nodes[segment]:
            # Of the copies, those that an owner's path goes through have targets.
            owned = {self._holder(holders, segment, rollout) for rollout in node.rollouts}
            targets += len(node.tokens) * (len(owned) - 1) if owned else 0
        return self.cost.cost(
            Workload(
                rows=more * rows,
                target_rows=targets,
                pairs=more * (rows * (rows + 1) // 2 + rows * rows_above),
                merged_rows=more * rows * level - self.below[segment],
            )
        )

    def _holder(self, holders: Sequence[int], segment: int, rollout: int) -> int:
        """Number of the copy of the segment that stays with a rollout; with one that ends here, the first."""
        last = self.last[rollout]
        return 0 if last == segment else bisect_right(holders, self.end_of[last]) - 1

    def _copy(self, segment: int) -> None:
        """Put a copy of the segment in front of each segment below it."""
        self.copied[segment] = True
        self.holders[segment] = [holder for child in self.children[segment] for holder in self.holders[child]]
        self.end_of[segment] = self.end_of[self.children[segment][0]]

    def build(self) -> RolloutTree:
        """The tree with its copies."""
        nodes: list[TreeNode] = []
        last_node: dict[int, int] = {-1: -1}
        for s in range(len(self.rows)):
            if self.copied[s]:
                continue
            path = [s]
            while (above := self.parents[path[-1]]) >= 0 and self.copied[above]:
                path.append(above)
            parent, joined = last_node[above], False
            for node in (node for segment in reversed(path) for node in self.nodes[segment]):
                owners = [r for r in node.rollouts if s <= self.end_of[self.last[r]] < self.ends[s]]
                nodes.append(replace(owned_by(node, owners), parent=parent, joined=joined))
                parent, joined = len(nodes) - 1, True
            last_node[s] = parent
        return replace(self.tree, nodes=tuple(nodes))
