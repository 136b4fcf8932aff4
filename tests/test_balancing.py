"""Plans of steps: nothing lost, limits kept, equal numbers of micro-batches, and how near the best they come."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prefix import LossConfig, RolloutGroup, RolloutTree, TokenCount, TreeNode, pack_groups
from megatron_prefix.balanced_plan import Group, PipelineShape, StepPlan
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.mcore.training import PolicyTrainer, StepInput
from megatron_prefix.packing import Pack
from megatron_prefix.pipeline_order import in_turns, order_jobs
from megatron_prefix.pipeline_plan import pipeline_jobs, plan_pipeline
from megatron_prefix.sharing import decline_unprofitable
from megatron_prefix.spreading import best_fit, least_makespan, spread
from megatron_prefix.workload import Workload
from tests import pipeline_cases as pc
from tests.distributed import run_distributed
from tests.mcore_helpers import start
from tests.pipeline_cases import Case
from tests.strategies import batches

pytestmark = pytest.mark.ci_oldest

COST = CostModel(row=1.0, target_row=0.3, pair=0.02, merged_row=0.05, level=0.4, microbatch=0.7)


# ---- spreading numbers


def costs_and_rows() -> st.SearchStrategy[list[tuple[float, int]]]:
    return st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), min_size=1, max_size=12)


@given(costs_and_rows(), st.integers(1, 5), st.integers(9, 20))
def test_spreading_loses_nothing_keeps_the_limit_and_leaves_no_set_empty(
    items: list[tuple[float, int]], count: int, limit: int
) -> None:
    costs, rows = zip(*items, strict=True)
    fewest = best_fit(rows, limit)
    assert sorted(i for each in fewest for i in each) == list(range(len(rows)))
    assert all(sum(rows[i] for i in each) <= limit for each in fewest)
    count = max(count, len(fewest))
    assume(count <= len(rows))
    sets = spread(costs, count, rows=rows, limit=limit)
    assert len(sets) == count and all(sets)
    assert sorted(i for each in sets for i in each) == list(range(len(rows)))
    assert all(sum(rows[i] for i in each) <= limit for each in sets)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(2, 3))
def test_spreading_is_near_the_optimum_and_the_bound_below_it(costs: list[int], count: int) -> None:
    """Against every assignment. Graham's guarantee for longest first: 4/3 - 1/(3 m)."""
    assume(len(costs) >= count)
    found = max(sum(costs[i] for i in each) for each in spread(costs, count))
    best = min(
        max(sum(c for c, at in zip(costs, where, strict=True) if at == each) for each in range(count))
        for where in itertools.product(range(count), repeat=len(costs))
    )
    assert least_makespan(costs, count) <= best + 1e-9
    assert best <= found <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def test_exchanges_find_what_longest_first_misses() -> None:
    assert sorted(sorted(each) for each in spread([3, 3, 2, 2, 2], 2)) == [[0, 1], [2, 3, 4]]
    assert least_makespan([5, 5, 5, 1], 3) == pytest.approx(6)  # of four, some set has two
    assert least_makespan([9, 1, 1], 3) == 9


# ---- plans


def shapes() -> st.SearchStrategy[PipelineShape]:
    return st.sampled_from([PipelineShape(), PipelineShape(2), PipelineShape(4), PipelineShape(2, chunks=2)])


def planned_or_skip(planner: StepPlanner, groups: Sequence[Group]) -> StepPlan:
    """The plan, where the limit and the number of responses allow one."""
    try:
        return planner.plan(groups)
    except ValueError as error:
        assert "max_tokens_per_pack" in str(error), error
        assume(False)
        raise


@settings(max_examples=80, deadline=None)
@given(batches(7), st.integers(1, 4), st.one_of(st.none(), st.integers(6, 40)), shapes())
def test_a_plan_has_every_group_once_within_the_limit_in_equal_numbers(
    groups: list[Group], dp: int, limit: int | None, shape: PipelineShape
) -> None:
    """And its costs and times are those of the packs that are built from it."""
    assume(len(groups) >= dp)
    planner = StepPlanner(COST, dp, limit, shape)
    plan = planned_or_skip(planner, groups)
    assert plan == planner.plan(groups) and plan == planner.plan([group.lengths_only() for group in groups])
    assert plan.groups == tuple(range(len(groups))) and all(rank.groups for rank in plan.ranks)
    alike = all(len(tree_nodes(group)[0].tokens) > 1 for group in groups)
    slowest = 0.0
    for rank, share in enumerate(plan.ranks):
        packs = plan.packs(groups, rank)
        assert len(packs) == len(share.costs) == plan.num_microbatches
        assert limit is None or all(pack.layout.num_rows <= limit for pack in packs)
        trained = sum(sum(len(n.tokens) for n in tree_nodes(groups[i]) if n.rollouts) for i in share.groups)
        assert sum(len(pack.response_rows) for pack in packs) == trained
        works = [Workload.of_layout(pack.layout, len(pack.response_rows)) for pack in packs]
        costs = [COST.cost(work) + COST.microbatch for work in works]
        for cost, modelled in zip(costs, share.costs, strict=True):
            # Below a root without rows the levels are others than below one with, and add up.
            assert cost - (0 if alike else COST.level) - 1e-9 <= modelled <= cost + 1e-9
        if shape.stages == 1:
            slowest = max(slowest, sum(share.costs))
            continue
        jobs = pipeline_jobs(packs)
        assert [job.kind for job in jobs] == [job.kind for job in share.jobs(shape.stages)]
        jobs = share.jobs(shape.stages)
        turns = in_turns(jobs, order_jobs(jobs, shape.stages, num_chunks=shape.chunks))
        slowest = max(slowest, plan_pipeline(turns, shape.stages, num_chunks=shape.chunks).total)
    assert plan.seconds == pytest.approx(slowest)
    if shape.stages == 1:
        assert plan.lower_bound <= plan.seconds * (1 + 1e-9)


