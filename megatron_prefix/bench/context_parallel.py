"""Attention of one prefix group over context-parallel ranks, next to one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention import kernel_named, prefix_grouped_attention, resolve_impl
from megatron_prefix.bench.attention import AttentionSizes, random_inputs
from megatron_prefix.bench.group import DTYPES, GroupSizes
from megatron_prefix.bench.over_ranks import CONTEXT_PARALLEL, ONE_RANK, CpSizes, Run, Work, bench_over_ranks
from megatron_prefix.bench.report import TOLERANCE, Differences, new_report, relative_difference, with_total
from megatron_prefix.collectives import Group, Traffic, all_gather_object, two_levels_of_groups
from megatron_prefix.context_parallel.attention import CpShare, context_parallel_attention
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape
from megatron_prefix.measure import Stopwatch


def bench_context_parallel(
    group: GroupSizes,
    sizes: AttentionSizes,
    cp: CpSizes,
    *,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare outputs and gradients with one rank, then time; see `bench_over_ranks`.

    Every rank of the default process group calls it; all get the report: JSON values.

    Args:
        after_each: called with a note after each of `over_ranks.num_runs` runs.

    Raises:
        ResultsDifferError: an output or a gradient differs from that of one rank.
        ValueError: what the exchange or the kernel cannot do.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    impl = resolve_impl(sizes.impl, device, DTYPES[sizes.dtype], sizes.head_dim)
    shape = AttentionShape(sizes.heads, sizes.kv_heads, sizes.head_dim, bytes_per_element=DTYPES[sizes.dtype].itemsize)
    plan = choose_plan(
        group.layout(), dist.get_world_size(), cp.placement, CpLayers(shape, (cp.comm_type,), cp.a2a_size)
    )
    settings = asdict(group) | asdict(sizes) | asdict(cp) | {"impl": impl, "repeats": repeats, "cp": plan.cp_size}
    report = new_report("context_parallel", settings | {"placement": plan.name}, seed)
    report |= {"rows": plan.layout.num_rows, "area": plan.layout.area}
    inputs = random_inputs(group, sizes, seed, device)
    inner, outer = (None, None) if cp.a2a_size is None else two_levels_of_groups(cp.a2a_size)

    def run(of: CpPlan, ranks: Group, comm_type: str) -> Run:
        traffic = Traffic()
        share = CpShare(of, ranks, device, inner, outer, traffic)
        rows = torch.tensor(of.rows(share.rank), dtype=torch.long, device=device)
        q, k, v = (x[rows].requires_grad_() for x in inputs[:3])
        dout = inputs[3][rows]
        watch = Stopwatch(device)
        out = context_parallel_attention(q, k, v, share, comm_type, q.shape[-1] ** -0.5, kernel_named(impl))
        watch.lap("forward")
        grads = torch.autograd.grad(out, (q, k, v), dout)
        watch.lap("backward")
        results = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
        return Run(results, with_total(watch.phases), traffic)

    def compare(alone: Run | None, together: Run) -> dict[str, Differences]:
        shares = all_gather_object({name: x.cpu() for name, x in together.results.items()}, dist.group.WORLD)
        if alone is None:
            return {}
        one = {name: x.cpu() for name, x in alone.results.items()}
        exact = one if DTYPES[sizes.dtype] in TOLERANCE else _exact(group, inputs)
        return {
            ONE_RANK: {name: relative_difference(one[name], exact[name]) for name in exact},
            CONTEXT_PARALLEL: {
                name: max(
                    relative_difference(share[name], x[plan.rows(rank)])
                    for rank, share in enumerate(shares)
                    if plan.local_layouts[rank].num_rows
                )
                for name, x in exact.items()
            },
        }

    whole = CpPlan.build(group.layout(), 1, "dual_chunk_swap")
    work = Work(lambda: run(whole, None, "p2p"), lambda: run(plan, dist.group.WORLD, cp.comm_type), compare, plan)
    return bench_over_ranks(report, work, cp, DTYPES[sizes.dtype], repeats, after_each or (lambda _: None))


def _exact(group: GroupSizes, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The reference of half precision: one rank in fp32 on the CPU."""
    q, k, v = (x.cpu().float().requires_grad_() for x in inputs[:3])
    out = prefix_grouped_attention(q, k, v, group.layout(), impl="sdpa")
    grads = torch.autograd.grad(out, (q, k, v), inputs[3].cpu().float())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
