"""Declined sharing: the same loss, a lower modelled cost, and nothing declined that pays."""

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prefix import RolloutGroup, RolloutTree, Trajectory, TreeNode, pack_and_split, pack_groups, share_prefixes
from megatron_prefix.cost_model import CostModel
from megatron_prefix.rollout_tree import num_rows
from megatron_prefix.sharing import Sharing, decline_unprofitable, summary
from megatron_prefix.workload import Workload
from tests.split_cases import limits, split_or_skip
from tests.strategies import rollout_groups, rollout_trees
from tests.test_prefix_trie import CONFIGS, assert_same_weights, packed_weights
from tests.test_splitting import pairs_of
from tests.trajectory_cases import naive_rollouts, naive_weights, trajectory_batches

pytestmark = pytest.mark.ci_oldest

COSTS = st.builds(
    CostModel,
    row=st.floats(0.01, 5),
    target_row=st.floats(0, 5),
    pair=st.floats(0, 1),
    merged_row=st.floats(0, 3),
    level=st.floats(0, 30),
)


@settings(max_examples=60)
@given(st.booleans().flatmap(trajectory_batches), COSTS, st.data())
def test_weights_stay_those_of_the_rollouts(
    trajectories: list[Trajectory], cost: CostModel, data: st.DataObject
) -> None:
    """Also where the group is larger than a micro-batch."""
    sampled = trajectories[0].log_probs is not None
    config = data.draw(st.sampled_from(CONFIGS if sampled else CONFIGS[:1]))
    expected = naive_weights(naive_rollouts(trajectories), config)
    trees = share_prefixes(trajectories, cost)
    assert_same_weights(packed_weights(pack_groups(trees), config), expected)
    assert_same_weights(packed_weights(pack_groups(trees, repeated=True), config), expected)


@given(rollout_trees(), COSTS, st.data())
def test_any_tree_keeps_its_pairs_whole_or_split(tree: RolloutTree, cost: CostModel, data: st.DataObject) -> None:
    """Masks, log-probs and trajectories included."""
    found = decline_unprofitable(tree, cost).tree
    expected = pairs_of(pack_groups([tree]))
    assert pairs_of(pack_groups([found])) == expected
    assert pairs_of(split_or_skip([found], data.draw(limits([found])), data.draw(st.integers(1, 3)))) == expected
    short = tree.lengths_only()
    assert decline_unprofitable(short, cost).tree == found.lengths_only()


@settings(max_examples=200)
@given(rollout_trees(max_nodes=12, max_length=6), COSTS)
def test_declining_lowers_the_cost(tree: RolloutTree, cost: CostModel) -> None:
    result = decline_unprofitable(tree, cost)
    assert result.cost == cost.cost(Workload.of_group(result.tree))
    assert result.cost <= result.cost_shared * (1 + 1e-9)
    if not result.shared:
        assert result.tree.layout.parents == (-1,) * len(result.tree.layout)
    again = decline_unprofitable(result.tree, cost)
    assert again.cost <= result.cost * (1 + 1e-9)


@given(rollout_groups(max_length=20), COSTS)
def test_a_group_is_shared_where_the_cost_model_says_that_it_pays(group: RolloutGroup, cost: CostModel) -> None:
    saving = cost.saving(group)
    assume(abs(saving) > 1e-9 and len(group.prompt) > 1)
    result = decline_unprofitable(group, cost)
    assert (result.shared, result.declined) == ((1, 0) if len(group) > 1 and saving > 0 else (0, int(len(group) > 1)))
    assert result.cost == pytest.approx(min(result.cost_shared, result.cost_repeated))


@given(rollout_trees(max_nodes=10))
def test_what_costs_nothing_to_repeat_is_repeated_and_what_costs_nothing_to_share_is_shared(tree: RolloutTree) -> None:
    dear, cheap = (
        decline_unprofitable(tree, CostModel(row=1.0, **prices)) for prices in ({"level": 1e6}, {"merged_row": 0.0})
    )
    assert dear.shared == 0 and Workload.of_group(dear.tree) == Workload.repeated(tree)
    assert cheap.declined == 0 and num_rows(cheap.tree) == num_rows(tree)


