"""What a pipeline will do with a step: who works when, how much time is lost, and how many prefixes are held.

Plain Python on lengths. The order of forwards and backwards on every stage is that of megatron-core's schedules (1F1B,
and interleaved with virtual stages); when each starts follows from what it waits for. Communication takes no time here.

A prefix of a split group is two micro-batches: A has its forward and no backward, C its backward and no forward. One
after the other, such halves leave the other stages waiting; several A together, and several C together, do not
(`order_jobs`), which holds more prefixes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from megatron_prefix.packing import Pack

BACKWARD_WORK = 2.0
"""Backward work per forward work: a gradient of the input and one of the weights for each product."""


@dataclass(frozen=True)
class PipelineJob:
    """One micro-batch of a step.

    Attributes:
        kind: "A" (a prefix's forward), "B" (a part), "C" (a prefix's backward), "whole" (groups that fit), or "idle".
        work: of its forward on one stage, in any unit; backward takes `BACKWARD_WORK` times that.
        prefix: number of the prefix that it belongs to, None for "whole" and "idle".
    """

    kind: str
    work: float
    prefix: int | None = None

    @property
    def forward(self) -> float:
        """Time of its forward on one stage."""
        return 0.0 if self.kind in ("C", "idle") else self.work

    @property
    def backward(self) -> float:
        """Time of its backward on one stage."""
        return 0.0 if self.kind in ("A", "idle") else BACKWARD_WORK * self.work


@dataclass(frozen=True)
class JobSpan:
    """One micro-batch's forward or backward on one model chunk, modelled or traced.

    Attributes:
        stage: of the pipeline.
        chunk: of the stage (virtual stage), 0 without interleaving.
        number: of the micro-batch in the step, as megatron-core counts.
        kind: see `PipelineJob`.
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
    """

    num_stages: int
    jobs: tuple[PipelineJob, ...]
    spans: tuple[JobSpan, ...]

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
            held: dict[int, tuple[int, int]] = {}
            for at, span in enumerate(self.on_stage(stage)):
                prefix = self.jobs[span.number].prefix
                if prefix is not None:
                    held[prefix] = (held.get(prefix, (at, at))[0], at)
            most = max([most, *(sum(a <= at <= b for a, b in held.values()) for at, _ in held.values())])
        return most

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
        return even_bubble(self.num_microbatches, self.num_stages, self.num_chunks)

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
        spans = {(s.stage, s.chunk, s.number, s.backward): s for s in self.spans}
        orders = [self.order(stage) for stage in range(self.num_stages)]
        times = _play(orders, lambda stage, op: seconds(spans[stage, *op]))
        found = [replace(spans[at], start=start, end=end) for at, (start, end) in times.items()]
        return replace(self, spans=tuple(sorted(found, key=lambda span: span.stage)))


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
    begins: dict[int, PipelineJob] = {}
    for pack in packs:
        work = pack.layout.num_rows + pair_cost * pack.layout.area
        if pack.prefix is None:
            jobs.append(PipelineJob("whole", work))
            continue
        number = prefixes.setdefault(id(pack.prefix), len(prefixes))
        jobs.append(PipelineJob("A" if pack.is_prefix else "B", work, number))
        if pack.is_prefix:
            begins[number] = jobs[-1]
    return jobs if forward_only else _with_prefix_backwards(jobs, begins)


def _with_prefix_backwards(jobs: list[PipelineJob], begins: dict[int, PipelineJob]) -> list[PipelineJob]:
    """A C behind the last part of every prefix, where the schedule has it."""
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
    if num_chunks is None:
        orders = [_one_f_one_b(len(all_jobs), num_stages - s - 1, forward_only) for s in range(num_stages)]
    else:
        group = chunk_group or num_stages
        orders = [
            _interleaved(len(all_jobs), num_stages - s - 1, num_chunks, group, forward_only) for s in range(num_stages)
        ]
    share = num_chunks or 1
    work = [(job.forward / share, job.backward / share) for job in all_jobs]
    times = _play(orders, lambda stage, op: work[op[1]][op[2]])
    spans = tuple(
        JobSpan(stage, op[0], op[1], all_jobs[op[1]].kind, op[2], *times[stage, *op])
        for stage, order in enumerate(orders)
        for op in order
    )
    return PipelineRun(num_stages, all_jobs, spans)


def order_jobs(
    jobs: Sequence[PipelineJob],
    num_stages: int,
    *,
    num_chunks: int | None = None,
    chunk_group: int | None = None,
    max_live_prefixes: int | None = None,
) -> list[int]:
    """The order of ``jobs`` with the smallest modelled bubble among a few simple ones, as indices into ``jobs``.

    All have waves of split groups: the A of a wave, its parts, its C. Waves have 1 group, 2, 4, ..., or all; the next
    wave's A may come before the C; groups that fit come last or before the last C. Groups, their parts, and the packs
    of groups that fit keep their order. Every stage finds the same answer.

    Args:
        jobs: from `pipeline_jobs`, with the backward.
        num_stages: of the pipeline. Without one, the order is kept.
        num_chunks: see `plan_pipeline`.
        chunk_group: see `plan_pipeline`.
        max_live_prefixes: the most prefixes that a stage may hold at once; None for as many as there are stages, which
            is what 1F1B holds of ordinary micro-batches. One group after the other is always allowed.
    """
    kept = list(range(len(jobs)))
    groups = sum(job.kind == "A" for job in jobs)
    if num_stages == 1 or not groups:
        return kept
    limit = num_stages if max_live_prefixes is None else max_live_prefixes
    settings: dict[str, Any] = {"num_chunks": num_chunks, "chunk_group": chunk_group}
    first = plan_pipeline(jobs, num_stages, **settings)
    best = (first.total, first.live_prefixes, kept)
    sizes = [1 << i for i in range(groups.bit_length()) if 1 << i < min(groups, limit)] + [min(groups, max(1, limit))]
    for size, early, whole_last in product(sizes, (False, True), (True, False)):
        order = _in_waves(jobs, size, early, whole_last)
        run = plan_pipeline([jobs[i] for i in order], num_stages, **settings)
        if run.live_prefixes <= max(limit, first.live_prefixes):
            best = min(best, (run.total, run.live_prefixes, order), key=lambda found: found[:2])
    return best[2]


def _in_waves(jobs: Sequence[PipelineJob], size: int, early: bool, whole_last: bool) -> list[int]:
    """``size`` split groups at a time; ``early``: the A of the next wave before the C of the last."""
    of_kind: dict[str, dict[int, list[int]]] = {kind: {} for kind in "ABC"}
    whole = []
    for i, job in enumerate(jobs):
        if job.prefix is None:
            whole.append(i)
        else:
            of_kind[job.kind].setdefault(job.prefix, []).append(i)
    prefixes = list(of_kind["A"])
    waves = [prefixes[first : first + size] for first in range(0, len(prefixes), size)]
    begins, parts, ends = ([[i for p in wave for i in of_kind[kind][p]] for wave in waves] for kind in "ABC")
    order = begins[0]
    for n in range(len(waves)):
        is_last = n == len(waves) - 1
        middle = [[] if is_last else begins[n + 1], [] if is_last and not whole_last else ends[n]]
        order = [*order, *parts[n], *(middle[0] + middle[1] if early else middle[1] + middle[0])]
    return [*order, *whole, *([] if whole_last else ends[-1])]


def even_bubble(num_microbatches: int, num_stages: int, num_chunks: int | None = None) -> float:
    """The bubble of megatron-core's schedule on equal micro-batches: idle time over all (arXiv 2104.04473, 2.2)."""
    fill = (num_stages - 1) / (num_chunks or 1)
    return fill / (num_microbatches + fill)


