"""What a pipeline will do with a step: who works when, how much time is lost, and how many prefixes are held.

Plain Python on lengths. The order of forwards and backwards on every stage is that of megatron-core's schedules (see
`pipeline_schedule`); when each starts follows from what it waits for. Communication takes no time here.

A prefix of a split group is two micro-batches: A has its forward and no backward, C its backward and no forward. The C
of one and the A of another can share one (`pipeline_order` says how such halves are arranged).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_prefix.packing import Pack
from megatron_prefix.pipeline_schedule import Schedule, most_at_once

BACKWARD_WORK = 2.0
"""Backward work per forward work: a gradient of the input and one of the weights for each product."""


@dataclass(frozen=True)
class PipelineJob:
    """One micro-batch of a step.

    Attributes:
        kind: "A" (a prefix's forward), "B" (a part), "C" (a prefix's backward), "whole" (groups that fit), or "idle".
        work: of its forward on one stage, in any unit; backward takes `BACKWARD_WORK` times that.
        prefix: number of the prefix that it belongs to, None for "whole" and "idle".
        ends: of an A, the C of another prefix whose backward is this micro-batch's.
    """

    kind: str
    work: float
    prefix: int | None = None
    ends: PipelineJob | None = None

    @property
    def forward(self) -> float:
        """Time of its forward on one stage."""
        return 0.0 if self.kind in ("C", "idle") else self.work

    @property
    def backward(self) -> float:
        """Time of its backward on one stage."""
        if self.ends is not None:
            return self.ends.backward
        return 0.0 if self.kind in ("A", "idle") else BACKWARD_WORK * self.work

    def half(self, backward: bool) -> PipelineJob:
        """The job whose forward or backward is this one's: another than itself for the backward of C and A in one."""
        return self.ends if backward and self.ends is not None else self