def turns() -> RolloutTree:
    """A long prompt, below it a short turn of two rollouts and a long one of two others."""
    nodes = (
        TreeNode([1] * 50, -1),
        TreeNode([2] * 3, 0, (0, 1), log_probs=[[-0.1] * 3, [-0.2] * 3]),
        TreeNode([3] * 40, 1, (0,), log_probs=[[-0.3] * 40]),
        TreeNode([4] * 40, 1, (1,), log_probs=[[-0.4] * 40]),
        TreeNode([5] * 60, 0),
        TreeNode([6] * 30, 4, (2,), log_probs=[[-0.5] * 30]),
        TreeNode([7] * 30, 4, (3,), log_probs=[[-0.6] * 30]),
    )
    return RolloutTree(nodes, (0.0, 1.0, 2.0, 3.0), "turns")


def test_one_turn_is_declined_and_another_is_not() -> None:
    result = decline_unprofitable(turns(), CostModel(row=1.0, merged_row=0.1))
    assert (result.shared, result.declined) == (2, 1)
    found = [(len(node.tokens), node.parent, node.rollouts, node.joined) for node in result.tree.nodes]
    assert found == [
        (50, -1, (), False),
        (3, 0, (0,), False), (40, 1, (0,), True),
        (3, 0, (1,), False), (40, 3, (1,), True),
        (60, 0, (), False),
        (30, 5, (2,), False), (30, 5, (3,), False),
    ]  # fmt: skip
    assert [node.log_probs for node in result.tree.nodes[1:4:2]] == [([-0.1] * 3,), ([-0.2] * 3,)]
    # Dear levels: the long turn alone does not pay for its level, the prompt does.
    result = decline_unprofitable(turns(), CostModel(row=1.0, merged_row=0.1, level=70.0))
    assert (result.shared, result.declined) == (1, 2)
    assert max(result.tree.layout.levels) == 1


@pytest.mark.parametrize(("merged_row", "declined"), [(1.9, 0), (2.1, 1)])
def test_copies_attend_to_the_rows_above_them(merged_row: float, declined: int) -> None:
    """A copy of the turn of 3 is 6 + 3 x 49 pairs and 3 merged rows, and 80 rows are not merged any more: 1.99."""
    result = decline_unprofitable(turns(), CostModel(row=0.0, pair=1.0, merged_row=merged_row))
    assert result.declined == declined


def test_a_declined_group_is_split_like_any_other() -> None:
    group = RolloutGroup([1, 2, 3], [[4] * 5, [5] * 6, [6] * 7], [0.0, 1.0, 2.0], "short")
    result = decline_unprofitable(group, CostModel(row=1.0, level=100.0))
    assert result.tree.layout.lengths == (7, 8, 9) and result.tree.layout.parents == (-1, -1, -1)
    packs = pack_and_split([result.tree], max_tokens_per_pack=15)
    assert [pack.layout.num_rows for pack in packs] == [15, 9]
    assert pairs_of(packs) == pairs_of(pack_groups([group]))


def results(*groups: Any) -> list[Sharing]:
    return [decline_unprofitable(group, CostModel(row=1.0, merged_row=0.5, level=4.0)) for group in groups]


def test_the_summary_says_what_was_declined() -> None:
    long = RolloutGroup([1] * 101, [[2] * 10] * 5, [0.0] * 5)
    short = RolloutGroup([1] * 3, [[2] * 10] * 5, [0.0] * 5)
    single = RolloutGroup([1] * 9, [[2] * 10], [0.0])
    assert summary(results(long)) == "sharing prefixes of 1 groups: modelled 3.07x over repeated prefixes"
    one, other, third = results(long, short, single)
    there = (60 + 18) / (52 + 25 + 4 + 18 + 5 + 4)
    gain = (550 + 60 + 18) / (one.cost + 60 + 18)
    assert (other.cost_repeated, third.cost) == (60.0, 18.0) and math.isclose(one.cost, 150 + 25 + 4)
    assert summary([one, other, third]) == (
        f"sharing prefixes of 3 groups: modelled {gain:.2f}x over repeated prefixes; declined for 2 of them (one "
        f"rollout, or a short prefix: modelled {there:.2f}x)"
    )
