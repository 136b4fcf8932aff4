"""From rollouts to packs: shift-by-one segments, ready for a model that shares prefixes.

A node of a rollout tree with tokens t1..tn, whose parent ends with token p, becomes a segment with the rows
[p, t1, ..., t(n-1)] that predict [t1, ..., tn]. A root has no parent token, so its first token is only read. Every
response row therefore has exactly one target and no prefix row has any: there are no shifted labels and no boundary
case where a prefix ends. A prompt P with responses R_i takes (|P| - 1) + sum |R_i| rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_prefix.layout import PartLayout, PrefixLayout
from megatron_prefix.loss import BatchTotals, RolloutPairs
from megatron_prefix.rollout_group import RolloutGroup, TokenCount
from megatron_prefix.rollout_tree import RolloutTree, TreeNode, alone, node_rows, num_rows

if TYPE_CHECKING:
    from megatron_prefix.attention.prefix_cache import PrefixCache

NO_TARGET = -100
"""Target of a row that predicts nothing (torch's ignore index)."""


@dataclass(eq=False)
class SharedPrefix:
    """The prefix of a split group, while a step runs. Equal only to itself.

    Attributes:
        num_rows: rows of its pack.
        cache: its keys on this pipeline stage, opened and closed by `forward_backward_prefix_groups`.
    """

    num_rows: int
    cache: PrefixCache | None = None


@dataclass(frozen=True)
class PackIds:
    """Token ids of a pack of T rows, on the CPU.

    Attributes:
        tokens: int64 [T], input token of each row.
        targets: int64 [T], the token that each row predicts; `NO_TARGET` where it predicts none.
    """

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Pack:
    """One micro-batch: rows of several prefix groups (or trees) side by side. Tensors are on the CPU.

    Shapes: T rows, N response rows, M (row, rollout) pairs, K rollouts.

    Attributes:
        layout: segments of the pack.
        ids: token ids, or None in a pack of groups of which only lengths are known (`TokenCount`).
        positions: int64 [T], position of each row in its own sequence.
        response_rows: int64 [N], rows with a target, ordered by group, response, token.
        pairs: which rollouts own which response row, ordered by rollout, token. M = N for plain groups.
        advantages: fp32 [K].
        rewards: fp32 [K].
        sampler_log_probs: fp32 [M], in the order of the pairs: of the policy that sampled the tokens, or None where
            not recorded. Rollouts that share a row may have been sampled one by one.
        prefix: of a split group, see `splitting`: shared by the pack of its prefix and those of its parts.
    """

    layout: PrefixLayout
    ids: PackIds | None
    positions: Tensor
    response_rows: Tensor
    pairs: RolloutPairs
    advantages: Tensor
    rewards: Tensor
    sampler_log_probs: Tensor | None
    prefix: SharedPrefix | None = None

    @property
    def tokens(self) -> Tensor:
        """`PackIds.tokens`. Raises ValueError where only lengths are known."""
        return self._known_ids().tokens

    @property
    def targets(self) -> Tensor:
        """`PackIds.targets`. Raises ValueError where only lengths are known."""
        return self._known_ids().targets

    def _known_ids(self) -> PackIds:
        if self.ids is None:
            raise ValueError(
                f"this pack of {self.layout.num_rows} rows was made from lengths only and has no token ids; build it "
                "from groups with their tokens where they are read"
            )
        return self.ids

    @property
    def is_prefix(self) -> bool:
        """Whether this is the prefix of a split group: rows whose keys the parts read, without targets in a group."""
        return self.prefix is not None and not isinstance(self.layout, PartLayout)

    @property
    def totals(self) -> BatchTotals:
        """Trained pairs and rollouts of this pack. Add them over all packs and ranks of a step."""
        return self.pairs.totals


def pack_groups(
    groups: Sequence[RolloutGroup | RolloutTree],
    *,
    max_tokens_per_pack: int | None = None,
    normalize_std: bool = True,
    repeated: bool = False,
) -> list[Pack]:
    """Put groups into packs, in their order, each as full as the limit allows.

    Args:
        groups: prefix groups, or rollout trees for multi-turn trajectories.
        max_tokens_per_pack: most rows of one pack; None puts everything into one.
        normalize_std: divide advantages by the standard deviation of the group's rewards (GRPO), or not (Dr. GRPO).
        repeated: the baseline: every rollout as a sequence of its own, with its prefix encoded again.

    Raises:
        ValueError: no groups, a group with more rows than the limit, or sampler log-probs in some groups only.
    """
    trees = check_pack_limit(groups, max_tokens_per_pack, repeated=repeated)
    check_sampler_log_probs(groups)
    packs: list[list[RolloutTree]] = []
    free = 0
    for tree in trees:
        rows = num_rows(tree, repeated)
        if not packs or (max_tokens_per_pack is not None and rows > free):
            packs.append([])
            free = max_tokens_per_pack or 0
        packs[-1].append(tree)
        free -= rows
    return [_build_pack(members, normalize_std, repeated) for members in packs]


def check_sampler_log_probs(groups: Sequence[RolloutGroup | RolloutTree]) -> None:
    """All of a batch or none of it: packs with and without them have different metrics, and importance weights.

    Raises:
        ValueError: some rollouts have them and others do not; names the first group that lacks them.
    """
    known = [(given, i) for i, group in enumerate(groups) for given in _have_log_probs(group)]
    if len({given for given, _ in known}) > 1:
        missing = next(i for given, i in known if not given)
        raise ValueError(
            f"group {group_name(groups[missing], missing)} lacks sampler log_probs that others have; give them for all "
            "rollouts or for none"
        )


def has_log_probs(group: RolloutGroup | RolloutTree) -> bool:
    """Whether the sampler's log-probs are known of all its rollouts."""
    return all(_have_log_probs(group))


def _have_log_probs(group: RolloutGroup | RolloutTree) -> list[bool]:
    if isinstance(group, RolloutTree):
        return [node.log_probs is not None for node in group.nodes if node.rollouts]
    return [group.log_probs is not None]


def repeated_packs(groups: Sequence[RolloutGroup | RolloutTree], *, normalize_std: bool = True) -> list[Pack]:
    """Every rollout as a pack of its own, its prefix encoded again, with the advantage that it has in its group.

    In the order of the groups and their rollouts. One sequence a micro-batch: the baseline with the least memory.
    """
    packs = []
    for tree in check_pack_limit(groups, None):
        for rollout, advantage in enumerate(tree.advantages(normalize_std=normalize_std)):
            pack = _build_pack([alone(tree, rollout)], normalize_std, repeated=True)
            packs.append(replace(pack, advantages=torch.tensor([advantage], dtype=torch.float32)))
    return packs


def check_pack_limit(
    groups: Sequence[RolloutGroup | RolloutTree], max_tokens_per_pack: int | None, *, repeated: bool = False
) -> list[RolloutTree]:
    """The groups as trees, each of which fits a pack.

    Raises:
        ValueError: no groups, or a group with more rows than the limit.
    """
    if not groups:
        raise ValueError("there is nothing to pack: no rollout groups were given")
    if max_tokens_per_pack is not None and max_tokens_per_pack < 1:
        raise ValueError(f"max_tokens_per_pack must be at least 1, got {max_tokens_per_pack}")
    trees = [group if isinstance(group, RolloutTree) else RolloutTree.from_group(group) for group in groups]
    for i, tree in enumerate(trees):
        rows = num_rows(tree, repeated)
        if max_tokens_per_pack is not None and rows > max_tokens_per_pack:
            raise ValueError(
                f"group {group_name(groups[i], i)} needs {rows} rows, max_tokens_per_pack is {max_tokens_per_pack}; "
                f"raise max_tokens_per_pack to at least {rows}, or give the group fewer or shorter responses"
            )
    return trees


def group_name(group: RolloutGroup | RolloutTree, index: int) -> str:
    return f"{index}" if group.group_id is None else f"{index} ({group.group_id!r})"


def _build_pack(trees: Sequence[RolloutTree], normalize_std: bool, repeated: bool) -> Pack:
    rows = PackRows()
    first_rollout = 0
    for tree in trees:
        (_add_repeated if repeated else _add_grouped)(rows, tree, first_rollout)
        first_rollout += len(tree.rewards)
    advantages = [a for tree in trees for a in tree.advantages(normalize_std=normalize_std)]
    return rows.pack(PrefixLayout(rows.lengths, rows.parents), advantages, [r for tree in trees for r in tree.rewards])


class PackRows:
    """The rows of a pack while it is put together."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.pairs: list[tuple[int, int, float]] = []  # rollout, row, the sampler's log-prob

    def add_segment(self, parent: int, tokens: Sequence[int] = (), targets: Sequence[int] = ()) -> int:
        """Append a segment; returns its index."""
        self.lengths.append(len(tokens))
        self.parents.append(parent)
        self._add_rows(tokens, targets)
        return len(self.lengths) - 1

    def add_node(
        self, parent: int, tree: RolloutTree, index: int, rollouts: Mapping[int, int], *, joined: bool = False
    ) -> int:
        """Append a node with its pairs, below segment ``parent`` or, ``joined``, at its end; returns its segment.

        ``rollouts`` numbers those of the tree in the pack.
        """
        node = tree.nodes[index]
        tokens, targets = node_rows(tree, index), _targets(node)
        start = len(self.tokens)
        for rollout in node.rollouts:
            self.pairs += [(rollouts[rollout], start + i, value) for i, value in _trained(node, rollout)]
        if not joined:
            return self.add_segment(parent, tokens, targets)
        assert parent == len(self.lengths) - 1, "a joined node follows its parent"
        self.lengths[parent] += len(tokens)
        self._add_rows(tokens, targets)
        return parent

    def _add_rows(self, tokens: Sequence[int], targets: Sequence[int]) -> None:
        self.tokens.extend(_ids(tokens))
        self.targets.extend(targets)

    def pack(
        self,
        layout: PrefixLayout,
        advantages: Sequence[float],
        rewards: Sequence[float],
        prefix: SharedPrefix | None = None,
        lengths: Sequence[int] | None = None,
        counted: int | None = None,
    ) -> Pack:
        """The pack of these rows, with one advantage and reward per rollout.

        ``lengths`` and ``counted`` are those of `RolloutPairs`, where rollouts are not whole in the pack.
        """
        targets = torch.tensor(self.targets, dtype=torch.long)
        response_rows = torch.nonzero(targets != NO_TARGET).flatten()
        number = {row: n for n, row in enumerate(response_rows.tolist())}
        pairs = sorted(self.pairs)
        sampler = torch.tensor([value for _, _, value in pairs], dtype=torch.float32)
        pair_rollout = torch.tensor([rollout for rollout, _, _ in pairs], dtype=torch.long)
        whole = torch.bincount(pair_rollout, minlength=len(rewards))
        return Pack(
            layout=layout,
            ids=self._ids(targets),
            positions=torch.tensor(layout.positions, dtype=torch.long),
            response_rows=response_rows,
            pairs=RolloutPairs(
                row=torch.tensor([number[row] for _, row, _ in pairs], dtype=torch.long),
                rollout=pair_rollout,
                num_rollouts=len(rewards),
                lengths=whole if lengths is None else torch.tensor(lengths, dtype=torch.long),
                counted=counted,
            ),
            advantages=torch.tensor(advantages, dtype=torch.float32),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            sampler_log_probs=None if sampler.isnan().any() else sampler,
            prefix=prefix,
        )

    def _ids(self, targets: Tensor) -> PackIds | None:
        unknown = self.tokens.count(_UNKNOWN)
        if 0 < unknown < len(self.tokens):
            raise ValueError(
                f"of {unknown} of {len(self.tokens)} rows of a pack no token id is known; pack groups with tokens, or "
                "groups without"
            )
        return None if unknown else PackIds(torch.tensor(self.tokens, dtype=torch.long), targets)


_UNKNOWN = -1
"""Stands for a token id that is not known, while a pack is put together."""


def _ids(tokens: Sequence[int]) -> list[int]:
    return [_UNKNOWN] * len(tokens) if isinstance(tokens, TokenCount) else list(tokens)


def _targets(node: TreeNode) -> list[int]:
    """Of the node's rows: a root has no row that predicts its first token."""
    return _ids(node.tokens) if node.rollouts else [NO_TARGET] * (len(node.tokens) - (node.parent < 0))


def _trained(node: TreeNode, rollout: int) -> list[tuple[int, float]]:
    """Offset of each trained token, with the log-prob of the rollout's sampler (NaN where unknown)."""
    sampled = None if node.log_probs is None else node.log_probs[node.rollouts.index(rollout)]
    return [
        (i, math.nan if sampled is None else sampled[i])
        for i in range(len(node.tokens))
        if node.loss_mask is None or node.loss_mask[i]
    ]


def _add_grouped(rows: PackRows, tree: RolloutTree, first_rollout: int) -> None:
    rollouts = {i: first_rollout + i for i in range(len(tree.rewards))}
    found: dict[int, int] = {-1: -1}
    for i, node in enumerate(tree.nodes):
        found[i] = rows.add_node(found[node.parent], tree, i, rollouts, joined=node.joined)


def _add_repeated(rows: PackRows, tree: RolloutTree, first_rollout: int) -> None:
    for rollout in range(len(tree.rewards)):
        single = alone(tree, rollout)
        segment = -1
        for i, node in enumerate(single.nodes):
            segment = rows.add_node(segment, single, i, {0: first_rollout + rollout}, joined=node.parent >= 0)
