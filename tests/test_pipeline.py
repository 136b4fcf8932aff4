"""Split prefix groups and pipeline stages against plain megatron-core on repeated prefixes, one stage."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix import RolloutGroup, pack_groups, response_log_probs
from megatron_prefix.mcore.equivalence import TOLERANCE
from megatron_prefix.splitting import pack_and_split
from tests import pipeline_cases as pc
from tests.distributed import run_distributed
from tests.mcore_helpers import start
from tests.pipeline_cases import WHOLE, Case

TIMEOUT_S = 240  # for a busy machine; alone it is a tenth
CASES = [
    # one stage
    Case(),
    Case(recompute="full", tied=True, prefix_activations="offload", steps=0),
    Case(recompute="selective", limit=30, dtype="float32", overlap=True, distributed_optimizer=True),
    # two processes
    Case(pp=2, limit=WHOLE, steps=0),
    Case(pp=2, vpp=2, tied=True, overlap=True),
    Case(pp=2, recompute="full", dtype="float32", overlap=True, distributed_optimizer=True),
    Case(pp=2, vpp=2, recompute="selective", prefix_activations="recompute", steps=0),
    Case(tp=2, sequence_parallel=True, recompute="selective", tied=True, steps=0),
    Case(dp=2, dtype="float32", overlap=True, distributed_optimizer=True),
    Case(cp=2, steps=0),
    Case(cp=2, cp_comm_type="a2a", cp_placement="dual_chunk_swap", recompute="full", tied=True, steps=0),
    # three
    Case(layers=6, pp=3, vpp=2, tied=True, recompute="selective", steps=0),
    Case(layers=6, pp=3, tied=True, overlap=True, prefix_activations="recompute", lengths_only=True, steps=0),
    # four
    Case(pp=2, vpp=2, tp=2, sequence_parallel=True, recompute="full", lengths_only=True, steps=0),
    Case(pp=2, tp=2, limit=30, tied=True, overlap=True, lengths_only=True, steps=0),
    Case(layers=8, pp=4, vpp=2, prefix_activations="offload", steps=0),
    Case(pp=4, recompute="full", tied=True, steps=0),
    Case(pp=2, dp=2, vpp=2, dtype="float32", overlap=True, distributed_optimizer=True),
    Case(pp=2, cp=2, cp_comm_type="all_gather", cp_placement="dual_chunk_swap", overlap=True, tied=True, steps=0),
    Case(tp=2, cp=2, lengths_only=True, steps=0),
    # rounding
    Case(dtype="bfloat16", recompute="full"),
    Case(dtype="bfloat16", pp=2),
]
if find_spec("megatron.core.models.hybrid"):
    CASES += [Case(hybrid=True, layers=2, pp=2, recompute="full", steps=0)]
EXACT = [case for case in CASES if case.dtype != "bfloat16"]
LENGTHS_ONLY = [case for case in CASES if case.lengths_only]
ROUNDED = [case for case in CASES if case.dtype == "bfloat16"]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, float]]]:
    """Results of every case by rank: one start of processes for all oracles, and one per world size."""
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # one for all cases of a model, of as many steps as any of them takes
        models = {pc.oracle_file(folder, case): case.model for case in sorted(CASES, key=lambda case: case.steps)}
        run_distributed(pc.write_oracles, 1, list(models.values()), folder, timeout_s=TIMEOUT_S)
        for world_size in sorted({case.world_size for case in CASES}):
            cases = [case for case in CASES if case.world_size == world_size]
            ranks = run_distributed(pc.compare_all, world_size, cases, folder, timeout_s=TIMEOUT_S)
            results |= {case.name: [rank[i] for rank in ranks] for i, case in enumerate(cases)}
    return results


def test_the_cases_cover_every_setting() -> None:
    split = [case for case in EXACT if case.limit < WHOLE]
    for field, values in {
        "pp": {1, 2, 3, 4},
        "vpp": {None, 2},
        "tp": {1, 2},
        "dp": {1, 2},
        "cp": {1, 2},
        "cp_comm_type": {"p2p", "all_gather", "a2a"},
        "cp_placement": {"branch", "dual_chunk_swap"},
        "recompute": {"none", "selective", "full"},
        "tied": {False, True},
        "overlap": {False, True},
        "prefix_activations": {"keep", "recompute", "offload"},
        "limit": {16, 30},
        "lengths_only": {False, True},
    }.items():
        assert {getattr(case, field) for case in split} == values
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
def test_equal_to_plain_megatron_core(case: Case, found: dict[str, list[dict[str, float]]]) -> None:
    """Log-probs, loss, every parameter's gradient, and the parameters after 5 optimizer steps."""
    limit = TOLERANCE[getattr(torch, case.dtype)]
    for result in found[case.name]:
        for quantity in ("log_probs", "loss", "gradients", "grad_norm", "parameters"):
            assert result.get(quantity, 0.0) <= limit, result
        # and the comparison had something to compare
        assert ("gradients" in result) is not case.distributed_optimizer
        assert ("grad_norm" in result) is (case.dtype == "float32")
        assert ("parameters" in result) is (case.steps > 0)
        assert result.get("moved", 1.0) > 1e-3
        assert (result["prefixes"] > 0) is (case.limit < WHOLE)
        assert (result["packs"] >= 4) is (case.limit < WHOLE)


