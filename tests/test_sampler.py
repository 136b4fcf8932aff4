"""Steps of an epoch: every group once, no group twice in a step, and the same steps after any interruption."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix import RolloutGroup, TokenCount
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.sampler import PrefixGroupSampler

pytestmark = pytest.mark.ci_oldest

PLANNER = StepPlanner(CostModel(row=1.0, pair=0.01))


def collection(count: int, longer: int = 0) -> list[RolloutGroup]:
    """Groups of different lengths."""
    return [
        RolloutGroup(TokenCount(3 + longer), [TokenCount(1 + i % 7), TokenCount(2 + i % 5), TokenCount(9)], [0.0] * 3)
        for i in range(count)
    ]


def steps(sampler: PrefixGroupSampler, count: int) -> list[tuple[int, ...]]:
    return [sampler.next_step().groups for _ in range(count)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 25), st.integers(1, 30), st.integers(0, 3), st.data())
def test_no_group_is_lost_or_doubled_over_epochs_resumes_and_reshards(
    num_groups: int, per_step: int, seed: int, data: st.DataObject
) -> None:
    """Saved and restored at any step, onto another number of ranks and another limit, as JSON."""
    groups, size = collection(num_groups), min(num_groups, per_step)
    per_epoch = -(-num_groups // size)
    count = 3 * per_epoch + 2
    whole = PrefixGroupSampler(groups, PLANNER, groups_per_step=per_step, seed=seed)
    expected = whole.upcoming(count)
    assert steps(whole, count) == expected
    assert all(len(step) == size == len(set(step)) for step in expected)
    # Every group has come as often as every other, or once more: epochs are whole, in whatever steps they lie.
    stream = [i for step in expected for i in step]
    for epochs in range(1, 4):
        within = Counter(i for step in expected[: epochs * num_groups // size] for i in step)
        assert all(epochs - 1 <= within[i] <= epochs for i in range(num_groups)), epochs
    assert len(stream) == count * size
    cut = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    found: list[tuple[int, ...]] = []
    state = None
    for begin, end in zip([0, *cut], [*cut, count], strict=True):
        dp = data.draw(st.integers(1, size))
        planner = replace(PLANNER, dp_size=dp, max_tokens_per_pack=data.draw(st.sampled_from([None, 60])))
        sampler = PrefixGroupSampler(groups, planner, groups_per_step=per_step, seed=seed)
        if state is not None:
            sampler.load_state_dict(json.loads(json.dumps(state)))
        assert sampler.upcoming(end - begin) == expected[begin:end]
        for _ in range(begin, end):
            plan = sampler.next_step()
            assert sorted(i for rank in plan.ranks for i in rank.groups) == list(plan.groups)
            assert len(plan.ranks) == dp
            found.append(plan.groups)
        state = sampler.state_dict()
    assert found == expected


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_epoch_has_each_group_once(num_groups: int, per_step: int) -> None:
    """The groups in the order in which they are drawn, epoch by epoch: a step that two epochs share has both's."""
    sampler = PrefixGroupSampler(collection(num_groups), PLANNER, groups_per_step=per_step)
    size = min(per_step, num_groups)
    taken: Counter[int] = Counter()
    drawn = 0
    for step in sampler.upcoming(4 * num_groups):
        drawn += size
        taken.update(step)
        assert max(taken.values()) - min(taken[i] for i in range(num_groups)) <= 1 + (drawn % num_groups < size)
        if drawn % num_groups == 0:  # the end of an epoch and of a step
            assert set(taken.values()) == {drawn // num_groups}


def test_orders_differ_by_epoch_and_seed() -> None:
    groups = collection(12)
    first, other = (PrefixGroupSampler(groups, PLANNER, groups_per_step=4, seed=seed).upcoming(6) for seed in (0, 1))
    assert first != other and first[:3] != first[3:]
    assert first == PrefixGroupSampler(groups, PLANNER, groups_per_step=4, seed=0).upcoming(6)


def test_the_rest_of_an_epoch_begins_the_next_step() -> None:
    sampler = PrefixGroupSampler(collection(5), PLANNER, groups_per_step=3)
    first, second = sampler.upcoming(2)
    assert sampler.epoch == 0
    rest = set(range(5)) - set(first)
    assert rest < set(second) and len(second) == 3
    sampler.next_step()
    sampler.next_step()
    state = sampler.state_dict()
    assert sampler.epoch == 1 and set(state["carried"]) == rest and state["position"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": collection(7)}, "saved with num_groups 6, this sampler has 7; give it the groups, seed"),
        ({"groups": collection(6, longer=1)}, "saved with lengths_sha256"),
        ({"seed": 1}, "saved with seed 0, this sampler has 1"),
        ({"groups_per_step": 3}, "saved with groups_per_step 4, this sampler has 3"),
    ],
)
def test_another_runs_place_is_refused(change: dict[str, object], message: str) -> None:
    state = PrefixGroupSampler(collection(6), PLANNER, groups_per_step=4).state_dict()
    settings_ = {"groups": collection(6), "groups_per_step": 4} | change
    sampler = PrefixGroupSampler(settings_.pop("groups"), PLANNER, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="seed is missing"):
        sampler.load_state_dict({"epoch": 0, "position": 0, "carried": []})
    assert sampler.upcoming(1) == [sampler.next_step().groups]


def test_what_cannot_make_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no groups to sample"):
        PrefixGroupSampler([], PLANNER, groups_per_step=2)
    with pytest.raises(ValueError, match="2 groups per step cannot feed 3 data-parallel ranks; raise groups_per_step"):
        PrefixGroupSampler(collection(5), replace(PLANNER, dp_size=3), groups_per_step=2)
    with pytest.raises(ValueError, match="max_tokens_per_pack is 8; raise it to at least 9"):
        PrefixGroupSampler(collection(5), replace(PLANNER, max_tokens_per_pack=8), groups_per_step=2)
