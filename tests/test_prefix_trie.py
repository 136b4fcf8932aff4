"""Trees of trajectories against a naive definition that compares them token by token, and follows each by itself."""

import math
import random
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prefix import BatchTotals, LossConfig, RolloutTree, Trajectory, grpo_loss, pack_groups, share_prefixes
from megatron_prefix.packing import Pack
from megatron_prefix.prefix_trie import common_prefix
from megatron_prefix.rollout_tree import num_rows, path_of
from tests import equivalence_cases as ec
from tests.distributed import run_distributed
from tests.test_packing import context
from tests.trajectory_cases import (
    NaiveRollout,
    naive_advantages,
    naive_rollouts,
    naive_weights,
    policy_log_prob,
    trajectory_batches,
)

pytestmark = pytest.mark.ci_newest

CONFIGS = [
    LossConfig(),
    LossConfig(aggregation="sequence", importance_cap=1.3),
    LossConfig(aggregation="constant", constant_length=5, importance_cap=0.8),
    LossConfig(importance_cap=2.0),
]


def packed_weights(packs: list[Pack], config: LossConfig) -> Counter[Any]:
    """The derivative of the packs' loss by the log-prob of every (context, token), on policy."""
    totals = sum((pack.totals for pack in packs), BatchTotals(0, 0))
    weights: Counter[Any] = Counter()
    for pack in packs:
        rows = [(context(pack, row), int(pack.targets[row])) for row in pack.response_rows.tolist()]
        log_probs = torch.tensor([policy_log_prob(*row) for row in rows], dtype=torch.float64, requires_grad=True)
        sampled = None if pack.sampler_log_probs is None else pack.sampler_log_probs.double()
        loss, _ = grpo_loss(log_probs, log_probs.detach(), pack.advantages.double(), pack.pairs, totals,
                            sampler_log_probs=sampled, config=config)  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, log_probs)
        for row, value in zip(rows, gradient.tolist(), strict=True):
            weights[row] += value
    return weights


def assert_same_weights(found: Counter[Any], expected: Counter[Any]) -> None:
    assert all(abs(found[key] - expected[key]) <= 1e-6 for key in found.keys() | expected.keys()), (found, expected)


def by_group(trajectories: list[Trajectory]) -> list[list[NaiveRollout]]:
    groups: dict[Any, list[NaiveRollout]] = {}
    for rollout in naive_rollouts(trajectories):
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def matched(trees: list[RolloutTree], trajectories: list[Trajectory]) -> list[tuple[RolloutTree, list[NaiveRollout]]]:
    """Each tree with its group's naive rollouts, of which it has as many, with the same tokens."""
    spelled = [Counter(_spelled(tree, r) for r in range(len(tree.rewards))) for tree in trees]
    result = []
    for group in by_group(trajectories):
        wanted = Counter(rollout.tokens for rollout in group)
        name = group[0].group if isinstance(group[0].group, str) else None
        found = [t for t, each in zip(trees, spelled, strict=True) if each == wanted and t.group_id == name]
        assert found, (wanted, spelled)
        result.append((found[0], group))
    assert len(result) == len(trees)
    return result


def _spelled(tree: RolloutTree, rollout: int) -> tuple[int, ...]:
    return tuple(token for node in path_of(tree, rollout) for token in node.tokens)


@given(st.booleans().flatmap(trajectory_batches))
def test_every_token_stands_once_for_all_rollouts_that_begin_alike(trajectories: list[Trajectory]) -> None:
    for tree, group in matched(share_prefixes(trajectories), trajectories):
        # A row is what it has seen and which token it predicts: the first token of a sequence is only seen.
        prefixes = {rollout.tokens[:end] for rollout in group for end in range(2, len(rollout.tokens) + 1)}
        assert num_rows(tree) == pack_groups([tree])[0].layout.num_rows == len(prefixes)
        paths = [path_of(tree, r) for r in range(len(tree.rewards))]
        for a, b in combinations(range(len(paths)), 2):
            one, other = _spelled(tree, a), _spelled(tree, b)
            same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            mine = {id(node) for node in paths[a]}
            shared = sum(len(node.tokens) for node in paths[b] if id(node) in mine)
            assert shared == (min(len(one), len(other)) if same is None else same)
        # An only child is no segment of its own: levels are branchings.
        assert all(tree.layout.parents.count(s) != 1 for s in range(len(tree.layout)))


