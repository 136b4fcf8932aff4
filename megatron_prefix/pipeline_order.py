"""The order of a step's micro-batches in a pipeline: small bubbles with few prefixes held. Plain Python on lengths.

In megatron-core's schedules every micro-batch has its turn of a forward and of a backward. A uses one of its turns and
C the other, so that around each of them fewer micro-batches are under way than the stages need, and stages wait. Two
things help. The C of one group and the A of a later one may share their turns, and then use both. In waves, all A of
some groups together and all C together, stages wait once per wave instead of once per group; the prefixes of a wave are
held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from megatron_prefix.pipeline_plan import PipelineJob, even_bubble, num_idle_jobs
from megatron_prefix.pipeline_schedule import Schedule

BUBBLE_TOLERANCE = 0.01
"""Of a step's time: modelled bubbles are that far from traced ones, so that no prefix is held for less."""

_ROUNDING = 1e-9

Turn = tuple[int, int]
"""One micro-batch: the job whose forward it has and the one whose backward. They differ where C and A share a turn."""


@dataclass(frozen=True)
class _Found:
    """An order, its bubble and the most prefixes that a stage holds."""

    order: list[Turn]
    bubble: float
    live: int


def order_jobs(
    jobs: Sequence[PipelineJob],
    num_stages: int,
    *,
    num_chunks: int | None = None,
    chunk_group: int | None = None,
    max_live_prefixes: int | None = None,
) -> list[Turn]:
    """The best order of ``jobs`` among some simple ones, as indices into ``jobs``. Every stage finds the same.

    All have waves of split groups: the A of a wave, its parts, its C. There are 1, 2, 3, ... waves; the next wave's A
    may share turns with the C, or come after or before them; groups that fit come last or before the last C. Groups,
    their parts, and the packs of groups that fit keep their order, or a wave's parts go from the largest to the
    smallest, whatever their groups, so that stages that are at different micro-batches have equal work. In the largest
    waves, with more than two stages, some of all sizes may come before those, the smallest first: a large micro-batch
    at the start keeps all later stages waiting for it.

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
    if num_stages == 1:
        return _apart(kept)
    share = num_chunks or 1
    times = [(job.forward / share, job.backward / share) for job in jobs]
    busy = share * sum(map(sum, times))
    prefixes = [(i, max(j for j in kept if jobs[j].prefix == jobs[i].prefix)) for i in kept if jobs[i].kind == "A"]

    @cache
    def schedule_of(turns: int) -> Schedule:
        return Schedule.of_megatron(turns, num_stages, num_chunks, chunk_group)

    def measured(order: list[Turn]) -> _Found:
        idle = num_idle_jobs(len(order), num_stages, num_chunks, chunk_group)
        schedule = schedule_of(len(order) + idle)
        begins = {forward: number for number, (forward, _) in enumerate(order)}
        ends = {backward: number for number, (_, backward) in enumerate(order)}
        held = [(begins[begin], ends[end]) for begin, end in prefixes]
        work = [taken for begin, end in order for taken in (times[begin][0], times[end][1])] + [0.0] * (2 * idle)
        return _Found(order, 1 - busy / schedule.total(work), schedule.most_held(held))

    one_by_one = measured(_apart(kept))
    cap = max_live_prefixes or groups
    sizes = sorted(size for size in {-(-groups // waves) for waves in range(1, groups + 1)} if size <= cap) or [1]
    found = [one_by_one]
    for size, whole_last in product(sizes, (True, False)):
        late, early = (_in_waves(jobs, size, early, whole_last) for early in (False, True))
        found += map(measured, (_shared(jobs, late), _apart(late), _apart(early)))
    for size in sizes:
        mixed = _in_waves(jobs, size, early=False, whole_last=True, rising=0)
        found += map(measured, (_shared(jobs, mixed), _apart(mixed)))
    for rising in (num_stages, 4 * num_stages) if num_stages > 2 else ():
        found.append(measured(_apart(_in_waves(jobs, sizes[-1], early=False, whole_last=True, rising=rising))))
    if max_live_prefixes is not None:
        limit = max(max_live_prefixes, one_by_one.live)
        return min((f for f in found if f.live <= limit), key=lambda f: (f.bubble, f.live)).order
    smallest = min(f.bubble for f in found)
    enough = even_bubble(sum(job.kind != "C" for job in jobs), num_stages, num_chunks, chunk_group) + _ROUNDING
    if smallest > enough:
        enough = smallest + BUBBLE_TOLERANCE
    return min((f for f in found if f.bubble <= enough), key=lambda f: (f.live, f.bubble)).order


def in_turns(jobs: Sequence[PipelineJob], order: Sequence[Turn]) -> list[PipelineJob]:
    """The micro-batches of an order of ``jobs``."""
    return [jobs[begin] if begin == end else replace(jobs[begin], ends=jobs[end]) for begin, end in order]


def _apart(order: Sequence[int]) -> list[Turn]:
    """Every job has turns of its own."""
    return [(i, i) for i in order]


def _shared(jobs: Sequence[PipelineJob], order: Sequence[int]) -> list[Turn]:
    """C with A behind them share turns, the first with the first."""
    turns: list[Turn] = []
    alone = 0  # C at the end of the turns that no A has joined are those from here on
    for i in order:
        if jobs[i].kind == "A" and alone < len(turns):
            turns[alone] = (i, turns[alone][1])
            alone += 1
        else:
            turns.append((i, i))
            if jobs[i].kind != "C":
                alone = len(turns)
    return turns


def _in_waves(
    jobs: Sequence[PipelineJob], size: int, early: bool, whole_last: bool, rising: int | None = None
) -> list[int]:
    """``size`` split groups at a time; ``early``: the A of the next wave before the C of the last.

    ``rising``: the A of a wave from the smallest to the largest and its parts from the largest to the smallest, groups
    that fit among those of the last wave; in the first one after so many of all sizes, from the smallest.
    """
    of_kind: dict[str, dict[int, list[int]]] = {kind: {} for kind in "ABC"}
    whole = []
    for i, job in enumerate(jobs):
        if job.prefix is None:
            whole.append(i)
        else:
            of_kind[job.kind].setdefault(job.prefix, []).append(i)
    prefixes = list(of_kind["A"])
    waves = [prefixes[first : first + size] for first in range(0, len(prefixes), size)] or [[]]
    begins, parts, ends = ([[i for p in wave for i in of_kind[kind][p]] for wave in waves] for kind in "ABC")
    if rising is not None:
        parts[-1], whole = parts[-1] + whole, []
        begins = [sorted(wave, key=lambda i: jobs[i].work) for wave in begins]
        parts = [sorted(wave, key=lambda i: -jobs[i].work) for wave in parts]
        parts[0] = _rise_and_fall(parts[0], rising)
    order = list(begins[0])
    for n in range(len(waves)):
        is_last = n == len(waves) - 1
        middle = [[] if is_last else begins[n + 1], [] if is_last and not whole_last else ends[n]]
        order += parts[n] + (middle[0] + middle[1] if early else middle[1] + middle[0])
    return [*order, *whole, *([] if whole_last else ends[-1])]


def _rise_and_fall(falling: Sequence[int], rising: int) -> list[int]:
    """So many of ``falling``, spread evenly over it, from the last to the first, and then the others."""
    last = len(falling) - 1
    up = {last - round(n * last / rising) for n in range(rising)} if rising else set()
    return [falling[i] for i in sorted(up, reverse=True)] + [i for at, i in enumerate(falling) if at not in up]