def test_prefixes_share_turns_with_longer_and_shorter_ones(found: dict[str, list[dict[str, float]]]) -> None:
    """In pipelines of all lengths, and with every treatment of activations."""
    counts = {case: [found[case.name][0][which] for which in ("longer", "shorter")] for case in EXACT if case.pp > 1}
    for stages in (2, 3, 4):
        for way in (0, 1):
            assert any(count[way] for case, count in counts.items() if case.pp == stages), (stages, way)
    for activations in ("keep", "recompute", "offload"):
        assert any(sum(count) for case, count in counts.items() if case.prefix_activations == activations), activations


@pytest.mark.parametrize("case", ROUNDED, ids=[case.name for case in ROUNDED])
def test_bf16_is_within_twice_the_plain_paths_own_error(case: Case, found: dict[str, Any]) -> None:
    for result in found[case.name]:
        assert 0 < result["error"] <= 2 * result["plain error"], result


@pytest.mark.parametrize("case", LENGTHS_ONLY, ids=[case.name for case in LENGTHS_ONLY])
def test_token_ids_are_on_tensor_parallel_rank_0_of_the_first_and_last_stage(
    case: Case, found: dict[str, list[dict[str, float]]]
) -> None:
    """Elsewhere no pack has a tensor of them, and the gradients above are those of plain megatron-core all the same."""
    for rank, result in enumerate(found[case.name]):
        # megatron-core's order of ranks: tensor, context, (data,) pipeline
        stage, tensor_rank = rank // (case.world_size // case.pp), rank % case.tp
        has_ids = stage in (0, case.pp - 1) and tensor_rank == 0
        assert result["with ids"] == (result["packs"] if has_ids else 0), rank


def test_the_batch_is_cut_into_2_to_5_unequal_parts() -> None:
    packs = pack_and_split(pc.batch(), max_tokens_per_pack=Case().limit)
    parts: dict[int, list[int]] = {}
    for pack in packs:
        if pack.prefix is not None and not pack.is_prefix:
            parts.setdefault(id(pack.prefix), []).append(pack.layout.num_rows)
    assert sorted(len(rows) for rows in parts.values()) == [2, 3, 5]
    assert all(len(set(rows)) > 1 for rows in parts.values())
    assert sum(pack.prefix is None for pack in packs) == 3


def rows_of_another_layout(rank: int, world_size: int) -> str:
    """What the second stage says of hidden states that are one row longer than its pack, which is no prefix."""
    start(pp=world_size)
    case = Case(pp=world_size, dtype="float32")
    (model,) = pc.build(case)
    (pack,) = pack_groups([RolloutGroup([1, 2, 3], [[4, 5], [6]], [0.0, 1.0])])
    if rank == 0:
        return ""
    model.set_input_tensor(torch.zeros(pack.layout.num_rows + 1, 1, model.config.hidden_size))
    with pytest.raises(ValueError, match="this pipeline stage received") as refused:
        response_log_probs(model, pack)
    return str(refused.value)


def test_a_stage_refuses_rows_of_another_layout() -> None:
    assert "this pipeline stage received 6 rows, its pack has 5" in run_distributed(rows_of_another_layout, 2)[1]
