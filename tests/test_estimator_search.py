"""The search: only legal choices, the quickest that fits, in few evaluations; and what it says when none fits."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.estimator.cluster import Cluster
from megatron_prefix.estimator.lengths import Lengths, draw_groups
from megatron_prefix.estimator.model import PRESETS, Experts, PlannedModel
from megatron_prefix.estimator.search import MOST_CP, Fixed, Found, Task, legal_sizes, search
from megatron_prefix.hardware import DEVICES
from megatron_prefix.mcore.parallel import ParallelSizes
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_group import RolloutGroup

pytestmark = pytest.mark.ci_newest

H100 = DEVICES["H100"]


def groups(
    count: int, prompt: str = "uniform:2000:8000", response: str = "lognormal:1000:0.5:4000"
) -> list[RolloutGroup]:
    return draw_groups(Lengths.parse(prompt), Lengths.parse(response), group_size=8, num_groups=count)


def find(model: str, gpus: int, count: int = 32, fixed: Fixed | None = None, **cluster: Any) -> Found:
    return search(Task(PRESETS[model], groups(count), replace(Cluster(H100, gpus), **cluster)), fixed)


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from([1, 2, 4, 8, 16, 24, 40, 96, 1000]),
    st.integers(1, 300),
)
def test_sizes_are_legal(name: str, gpus: int, num_groups: int) -> None:
    model = PRESETS[name]
    config = model.config
    found = list(legal_sizes(model, Cluster(H100, gpus), num_groups))
    assert len(set(found)) == len(found)
    for sizes in found:
        vpp = sizes.vpp if sizes.vpp > 1 else None
        assert ParallelSizes(tp=sizes.tp, pp=sizes.pp, cp=sizes.cp, vpp=vpp).resolve(gpus).dp == sizes.dp
        assert sizes.gpus == gpus and sizes.dp <= num_groups and sizes.tp <= 8 and sizes.cp <= MOST_CP
        for width in (config.num_attention_heads, config.groups, config.vocab_size):
            assert width % sizes.tp == 0
        assert config.num_layers % (sizes.pp * sizes.vpp) == 0
        if model.experts is None:
            assert sizes.ep == 1 and config.ffn_hidden_size % sizes.tp == 0
        else:
            assert model.experts.num_experts % sizes.ep == 0 == sizes.stage_gpus % sizes.ep


def test_no_legal_size_is_left_out() -> None:
    config = ModelConfig(
        num_layers=4, hidden_size=8, ffn_hidden_size=8, num_attention_heads=4, num_query_groups=2, vocab_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model = PlannedModel("t", config, Experts(2, 1))
    found = {(s.tp, s.cp, s.pp, s.vpp, s.ep, s.dp) for s in legal_sizes(model, Cluster(H100, 4), 2)}
    by_hand = {
        (tp, cp, pp, vpp, ep, 4 // (tp * cp * pp))
        for tp in (1, 2)
        for cp in (1, 2, 4)
        for pp in (1, 2, 4)
        for vpp in (1, 2, 4)
        for ep in (1, 2)
        if 4 % (tp * cp * pp) == 0
        and 4 // (tp * cp * pp) <= 2
        and (vpp == 1 or pp > 1)
        and 4 % (pp * vpp) == 0
        and (4 // pp) % ep == 0
    }
    assert found == by_hand


def test_choices_fit_and_are_sorted() -> None:
    task = Task(PRESETS["qwen3-8b"], groups(32), Cluster(H100, 16))
    found = search(task)
    times = [choice.grouped.step.total for choice in found.choices]
    assert times == sorted(times) and len(found.choices) <= found.evaluated
    for choice in found.choices:
        assert choice.grouped.memory.total <= task.cluster.usable_memory
        assert choice.grouped.step.total > 0 and choice.grouped.microbatches >= 1
        # Long prefixes, eight responses each: sharing pays at equal sizes.
        assert choice.speed_up > 1
    assert found.best_repeated is not None and found.best_repeated.repeated.step.total > times[0]
    distinct = found.distinct
    assert distinct[0] == found.choices[0] and len({replace(c.sizes, vpp=1) for c in distinct}) == len(distinct)


def test_more_memory_or_network_never_hurts_and_fixing_never_helps() -> None:
    base = find("qwen3-32b", 32).choices[0].grouped.step.total
    assert find("qwen3-32b", 32, memory_share=1.0).choices[0].grouped.step.total <= base
    assert find("qwen3-32b", 32, network_bandwidth=200e9).choices[0].grouped.step.total <= base
    for fixed in (Fixed(tp=4), Fixed(pp=8), Fixed(recompute="full"), Fixed(cp=2, dp=1)):
        found = find("qwen3-32b", 32, fixed=fixed)
        assert found.choices[0].grouped.step.total >= base
        for choice in found.choices:
            assert fixed.allows(choice.sizes) and fixed.recompute in (None, choice.recompute)


def test_more_gpus_are_quicker() -> None:
    times = [find("llama-3.1-8b", gpus, 64).choices[0].grouped.step.total for gpus in (8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)


def test_a_limit_of_rows_is_kept() -> None:
    found = find("qwen3-8b", 8, fixed=Fixed(max_tokens=9000))
    assert {choice.max_tokens for choice in found.choices} == {9000}
    assert all(choice.live_prefixes > 0 for choice in found.choices)
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch 500 is less than .* raise it to at least \d+"):
        find("qwen3-8b", 8, fixed=Fixed(max_tokens=500))


@pytest.mark.parametrize(("model", "count"), [("qwen3-32b", 256), ("qwen3-30b-a3b", 64)])
def test_ten_thousand_gpus_are_few_evaluations(model: str, count: int) -> None:
    found = find(model, 10_000, 5 * count)
    assert 100 < found.evaluated < 20_000
    assert found.choices[0].sizes.gpus == 10_000


def test_experts_spread_where_memory_is_short() -> None:
    found = find("qwen3-30b-a3b", 16, fixed=Fixed(pp=1))
    assert min(choice.sizes.ep for choice in found.choices) > 1
    best = found.choices[0].grouped
    assert best.communication_bytes["expert"] > 0 and best.step.expert > 0


def test_what_does_not_fit_says_what_would_help() -> None:
    with pytest.raises(ValueError, match=r"nothing fits 67\.1 GiB of a H100: the least is .* weights, gradients and"):
        find("qwen3-32b", 4)
    with pytest.raises(ValueError, match=r"no parallel sizes with tp=3 use all 8 GPUs: tp must divide 32 heads"):
        find("qwen3-8b", 8, fixed=Fixed(tp=3))
    with pytest.raises(ValueError, match="1 groups feed at most dp=1"):
        find("qwen3-8b", 8, 1, fixed=Fixed(dp=8))
    with pytest.raises(ValueError, match="no rollout groups"):
        Task(PRESETS["qwen3-8b"], [], Cluster(H100, 8))
    for wrong in ({"tp": 0}, {"recompute": "some"}):
        with pytest.raises(ValueError, match=r"tp must be at least 1|recompute must be one of"):
            Fixed(**wrong)  # type: ignore[arg-type]
