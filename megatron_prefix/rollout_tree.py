"""Rollouts that share tokens, as a tree: prefix groups are trees of two levels, multi-turn trajectories deeper ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_prefix.advantages import group_advantages
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.rollout_group import RolloutGroup, TokenCount, check_all_known, token_ids


@dataclass(frozen=True)
class TreeNode:
    """Consecutive tokens of a rollout tree.

    Attributes:
        tokens: token ids, at least one; or a `TokenCount`, as those of all nodes then are.
        parent: index of the parent node, -1 for a root.
        rollouts: the rollouts that own (generated) these tokens; empty for a prompt or a tool's output.
        loss_mask: per token, whether it is trained; None trains all tokens of an owned node.
        log_probs: of each of ``rollouts``, per token, the sampler's log-probs; None where unknown.
        joined: its rows continue its parent's segment instead of being one of their own. For an only child: it
            attends to the same rows either way, and a segment less is a varlen call less.
    """

    tokens: Sequence[int]
    parent: int
    rollouts: tuple[int, ...] = ()
    loss_mask: Sequence[bool] | None = None
    log_probs: Sequence[Sequence[float]] | None = None
    joined: bool = False


@dataclass(frozen=True)
class RolloutTree:
    """Rollouts that share tokens, of one group.

    Attributes:
        nodes: in depth-first order. Several roots share nothing with one another, but make one group all the same.
        rewards: one per rollout.
        group_id: a name used in messages.
        trajectories: of each rollout, the number of its trajectory: the paths of one whose context was rewritten on
            the way, with one reward, which counts once in the group's advantages. None: one rollout each.

    Raises:
        ValueError: anything else; names the node or rollout.
    """

    nodes: tuple[TreeNode, ...]
    rewards: tuple[float, ...]
    group_id: str | None = None
    trajectories: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[0].parent != -1:
            raise ValueError("a rollout tree needs a root as its first node")
        owned: set[int] = set()
        for i, node in enumerate(self.nodes):
            self._check_node(i, node)
            if node.loss_mask is None or any(node.loss_mask):
                owned.update(node.rollouts)
        check_all_known("rollout tree", [node.tokens for node in self.nodes])
        if len(owned) != len(self.rewards):
            missing = sorted(set(range(len(self.rewards))) - owned)
            raise ValueError(f"rollouts {missing} own no trained token; leave them out")
        self._check_paths()
        self._check_trajectories()

    def _check_node(self, i: int, node: TreeNode) -> None:
        token_ids(f"node {i}", node.tokens)
        if node.parent == -1 and node.rollouts:
            raise ValueError(
                f"node {i}: nothing predicts a root's first token, so it cannot be trained; put the prompt there"
            )
        if len(set(node.rollouts)) != len(node.rollouts):
            raise ValueError(f"node {i}: rollouts {node.rollouts} names a rollout twice")
        if any(not 0 <= rollout < len(self.rewards) for rollout in node.rollouts):
            raise ValueError(
                f"node {i}: rollouts {node.rollouts} must be below {len(self.rewards)}, the number of rewards"
            )
        if node.loss_mask is not None and len(node.loss_mask) != len(node.tokens):
            raise ValueError(f"node {i}: loss_mask has {len(node.loss_mask)} entries for {len(node.tokens)} tokens")
        if node.log_probs is not None and len(node.log_probs) != len(node.rollouts):
            raise ValueError(
                f"node {i}: log_probs of {len(node.log_probs)} rollouts for the {len(node.rollouts)} that own it; give "
                "one sequence each"
            )
        for values in node.log_probs or ():
            if len(values) != len(node.tokens):
                raise ValueError(f"node {i}: log_probs has {len(values)} entries for {len(node.tokens)} tokens")

    def _check_paths(self) -> None:
        """Depth-first order, joined nodes are only children, and every rollout is one path down the tree."""
        parents = [node.parent for node in self.nodes]
        try:
            ends = PrefixLayout([1] * len(parents), parents).subtree_ends
        except ValueError as error:
            raise ValueError(f"rollout tree: {str(error).replace('segment', 'node')}") from error
        children = Counter(parents)
        deepest: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            if node.joined and (node.parent == -1 or children[node.parent] > 1):
                raise ValueError(f"node {i} is joined to its parent {node.parent}, but is not the only child of a node")
            for rollout in node.rollouts:
                above = deepest.get(rollout)
                if above is not None and ends[above] <= i:
                    raise ValueError(
                        f"rollout {rollout} owns nodes {above} and {i}, which are on different branches; "
                        "a rollout is one path from a root"
                    )
                deepest[rollout] = i

    def _check_trajectories(self) -> None:
        if self.trajectories is None:
            return
        if len(self.trajectories) != len(self.rewards):
            raise ValueError(f"{len(self.trajectories)} trajectories for {len(self.rewards)} rollouts; give one each")
        first: dict[int, float] = {}
        for i, (trajectory, reward) in enumerate(zip(self.trajectories, self.rewards, strict=True)):
            if first.setdefault(trajectory, reward) != reward:
                raise ValueError(
                    f"rollout {i} of trajectory {trajectory} has the reward {reward}, another has {first[trajectory]}; "
                    "a trajectory has one"
                )

    def advantages(self, *, normalize_std: bool = True) -> list[float]:
        """One per rollout, see `group_advantages`; every trajectory counts once."""
        numbers = range(len(self.rewards)) if self.trajectories is None else self.trajectories
        rewards = dict(zip(numbers, self.rewards, strict=True))
        values = group_advantages(list(rewards.values()), normalize_std=normalize_std)
        found = dict(zip(rewards, values, strict=True))
        return [found[number] for number in numbers]

    def lengths_only(self, *, keep_log_probs: bool = False) -> RolloutTree:
        """As `RolloutGroup.lengths_only`."""
        nodes = [
            replace(node, tokens=TokenCount(len(node.tokens)), log_probs=node.log_probs if keep_log_probs else None)
            for node in self.nodes
        ]
        return replace(self, nodes=tuple(nodes))

    @classmethod
    def from_group(cls, group: RolloutGroup) -> RolloutTree:
        """The two-level tree of a prefix group."""
        responses = [
            TreeNode(
                tokens=tokens,
                parent=0,
                rollouts=(i,),
                loss_mask=None if group.loss_masks is None else [bool(m) for m in group.loss_masks[i]],
                log_probs=None if group.log_probs is None else (group.log_probs[i],),
            )
            for i, tokens in enumerate(group.responses)
        ]
        return cls((TreeNode(group.prompt, -1), *responses), tuple(group.rewards), group.group_id)

    @cached_property
    def last_nodes(self) -> tuple[int, ...]:
        """Of each rollout, the deepest node that it owns."""
        found = {rollout: i for i, node in enumerate(self.nodes) for rollout in node.rollouts}
        return tuple(found[rollout] for rollout in range(len(self.rewards)))

    @property
    def layout(self) -> PrefixLayout:
        """The tree's segments when it is a pack of its own. A root's last token stands in its children's segments."""
        _, lengths, parents = segments(self, range(len(self.nodes)))
        return PrefixLayout(lengths, parents)