def tree_nodes(group: Group) -> tuple[TreeNode, ...]:
    return (group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)).nodes


@settings(max_examples=30, deadline=None)
@given(batches(5), st.integers(1, 2), st.integers(6, 30))
def test_values_go_to_packs_and_back(groups: list[Group], dp: int, limit: int) -> None:
    """Each response row's value reaches the row with its token, however its group was cut."""
    assume(len(groups) >= dp)
    plan = planned_or_skip(StepPlanner(COST, dp, limit, PipelineShape(4)), groups)
    alone = [pack_groups([group])[0] for group in groups]
    values = {i: tokens_of(pack) for i, pack in enumerate(alone)}
    for rank, share in enumerate(plan.ranks):
        packs = plan.packs(groups, rank)
        by_pack = plan.by_pack(groups, rank, values)
        for pack, mine in zip(packs, by_pack, strict=True):
            assert mine.shape[:1] == pack.response_rows.shape
            assert torch.equal(mine.reshape(-1, 2).long(), tokens_of(pack))
        back = plan.by_group(groups, rank, by_pack)
        assert set(back) == set(share.groups)
        assert all(torch.equal(back[i], values[i]) for i in back)


def tokens_of(pack: Pack) -> torch.Tensor:
    """[N, 2]: target and position of each response row."""
    return torch.stack([pack.targets[pack.response_rows], pack.positions[pack.response_rows]], 1)


def group(prompt: int, *responses: int) -> RolloutGroup:
    return RolloutGroup(TokenCount(prompt), [TokenCount(n) for n in responses], [0.0] * len(responses))


