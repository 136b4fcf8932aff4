"""The whole model under context parallelism against plain megatron-core on repeated prefixes."""

import itertools
import math
from importlib.metadata import version
from typing import Any

import pytest
import torch

from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.mcore.equivalence import TOLERANCE
from tests import cp_cases as cc
from tests.cp_cases import Case, World
from tests.distributed import run_distributed

TIMEOUT_S = 500  # for a busy machine; alone it is a tenth
DUAL, BRANCH = PLACEMENTS

# Every comm type meets every placement on every number of ranks; the rest is spread so that each value meets each comm
# type. Five optimizer steps where they say something new.
CASES: dict[World, list[Case]] = {
    World(cp=2): [
        Case("p2p", BRANCH, steps=5),
        Case("p2p", DUAL, "full", loss="gspo"),
        Case("all_gather", BRANCH, "selective", "trees"),
        Case("all_gather", DUAL, "full", "tiny"),
        Case("a2a", BRANCH, "full", loss="entropy"),
        Case("a2a", DUAL, "selective", "trees", steps=5),
        Case("p2p", "auto", dtype="float32", steps=5),
        Case("a2a", "auto", dtype="float32", kv_heads=1),
    ],
    World(cp=3): [
        Case("p2p", BRANCH, "selective", "tiny"),
        Case("p2p", DUAL, batch="trees"),
        Case("all_gather", BRANCH, loss="gspo", steps=5),
        Case("all_gather", DUAL, "selective"),
        Case("a2a", BRANCH, batch="tiny", kv_heads=2),
        Case("a2a", DUAL, "full", kv_heads=1),
    ],
    World(cp=4): [
        Case("p2p", BRANCH, "full", "trees"),
        Case("p2p", DUAL, loss="entropy"),
        Case("all_gather", BRANCH, "full", "tiny"),
        Case("all_gather", DUAL, batch="trees", loss="gspo"),
        Case("a2a", BRANCH, "selective", kv_heads=2),
        Case("a2a", DUAL, batch="tiny", loss="gspo"),
        Case("a2a+p2p", BRANCH, "full", steps=5),
        Case("a2a+p2p", DUAL, batch="trees", kv_heads=2, loss="gspo"),
        Case("a2a+p2p", BRANCH, "selective", "tiny", kv_heads=1),
    ],
    World(tp=2, cp=2): [
        Case("p2p", DUAL, "full", loss="gspo"),
        Case("all_gather", BRANCH, batch="tiny"),
        Case("a2a", BRANCH, batch="trees", kv_heads=2),
    ],
    World(tp=2, cp=2, sequence_parallel=True): [
        Case("p2p", BRANCH, "full", "trees", steps=5),
        Case("p2p", DUAL, batch="tiny"),
        Case("all_gather", DUAL, "selective"),
        Case("all_gather", BRANCH, loss="entropy"),
        Case("a2a", DUAL, "full", loss="gspo", kv_heads=2),
        Case("a2a", BRANCH, "full", "tiny"),
    ],
    World(cp=2, dp=2): [
        Case("p2p", BRANCH, dtype="float32", steps=5, distributed_optimizer=True),
        Case("a2a", DUAL, "full", loss="gspo"),
        Case("all_gather", "auto", batch="trees", steps=5),
    ],
}
NAMES = {world: f"tp{world.tp}-cp{world.cp}-dp{world.dp}{'-sp' * world.sequence_parallel}" for world in CASES}


def test_the_cases_cover_what_they_should() -> None:
    for world, cases in CASES.items():
        used = {(case.comm_type, case.placement) for case in cases}
        if world.size == world.cp:
            expected = [comm for comm in COMM_TYPES if comm != "a2a+p2p" or world.cp == 4]
            assert used >= set(itertools.product(expected, PLACEMENTS)), world
    everything = [case for cases in CASES.values() for case in cases]
    for comm_type in COMM_TYPES:
        mine = [case for case in everything if case.comm_type == comm_type]
        for field in ("recompute", "batch", "loss"):
            values = {getattr(case, field) for case in everything} - {"entropy"}
            assert {getattr(case, field) for case in mine} >= values, (comm_type, field)
        assert any(case.steps for case in mine)


@pytest.mark.parametrize("world", CASES, ids=list(NAMES.values()))
def test_equal_to_plain_megatron_core(world: World) -> None:
    ranks = run_distributed(cc.compare_all, world.size, world, CASES[world], timeout_s=TIMEOUT_S)
    for results in ranks:
        for case, result in zip(CASES[world], results, strict=True):
            check(case, result)


def check(case: Case, result: dict[str, Any]) -> None:
    limit = TOLERANCE[getattr(torch, case.dtype)]
    shown = {key: value for key, value in result.items() if not isinstance(value, dict)}
    assert result["max_log_prob_diff"] <= limit * 10, (case, shown)
    assert result["worst"] <= limit, (case, result)
    # and there was something to compare
    assert bool(result["gradients"]) is not case.distributed_optimizer
    assert bool(result["parameters"]) is bool(case.steps) and (result["moved"] > 3e-4) is bool(case.steps)
    assert abs(result["loss"]) > 1e-6 and math.isfinite(result["loss"])


def test_bf16_is_within_twice_the_plain_paths_own_error() -> None:
    ranks = run_distributed(cc.bf16_errors, 2, World(cp=2), Case("p2p", BRANCH, dtype="bfloat16"), timeout_s=TIMEOUT_S)
    for result in ranks:
        for quantity, (mine, plain) in result.items():
            assert 0 < mine <= 2 * plain, (quantity, mine, plain)


PER_LAYER = Case(["p2p", "a2a"], BRANCH)


@pytest.mark.skipif(
    version("megatron-core") < "0.17",
    reason="megatron-core 0.16 reads its list of cp_comm_type one entry too far and raises for the last layer",
)
def test_one_comm_type_per_layer() -> None:
    for (result,) in run_distributed(cc.compare_all, 2, World(cp=2), [PER_LAYER], timeout_s=TIMEOUT_S):
        check(PER_LAYER, result)


@pytest.mark.parametrize(("cp", "placement"), [(2, DUAL), (3, BRANCH)])
def test_own_rows_and_the_full_vector(cp: int, placement: str) -> None:
    """full=False gives a rank its own rows in order; the full vector is the same everywhere, its gradient too."""
    (alone,) = run_distributed(cc.full_on_one_rank, 1, timeout_s=TIMEOUT_S)
    ranks = run_distributed(cc.own_rows, cp, World(cp=cp), placement, timeout_s=TIMEOUT_S)
    without_rows = 0
    for i, expected in enumerate(alone):
        mine = [number for rank in ranks for number in rank[i]["mine"]]
        assert sorted(mine) == list(range(len(expected)))
        for rank in ranks:
            result = rank[i]
            without_rows += not result["mine"]
            assert (result["full"] - expected).abs().max() <= 1e-12
            assert torch.equal(result["own"], result["full"][result["mine"]])
            assert torch.equal(result["own_entropy"], result["full_entropy"][result["mine"]])
            assert (result["full_entropy"] > 0).all()
            assert result["gradient_difference"] <= 1e-12
    assert without_rows
