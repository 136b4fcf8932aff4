"""Packs against a definition that follows every rollout by itself, as one list of tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix import Pack, PrefixLayout, RolloutGroup, RolloutTree, TreeNode, pack_and_split, pack_groups
from megatron_prefix.packing import NO_TARGET, repeated_packs
from tests.strategies import batches, rollout_groups

Batch = list[RolloutGroup | RolloutTree]


@dataclass(frozen=True)
class Trained:
    """A trained token of a rollout: what stands before it, itself, and the sampler's log-prob (None where unknown)."""

    before: tuple[int, ...]
    token: int
    log_prob: float | None


def by_rollout(batch: Batch) -> list[list[Trained]]:
    """The trained tokens of every rollout in order: no segments, no shifts."""
    return [
        rollout
        for group in batch
        for rollout in (_of_tree(group) if isinstance(group, RolloutTree) else _of_group(group))
    ]


def _of_group(group: RolloutGroup) -> Iterator[list[Trained]]:
    for r, response in enumerate(group.responses):
        yield [
            Trained((*group.prompt, *response[:i]), token, group.log_probs[r][i] if group.log_probs else None)
            for i, token in enumerate(response)
            if group.loss_masks is None or group.loss_masks[r][i]
        ]


def _of_tree(tree: RolloutTree) -> Iterator[list[Trained]]:
    for rollout in range(len(tree.rewards)):
        node = max(i for i, node in enumerate(tree.nodes) if rollout in node.rollouts)
        path = []
        while node != -1:
            path.insert(0, tree.nodes[node])
            node = tree.nodes[node].parent
        before: list[int] = []
        trained = []
        for part in path:
            for i, token in enumerate(part.tokens):
                if rollout in part.rollouts and (part.loss_mask is None or part.loss_mask[i]):
                    own = part.log_probs and part.log_probs[part.rollouts.index(rollout)]
                    trained.append(Trained(tuple(before), token, own[i] if own else None))
                before.append(token)
        yield trained


def context(pack: Pack, row: int) -> tuple[int, ...]:
    """The tokens that a row of a pack sees, itself included, from the layout alone."""
    tokens = pack.tokens.tolist()
    starts = pack.layout.starts
    segment = max(s for s in range(len(pack.layout)) if starts[s] <= row and pack.layout.lengths[s] > 0)
    above = [t for s in pack.layout.branch(segment)[:-1] for t in tokens[starts[s] : starts[s + 1]]]
    return (*above, *tokens[starts[segment] : row + 1])


def pairs_of(pack: Pack) -> list[list[Trained]]:
    """What the pairs of a pack train, by rollout."""
    found: list[list[Trained]] = [[] for _ in range(pack.pairs.num_rollouts)]
    sampled = pack.sampler_log_probs
    for m, (n, rollout) in enumerate(zip(pack.pairs.row.tolist(), pack.pairs.rollout.tolist(), strict=True)):
        row = int(pack.response_rows[n])
        before = context(pack, row)
        assert pack.positions[row] == len(before) - 1
        log_prob = None if sampled is None else sampled[m].item()
        found[rollout].append(Trained(before, int(pack.targets[row]), log_prob))
    return found


def without_log_probs(rollouts: list[list[Trained]]) -> list[list[Trained]]:
    return [[Trained(t.before, t.token, None) for t in rollout] for rollout in rollouts]


def rows_needed(group: RolloutGroup | RolloutTree) -> int:
    if isinstance(group, RolloutTree):
        return sum(len(node.tokens) - (node.parent < 0) for node in group.nodes)
    return len(group.prompt) - 1 + sum(map(len, group.responses))