def brute_force(groups: Sequence[Group], dp: int) -> float:
    """The least modelled time of groups in one micro-batch per rank."""
    works = [Workload.of_group(each) for each in groups]
    return min(
        max(
            COST.cost(sum((w for w, at in zip(works, where, strict=True) if at == rank), Workload())) + COST.microbatch
            for rank in range(dp)
        )
        for where in itertools.product(range(dp), repeat=len(groups))
        if len(set(where)) == dp
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_small_step_is_planned_nearly_as_well_as_can_be(seed: int) -> None:
    draw = random.Random(seed)
    groups = [group(draw.randint(2, 60), *(draw.randint(1, 90) for _ in range(4))) for _ in range(7)]
    plan = StepPlanner(COST, 3).plan(groups)
    assert plan.lower_bound <= brute_force(groups, 3) <= plan.seconds <= 1.1 * brute_force(groups, 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [None, 70_000])
@pytest.mark.parametrize("kind", ["long answers", "long prompts"])
def test_balance_over_ranks(kind: str, limit: int | None, seed: int) -> None:
    """64 groups of 16 over 8 ranks, lengths as of reasoning models and of long documents."""
    draw = random.Random(seed)
    groups = []
    for _ in range(64):
        if kind == "long answers":
            groups.append(group(draw.randint(80, 300), *(min(16384, int(draw.lognormvariate(8.0, 0.8))) + 1
                                                          for _ in range(16))))  # fmt: skip
        else:
            groups.append(group(draw.randint(8000, 24000), *(int(draw.lognormvariate(6.0, 0.6)) + 1
                                                            for _ in range(16))))  # fmt: skip
    cost = CostModel(row=1.0, pair=1 / (6 * 4096), microbatch=50)
    plan = StepPlanner(cost, 8, limit).plan(groups)
    assert plan.balance <= 1.03 and plan.seconds <= 1.03 * plan.lower_bound


def test_ranks_with_fewer_groups_cut_them_into_as_many_micro_batches() -> None:
    large, small = group(11, *[90] * 10), group(11, *[70] * 4)
    plan = StepPlanner(CostModel(row=1.0), 2, 320).plan([large, small])
    assert plan.num_microbatches == 5
    splits = {split.group: split for rank in plan.ranks for split in rank.splits}
    assert len(splits[0].parts) == len(splits[1].parts) == 4  # and the prefix


def test_rollouts_that_share_nothing_are_parted_without_a_prefix() -> None:
    declined = decline_unprofitable(RolloutGroup([1, 2, 3], [[4] * 5] * 4, [0.0] * 4), replace(COST, level=1e6)).tree
    many = RolloutGroup([1] * 9, [[2] * 6] * 4, [0.0] * 4)
    plan = StepPlanner(COST, dp_size=2, max_tokens_per_pack=14).plan([declined, many])
    assert plan.num_splits > 0
    mine = next(rank for rank in plan.ranks if rank.groups == (0,))
    packs = plan.packs([declined, many], plan.ranks.index(mine))
    assert plan.num_microbatches == len(packs) > 1 and all(pack.prefix is None for pack in packs)
    assert sum(pack.layout.num_rows for pack in packs) == 4 * (3 - 1 + 5)


def test_a_rank_that_cannot_be_cut_so_far_is_refused() -> None:
    groups = [group(11, *[90] * 10), group(11, 250)]
    with pytest.raises(ValueError, match=r"group 0 of 910 rows needs 5 of at most 320 rows, .* into 2 at most; raise"):
        StepPlanner(CostModel(row=1.0), 2, 320).plan(groups)
    with pytest.raises(ValueError, match="1 groups cannot feed 2 data-parallel ranks"):
        StepPlanner(CostModel(row=1.0), 2).plan(groups[:1])
    with pytest.raises(ValueError, match="group 0: node 3 has 400 tokens, max_tokens_per_pack is 320"):
        StepPlanner(CostModel(row=1.0), 1, 320).plan([group(5, 10, 10, 400)])
    with pytest.raises(ValueError, match="dp_size must be at least 1, got 0"):
        StepPlanner(CostModel(row=1.0), 0)


def test_a_pipeline_gets_more_micro_batches_where_its_bubble_is_worth_them() -> None:
    groups = [group(21, *[30] * 8) for _ in range(2)]
    plain, staged = (StepPlanner(CostModel(row=1.0), 1, None, PipelineShape(n)).plan(groups) for n in (1, 4))
    assert plain.num_microbatches == 1 and staged.num_microbatches > 4
    one = StepPlan(plain.ranks, PipelineShape(4), plain.lower_bound)
    assert staged.seconds < 0.6 * one.seconds
    costly = StepPlanner(CostModel(row=1.0, microbatch=1e4), 1, None, PipelineShape(4)).plan(groups)
    assert costly.num_microbatches == 1


def test_ten_thousand_groups_are_planned_in_one_step() -> None:
    """How long it takes is measured by examples/packing_quality.py."""
    draw = random.Random(0)
    groups = [group(draw.randint(80, 300), *(draw.randint(100, 9000) for _ in range(16))) for _ in range(10_000)]
    plan = StepPlanner(CostModel(row=1.0, pair=1e-5), 8, 150_000).plan(groups)
    assert plan.groups == tuple(range(10_000))
    assert plan.balance < 1.001 and plan.seconds < 1.001 * plan.lower_bound
    assert plan.num_microbatches * 8 < 1.11 * sum(Workload.of_group(each).rows for each in groups) / 150_000 + 8


def test_a_plan_says_what_it_is() -> None:
    plan = StepPlanner(CostModel(row=1.0), 2, 320).plan([group(11, *[90] * 4), group(11, *[90] * 4), group(11, 9)])
    assert plan.describe() == (
        "3 groups (2 split) in 4 micro-batches on each of 2 ranks, balance 1.03, modelled step 1.00 of the lower bound"
    )
    assert plan.metrics()["microbatches"] == 4 and plan.metrics()["groups_split"] == 2


# ---- the same step, however it is planned


def planned_step(rank: int, world_size: int, weights: pc.Whole | None, limit: int | None) -> tuple[float, pc.Whole]:
    """Loss and gradients of the batch of `pipeline_cases`, planned for so many ranks; in one pack without weights."""
    case = Case(layers=2, steps=0)
    start(dp=world_size)
    chunks = pc.build(case)
    trainer = PolicyTrainer(chunks, pc.settings_of(case), LossConfig())
    groups = pc.batch()
    plan = StepPlanner(COST, world_size, limit).plan(groups)
    packs = plan.packs(groups, rank) if limit else pack_groups(groups)
    inputs: list[StepInput] = pc.inputs_of(packs)
    loss = trainer.gradients(inputs)["loss"]
    return loss, {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}


@pytest.mark.parametrize("dp", [2, 3])
def test_a_planned_step_has_the_loss_and_gradients_of_one_pack(dp: int) -> None:
    ((loss, gradients),) = run_distributed(planned_step, 1, None, None)
    for found, mine in run_distributed(planned_step, dp, None, 18):
        assert found == pytest.approx(loss, rel=1e-10, abs=1e-12)
        assert mine.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert (mine[name] - expected).norm() <= 1e-10 * expected.norm() + 1e-14, name
