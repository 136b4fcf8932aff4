"""Whole steps on the stages of a real pipeline: compared over all of them first, then timed, next to what is modelled.

Every process is a stage, and calls the functions here; megatron-core's groups must exist, with a pp of all processes.
Each path is a step of several groups in one model, through megatron-core's own schedule (see `scheduled_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention import resolve_impl
from megatron_prefix.bench.group import DTYPES, GroupSizes, PipelineSizes, ratios
from megatron_prefix.bench.report import TOLERANCE, Differences, check_equal, new_report, speed_ups
from megatron_prefix.bench.scheduled_step import BenchTrainer, ScheduledStep
from megatron_prefix.bench.split import SplitSettings, split_steps
from megatron_prefix.bench.split_report import add_ratios
from megatron_prefix.bench.step import (
    StepSettings,
    check_positions,
    differences,
    exact_model,
    random_model,
    random_rollouts,
)
from megatron_prefix.collectives import all_gather_object, barrier
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.measure import Times, interleaved_times
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import repeated_packs
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split

Steps = dict[str, ScheduledStep]


class PipelineBench:
    """This rank's stage of a model with random weights, and the random groups of a step.

    Args:
        group: of each group.
        config: of the model.
        settings: how steps are computed.
        sizes: of the pipeline.
        seed: of weights and groups.

    Raises:
        ValueError: a model that is too small for the group, or does not divide into such stages, or is not supported.
    """

    def __init__(
        self, group: GroupSizes, config: ModelConfig, settings: StepSettings, sizes: PipelineSizes, *, seed: int = 0
    ) -> None:
        check_positions(group, config)
        self.group, self.config, self.settings, self.sizes, self.seed = group, config, settings, sizes, seed
        self.dtype = DTYPES[settings.dtype]
        self.groups = random_groups(group, config.vocab_size, sizes.groups, seed)
        stages = [None] if sizes.vpp == 1 else range(sizes.vpp)
        model = [random_model(config, self.dtype, settings.impl, seed, vp_stage=stage) for stage in stages]
        self.exact: BenchTrainer | None = None
        if self.dtype not in TOLERANCE:  # before the trainer: it wraps the model
            exact = [exact_model(chunk, config, vp_stage=stage) for chunk, stage in zip(model, stages, strict=True)]
            self.exact = BenchTrainer(exact)
        self.parameters = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
        self.trainer = BenchTrainer(model)

    def step(
        self,
        *,
        max_tokens: int | None = None,
        repeats: int = 5,
        after_each: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Compare repeated prefixes, one sequence a micro-batch, with the groups, then time both.

        Args:
            max_tokens: most rows of a micro-batch of the groups; larger ones are split. None for a group's rows.
            repeats: timed runs of each path, in turn.
            after_each: called with a note after each of `num_runs` runs.

        Returns:
            The report: JSON values. ``results`` has for each path rows and attention area, the modelled ``bubble``,
            ``even_bubble`` (megatron-core's with as many even micro-batches) and ``live_prefixes``, the seconds of the
            slowest stage, and for every one of the ``stages`` FLOPs, peak bytes and median seconds.

        Raises:
            ResultsDifferError: log-probs, loss terms or a gradient differ, on every rank.
            ValueError: ``max_tokens`` below a response or the prefix.
        """
        limit = self.group.layout().num_rows if max_tokens is None else max_tokens
        packs = pack_and_split(self.groups, max_tokens_per_pack=limit)
        steps = {
            "repeated": ScheduledStep(self.trainer, repeated_packs(self.groups)),
            "grouped": ScheduledStep(self.trainer, packs),
        }
        report = self._report("step", {"max_tokens_per_microbatch": limit, "repeats": repeats})
        times = self._compare_and_time(report, steps, repeats, after_each or (lambda _: None))
        report["bound"] = {"name": "rho", "value": self.group.rho, "alpha": self.group.alpha}
        report["ratios"] = ratios(self.group.layout(), self.group.layout().repeated())
        report["speed_up"] = speed_ups(times["repeated"], times["grouped"])
        report["speed_up_over_bound"] = report["speed_up"]["total"] / self.group.rho
        return report

    def split(
        self, split: SplitSettings, *, repeats: int = 5, after_each: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Compare the paths of `bench.split` with the unsplit groups, one a micro-batch, then time all.

        Args and returns are as for `step`; the report also has the ratios of `split_report.add_ratios`. There are no
        phases and no ``group_sizes``: stages are in different phases at one time.

        Raises:
            ResultsDifferError: log-probs, loss terms or a gradient differ, on every rank.
            ValueError: more parts than responses.
        """
        split.check(self.group)
        steps = split_steps(self.trainer, self.groups, split, split.num_parts)
        report = self._report("split", {"parts": split.num_parts, "repeats": repeats}) | {"by_group_size": []}
        self._compare_and_time(report, steps, repeats, after_each or (lambda _: None))
        add_ratios(report)
        return report

    def _report(self, bench: str, more_sizes: dict[str, Any]) -> dict[str, Any]:
        sizes = asdict(self.group) | asdict(self.settings) | asdict(self.sizes) | more_sizes
        impl = resolve_impl(self.settings.impl, self.trainer.device, self.dtype, self.config.channels)
        report = new_report(bench, sizes | {"impl": impl}, self.seed)
        parameters = all_gather_object(self.parameters, dist.group.WORLD)
        return report | {"model": asdict(self.config) | {"parameters": sum(parameters)}}

    def _compare_and_time(
        self, report: dict[str, Any], steps: Steps, repeats: int, note: Callable[[str], None]
    ) -> dict[str, dict[str, Times]]:
        """Add ``results`` of all paths to the report, whose first one is what the others are compared with; returns
        the seconds of the slowest stage."""
        world, baseline = dist.group.WORLD, next(iter(steps))
        found: dict[str, dict[str, Tensor]] = {}
        mine: dict[str, dict[str, Any]] = {}
        for name, step in steps.items():
            found[name], mine[name] = step.measure()
            note(f"checking {name}")

        def exact() -> dict[str, Tensor]:
            assert self.exact is not None
            results = ScheduledStep(self.exact, steps[baseline].packs).measure()[0]
            note("checking against fp32")
            return results

        here = differences(found, baseline, exact, self.dtype)
        check_equal(report, _worst(all_gather_object(here, world)), self.dtype, baseline)
        del found

        def timed(step: ScheduledStep) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                barrier(world)
                return {"total": step.time()["total"]}

            return run

        runs = {name: timed(step) for name, step in steps.items()}
        taken = interleaved_times(runs, repeats=repeats, warmup=0, after_each=lambda name: note(f"timing {name}"))
        times, results = {}, {}
        for name, step in steps.items():
            this_stage = {key: mine[name][key] for key in ("flops", "peak_bytes")} | {"seconds": taken[name]["total"]}
            stages = all_gather_object(this_stage, world)
            by_stage = zip(*(stage["seconds"].seconds for stage in stages), strict=True)
            times[name] = {"total": Times(tuple(max(each) for each in by_stage))}
            plan = plan_step(step.packs, self.trainer.trainer.config)
            results[name] = {
                "micro_batches": plan.num_microbatches,
                "rows": mine[name]["rows"],
                "area": sum(pack.layout.area for pack in step.packs),
                "bubble": plan.bubble,
                "even_bubble": plan.even_bubble,
                "live_prefixes": plan.live_prefixes,
                "plan": plan.describe(),
                "seconds": {"total": times[name]["total"].as_dict()},
                "peak_bytes": max(stage["peak_bytes"] for stage in stages),
                "stages": [stage | {"seconds": stage["seconds"].median} for stage in stages],
            }
        report["results"] = results
        return times


def random_groups(group: GroupSizes, vocab_size: int, count: int, seed: int) -> list[RolloutGroup]:
    """`random_rollouts` of several groups."""
    return [random_rollouts(group, vocab_size, seed + i) for i in range(count)]


def num_runs(paths: int, repeats: int, dtype: str) -> int:
    """How often a benchmark of so many paths calls ``after_each``."""
    return paths * (1 + repeats) + (DTYPES[dtype] not in TOLERANCE)


def _worst(stages: Iterable[dict[str, Differences]]) -> dict[str, Differences]:
    """The largest of all ranks, by path and tensor; what is not a number is infinite, so that it is the largest."""
    worst: dict[str, Differences] = {}
    for found in stages:
        for path, values in found.items():
            merged = worst.setdefault(path, {})
            for name, value in values.items():
                merged[name] = max(merged.get(name, 0.0), math.inf if math.isnan(value) else value)
    return worst
