"""Rollouts that share tokens, as a tree: prefix groups are trees of two levels, multi-turn trajectories deeper ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prefix.layout import PrefixLayout
from megatron_prefix.rollout_group import RolloutGroup, TokenCount, check_all_known, token_ids


@dataclass(frozen=True)
class TreeNode:
    """Consecutive tokens of a rollout tree.

    Attributes:
        tokens: token ids, at least one; or a `TokenCount`, as those of all nodes then are.
        parent: index of the parent node, -1 for the root.
        rollouts: the rollouts that own (generated) these tokens; empty for a prompt or a tool's output.
        loss_mask: per token, whether it is trained; None trains all tokens of an owned node.
        log_probs: per token, the sampler's log-probs; None where unknown.
    """

    tokens: Sequence[int]
    parent: int
    rollouts: tuple[int, ...] = ()
    loss_mask: Sequence[bool] | None = None
    log_probs: Sequence[float] | None = None


@dataclass(frozen=True)
class RolloutTree:
    """Rollouts that share tokens: nodes in depth-first order and one reward per rollout."""

    nodes: tuple[TreeNode, ...]
    rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[0].parent != -1 or any(node.parent == -1 for node in self.nodes[1:]):
            raise ValueError("a rollout tree needs exactly one root, as its first node")
        if self.nodes[0].rollouts:
            raise ValueError(
                "node 0: nothing predicts the root's first token, so it cannot be trained; put the prompt there"
            )
        owned: set[int] = set()
        for i, node in enumerate(self.nodes):
            token_ids(f"node {i}", node.tokens)
            if len(set(node.rollouts)) != len(node.rollouts):
                raise ValueError(f"node {i}: rollouts {node.rollouts} names a rollout twice")
            if any(not 0 <= rollout < len(self.rewards) for rollout in node.rollouts):
                raise ValueError(
                    f"node {i}: rollouts {node.rollouts} must be below {len(self.rewards)}, the number of rewards"
                )
            for name in ("loss_mask", "log_probs"):
                values = getattr(node, name)
                if values is not None and len(values) != len(node.tokens):
                    raise ValueError(f"node {i}: {name} has {len(values)} entries for {len(node.tokens)} tokens")
            if node.loss_mask is None or any(node.loss_mask):
                owned.update(node.rollouts)
        check_all_known("rollout tree", [node.tokens for node in self.nodes])
        if len(owned) != len(self.rewards):
            missing = sorted(set(range(len(self.rewards))) - owned)
            raise ValueError(f"rollouts {missing} own no trained token; leave them out")
        self._check_paths()

    def _check_paths(self) -> None:
        """Depth-first order, and every rollout is one path down the tree."""
        try:
            layout = PrefixLayout([1] * len(self.nodes), [node.parent for node in self.nodes])
        except ValueError as error:
            raise ValueError(f"rollout tree: {str(error).replace('segment', 'node')}") from error
        deepest: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            for rollout in node.rollouts:
                if deepest.get(rollout, 0) not in layout.branch(i):
                    raise ValueError(
                        f"rollout {rollout} owns nodes {deepest[rollout]} and {i}, which are on different branches; "
                        "a rollout is one path from the root"
                    )
                deepest[rollout] = i

    def lengths_only(self, *, keep_log_probs: bool = False) -> RolloutTree:
        """As `RolloutGroup.lengths_only`."""
        nodes = [
            replace(node, tokens=TokenCount(len(node.tokens)), log_probs=node.log_probs if keep_log_probs else None)
            for node in self.nodes
        ]
        return RolloutTree(tuple(nodes), self.rewards)

    @classmethod
    def from_group(cls, group: RolloutGroup) -> RolloutTree:
        """The two-level tree of a prefix group."""
        responses = [
            TreeNode(
                tokens=tokens,
                parent=0,
                rollouts=(i,),
                loss_mask=None if group.loss_masks is None else [bool(m) for m in group.loss_masks[i]],
                log_probs=None if group.log_probs is None else group.log_probs[i],
            )
            for i, tokens in enumerate(group.responses)
        ]
        return cls((TreeNode(group.prompt, -1), *responses), tuple(group.rewards))

    @property
    def layout(self) -> PrefixLayout:
        """The tree's segments when it is a pack of its own. The root's last token stands in its children's segments."""
        lengths = [len(node.tokens) - (node.parent < 0) for node in self.nodes]
        return PrefixLayout(lengths, [node.parent for node in self.nodes])


def node_rows(tree: RolloutTree, index: int) -> Sequence[int]:
    """Input tokens of a node's rows: shifted by one, so its parent's last token stands first. The root's last token
    is not among the root's rows. A `TokenCount` where the tree has those."""
    node = tree.nodes[index]
    if isinstance(node.tokens, TokenCount):
        return TokenCount(len(node.tokens) - (node.parent < 0))
    before = [] if node.parent < 0 else [tree.nodes[node.parent].tokens[-1]]
    return [*before, *node.tokens[:-1]]


def num_rows(tree: RolloutTree, repeated: bool = False) -> int:
    """Rows that the tree takes in a pack."""
    if not repeated:
        return sum(len(node.tokens) for node in tree.nodes) - 1
    return sum(sum(len(node.tokens) for node in path_of(tree, r)) - 1 for r in range(len(tree.rewards)))


def path_of(tree: RolloutTree, rollout: int) -> list[TreeNode]:
    """Nodes from the root to the deepest node that the rollout owns."""
    i = max(i for i, node in enumerate(tree.nodes) if rollout in node.rollouts)
    path = []
    while i >= 0:
        path.append(tree.nodes[i])
        i = tree.nodes[i].parent
    return path[::-1]


def alone(tree: RolloutTree, rollout: int) -> RolloutTree:
    """The tree of one rollout: its path, a single branch."""
    nodes = [
        replace(node, parent=depth - 1, rollouts=(0,) if rollout in node.rollouts else ())
        for depth, node in enumerate(path_of(tree, rollout))
    ]
    return RolloutTree(tuple(nodes), (tree.rewards[rollout],))