@settings(max_examples=60)
@given(batches(), st.booleans(), st.integers(0, 30))
def test_every_trained_token_of_every_rollout_is_in_exactly_one_pair(batch: Batch, repeated: bool, room: int) -> None:
    """Over any limit and in both forms: the right context, position, target and log-prob, in order."""
    limit = room + max(pack.layout.num_rows for group in batch for pack in pack_groups([group], repeated=repeated))
    packs = pack_groups(batch, max_tokens_per_pack=limit, repeated=repeated)
    assert all(pack.layout.num_rows <= limit for pack in packs)
    expected = by_rollout(batch)
    found = [rollout for pack in packs for rollout in pairs_of(pack)]
    assert without_log_probs(found) == without_log_probs(expected)
    assert [n for pack in packs for n in pack.pairs.lengths.tolist()] == [len(rollout) for rollout in expected]
    assert sum(pack.totals.tokens for pack in packs) == sum(map(len, expected))
    assert sum(pack.totals.rollouts for pack in packs) == len(expected)
    assert [r for pack in packs for r in pack.rewards.tolist()] == [r for group in batch for r in group.rewards]
    for pack in packs:
        mine = [t.log_prob for rollout in expected[: pack.pairs.num_rollouts] for t in rollout]
        expected = expected[pack.pairs.num_rollouts :]
        if pack.sampler_log_probs is not None:
            assert [t.log_prob for rollout in pairs_of(pack) for t in rollout] == mine


@settings(max_examples=40)
@given(batches(), st.booleans())
def test_the_tensors_of_a_pack_fit_together(batch: Batch, repeated: bool) -> None:
    (pack,) = pack_groups(batch, repeated=repeated)
    rows = pack.layout.num_rows
    assert pack.tokens.shape == pack.targets.shape == pack.positions.shape == (rows,)
    assert pack.tokens.dtype == pack.targets.dtype == pack.positions.dtype == pack.response_rows.dtype == torch.int64
    assert pack.positions.tolist() == list(pack.layout.positions)
    assert pack.response_rows.tolist() == [row for row in range(rows) if pack.targets[row] != NO_TARGET]
    assert pack.advantages.dtype == pack.rewards.dtype == torch.float32
    assert (pack.tokens >= 0).all()
    # ordered by rollout, then by token
    order = list(
        zip(pack.pairs.rollout.tolist(), pack.positions[pack.response_rows[pack.pairs.row]].tolist(), strict=True)
    )
    assert order == sorted(order)
    if not repeated:
        assert rows == sum(map(rows_needed, batch))
        assert all(parent == -1 or s > 0 for s, parent in enumerate(pack.layout.parents))
    else:
        assert set(pack.layout.parents) == {-1} and len(pack.layout) == len(pack.rewards)


@settings(max_examples=40)
@given(batches())
def test_both_forms_have_the_same_pairs(batch: Batch) -> None:
    """Pair for pair the same target and context, so a loss over pairs is the same loss."""
    (grouped,), (repeated,) = pack_groups(batch), pack_groups(batch, repeated=True)
    assert without_log_probs(pairs_of(grouped)) == without_log_probs(pairs_of(repeated))
    assert torch.equal(grouped.pairs.rollout, repeated.pairs.rollout)
    assert torch.equal(grouped.advantages, repeated.advantages)
    assert grouped.layout.num_rows <= repeated.layout.num_rows


@given(st.booleans().flatmap(lambda known: st.lists(rollout_groups(log_probs=known), min_size=1, max_size=4)))
def test_response_rows_of_plain_groups_are_the_response_tokens_in_order(groups: list[RolloutGroup]) -> None:
    """By group, response and token, untrained tokens included: the order of `response_log_probs`, in both forms."""
    expected = [token for group in groups for response in group.responses for token in response]
    for repeated in (False, True):
        (pack,) = pack_groups(groups, repeated=repeated)
        assert pack.targets[pack.response_rows].tolist() == expected
        sampled = [
            None if group.log_probs is None else [t.log_prob for rollout in _of_group(group) for t in rollout]
            for group in groups
        ]
        if None in sampled:
            assert pack.sampler_log_probs is None
        else:
            assert pack.sampler_log_probs is not None
            assert pack.sampler_log_probs.tolist() == [x for xs in sampled if xs for x in xs]


