"""The benchmarks over context-parallel ranks: what they report next to one rank, and that they refuse what differs."""

import json
from typing import Any

import pytest

from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.bench.attention import AttentionSizes
from megatron_prefix.bench.context_parallel import bench_context_parallel
from megatron_prefix.bench.group import DTYPES, GroupSizes
from megatron_prefix.bench.over_ranks import CpSizes
from megatron_prefix.bench.report import ResultsDifferError
from megatron_prefix.bench.step import StepSettings
from megatron_prefix.bench.step_over_ranks import bench_step_over_ranks
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.context_parallel.traffic import AttentionShape, computed_areas, layer_traffic
from tests.cli_runs import Run, run_cli
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config
from tests.test_bench import WrongBackward

pytestmark = pytest.mark.ci_oldest

GROUP = GroupSizes(24, 4, 3)
SIZES = ["--prefix-len", "24", "--response-len", "4", "--group-size", "3", "--repeats", "2", "--json"]
ATTENTION = ["bench", "attention", *SIZES, "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
STEP = ["bench", "step", *SIZES, "--layers", "3", "--hidden-size", "32", "--vocab-size", "64"]  # 4 heads, 2 for keys
RUNS = {
    2: [
        [*ATTENTION, "--cp-comm-type", "p2p", "--cp-placement", "branch"],
        [*ATTENTION, "--cp-comm-type", "a2a", "--dtype", "bf16"],
        [*STEP, "--cp-comm-type", "p2p", "--dtype", "fp64"],
        [*STEP, "--cp-comm-type", "all_gather", "--dtype", "bf16"],
    ],
    4: [
        [*ATTENTION, "--cp-comm-type", "a2a+p2p", "--cp-a2a", "2"],
        [*STEP, "--cp-comm-type", "a2a+p2p", "--cp-a2a", "2", "--cp-placement", "dual_chunk_swap"],
    ],
}


@pytest.mark.parametrize("cp", RUNS)
def test_ranks_report_time_wait_and_planned_bytes_next_to_one_rank(cp: int) -> None:
    results = run_cli(*([*arguments, "--cp", str(cp)] for arguments in RUNS[cp]), world_size=cp)
    for arguments, ranks in zip(RUNS[cp], results, strict=True):
        assert [run.exit_code for run in ranks] == [0] * cp, ranks[0]
        check(arguments, cp, ranks[0])
        assert not any(run.stdout for run in ranks[1:])


def check(arguments: list[str], cp: int, run: Run) -> None:
    report, sizes = run.json, run.json["sizes"]
    layers = 3 if arguments[1] == "step" else 1
    shape = AttentionShape(4, 2, 8, bytes_per_element=DTYPES[sizes["dtype"]].itemsize)
    given = arguments[arguments.index("--cp-placement") + 1] if "--cp-placement" in arguments else "auto"
    how = sizes["comm_type"], sizes["a2a_size"]
    plan = choose_plan(GROUP.layout(), cp, given, CpLayers(shape, (how[0],), how[1]))
    assert report["ok"] and (sizes["cp"], sizes["placement"], len(report["ranks"])) == (cp, plan.name, cp)
    assert (report["rows"], report["area"]) == (plan.layout.num_rows, plan.layout.area)
    phases = {"forward", "backward", "total"} | ({"gradients"} if layers > 1 else set())
    assert report["seconds_one_rank"].keys() == {"forward", "backward", "total"}
    moved, areas = layer_traffic(plan, shape, *how), computed_areas(plan, *how)
    for rank, found in enumerate(report["ranks"]):
        assert (found["rows"], found["area"]) == (plan.local_layouts[rank].num_rows, areas[rank])
        assert found["seconds"].keys() == phases
        assert found["seconds"]["total"] > found["seconds_waited"] > 0
        total = moved[rank].total
        assert (found["bytes_sent"], found["bytes_received"]) == (layers * total.sent, layers * total.received)
    together = report["differences"]["context parallel"]
    assert len(together) == (4 if layers == 1 else 1 + 3 * 6 + 3)
    limit = report["tolerance"]["context parallel"]
    assert limit == {"fp64": 1e-10, "fp32": 1e-5}.get(sizes["dtype"], limit) and max(together.values()) <= limit < 0.1
    assert f"cp {cp}, {how[0]}, {plan.name}: one rank" in " ".join(run.stderr.split())
    assert "│ alone" in run.stderr and "…" not in run.stderr


def refused_when_one_rank_is_wrong(rank: int, world_size: int) -> list[dict[str, Any]]:
    start(cp=world_size)
    if rank == 1:
        KERNELS["sdpa"] = WrongBackward()
    cp, reports = CpSizes("p2p", "branch"), []
    for bench in (
        lambda: bench_context_parallel(GROUP, AttentionSizes(4, 2, 8, "fp32"), cp, repeats=1),
        lambda: bench_step_over_ranks(GROUP, tiny_config(), StepSettings("fp32"), cp, repeats=1),
    ):
        with pytest.raises(ResultsDifferError) as error:
            bench()
        reports.append(error.value.report)
    return reports


def test_no_times_where_a_rank_is_wrong() -> None:
    first, second = run_distributed(refused_when_one_rank_is_wrong, 2)
    assert json.dumps(first) == json.dumps(second)
    for report, named in zip(first, ("dk", "grad decoder.layers.0.self_attention.linear_qkv.weight"), strict=True):
        assert report["ok"] is False and not {"ranks", "seconds_one_rank"} & report.keys()
        assert any(f"context parallel: {named} differs" in line for line in report["failures"])


def test_bad_input_is_refused() -> None:
    words = [
        [*ATTENTION, "--cp", "2"],
        [*STEP, "--cp", "2"],
        [*STEP, "--cp-a2a", "2"],
        [*ATTENTION, "--cp-comm-type", "a2a+p2p", "--cp", "4", "--cp-a2a", "3"],
    ]
    ends = [
        "runs in 2 process(es), 1 run",
        "runs in 2 process(es), 1 run",
        "give both or neither",
        "divides cp=4, got 3",
    ]
    for (run,), end in zip(run_cli(*words), ends, strict=True):
        assert run.exit_code == 2 and end in " ".join(run.stderr.split()) and not run.stdout
