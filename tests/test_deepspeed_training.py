"""DeepSpeed's engine takes the steps that megatron-core's takes: ZeRO 0 to 3 with tensor and context parallelism."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.training import PolicyTrainer
from tests import deepspeed_cases as dc
from tests.deepspeed_cases import SPLIT, Case
from tests.distributed import run_distributed

STAGES = [(f"ZeRO-{stage}", {"stage": stage}) for stage in range(4)]
TIMEOUT_S = 400
CASES = (Case(), Case(tp=2, sequence_parallel=True), Case(cp=2, tied=True), Case(tp=2, cp=2))
BF16_RUNS: list[tuple[str, dict[str, Any]]] = [
    ("bf16 sums", {"stage": 1}),
    ("fp32 sums", {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}),
    ("ZeRO-2", {"stage": 2, "data_types": {"grad_accum_dtype": "fp32"}}),
    ("ZeRO-3", {"stage": 3}),
]


def four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """All cases in one start of the processes."""
    found: dict[str, Any] = {}
    for case in CASES:
        dc.start_deepspeed(rank, tp=case.tp, cp=case.cp)
        found[f"tp {case.tp} cp {case.cp}"] = dc.differences(case, STAGES)
    split = replace(CASES[1], max_tokens=SPLIT)
    dc.start_deepspeed(rank, tp=split.tp)
    found["split groups"] = dc.differences(split, STAGES[:3])
    return found


@pytest.fixture(scope="module")
def matrix() -> list[dict[str, Any]]:
    return run_distributed(four_ranks, 4, timeout_s=TIMEOUT_S)


@pytest.mark.ci_newest
def test_the_steps_are_those_of_megatron_core(matrix: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(matrix):
        assert len(found) == len(CASES) + 1
        for case, runs in found.items():
            for run, (where, error) in runs.items():
                assert error < dc.PRECISION, f"rank {rank}, {case}, {run}: {where} differs by {error:.1e}"


def two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    dc.start_deepspeed(rank)
    case = Case()
    shares = [PolicyTrainer(dc.build(case), case.settings, dc.LOSS)]
    counts = [len(dc.inputs_of(trainer, case)) for trainer in shares]
    tokens = [sum(x.pack.totals.tokens for x in dc.inputs_of(trainer, case)) for trainer in shares]
    found: dict[str, Any] = {"counts": all_gather_object((counts, tokens), torch.distributed.group.WORLD)}
    found["bf16"] = dc.differences(replace(case, dtype=torch.bfloat16), BF16_RUNS)
    found["offload"] = dc.differences(
        case,
        [
            (
                f"ZeRO-{stage}",
                {
                    "stage": stage,
                    "zero": {"offload_optimizer": {"device": "cpu"}},
                    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
                    "zero_force_ds_cpu_optimizer": False,
                },
            )
            for stage in (2, 3)
        ],
    )
    found["nonfinite"] = [dc.nonfinite_step(case, stage) for stage in range(4)]
    refused = {}
    for stage, config in ((3, {}), (2, {"data_types": {"grad_accum_dtype": "fp32"}})):
        half = replace(case, max_tokens=SPLIT, dtype=torch.float32 if stage == 3 else torch.bfloat16)
        trainer = dc.by_deepspeed(half, stage, **config)
        with pytest.raises(ValueError, match="split groups") as error:
            dc.train(trainer, half)
        refused[stage] = str(error.value)
    found["refused"] = refused
    from megatron_prefix.deepspeed.ulysses import ulysses_layer_spec

    dc.start_deepspeed(rank, cp=2)
    runs = [(f"ZeRO-{stage}", {"stage": stage, "layer_spec": ulysses_layer_spec}) for stage in (1, 3)]
    found["ulysses"] = dc.differences(Case(cp=2), runs)
    return found


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_distributed(two_ranks, 2, timeout_s=TIMEOUT_S)


@pytest.mark.ci_oldest
def test_ranks_have_unequal_shares(pair: list[dict[str, Any]]) -> None:
    """Else the tests above would prove less than they say."""
    (counts_0, tokens_0), (counts_1, tokens_1) = pair[0]["counts"]
    assert counts_0 != counts_1 and tokens_0 != tokens_1


@pytest.mark.ci_oldest
def test_offload_to_the_host(pair: list[dict[str, Any]]) -> None:
    for stage, (where, error) in pair[0]["offload"].items():
        assert error < dc.PRECISION, (stage, where)


@pytest.mark.ci_oldest
def test_ulysses_is_the_same_attention(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        for stage, (where, error) in found["ulysses"].items():
            assert error < dc.PRECISION, (stage, where)


@pytest.mark.ci_oldest
def test_bf16_up_to_its_rounding(pair: list[dict[str, Any]]) -> None:
    for run, (where, error) in pair[0]["bf16"].items():
        assert error < 0.05, (run, where, error)


@pytest.mark.ci_oldest
def test_a_step_that_is_not_finite_updates_nothing(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        for stage, (metrics, same, after) in enumerate(found["nonfinite"]):
            assert metrics["updated"] == 0 and not math.isfinite(metrics["loss"]), stage
            assert same and math.isinf(metrics["grad_norm"]), stage
            assert after["updated"] == 1 and math.isfinite(after["grad_norm"]), stage


@pytest.mark.ci_oldest
def test_split_groups_are_refused_where_they_do_not_work(pair: list[dict[str, Any]]) -> None:
    assert "ZeRO-3 with split groups" in pair[0]["refused"][3]
    assert "adds gradients up in torch.bfloat16" in pair[0]["refused"][2]
