"""Spreading costs evenly: over data-parallel ranks, over the micro-batches of a rank, over the parts of a group.

Pure functions of numbers, the same on every rank. Makespan scheduling on identical machines: longest first onto the
least loaded (Graham 1969, "Bounds on Multiprocessing Timing Anomalies"), then moves and swaps between the most loaded
and a little loaded one until none helps; best-fit decreasing counts how many a limit on rows asks for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_PARTNERS = 8
"""Little loaded sets that the most loaded one tries to exchange with."""

_SAMPLE = 512
"""Most members of a set that an exchange looks at, evenly over their costs."""

_CRUMB = 1e-6
"""Of the mean: a smaller gain is none."""


def spread(
    costs: Sequence[float],
    count: int,
    *,
    rows: Sequence[int] | None = None,
    limit: int | None = None,
    enough: float = 0.001,
) -> list[list[int]]:
    """Indices of the costs in ``count`` sets, none of them empty, their sums as even as the search gets them.

    Args:
        costs: 0 or more each.
        count: of the sets.
        rows: of each, with a limit.
        limit: most rows of one set; there must be room in ``count`` sets, see `best_fit`.
        enough: the search ends where the largest sum is that close to the mean, as a share of it.

    Raises:
        ValueError: fewer costs than sets.
    """
    if len(costs) < count:
        raise ValueError(f"{len(costs)} cannot be spread over {count} so that each has one")
    values = np.asarray(costs, dtype=float)
    sizes = np.zeros(len(costs), dtype=np.int64) if rows is None or limit is None else np.asarray(rows)
    members = _longest_first(values, sizes, count, limit or 0)
    if enough < np.inf:
        _Sets(values, sizes, 0 if limit is None else limit, members).even_out(enough)
    return members


def best_fit(sizes: Sequence[float], limit: float) -> list[list[int]]:
    """Indices of ``sizes`` in few sets of at most ``limit`` each: best-fit decreasing, the fullest with room first.

    At most 11/9 of the fewest possible, plus 4 (Johnson et al. 1974). No single size may be above the limit.
    """
    sets: list[list[int]] = []
    room: list[tuple[float, int]] = []  # of each set, ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(room, (sizes[i], -1))
        if at < len(room):
            free, number = room.pop(at)
            sets[number].append(i)
        else:
            free, number = limit, len(sets)
            sets.append([i])
        insort(room, (free - sizes[i], number))
    return sets


def least_makespan(costs: Sequence[float], count: int) -> float:
    """What the largest of ``count`` sums is at least, however the costs are spread.

    The mean; and of the j * count + 1 largest costs, some set has j + 1 of them.
    """
    largest = sorted(costs, reverse=True)
    before = list(accumulate(largest, initial=0.0))
    crowded = (before[j * count + 1] - before[j * count - j] for j in range((len(largest) - 1) // count + 1))
    return max(before[-1] / count, *crowded)


def _longest_first(costs: NDArray, rows: NDArray, count: int, limit: int) -> list[list[int]]:
    """Longest first onto the least loaded with room, or best-fit decreasing where that finds no room."""
    order = np.argsort(-costs, kind="stable")
    smallest = np.minimum.accumulate(rows[order][::-1])[::-1].tolist()  # of the rows to come
    sets: list[list[int]] = [[] for _ in range(count)]
    open_sets = [(0.0, at, limit) for at in range(count)]  # a heap: load, set, room
    for number, i in enumerate(order.tolist()):
        full = []
        while open_sets and open_sets[0][2] < rows[i]:
            full.append(heappop(open_sets))
        if not open_sets:
            return _filled(rows, count, limit)
        load, at, room = open_sets[0]
        sets[at].append(i)
        heapreplace(open_sets, (load + float(costs[i]), at, room - int(rows[i])))
        for each in full:
            if each[2] >= smallest[number]:
                heappush(open_sets, each)
    return sets if all(sets) else _filled(rows, count, limit)  # costs of 0 may all come to one set


def _filled(rows: NDArray, count: int, limit: int) -> list[list[int]]:
    sets = best_fit(rows.tolist(), limit)
    assert len(sets) <= count, "the caller counted the sets"
    for _ in range(count - len(sets)):
        sets.append([max(sets, key=len).pop()])
    return sets


class _Sets:
    """Sets of costs while they are made even."""

    def __init__(self, costs: NDArray, rows: NDArray, limit: int, members: list[list[int]]) -> None:
        # The last, at -1, stands for nothing: what comes back in a move.
        self.costs, self.rows = np.append(costs, 0.0), np.append(rows, 0)
        self.limit, self.members = limit, members
        self.loads = np.array([costs[each].sum() for each in members])
        self.taken = np.array([rows[each].sum() for each in members], dtype=np.int64)

    def even_out(self, enough: float) -> None:
        """Lower the largest load, by moves and swaps, while that is possible."""
        mean = float(self.loads.mean())
        for _ in range(4 * len(self.members) + 64):
            most = int(np.argmax(self.loads))
            if self.loads[most] <= (1 + enough) * mean:
                return
            little = [at for at in np.argsort(self.loads, kind="stable").tolist() if at != most]
            if not any(self._exchange(most, other, _CRUMB * mean) for other in little[:_PARTNERS]):
                return

    def _exchange(self, most: int, other: int, crumb: float) -> bool:
        """Move one cost over, or swap two, so that both loads come closest; whether anything helped."""
        gap = self.loads[most] - self.loads[other]
        mine, theirs = self._sample(most), [-1, *self._sample(other)]
        given = self.costs[mine][:, None] - self.costs[theirs][None, :]
        moved = self.rows[mine][:, None] - self.rows[theirs][None, :]
        helps = (given > crumb) & (given < gap - crumb)
        helps &= (self.taken[other] + moved <= self.limit) & (self.taken[most] - moved <= self.limit)
        if not helps.any():
            return False
        row, column = divmod(int(np.argmin(np.where(helps, np.abs(given - gap / 2), np.inf))), len(theirs))
        self.members[most].remove(mine[row])
        self.members[other].append(mine[row])
        if theirs[column] >= 0:
            self.members[other].remove(theirs[column])
            self.members[most].append(theirs[column])
        self.loads[most] -= given[row, column]
        self.loads[other] += given[row, column]
        self.taken[most] -= moved[row, column]
        self.taken[other] += moved[row, column]
        return True

    def _sample(self, at: int) -> list[int]:
        members = sorted(self.members[at], key=lambda i: (self.costs[i], i))
        return members[:: -(-len(members) // _SAMPLE)]