_Op = tuple[int, int, bool]  # chunk, micro-batch, backward


def _one_f_one_b(count: int, stages_after: int, forward_only: bool) -> list[_Op]:
    forwards: list[_Op] = [(0, n, False) for n in range(count)]
    return forwards if forward_only else _alternate(forwards, [(0, n, True) for n in range(count)], stages_after)


def _interleaved(count: int, stages_after: int, num_chunks: int, chunk_group: int, forward_only: bool) -> list[_Op]:
    """Groups of micro-batches go through one chunk after the other; backward likewise, from the last chunk."""
    table = [
        (chunk, n)
        for first in range(0, count, chunk_group)
        for chunk in range(num_chunks)
        for n in range(first, min(first + chunk_group, count))
    ]
    forwards: list[_Op] = [(chunk, n, False) for chunk, n in table]
    if forward_only:
        return forwards
    warmup = 2 * stages_after + (num_chunks - 1) * chunk_group
    return _alternate(forwards, [(num_chunks - 1 - chunk, n, True) for chunk, n in table], warmup)


def _alternate(forwards: list[_Op], backwards: list[_Op], warmup: int) -> list[_Op]:
    """Some forwards, then one of each in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
    return [*forwards[:warmup], *(op for pair in pairs for op in pair), *backwards[steady:]]


_Times = dict[tuple[int, int, int, bool], tuple[float, float]]  # (stage, chunk, micro-batch, backward): start and end


def _play(orders: Sequence[Sequence[_Op]], seconds: Callable[[int, _Op], float]) -> _Times:
    """Start everything as early as its stage's order and what it waits for allow."""
    stages = len(orders)
    last_chunk = max(op[0] for order in orders for op in order)
    times: _Times = {}
    next_up, free = [0] * stages, [0.0] * stages
    waiting = set(range(stages))
    while waiting:
        before = len(times)
        for stage in sorted(waiting):
            order = orders[stage]
            while next_up[stage] < len(order):
                op = order[next_up[stage]]
                source = _waits_for(stage, op, stages, last_chunk)
                if source is not None and source not in times:
                    break
                start = free[stage] if source is None else max(free[stage], times[source][1])
                free[stage] = start + seconds(stage, op)
                times[stage, *op] = (start, free[stage])
                next_up[stage] += 1
            else:
                waiting.remove(stage)
        assert len(times) > before or not waiting, "the order of the schedule waits for itself"
    return times


def _waits_for(stage: int, op: _Op, num_stages: int, last_chunk: int) -> tuple[int, int, int, bool] | None:
    """(stage, chunk, micro-batch, backward) of what gives this its input."""
    chunk, number, backward = op
    if backward and (stage, chunk) == (num_stages - 1, last_chunk):
        return stage, chunk, number, False
    at = chunk * num_stages + stage + (1 if backward else -1)
    return None if at < 0 else (at % num_stages, at // num_stages, number, backward)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