def segments(tree: RolloutTree, nodes: Iterable[int]) -> tuple[dict[int, int], list[int], list[int]]:
    """The segments that some nodes, in order, make in a pack of their own.

    Returns:
        The segment of each node; the rows and the parent of each segment. A parent outside the nodes is none.
    """
    of_node: dict[int, int] = {}
    lengths: list[int] = []
    parents: list[int] = []
    for i in nodes:
        above = of_node.get(tree.nodes[i].parent, -1)
        if tree.nodes[i].joined and above >= 0:
            of_node[i] = above
        else:
            of_node[i] = len(parents)
            parents.append(above)
            lengths.append(0)
        lengths[of_node[i]] += len(node_rows(tree, i))
    return of_node, lengths, parents


def node_rows(tree: RolloutTree, index: int) -> Sequence[int]:
    """Input tokens of a node's rows: shifted by one, so its parent's last token stands first. A root's last token
    is not among the root's rows. A `TokenCount` where the tree has those."""
    node = tree.nodes[index]
    if isinstance(node.tokens, TokenCount):
        return TokenCount(len(node.tokens) - (node.parent < 0))
    before = [] if node.parent < 0 else [tree.nodes[node.parent].tokens[-1]]
    return [*before, *node.tokens[:-1]]


def num_rows(tree: RolloutTree, repeated: bool = False) -> int:
    """Rows that the tree takes in a pack."""
    if not repeated:
        return sum(len(node.tokens) - (node.parent < 0) for node in tree.nodes)
    return sum(sum(len(node.tokens) for node in path_of(tree, r)) - 1 for r in range(len(tree.rewards)))


def path_of(tree: RolloutTree, rollout: int) -> list[TreeNode]:
    """Nodes from a root to the deepest node that the rollout owns."""
    i = tree.last_nodes[rollout]
    path = []
    while i >= 0:
        path.append(tree.nodes[i])
        i = tree.nodes[i].parent
    return path[::-1]


def alone(tree: RolloutTree, rollout: int) -> RolloutTree:
    """The tree of one rollout: its path, a single branch."""
    nodes = [
        replace(owned_by(node, [rollout] if rollout in node.rollouts else [], {rollout: 0}), parent=depth - 1)
        for depth, node in enumerate(path_of(tree, rollout))
    ]
    return RolloutTree(tuple(nodes), (tree.rewards[rollout],), tree.group_id)


def owned_by(node: TreeNode, rollouts: Sequence[int], numbers: Mapping[int, int] | None = None) -> TreeNode:
    """The node with only these of its owners, with their log-probs; ``numbers`` gives them others."""
    log_probs = None
    if node.log_probs is not None:
        log_probs = tuple(node.log_probs[node.rollouts.index(rollout)] for rollout in rollouts)
    names = tuple(rollouts if numbers is None else (numbers[rollout] for rollout in rollouts))
    return replace(node, rollouts=names, log_probs=log_probs)