def test_sampler_log_probs_of_some_groups_only_are_refused() -> None:
    """Packs would differ in what they measure and in their importance weights."""
    known = RolloutGroup([5], [[1]], [1.0], log_probs=[[-0.5]])
    unknown = RolloutGroup([5], [[1]], [1.0], group_id="late")
    with pytest.raises(ValueError, match=r"group 1 \('late'\) lacks sampler log_probs"):
        pack_groups([known, unknown])


def test_a_group_by_hand() -> None:
    group = RolloutGroup([5, 6, 7], [[1, 2], [3]], [1.0, 0.0], log_probs=[[-0.5, -1.0], [-2.0]])
    (pack,) = pack_groups([group])
    assert pack.layout.lengths == (2, 2, 1) and pack.layout.parents == (-1, 0, 0)
    assert pack.tokens.tolist() == [5, 6, 7, 1, 7]
    assert pack.targets.tolist() == [NO_TARGET, NO_TARGET, 1, 2, 3]
    assert pack.positions.tolist() == [0, 1, 2, 3, 2]
    assert pack.response_rows.tolist() == [2, 3, 4]
    assert pack.pairs.row.tolist() == [0, 1, 2] and pack.pairs.rollout.tolist() == [0, 0, 1]
    assert pack.sampler_log_probs is not None and pack.sampler_log_probs.tolist() == [-0.5, -1.0, -2.0]
    assert pack.advantages.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)
    (pack,) = pack_groups([group], repeated=True)
    assert pack.layout.lengths == (4, 3) and pack.layout.parents == (-1, -1)
    assert pack.tokens.tolist() == [5, 6, 7, 1, 5, 6, 7]
    assert pack.targets.tolist() == [NO_TARGET, NO_TARGET, 1, 2, NO_TARGET, NO_TARGET, 3]


def test_a_one_token_prompt_shares_no_row() -> None:
    (pack,) = pack_groups([RolloutGroup([9], [[1], [2, 3]], [0.0, 1.0])])
    assert pack.layout.lengths == (0, 1, 2)
    assert pack.tokens.tolist() == [9, 9, 2]
    assert pack.positions.tolist() == [0, 0, 1]


def two_turns() -> RolloutTree:
    """Two rollouts share a first turn, a tool answers, then they part; the second trains only its end."""
    return RolloutTree(
        (
            TreeNode([10, 11], -1),
            TreeNode([20, 21], 0, rollouts=(0, 1), loss_mask=[True, False]),
            TreeNode([30], 1),
            TreeNode([40], 2, rollouts=(0,)),
            TreeNode([50, 51], 2, rollouts=(1,), loss_mask=[False, True]),
        ),
        rewards=(1.0, 0.0),
    )


def test_a_row_owned_by_two_rollouts_is_in_two_pairs() -> None:
    (pack,) = pack_groups([two_turns()])
    assert pack.tokens.tolist() == [10, 11, 20, 21, 30, 30, 50]
    assert pack.targets.tolist() == [NO_TARGET, 20, 21, NO_TARGET, 40, 50, 51]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert pack.response_rows.tolist() == [1, 2, 4, 5, 6]
    assert list(zip(pack.pairs.rollout.tolist(), pack.pairs.row.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 4),
    ]
    assert pack.pairs.lengths.tolist() == [2, 2]


def test_packs_are_filled_in_order() -> None:
    groups: Batch = [RolloutGroup([1] * 4, [[2] * n], [1.0]) for n in (2, 3, 1, 9, 1)]  # 5, 6, 4, 12 and 4 rows
    assert [pack.layout.num_rows for pack in pack_groups(groups, max_tokens_per_pack=12)] == [11, 4, 12, 4]
    assert [pack.layout.num_rows for pack in pack_groups(groups)] == [31]
    assert [pack.layout.num_rows for pack in pack_groups(groups, max_tokens_per_pack=15)] == [15, 12, 4]


