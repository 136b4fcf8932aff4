"""The order in which megatron-core's schedules run micro-batches on every stage, and when each starts.

Plain Python on numbers: 1F1B, and interleaved with virtual stages. What a micro-batch is does not matter here but for
how long it takes, so that one `Schedule` serves every order of a step's micro-batches. Communication takes no time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property

Op = tuple[int, int, bool]
"""Model chunk, micro-batch, whether backward."""


class Schedule:
    """What stages do, and what each piece of work waits for.

    Args:
        orders: of each stage, what it does, in order.

    Attributes:
        num_stages: of the pipeline.
        ops: (stage, op) of all, each behind what it waits for; those of one stage in its order.
    """

    def __init__(self, orders: Sequence[Sequence[Op]]) -> None:
        self.num_stages = len(orders)
        last_chunk = max(op[0] for order in orders for op in order)
        self.ops: list[tuple[int, Op]] = []
        self._waits: list[tuple[int, int]] = []  # stage, and where in ops that stands what it waits for, or -1
        placed: dict[tuple[int, Op], int] = {}
        next_up = [0] * self.num_stages
        total = sum(map(len, orders))
        while len(self.ops) < total:
            before = len(self.ops)
            for stage, order in enumerate(orders):
                while next_up[stage] < len(order):
                    op = order[next_up[stage]]
                    source = _waits_for(stage, op, self.num_stages, last_chunk)
                    if source is not None and source not in placed:
                        break
                    self._waits.append((stage, -1 if source is None else placed[source]))
                    placed[stage, op] = len(self.ops)
                    self.ops.append((stage, op))
                    next_up[stage] += 1
            assert len(self.ops) > before, "the order of the schedule waits for itself"
        self._work_of = [2 * number + backward for _, (_, number, backward) in self.ops]

    @classmethod
    def of_megatron(
        cls, count: int, num_stages: int, num_chunks: int | None, chunk_group: int | None, forward_only: bool = False
    ) -> Schedule:
        """Of ``count`` micro-batches; other arguments as in `pipeline_plan.plan_pipeline`."""
        after = [num_stages - stage - 1 for stage in range(num_stages)]
        if num_chunks is None:
            return cls([_one_f_one_b(count, stages, forward_only) for stages in after])
        group = chunk_group or num_stages
        return cls([_interleaved(count, stages, num_chunks, group, forward_only) for stages in after])

    def play(self, seconds: Iterable[float]) -> list[float]:
        """When each of ``ops`` ends that takes so long, started as early as its stage and what it waits for allow."""
        free = [0.0] * self.num_stages
        ends: list[float] = []
        for (stage, source), taken in zip(self._waits, seconds, strict=True):
            start = free[stage]
            if source >= 0 and ends[source] > start:
                start = ends[source]
            free[stage] = end = start + taken
            ends.append(end)
        return ends

    def total(self, work: Sequence[float]) -> float:
        """When all is done. ``work``: of one chunk, at 2 n the forward of micro-batch n and at 2 n + 1 its backward."""
        return max(self.play([work[i] for i in self._work_of]))

    def most_held(self, spans: Sequence[tuple[int, int]]) -> int:
        """How many things one stage holds at once that each live from one micro-batch's first piece of work there to
        another's last one.

        Args:
            spans: those two micro-batches of each.
        """
        return max(
            most_at_once([first[a] for a, _ in spans], [last[b] for _, b in spans])
            for first, last in self._first_and_last
        )

    @cached_property
    def _first_and_last(self) -> list[tuple[dict[int, int], dict[int, int]]]:
        """By stage, where among its work that of a micro-batch begins and ends."""
        found: list[tuple[dict[int, int], dict[int, int]]] = [({}, {}) for _ in range(self.num_stages)]
        for at, (stage, (_, number, _)) in enumerate(self.ops):
            found[stage][0].setdefault(number, at)
            found[stage][1][number] = at
        return found


def most_at_once(starts: Iterable[int], ends: Iterable[int]) -> int:
    """The most spans that hold one moment; each has a start and an end that counts still."""
    ended = sorted(ends)
    return max((i + 1 - bisect_left(ended, start) for i, start in enumerate(sorted(starts))), default=0)


def _one_f_one_b(count: int, stages_after: int, forward_only: bool) -> list[Op]:
    forwards: list[Op] = [(0, n, False) for n in range(count)]
    return forwards if forward_only else _alternate(forwards, [(0, n, True) for n in range(count)], stages_after)


def _interleaved(count: int, stages_after: int, num_chunks: int, chunk_group: int, forward_only: bool) -> list[Op]:
    """Groups of micro-batches go through one chunk after the other; backward likewise, from the last chunk."""
    table = [
        (chunk, n)
        for first in range(0, count, chunk_group)
        for chunk in range(num_chunks)
        for n in range(first, min(first + chunk_group, count))
    ]
    forwards: list[Op] = [(chunk, n, False) for chunk, n in table]
    if forward_only:
        return forwards
    warmup = 2 * stages_after + (num_chunks - 1) * chunk_group
    return _alternate(forwards, [(num_chunks - 1 - chunk, n, True) for chunk, n in table], warmup)


def _alternate(forwards: list[Op], backwards: list[Op], warmup: int) -> list[Op]:
    """Some forwards, then one of each in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
    return [*forwards[:warmup], *(op for pair in pairs for op in pair), *backwards[steady:]]


def _waits_for(stage: int, op: Op, num_stages: int, last_chunk: int) -> tuple[int, Op] | None:
    """(stage, op) of what gives this its input."""
    chunk, number, backward = op
    if backward and (stage, chunk) == (num_stages - 1, last_chunk):
        return stage, (chunk, number, False)
    at = chunk * num_stages + stage + (1 if backward else -1)
    return None if at < 0 else (at % num_stages, (at // num_stages, number, backward))
