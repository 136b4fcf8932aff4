"""The micro-batches of the data-parallel rank that has the most work, counted on lengths.

Groups go to ranks longest first, onto the least loaded, by modelled cost. On a rank, groups with at most the limit's
rows share micro-batches (best fit, longest first); a larger one becomes its prefix and parts (`splitting`). Repeated
prefixes are sequences of their own, packed the same way; a sequence over the limit has a micro-batch to itself.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.workload import Workload

LEEWAY = 1.03
"""Of the mean rank's rows: what a whole response may take on one context-parallel rank, see `placement`."""

Cost = Callable[[Workload], float]


@dataclass(frozen=True)
class Sequences:
    """A prefix and the responses that share it, in rows; a repeated sequence is one response without a prefix.

    Attributes:
        prefix: rows that are encoded once.
        responses: rows of each response that has a target, with what it repeats of the prefix before them.
        repeated: of the rows of each response, those without a target.
    """

    prefix: int
    responses: tuple[int, ...]
    repeated: int = 0

    @classmethod
    def grouped(cls, group: RolloutGroup) -> Sequences:
        """A group with its prefix encoded once."""
        return cls(len(group.prompt) - 1, tuple(len(tokens) for tokens in group.responses))

    @classmethod
    def each(cls, group: RolloutGroup) -> list[Sequences]:
        """The group's rollouts as sequences of their own."""
        prefix = len(group.prompt) - 1
        return [cls(0, (prefix + len(tokens),), prefix) for tokens in group.responses]

    @cached_property
    def rows(self) -> int:
        """Of all of it."""
        return self.prefix + sum(self.responses)

    @property
    def is_one(self) -> bool:
        """Whether it is a single segment, which is not cut."""
        return not self.prefix and len(self.responses) == 1

    @cached_property
    def work(self) -> Workload:
        """Of all of it in one micro-batch."""
        part = self.part(self.responses)
        return replace(part, rows=part.rows + self.prefix, pairs=part.pairs + _triangle(self.prefix))

    @property
    def prefix_work(self) -> Workload:
        """Of the prefix alone."""
        return Workload(self.prefix, pairs=_triangle(self.prefix))

    def part(self, responses: Sequence[int]) -> Workload:
        """Of some of the responses, which read the prefix's keys."""
        rows = sum(responses)
        pairs = self.prefix * rows + sum(map(_triangle, responses))
        shared = self.prefix > 0
        return Workload(rows, rows - self.repeated * len(responses), pairs, rows if shared else 0, int(shared))


@dataclass(frozen=True)
class RankLoad:
    """A step of one data-parallel rank.

    Attributes:
        work: of all micro-batches.
        microbatches: how many, a split group's prefix counted once.
        largest: the micro-batch of the highest cost.
        most_rows: of any micro-batch.
        most_targets: rows with a target, of any micro-batch.
        split_groups: groups that do not fit a micro-batch and have a prefix to share.
        split_prefix: rows of the longest prefix of a split group.
        parts: most parts of a split group; 0 without one.
        reread_rows: over all parts, rows of the prefix that they read.
        sequences: what it computes.
    """

    work: Workload
    microbatches: int
    largest: Workload
    most_rows: int
    most_targets: int
    split_groups: int
    split_prefix: int
    parts: int
    reread_rows: int
    sequences: tuple[Sequences, ...]

    @classmethod
    def of(cls, sequences: Iterable[Sequences], max_tokens: int, cost: Cost) -> RankLoad:
        """Of what one rank computes, in micro-batches of at most ``max_tokens`` rows."""
        sequences = tuple(sequences)
        whole = [each for each in sequences if each.rows <= max_tokens or each.is_one]
        split = [each for each in sequences if not (each.rows <= max_tokens or each.is_one)]
        works = _best_fit(whole, max_tokens)
        most_parts = reread = 0
        for each in split:
            parts = _parts(each, max_tokens)
            works += [each.prefix_work, *parts] if each.prefix else parts
            most_parts = max(most_parts, len(parts))
            reread += len(parts) * each.prefix
        return cls(
            work=sum(works, Workload()),
            microbatches=len(works),
            largest=max(works, key=cost),
            most_rows=max(work.rows for work in works),
            most_targets=max(work.target_rows for work in works),
            split_groups=sum(each.prefix > 0 for each in split),
            split_prefix=max((each.prefix for each in split), default=0),
            parts=most_parts,
            reread_rows=reread,
            sequences=sequences,
        )

    def keys_that_travel(self, cp: int) -> int:
        """Key rows that reach other context-parallel ranks in a forward pass: prefixes', once more for every part that
        reads them, and those of responses that are cut.

        The placement "branch" keeps a response whole where it fits within 3% of the mean rank (`placement`).
        """
        sizes, rows = self._cut_responses
        return self._prefix_rows + self.reread_rows + rows[bisect_left(sizes, cp)]

    @cached_property
    def _prefix_rows(self) -> int:
        return sum(each.prefix for each in self.sequences)

    @cached_property
    def _cut_responses(self) -> tuple[list[float], list[int]]:
        """Ascending, the number of ranks above which each response is cut; and the rows of the first n responses."""
        cut = sorted((LEEWAY * each.rows / rows, rows) for each in self.sequences for rows in each.responses)
        return [size for size, _ in cut], list(accumulate((rows for _, rows in cut), initial=0))


def busiest_rank(costs: Sequence[float], num_ranks: int) -> tuple[int, ...]:
    """Indices of the groups of the data-parallel rank with the highest cost.

    Raises:
        ValueError: fewer groups than ranks.
    """
    if len(costs) < num_ranks:
        raise ValueError(f"{len(costs)} groups cannot feed {num_ranks} data-parallel ranks; give each at least one")
    ranks: list[tuple[float, int]] = [(0.0, rank) for rank in range(num_ranks)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(ranks)
        shares[rank].append(i)
        heapq.heappush(ranks, (load + costs[i], rank))
    return tuple(shares[max(ranks)[1]])


def smallest_limit(groups: Iterable[Sequences]) -> int:
    """The lowest limit of a micro-batch's rows with which every group can be trained: the longest prefix or response
    of those that would be split."""
    return max(min(each.rows, max(each.prefix, *each.responses)) for each in groups)


def _best_fit(whole: list[Sequences], limit: int) -> list[Workload]:
    """Micro-batches of groups that are not split; each goes where the least is left free, longest first."""
    free: list[tuple[int, int]] = []  # (rows, micro-batch), ascending
    works: list[Workload] = []
    for each in sorted(whole, key=lambda each: -each.rows):
        at = bisect_left(free, (each.rows, -1))
        if at == len(free):
            left, number = limit, len(works)
            works.append(Workload())
        else:
            left, number = free.pop(at)
        works[number] += each.work
        if left > each.rows:
            insort(free, (left - each.rows, number))
    return works


def _parts(group: Sequences, limit: int) -> list[Workload]:
    """Responses in order, as many in a part as fit."""
    parts: list[list[int]] = [[]]
    for rows in group.responses:
        if parts[-1] and sum(parts[-1]) + rows > limit:
            parts.append([])
        parts[-1].append(rows)
    return [group.part(part) for part in parts]


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2
