"""One piece of work over context-parallel ranks, next to one rank: compared first, then time, wait time and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.bench.report import Differences, check_equal
from megatron_prefix.collectives import Traffic, all_gather_object, barrier
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import computed_areas

ONE_RANK = "one rank"
CONTEXT_PARALLEL = "context parallel"

PAIRS = {"M": 10**6, "k": 10**3}
SHORT = {"forward": "fwd", "backward": "bwd", "gradients": "grads"}


@dataclass(frozen=True)
class CpSizes:
    """How the ranks of the default process group share the work; ``a2a_size`` is that of a2a+p2p's inner groups."""

    comm_type: str = "p2p"
    placement: str = "auto"
    a2a_size: int | None = None


@dataclass(frozen=True)
class Run:
    """What one rank gets, the seconds of each phase, and what it moved."""

    results: dict[str, Tensor]
    seconds: dict[str, float]
    traffic: Traffic


@dataclass(frozen=True)
class Work:
    """The same work twice.

    Attributes:
        alone: on one rank; only rank 0 calls it.
        together: on this rank of all.
        compare: every rank calls it with the first of both (None for the one that only rank 0 has); gives rank 0 the
            relative differences from one rank, by path (`ONE_RANK`, `CONTEXT_PARALLEL`) and tensor.
        plan: how rows go to ranks.
    """

    alone: Callable[[], Run]
    together: Callable[[], Run]
    compare: Callable[[Run | None, Run], dict[str, Differences]]
    plan: CpPlan


def num_runs(repeats: int) -> int:
    """How often `bench_over_ranks` calls ``note``."""
    return 2 + 2 * repeats


def bench_over_ranks(
    report: dict[str, Any], work: Work, cp: CpSizes, dtype: torch.dtype, repeats: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Compare with one rank, then time. Every rank of the default process group calls it; all get the report.

    First rank 0 does the whole work alone ``1 + repeats`` times, while the others wait, then all do it together. The
    results of the first runs are compared.

    Args:
        report: gets ``seconds_one_rank`` by phase and ``ranks``: of each its rows, the attention area that it computes,
            median seconds by phase, seconds waited for others and bytes sent and received in one run.
        dtype: in which both run.
        note: called after each of `num_runs` runs.

    Raises:
        ResultsDifferError: a result differs from that of one rank, on every rank.
    """
    world, rank = dist.group.WORLD, dist.get_rank()

    def repeat(run: Callable[[], Run] | None, name: str) -> tuple[Run | None, list[Run]]:
        """The first run, and the others without their results."""
        first, timed = None, []
        for i in range(1 + repeats):
            barrier(world)
            done = run() if run else None
            if i == 0:
                first = done
            elif done:
                timed.append(replace(done, results={}))
            note(name)
        return first, timed

    first_alone, alone = repeat(work.alone if rank == 0 else None, ONE_RANK)
    first_together, together = repeat(work.together, f"{work.plan.cp_size} ranks")
    assert first_together is not None
    found = work.compare(first_alone, first_together)
    differences, seconds_one_rank = all_gather_object((found, _medians(alone)), world)[0]
    check_equal(report, differences, dtype, baseline=ONE_RANK)
    report["seconds_one_rank"] = seconds_one_rank
    mine = {
        "rows": work.plan.local_layouts[rank].num_rows,
        "area": computed_areas(work.plan, cp.comm_type, cp.a2a_size)[rank],
        "seconds": _medians(together),
        "seconds_waited": statistics.median(run.traffic.waited for run in together),
        "bytes_sent": together[-1].traffic.sent,
        "bytes_received": together[-1].traffic.received,
    }
    report["ranks"] = all_gather_object(mine, world)
    return report


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    phases = runs[0].seconds if runs else ()
    return {phase: statistics.median(run.seconds[phase] for run in runs) for phase in phases}


def table(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the report's table: one rank first, then the ranks together."""
    sizes, alone = report["sizes"], report["seconds_one_rank"]
    slowest = max(rank["seconds"]["total"] for rank in report["ranks"])
    title = (
        f"{report['bench']}, cp {sizes['cp']}, {sizes['comm_type']}, {sizes['placement']}: "
        f"one rank {alone['total']:.2f} s, the slowest of {sizes['cp']} {slowest:.2f} s"
    )
    phases = list(report["ranks"][0]["seconds"])
    unit = "M" if report["area"] >= PAIRS["M"] else "k"

    def shared(name: str, of: dict[str, Any], seconds: dict[str, float]) -> list[str]:
        times = [f"{seconds[phase]:.2f}" if phase in seconds else "" for phase in phases]
        return [name, f"{of['rows']:,}", f"{of['area'] / PAIRS[unit]:,.1f}", *times]

    rows = [[*shared("alone", report, alone), "", "", ""]]
    for number, rank in enumerate(report["ranks"]):
        moved = (f"{rank[key] / 2**20:.1f}" for key in ("bytes_sent", "bytes_received"))
        rows.append([*shared(str(number), rank, rank["seconds"]), f"{rank['seconds_waited']:.2f}", *moved])
    times = [f"{SHORT.get(phase, phase)}\ns" for phase in phases]
    return title, ["rank", "rows", f"{unit}\npairs", *times, "wait\ns", "MiB\nsent", "MiB\nrecv"], rows
