"""Attention of one prefix group over context-parallel ranks, next to one rank: time, wait time and bytes per rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention import KERNELS, prefix_grouped_attention, resolve_impl
from megatron_prefix.bench.attention import AttentionSizes, random_inputs
from megatron_prefix.bench.group import DTYPES, GroupSizes
from megatron_prefix.bench.report import TOLERANCE, Differences, check_equal, new_report, relative_difference
from megatron_prefix.collectives import Traffic, all_gather_object, barrier
from megatron_prefix.context_parallel.attention import CpShare, context_parallel_attention
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.measure import Stopwatch


@dataclass(frozen=True)
class CpSizes:
    """How the ranks of the default process group share the work."""

    comm_type: str = "p2p"
    placement: str = "auto"


@dataclass(frozen=True)
class _Run:
    results: dict[str, Tensor]
    seconds: float
    traffic: Traffic


def bench_context_parallel(
    group: GroupSizes,
    sizes: AttentionSizes,
    cp: CpSizes,
    *,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare with one rank, then time. Every rank of the default process group calls it; all get the report.

    The ranks first run the whole group by itself on rank 0, while the others wait, then all together. The results of
    the first run together are compared with those of one rank.

    Args:
        after_each: called with a note after each of ``2 + 2 * repeats`` runs.

    Returns:
        The report: JSON values; per rank the rows, attention area, median seconds of forward and backward, seconds
        waited for others and bytes sent and received in one run.

    Raises:
        ResultsDifferError: an output or a gradient differs from that of one rank.
        ValueError: what the exchange or the kernel cannot do.
    """
    note = after_each or (lambda _: None)
    world = dist.group.WORLD
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    impl = resolve_impl(sizes.impl, device)
    plan = CpPlan.build(group.layout(), dist.get_world_size(), cp.placement)
    settings = asdict(group) | asdict(sizes) | asdict(cp) | {"impl": impl, "repeats": repeats, "cp": plan.cp_size}
    report = new_report("context_parallel", settings | {"placement": plan.name}, seed)
    inputs = random_inputs(group, sizes, seed, device)

    def run(of: CpPlan, ranks: dist.ProcessGroup | None, comm_type: str) -> _Run:
        share = CpShare(of, ranks, device, traffic=Traffic())
        rows = torch.tensor(of.rows(share.rank), dtype=torch.long, device=device)
        q, k, v = (x[rows].requires_grad_() for x in inputs[:3])
        dout = inputs[3][rows]
        watch = Stopwatch(device)
        out = context_parallel_attention(q, k, v, share, comm_type, q.shape[-1] ** -0.5, KERNELS[impl])
        grads = torch.autograd.grad(out, (q, k, v), dout)
        watch.lap("total")
        names = ("out", "dq", "dk", "dv")
        results = dict(zip(names, (out.detach(), *grads), strict=True))
        return _Run(results, watch.phases["total"], share.traffic or Traffic())

    whole = CpPlan.build(group.layout(), 1, "dual_chunk_swap")
    alone = []
    for _ in range(1 + repeats):
        if dist.get_rank() == 0:
            alone.append(run(whole, None, "p2p"))
        barrier(world)
        note("one rank")
    together = []
    for _ in range(1 + repeats):
        barrier(world)
        together.append(run(plan, world, cp.comm_type))
        note(f"{plan.cp_size} ranks")

    shares = all_gather_object({name: x.cpu() for name, x in together[0].results.items()}, world)
    found: dict[str, Differences] = {}
    if dist.get_rank() == 0:
        one = {name: x.cpu() for name, x in alone[0].results.items()}
        exact = one if DTYPES[sizes.dtype] in TOLERANCE else _exact(group, inputs)
        found["one rank"] = {name: relative_difference(one[name], exact[name]) for name in exact}
        found["context parallel"] = {
            name: max(
                relative_difference(share[name], x[plan.rows(rank)])
                for rank, share in enumerate(shares)
                if plan.local_layouts[rank].num_rows
            )
            for name, x in exact.items()
        }
        report["seconds_one_rank"] = statistics.median(r.seconds for r in alone[1:])
    found, one_rank = all_gather_object((found, report.get("seconds_one_rank")), world)[0]
    check_equal(report, found, DTYPES[sizes.dtype], baseline="one rank")
    report["seconds_one_rank"] = one_rank
    mine = {
        "rows": plan.local_layouts[dist.get_rank()].num_rows,
        "area": plan.area(dist.get_rank()),
        "seconds": statistics.median(r.seconds for r in together[1:]),
        "seconds_waited": statistics.median(r.traffic.waited for r in together[1:]),
        "bytes_sent": together[-1].traffic.sent,
        "bytes_received": together[-1].traffic.received,
    }
    report["ranks"] = all_gather_object(mine, world)
    return report


def _exact(group: GroupSizes, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The reference of half precision: one rank in fp32 on the CPU."""
    q, k, v = (x.cpu().float().requires_grad_() for x in inputs[:3])
    out = prefix_grouped_attention(q, k, v, group.layout(), impl="sdpa")
    grads = torch.autograd.grad(out, (q, k, v), inputs[3].cpu().float())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def table(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the report's table."""
    sizes = report["sizes"]
    title = (
        f"context parallel attention, cp {sizes['cp']}, {sizes['comm_type']}, {sizes['placement']}: "
        f"one rank takes {report['seconds_one_rank']:.2f} s"
    )
    rows = [
        [
            str(rank),
            f"{r['rows']:,}",
            f"{r['area']:,}",
            f"{r['seconds']:.2f}",
            f"{r['seconds_waited']:.2f}",
            f"{r['bytes_sent'] / 2**20:.1f}",
            f"{r['bytes_received'] / 2**20:.1f}",
        ]
        for rank, r in enumerate(report["ranks"])
    ]
    return title, ["rank", "rows", "pairs", "seconds", "waited", "MiB sent", "MiB received"], rows