@dataclass(frozen=True)
class JobSpan:
    """One micro-batch's forward or backward on one model chunk, modelled or traced.

    Attributes:
        stage: of the pipeline.
        chunk: of the stage (virtual stage), 0 without interleaving.
        number: of the micro-batch in the step, as megatron-core counts.
        kind: see `PipelineJob`; where C and A are one, that of this half.
        backward: whether it is the backward.
        start: when it began to work: seconds, or units of modelled work.
        end: when it was done.
        cpu_seconds: that the processor spent on it; 0 where that was not measured.
    """

    stage: int
    chunk: int
    number: int
    kind: str
    backward: bool
    start: float = 0.0
    end: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class PipelineRun:
    """A step on all stages, modelled by `plan_pipeline` or traced by `mcore.schedule_trace.ScheduleTrace`.

    Attributes:
        num_stages: of the pipeline.
        jobs: the micro-batches, in the order that megatron-core counts them.
        spans: by stage, in order of their start.
        chunk_group: see `num_idle_jobs`.
    """

    num_stages: int
    jobs: tuple[PipelineJob, ...]
    spans: tuple[JobSpan, ...]
    chunk_group: int | None = None

    @property
    def total(self) -> float:
        """From the first start to the last end."""
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time that each stage works."""
        busy = [0.0] * self.num_stages
        for span in self.spans:
            busy[span.stage] += span.end - span.start
        return tuple(busy)

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait; 0 for a step without work."""
        return 1 - sum(self.busy) / (self.num_stages * self.total) if self.total else 0.0

    @cached_property
    def live_prefixes(self) -> int:
        """The most prefixes whose keys one stage holds at once: from the first forward of A to the last backward of C,
        or, in a step without backward, to the last part."""
        most = 0
        for stage in range(self.num_stages):
            first: dict[int, int] = {}
            last: dict[int, int] = {}
            for at, span in enumerate(self.on_stage(stage)):
                prefix = self.prefix_of(span)
                if prefix is not None:
                    first.setdefault(prefix, at)
                    last[prefix] = at
            most = max(most, most_at_once(first.values(), last.values()))
        return most

    def prefix_of(self, span: JobSpan) -> int | None:
        """Number of the prefix that a piece of work belongs to."""
        return self.jobs[span.number].half(span.backward).prefix

    def on_stage(self, stage: int) -> list[JobSpan]:
        """What a stage does, in order."""
        return [span for span in self.spans if span.stage == stage]

    def order(self, stage: int) -> list[tuple[int, int, bool]]:
        """(model chunk, micro-batch, backward) of what a stage does, in order."""
        return [(span.chunk, span.number, span.backward) for span in self.on_stage(stage)]

    @property
    def num_chunks(self) -> int:
        """Model chunks of each stage, 1 without interleaving."""
        return max(span.chunk for span in self.spans) + 1

    @property
    def num_microbatches(self) -> int:
        """Micro-batches with work. A prefix counts as one, though its forward and its backward are apart."""
        return sum(job.kind not in ("C", "idle") for job in self.jobs)

    @property
    def even_bubble(self) -> float:
        """The bubble that megatron-core's schedule has with as many micro-batches of equal work."""
        chunks = self.num_chunks if self.num_chunks > 1 else None
        return even_bubble(self.num_microbatches, self.num_stages, chunks, self.chunk_group)

    def describe(self) -> str:
        """One line: "pipeline 4 stages, 17 micro-batches (3 groups in 13 parts), bubble 0.16 (even micro-batches:
        0.15), at most 2 prefixes live"."""
        kinds = [job.kind for job in self.jobs]
        parts = f" ({_count(kinds.count('A'), 'group')} in {_count(kinds.count('B'), 'part')})" if "A" in kinds else ""
        chunks = f" of {self.num_chunks} model chunks" if self.num_chunks > 1 else ""
        live = f", at most {_count(self.live_prefixes, 'prefix', 'prefixes')} live" if parts else ""
        return (
            f"pipeline {_count(self.num_stages, 'stage')}{chunks}, "
            f"{_count(self.num_microbatches, 'micro-batch', 'micro-batches')}{parts}, "
            f"bubble {self.bubble:.2f} (even micro-batches: {self.even_bubble:.2f}){live}"
        )

    def replayed(self, seconds: Callable[[JobSpan], float]) -> PipelineRun:
        """The same order on every stage, everything as long as ``seconds`` says and as early as it can start."""
        spans = {(s.stage, (s.chunk, s.number, s.backward)): s for s in self.spans}
        schedule = Schedule([self.order(stage) for stage in range(self.num_stages)])
        ordered = [spans[op] for op in schedule.ops]
        return replace(self, spans=_played(schedule, ordered, [seconds(span) for span in ordered]))


def pipeline_jobs(packs: Iterable[Pack], *, pair_cost: float = 0.0, forward_only: bool = False) -> list[PipelineJob]:
    """The micro-batches of a step of packs in the order of `pack_and_split`.

    Args:
        packs: see `mcore.schedule.forward_backward_prefix_groups`.
        pair_cost: work of one (query, key) pair of the attention mask, where that of one row is 1. A layer of hidden
            size h has about 24 h^2 operations per row and 4 h per pair: 1 / (6 h).
        forward_only: without a backward, hence without C.
    """
    jobs: list[PipelineJob] = []
    prefixes: dict[int, int] = {}
    for pack in packs:
        work = pack.layout.num_rows + pair_cost * pack.layout.area
        if pack.prefix is None:
            jobs.append(PipelineJob("whole", work))
            continue
        number = prefixes.setdefault(id(pack.prefix), len(prefixes))
        jobs.append(PipelineJob("A" if pack.is_prefix else "B", work, number))
    return jobs if forward_only else with_prefix_backwards(jobs)