@settings(max_examples=60)
@given(st.booleans().flatmap(trajectory_batches), st.sampled_from(CONFIGS))
def test_every_tokens_loss_weight_is_that_of_each_rollout_by_itself(
    trajectories: list[Trajectory], config: LossConfig
) -> None:
    """In one pack or one a group, with prefixes shared or repeated."""
    assume(config.importance_cap is None or trajectories[0].log_probs is not None)
    trees = share_prefixes(trajectories)
    expected = naive_weights(naive_rollouts(trajectories), config)
    for repeated in (False, True):
        assert_same_weights(packed_weights(pack_groups(trees, repeated=repeated), config), expected)
        most = max(num_rows(tree, repeated) for tree in trees)
        packs = pack_groups(trees, max_tokens_per_pack=most, repeated=repeated)
        assert_same_weights(packed_weights(packs, config), expected)


@given(trajectory_batches())
def test_trajectories_count_once_in_the_advantages(trajectories: list[Trajectory]) -> None:
    for tree, group in matched(share_prefixes(trajectories), trajectories):
        found = sorted(zip(tree.rewards, tree.advantages(), strict=True))
        assert [x for _, x in found] == pytest.approx(sorted(naive_advantages(group)), abs=1e-9)


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_the_common_prefix_is_that_of_a_walk(a: list[int], b: list[int]) -> None:
    walked = 0
    while walked < min(len(a), len(b)) and a[walked] == b[walked]:
        walked += 1
    assert common_prefix(a, b) == walked
    assert common_prefix(a, [*a, *b]) == len(a)


# ---- on megatron-core


def multi_turn(rank: int, world_size: int) -> Any:
    return ec.in_groups(1, 1, ec.compare_multi_turn, ec.Case())


def test_loss_and_gradients_equal_those_of_repeated_sequences() -> None:
    """fp64; every call's tokens in a sequence of its own, as plain megatron-core computes them."""
    (found,) = run_distributed(multi_turn, 1)
    for name, (_, loss, worst) in found.items():
        assert abs(loss) > 1e-4 and worst <= 1e-10, (name, found)
    assert found["shared"][0] == found["split"][0] < found["declined"][0]


# ---- by hand


def test_a_tree_by_hand() -> None:
    """Two rollouts write 3; the first two part behind it, the third only reads it and is one of a kind from there."""
    trajectories = [
        Trajectory([1, 2, 3, 4], [0, 0, 1, 1], 1.0, "g", [None, None, -0.3, -0.4]),
        Trajectory([1, 2, 3, 5, 6, 9], [0, 0, 1, 0, 1, 0], 0.0, "g", [None, None, -0.5, None, -0.6, None]),
        Trajectory([1, 2, 3], [0, 0, 1], 0.5, "g", [0.0, 0.0, -0.7]),
    ]
    (tree,) = share_prefixes(trajectories)
    found = [(node.tokens, node.parent, node.rollouts, node.log_probs, node.joined) for node in tree.nodes]
    assert found == [
        ((1, 2), -1, (), None, False),
        ((3,), 0, (0, 1, 2), ((-0.3,), (-0.5,), (-0.7,)), True),
        ((4,), 1, (0,), ((-0.4,),), False),
        ((5,), 1, (), None, False),
        ((6,), 3, (1,), ((-0.6,),), True),
    ]
    assert (tree.rewards, tree.group_id, tree.trajectories) == ((1.0, 0.0, 0.5), "g", None)
    (pack,) = pack_groups([tree])
    assert pack.pairs.row.tolist() == [0, 1, 0, 2, 0]
    assert pack.sampler_log_probs is not None
    assert pack.sampler_log_probs.tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.6, -0.7])


def test_turns_that_branch_in_the_middle() -> None:
    """The first call is part of one of the two that extend it; its token is trained once, where only it is marked."""
    first, left, right = [1, 2], [1, 2, 3, 4], [1, 2, 3, 5]
    calls = [Trajectory(first, [0, 1], 1.0, "g", trajectory_id="a"),
             Trajectory(right, [0, 0, 0, 1], 1.0, "g", trajectory_id="a"),
             Trajectory(left, [0, 0, 0, 1], 1.0, "g", trajectory_id="a"),
             Trajectory([1, 6], [0, 1], 0.0, "g")]  # fmt: skip
    (tree,) = share_prefixes(calls)
    assert tree.rewards == (1.0, 1.0, 0.0) and tree.trajectories == (0, 0, 1)
    assert [(node.tokens, node.rollouts) for node in tree.nodes] == [
        ((1,), ()), ((2,), (0,)), ((3,), ()), ((4,), (0,)), ((5,), (1,)), ((6,), (2,))
    ]  # fmt: skip
    assert tree.advantages(normalize_std=False) == [0.5, 0.5, -0.5]