@pytest.mark.parametrize("repeated", [False, True])
def test_a_group_above_the_limit_is_refused_with_the_remedy(repeated: bool) -> None:
    groups = [
        RolloutGroup([1, 2], [[3]], [1.0]),
        RolloutGroup([1] * 10, [[2] * 4, [3] * 5], [0.0, 1.0], group_id="maze"),
    ]
    rows = 27 if repeated else 18
    remedy = rf"group 1 \('maze'\) needs {rows} rows, max_tokens_per_pack is 17; raise .* to at least {rows}"
    with pytest.raises(ValueError, match=remedy):
        pack_groups(groups, max_tokens_per_pack=17, repeated=repeated)
    assert len(pack_groups(groups, max_tokens_per_pack=rows, repeated=repeated)) == 2
    with pytest.raises(ValueError, match="group 0 needs 7 rows, max_tokens_per_pack is 5"):
        pack_groups(
            [two_turns()] if not repeated else [RolloutGroup([1, 2], [[3] * 6], [1.0])],
            max_tokens_per_pack=5,
            repeated=repeated,
        )


def test_nothing_to_pack_and_a_limit_of_0_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pack: no rollout groups"):
        pack_groups([])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"max_tokens_per_pack must be at least 1, got {limit}"):
            pack_groups([two_turns()], max_tokens_per_pack=limit)


def test_advantages_with_and_without_the_standard_deviation() -> None:
    groups: Batch = [RolloutGroup([1], [[2]] * 3, [0.0, 1.0, 5.0]), RolloutGroup([1], [[2]], [7.0])]
    (pack,) = pack_groups(groups, normalize_std=False)
    assert pack.advantages.tolist() == [-2.0, -1.0, 3.0, 0.0]
    (pack,) = pack_groups(groups)
    std = math.sqrt((4 + 1 + 9) / 2)
    assert pack.advantages.tolist() == pytest.approx([-2 / std, -1 / std, 3 / std, 0.0], rel=1e-5)


NODE = TreeNode([4, 5], -1)