def with_prefix_backwards(jobs: Sequence[PipelineJob]) -> list[PipelineJob]:
    """A C behind the last part of every prefix, where the schedule has it."""
    begins = {job.prefix: job for job in jobs if job.kind == "A"}
    last = {job.prefix: i for i, job in enumerate(jobs)}
    found = []
    for i, job in enumerate(jobs):
        found.append(job)
        if job.prefix is not None and last[job.prefix] == i:
            found.append(replace(begins[job.prefix], kind="C"))
    return found


def num_idle_jobs(count: int, num_stages: int, num_chunks: int | None, chunk_group: int | None = None) -> int:
    """How many micro-batches an interleaved pipeline needs beside ``count``: its last group must not be short.

    Args:
        count: micro-batches with work.
        num_stages: of the pipeline.
        num_chunks: model chunks of a stage; None without interleaving.
        chunk_group: megatron-core's ``microbatch_group_size_per_vp_stage``; None for its default, the stages.
    """
    if num_chunks is None:
        return 0
    group = chunk_group or num_stages
    total = max(count, group)
    while 0 < total % group < num_stages:
        total += 1
    return total - count


def plan_pipeline(
    jobs: Sequence[PipelineJob],
    num_stages: int,
    *,
    num_chunks: int | None = None,
    chunk_group: int | None = None,
    forward_only: bool = False,
) -> PipelineRun:
    """The step of ``jobs`` in megatron-core's schedule, with modelled times.

    Args:
        jobs: from `pipeline_jobs`, or any others.
        num_stages: of the pipeline; layers are spread evenly over them.
        num_chunks: model chunks of each stage (interleaved schedule); None for 1F1B.
        chunk_group: see `num_idle_jobs`.
        forward_only: all forwards, no backward.

    Raises:
        ValueError: no jobs, or no stage.
    """
    if not jobs or num_stages < 1:
        raise ValueError(f"a pipeline needs jobs and stages: {len(jobs)} jobs and {num_stages} stages were given")
    if num_stages == 1:
        num_chunks = None
    idle = num_idle_jobs(len(jobs), num_stages, num_chunks, chunk_group)
    all_jobs = (*jobs, *[PipelineJob("idle", 0.0)] * idle)
    schedule = Schedule.of_megatron(len(all_jobs), num_stages, num_chunks, chunk_group, forward_only)
    share = num_chunks or 1
    work = [(job.forward / share, job.backward / share) for job in all_jobs]
    spans = [
        JobSpan(stage, chunk, number, all_jobs[number].half(backward).kind, backward)
        for stage, (chunk, number, backward) in schedule.ops
    ]
    timed = _played(schedule, spans, [work[span.number][span.backward] for span in spans])
    return PipelineRun(num_stages, all_jobs, timed, chunk_group)


def _played(schedule: Schedule, spans: Sequence[JobSpan], seconds: Sequence[float]) -> tuple[JobSpan, ...]:
    """The spans of ``schedule.ops`` with their times, by stage."""
    timed = [
        replace(span, start=end - taken, end=end)
        for span, taken, end in zip(spans, seconds, schedule.play(seconds), strict=True)
    ]
    return tuple(sorted(timed, key=lambda span: span.stage))


def even_bubble(
    num_microbatches: int, num_stages: int, num_chunks: int | None = None, chunk_group: int | None = None
) -> float:
    """The bubble of megatron-core's schedule on equal micro-batches: idle time over all.

    Args:
        num_microbatches: with work. An interleaved pipeline may need idle ones beside them, see `num_idle_jobs`.
        num_stages, num_chunks, chunk_group: see `plan_pipeline`.
    """
    if num_chunks is None:
        return (num_stages - 1) / (num_microbatches + num_stages - 1)  # arXiv 2104.04473, 2.2
    idle = num_idle_jobs(num_microbatches, num_stages, num_chunks, chunk_group)
    schedule = Schedule.of_megatron(num_microbatches + idle, num_stages, num_chunks, chunk_group)
    work = [1.0, BACKWARD_WORK] * num_microbatches + [0.0, 0.0] * idle
    return 1 - num_chunks * sum(work) / schedule.total(work)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
