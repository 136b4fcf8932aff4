"""The order of a step's micro-batches in a pipeline: small bubbles with few prefixes held. Plain Python on lengths.

In megatron-core's schedules every micro-batch has its turn of a forward and of a backward. A uses one of its turns and
C the other, so that around each of them fewer micro-batches are under way than the stages need, and stages wait. In
waves, all A of some groups together and all C together, they wait once per wave instead of once per group; the prefixes
of a wave are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from megatron_prefix.pipeline_plan import PipelineJob, even_bubble, num_idle_jobs
from megatron_prefix.pipeline_schedule import Schedule

BUBBLE_TOLERANCE = 0.01
"""Of a step's time: modelled bubbles are that far from traced ones, so that no prefix is held for less."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Found:
    """An order, as indices into the jobs, its bubble and the most prefixes that a stage holds."""

    order: list[int]
    bubble: float
    live: int


def order_jobs(
    jobs: Sequence[PipelineJob],
    num_stages: int,
    *,
    num_chunks: int | None = None,
    chunk_group: int | None = None,
    max_live_prefixes: int | None = None,
) -> list[int]:
    """The best order of ``jobs`` among some simple ones, as indices into ``jobs``. Every stage finds the same.

    All have waves of split groups: the A of a wave, its parts, its C. There are 1, 2, 3, ... waves; the next wave's A
    may come before the C; groups that fit come last or before the last C. Groups, their parts, and the packs of groups
    that fit keep their order.

    Args:
        jobs: from `pipeline_jobs`, with the backward.
        num_stages: of the pipeline. Without one, the order is kept.
        num_chunks: see `plan_pipeline`.
        chunk_group: see `plan_pipeline`.
        max_live_prefixes: the most prefixes that a stage may hold at once; the order then has the smallest modelled
            bubble. One group after the other is always allowed. None for as few as a small bubble takes: that of
            megatron-core's schedule with as many even micro-batches or, where no order comes to that (micro-batches are
            uneven), the smallest of all plus `BUBBLE_TOLERANCE`.
    """
    kept = list(range(len(jobs)))
    groups = sum(job.kind == "A" for job in jobs)
    if num_stages == 1 or not groups:
        return kept
    idle = num_idle_jobs(len(jobs), num_stages, num_chunks, chunk_group)
    schedule = Schedule.of_megatron(len(jobs) + idle, num_stages, num_chunks, chunk_group)
    share = num_chunks or 1
    times = [(job.forward / share, job.backward / share) for job in jobs]
    busy = share * sum(map(sum, times))
    prefixes = [(i, max(j for j in kept if jobs[j].prefix == jobs[i].prefix)) for i in kept if jobs[i].kind == "A"]

    def measured(order: list[int]) -> _Found:
        place = {job: number for number, job in enumerate(order)}
        held = [(place[begin], place[end]) for begin, end in prefixes]
        work = [taken for i in order for taken in times[i]] + [0.0] * (2 * idle)
        return _Found(order, 1 - busy / schedule.total(work), schedule.most_held(held))

    one_by_one = measured(kept)
    cap = max_live_prefixes or groups
    sizes = sorted(size for size in {-(-groups // waves) for waves in range(1, groups + 1)} if size <= cap)
    variants = product(sizes, (False, True), (True, False))
    found = [one_by_one, *(measured(_in_waves(jobs, *variant)) for variant in variants)]
    if max_live_prefixes is not None:
        limit = max(max_live_prefixes, one_by_one.live)
        return min((f for f in found if f.live <= limit), key=lambda f: (f.bubble, f.live)).order
    smallest = min(f.bubble for f in found)
    enough = even_bubble(sum(job.kind != "C" for job in jobs), num_stages, num_chunks, chunk_group) + _ROUNDING
    if smallest > enough:
        enough = smallest + BUBBLE_TOLERANCE
    return min((f for f in found if f.bubble <= enough), key=lambda f: (f.live, f.bubble)).order


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
    order = list(begins[0])
    for n in range(len(waves)):
        is_last = n == len(waves) - 1
        middle = [[] if is_last else begins[n + 1], [] if is_last and not whole_last else ends[n]]
        order += parts[n] + (middle[0] + middle[1] if early else middle[1] + middle[0])
    return [*order, *whole, *([] if whole_last else ends[-1])]