@pytest.mark.parametrize(
    ("nodes", "rewards", "message"),
    [
        ((), (1.0,), "needs a root as its first node"),
        ((TreeNode([1], 0, (0,)),), (1.0,), "needs a root as its first node"),
        ((NODE, TreeNode([1], -1, (0,))), (1.0,), "node 1: nothing predicts a root's first token"),
        ((TreeNode([1], -1, (0,)),), (1.0,), "node 0: nothing predicts a root's first token"),
        ((NODE, TreeNode([], 0, (0,))), (1.0,), "node 1 is empty; it needs at least one token"),
        ((NODE, TreeNode([1], 0, (1,))), (1.0,), r"node 1: rollouts \(1,\) must be below 1, the number of rewards"),
        ((NODE, TreeNode([1], 0, (-1,))), (1.0,), r"node 1: rollouts \(-1,\)"),
        ((NODE, TreeNode([1], 0, (0, 0))), (1.0,), r"node 1: rollouts \(0, 0\) names a rollout twice"),
        ((NODE, TreeNode([1, 2], 0, (0,), loss_mask=[True])), (1.0,), "node 1: loss_mask has 1 entries for 2 tokens"),
        ((NODE, TreeNode([1, 2], 0, (0,), log_probs=[[-1.0]])), (1.0,), "node 1: log_probs has 1 entries for 2 tokens"),
        ((NODE, TreeNode([1], 0, (0,), log_probs=[])), (1.0,), "node 1: log_probs of 0 rollouts for the 1 that own it"),
        ((TreeNode([1], -1, joined=True), TreeNode([1], 0, (0,))), (1.0,), "node 0 is joined to its parent -1"),
        (
            (NODE, TreeNode([1], 0, (0,), joined=True), TreeNode([2], 0, (1,))),
            (1.0, 0.0),
            "node 1 is joined to its parent 0, but is not the only child",
        ),
        ((NODE, TreeNode([1], 0, (0,))), (1.0, 0.0), r"rollouts \[1\] own no trained token"),
        ((NODE, TreeNode([1], 0, (0,), loss_mask=[False])), (1.0,), r"rollouts \[0\] own no trained token"),
        ((NODE, TreeNode([1], 5, (0,))), (1.0,), "node 1: parent must be -1 \\(a root\\) or an earlier node .* got 5"),
        (
            (NODE, TreeNode([1], -2, (0,))),
            (1.0,),
            "node 1: parent must be -1 \\(a root\\) or an earlier node .* got -2",
        ),
        (
            (NODE, TreeNode([1], 0, (0,)), TreeNode([2], 0, (1,)), TreeNode([3], 1, (0,))),
            (1.0, 0.0),
            "node 3: .* depth-first",
        ),
        (
            (NODE, TreeNode([1], 0, (0,)), TreeNode([2], 0, (0,))),
            (1.0,),
            "rollout 0 owns nodes 1 and 2, which are on different",
        ),
        (
            (NODE, TreeNode([1, -7], 0, (0,))),
            (1.0,),
            "node 1, position 1: a token id must be an int of 0 or more, got -7",
        ),
        ((NODE, TreeNode([1], 0, (0,))), (math.nan,), "reward 0 must be finite, got nan"),
    ],
)
def test_trees_that_do_not_fit_are_refused(
    nodes: tuple[TreeNode, ...], rewards: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_groups([RolloutTree(nodes, rewards)])


def test_a_trajectory_counts_once_in_its_groups_advantages() -> None:
    """Two paths of one trajectory and one of another: as a group of two rewards, in every pack."""
    nodes = (NODE, TreeNode([1], 0, (0,)), TreeNode([2], 0, (1,)), TreeNode([3], -1), TreeNode([4], 3, (2,)))
    tree = RolloutTree(nodes, (1.0, 0.0, 1.0), "agent", (7, 2, 7))
    two = RolloutGroup([4, 5], [[1], [2]], [1.0, 0.0])
    for normalize_std in (True, False):
        high, low = pack_groups([two], normalize_std=normalize_std)[0].advantages.tolist()
        options = {"normalize_std": normalize_std}
        packs = [
            *pack_groups([tree], **options),
            *pack_groups([tree], repeated=True, **options),
        ]
        assert all(pack.advantages.tolist() == [high, low, high] for pack in packs)
        assert [pack.advantages.tolist() for pack in repeated_packs([tree], **options)] == [[high], [low], [high]]
        parts = pack_and_split([tree], max_tokens_per_pack=2, **options)
        assert len(parts) > 2
        assert sorted(x for pack in parts for x in pack.advantages.tolist()) == [low, high, high]
    with pytest.raises(ValueError, match=r"rollout 2 of trajectory 7 has the reward 0\.5, another has 1\.0"):
        RolloutTree(nodes, (1.0, 0.0, 0.5), "agent", (7, 2, 7))
    with pytest.raises(ValueError, match="2 trajectories for 3 rollouts"):
        RolloutTree(nodes, (1.0, 0.0, 0.5), "agent", (7, 2))


def test_joined_nodes_are_one_segment_and_messages_name_the_group() -> None:
    nodes = (TreeNode([1, 2], -1), TreeNode([3, 4], 0, (0,), joined=True), TreeNode([5], 1, (0,)))
    tree = RolloutTree(nodes, (1.0,), "long")
    assert tree.layout == PrefixLayout([3, 1], [-1, 0])
    assert pack_groups([tree])[0].tokens.tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"group 0 \('long'\) needs 4 rows"):
        pack_groups([tree], max_tokens_per_pack=3)
