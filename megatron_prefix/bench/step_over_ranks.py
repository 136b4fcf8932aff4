"""A whole training step on one prefix group over context-parallel ranks, next to one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention import resolve_impl
from megatron_prefix.bench.group import DTYPES, GroupSizes
from megatron_prefix.bench.over_ranks import CONTEXT_PARALLEL, ONE_RANK, CpSizes, Run, Work, bench_over_ranks
from megatron_prefix.bench.report import Differences, new_report, with_total
from megatron_prefix.bench.step import (
    Step,
    StepSettings,
    check_positions,
    differences,
    exact_model,
    one_pack,
    random_model,
    random_rollouts,
)
from megatron_prefix.collectives import Traffic, all_reduce_sum
from megatron_prefix.context_parallel.choice import choose_plan
from megatron_prefix.mcore.core_attention import attention_layers
from megatron_prefix.mcore.parallel import whole_on_every_rank
from megatron_prefix.measure import Stopwatch
from megatron_prefix.model_config import ModelConfig


def bench_step_over_ranks(
    group: GroupSizes,
    config: ModelConfig,
    settings: StepSettings,
    cp: CpSizes,
    *,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare log-probs and every parameter's gradient with one rank, then time; see `bench_over_ranks`.

    The step together ends with the sum of all gradients over the ranks, a phase of its own that one rank does not have.
    Bytes and wait are those of attention. Every process calls it; megatron-core's groups must exist, with a cp of all
    processes and, for a2a+p2p, their two levels.

    Args:
        after_each: called with a note after each of `over_ranks.num_runs` runs.

    Returns:
        The report: JSON values.

    Raises:
        ResultsDifferError: log-probs or a gradient differ from those of one rank.
        ValueError: a model that is too small for the group, or not supported; what the exchange cannot do.
    """
    check_positions(group, config)
    world, dtype = dist.group.WORLD, DTYPES[settings.dtype]
    levels = None if cp.a2a_size is None else [cp.a2a_size, dist.get_world_size() // cp.a2a_size]
    overrides = {"cp_comm_type": cp.comm_type, "hierarchical_context_parallel_sizes": levels}
    model = random_model(config, dtype, settings.impl, seed, overrides=overrides)
    pack = one_pack(random_rollouts(group, config.vocab_size, seed), repeated=False)
    plan = choose_plan(pack.layout, dist.get_world_size(), cp.placement, attention_layers(model.config, cp.a2a_size))
    alone_settings = whole_on_every_rank()
    together = Step(model, pack, cp.placement)
    impl = resolve_impl(settings.impl, together.device, dtype, config.channels)
    sizes = asdict(group) | asdict(settings) | asdict(cp) | {"impl": impl}
    sizes |= {"repeats": repeats, "cp": plan.cp_size, "placement": plan.name}
    report = new_report("step", sizes, seed) | {"rows": plan.layout.num_rows, "area": plan.layout.area}
    report["model"] = asdict(config) | {"parameters": sum(param.numel() for param in model.parameters())}
    alone = None
    if dist.get_rank() == 0:
        alone = Step(random_model(config, dtype, settings.impl, seed, **alone_settings), pack)

    def run(step: Step, ranks: dist.ProcessGroup | None) -> Run:
        traffic, watch = Traffic(), Stopwatch(step.device)
        log_probs, loss = step.forward(traffic)
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        if ranks is not None:
            for param in step.model.parameters():
                if param.grad is not None:
                    all_reduce_sum(param.grad, ranks)
            watch.lap("gradients")
        return Run(step.take_results(log_probs), with_total(watch.phases), traffic)

    def run_alone() -> Run:
        assert alone is not None
        return run(alone, None)

    def compare(one: Run | None, all_ranks: Run) -> dict[str, Differences]:
        if one is None:
            return {}

        def exact() -> dict[str, Tensor]:
            step = Step(exact_model(model, config, **alone_settings), pack)
            return step.measure()[0]

        measured = {ONE_RANK: one.results, CONTEXT_PARALLEL: all_ranks.results}
        return differences(measured, ONE_RANK, exact, dtype)

    work = Work(run_alone, lambda: run(together, world), compare, plan)
    return bench_over_ranks(report, work, cp, dtype, repeats, after_each or (lambda _: None))