def test_equal_sequences_of_two_trajectories_are_two_rollouts() -> None:
    same = [Trajectory([1, 2, 3], [0, 1, 1], reward, "g") for reward in (1.0, 0.0)]
    (tree,) = share_prefixes(same)
    assert [(node.tokens, node.rollouts) for node in tree.nodes] == [((1,), ()), ((2, 3), (0, 1))]
    assert sorted(tree.advantages(normalize_std=False)) == [-0.5, 0.5]


def test_a_rewritten_context_is_another_root_of_the_same_group() -> None:
    calls = [Trajectory([1, 2, 3], [0, 0, 1], 1.0, "g", trajectory_id="a"),
             Trajectory([8, 9], [0, 1], 1.0, "g", trajectory_id="a"),
             Trajectory([1, 2, 4], [0, 0, 1], 0.0, "g", trajectory_id="b")]  # fmt: skip
    (tree,) = share_prefixes(calls)
    assert [node.tokens for node in tree.nodes if node.parent < 0] == [(1, 2), (8,)]
    assert tree.advantages(normalize_std=False) == [0.5, 0.5, -0.5]


def test_deep_and_wide_trees_are_made_without_recursion() -> None:
    turns = 10_000
    deep = Trajectory([t % 7 for t in range(2 * turns)], [t % 2 for t in range(2 * turns)], 1.0, "deep")
    (tree,) = share_prefixes([deep])
    assert len(tree.nodes) == 2 * turns and len(tree.layout) == 1
    story, width = [random.Random(0).randrange(9) for _ in range(1_500)], 1_500
    comb = [Trajectory([*story[:i], 9], [0] + [1] * i, float(i % 2), "comb") for i in range(1, width)]
    (tree,) = share_prefixes(comb)
    assert len(tree.rewards) == width - 1 and num_rows(tree) == 2 * width - 3
    assert max(tree.layout.levels) == width - 2


# ---- refusals

PLAIN = Trajectory([1, 2, 3], [0, 0, 1], 1.0, "g")


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([], "no trajectories were given"),
        (
            [PLAIN, Trajectory([1, 5, 3], [0, 0, 1], 0.0, "g", trajectory_id="b")],
            "different prompts under one group 'g': position 1 is 2 in trajectory 0 of group 'g' and 5 in trajectory "
            "'b' of group 'g'; give each prompt its own group_id",
        ),
        # the second prompt goes on where the first trajectory already wrote
        ([PLAIN, Trajectory([1, 2, 4, 5], [0, 0, 0, 1], 0.0, "g")], r"position 2 is 4 in trajectory 1 .* and 3 in"),
        ([PLAIN, Trajectory([1, 2, 3, 5, 6], [0, 0, 0, 0, 1], 0.0, "g")], "position 3 is 5 in .* and no token in"),
        (
            [Trajectory([1, 2], [0, 1], r, "g", trajectory_id="t") for r in (1.0, 0.5)],
            "trajectory 't' of group 'g' has the rewards 1.0 and 0.5",
        ),
        (
            [Trajectory([1, 2], [0, 1], 1.0, "g", p, "t") for p in (None, [0.0, -1.0])],
            "trajectory 't' of group 'g' has log_probs in some of its sequences only",
        ),
        (
            [Trajectory([1, 2], [0, 1], 1.0, "g", p) for p in ([0.0, -1.0], None)],
            "trajectory 1 of group 'g' lacks log_probs that others have",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(trajectories: list[Trajectory], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_prefixes(trajectories)


def test_trajectories_without_ids_are_grouped_by_their_prompts() -> None:
    bare = [Trajectory([1, 2, t], [0, 0, 1], float(t)) for t in (3, 4)] + [Trajectory([1, 3], [0, 1], 7.0)]
    trees = share_prefixes(bare)
    assert [tree.rewards for tree in trees] == [(3.0, 4.0), (7.0,)]
    assert [tree.group_id for tree in trees] == [None, None]


def test_equal_trajectories_compare_equal() -> None:
    one, other = (Trajectory([1, 2], [0, 1], 1.0, "g", [math.inf, -1.0]) for _ in range(2))
    assert one == other
