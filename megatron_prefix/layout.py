"""The layout of a pack: a forest of segments in depth-first order.

A prefix group is a two-level tree (one prefix, G responses); multi-turn trajectories give deeper trees. Row ``r`` of a
pack belongs to exactly one segment. It attends causally inside its own segment and fully to every ancestor segment:

    segment 0 (prefix)      0 0 0
    segment 1 (response)    0 0 0 1 1        rows of segment 1 see segment 0 and, causally, themselves
    segment 2 (response)    0 0 0     2 2    rows of segment 2 never see segment 1

Everything here is plain Python on integers: no torch, no process groups, nothing that changes after construction.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

FLOPS_PER_PAIR = 14
"""Of one (query, key) pair, per head and channel: two matrix products forward and five backward, two FLOPs each."""

FORWARD_FLOPS_PER_PAIR = 4
"""Those of the forward."""


class AncestorRange(NamedTuple):
    """Queries of a segment's descendants (contiguous, because depth-first) against that segment's keys, in rows."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


@dataclass(frozen=True, init=False)
class PrefixLayout:
    """Lengths and parents of the segments of a pack, in depth-first order.

    Args:
        lengths: rows of each segment; 0 is allowed (a one-token prompt shares no row).
        parents: index of each segment's parent, -1 for a root. Depth-first: a segment follows its parent, and all
            descendants of a segment stand together right behind it.

    Raises:
        ValueError: an empty layout, lists of different length, a negative length, a parent that does not exist, or an
            order that is not depth-first. The message names the segment.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __init__(self, lengths: list[int] | tuple[int, ...], parents: list[int] | tuple[int, ...]) -> None:
        lengths, parents = tuple(lengths), tuple(parents)
        if not lengths:
            raise ValueError("a layout needs at least one segment, got none")
        if len(lengths) != len(parents):
            raise ValueError(
                f"lengths and parents must have one entry per segment, got {len(lengths)} and {len(parents)}"
            )
        branch: list[int] = []  # the path from a root to the previous segment
        for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            for name, value in (("length", length), ("parent", parent)):
                if type(value) is not int:
                    raise ValueError(f"segment {i}: {name} must be an int, got {value!r}")
            if length < 0:
                raise ValueError(f"segment {i}: length must be 0 or more, got {length}")
            if not -1 <= parent < i:
                raise ValueError(f"segment {i}: parent must be -1 (a root) or an earlier segment (< {i}), got {parent}")
            while branch and branch[-1] != parent:
                branch.pop()
            if parent != -1 and not branch:
                raise ValueError(
                    f"segment {i}: parent {parent} is not on the current branch, so the order is not depth-first; "
                    "list all descendants of a segment right after it"
                )
            branch.append(i)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "parents", parents)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment, and the number of rows at the end: [S + 1]."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def num_rows(self) -> int:
        """Rows of the pack (T)."""
        return self.starts[-1]

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Depth of each segment in its tree, 0 for a root: [S]."""
        levels: list[int] = []
        for parent in self.parents:
            levels.append(0 if parent < 0 else levels[parent] + 1)
        return tuple(levels)

    @cached_property
    def first_positions(self) -> tuple[int, ...]:
        """Position of each segment's first row in its own sequence (rows of all its ancestors): [S]."""
        firsts: list[int] = []
        for parent in self.parents:
            firsts.append(0 if parent < 0 else firsts[parent] + self.lengths[parent])
        return tuple(firsts)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Position of each row in its own sequence, for RoPE or learned embeddings: [T]."""
        return tuple(
            position
            for first, length in zip(self.first_positions, self.lengths, strict=True)
            for position in range(first, first + length)
        )

    @cached_property
    def max_sequence_length(self) -> int:
        """Rows of the longest root-to-leaf sequence."""
        return max(first + length for first, length in zip(self.first_positions, self.lengths, strict=True))

    @cached_property
    def subtree_ends(self) -> tuple[int, ...]:
        """Row behind the last row of each segment's subtree: [S]."""
        ends = list(self.starts[1:])
        for i in reversed(range(len(self))):
            parent = self.parents[i]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[i])
        return tuple(ends)

    @cached_property
    def ancestor_levels(self) -> tuple[tuple[AncestorRange, ...], ...]:
        """For each tree level that has keys to read: one range per segment with rows and with descendant rows.

        Ranges of one level are disjoint in queries and in keys, so a level is one varlen call.
        """
        by_level: dict[int, list[AncestorRange]] = {}
        for i, level in enumerate(self.levels):
            k_start, k_end, q_end = self.starts[i], self.starts[i + 1], self.subtree_ends[i]
            if k_end > k_start and q_end > k_end:
                by_level.setdefault(level, []).append(AncestorRange(k_end, q_end, k_start, k_end))
        return tuple(tuple(by_level[level]) for level in sorted(by_level))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Segments without children."""
        inner = set(self.parents)
        return tuple(i for i in range(len(self)) if i not in inner)

    def branch(self, segment: int) -> tuple[int, ...]:
        """The segments from the root down to ``segment``, which is included."""
        path = [segment]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    @cached_property
    def area(self) -> int:
        """(query, key) pairs of the attention mask: the work of one attention head."""
        own = sum(n * (n + 1) // 2 for n in self.lengths)
        shared = sum((r.q_end - r.q_start) * (r.k_end - r.k_start) for level in self.ancestor_levels for r in level)
        return own + shared

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of lengths and parents: equal layouts on two ranks have equal checksums."""
        return zlib.crc32(repr((self.lengths, self.parents)).encode())

    def repeated(self) -> PrefixLayout:
        """The layout of repeated-prefix training: every root-to-leaf sequence as a segment of its own."""
        return PrefixLayout([self.first_positions[i] + self.lengths[i] for i in self.leaves], [-1] * len(self.leaves))


@dataclass(frozen=True, init=False)
class PartLayout(PrefixLayout):
    """Some subtrees of a tree whose ancestors' rows are in another pack: a micro-batch of a split prefix group.

    Rows are those of the part alone. The ancestors stand in the tree as segments without rows, so that levels and
    queries are those of a whole tree; their keys are read from a cache, which holds the rows of the ancestors' pack.

        ancestors' pack     p p p                 cached at rows 0..2
        part                      0 0             sees p p p and, causally, itself
                                      1 1 1       sees p p p, never segment 0

    Args:
        lengths: rows of each segment in this pack; 0 for a cached segment.
        parents: as in `PrefixLayout`.
        cached_lengths: rows of each segment in the cache; 0 for a segment of this pack.
        cached_starts: first row of each segment in the cache; 0 for a segment of this pack.

    Raises:
        ValueError: as `PrefixLayout`; lists of different length, a segment with rows in both places, a cached segment
            below one of this pack, or a negative row. The message names the segment.
    """

    cached_lengths: tuple[int, ...]
    cached_starts: tuple[int, ...]

    def __init__(
        self,
        lengths: Sequence[int],
        parents: Sequence[int],
        cached_lengths: Sequence[int],
        cached_starts: Sequence[int],
    ) -> None:
        super().__init__(tuple(lengths), tuple(parents))
        if not len(lengths) == len(cached_lengths) == len(cached_starts):
            raise ValueError(
                f"a part needs one cached length and start per segment: {len(self)} segments, "
                f"{len(cached_lengths)} lengths, {len(cached_starts)} starts"
            )
        for i, (length, cached, start) in enumerate(zip(lengths, cached_lengths, cached_starts, strict=True)):
            if cached < 0 or start < 0:
                raise ValueError(f"segment {i}: cached length and start must be 0 or more, got {cached} and {start}")
            if cached and length:
                raise ValueError(f"segment {i} has {length} rows here and {cached} in the cache; it must be in one")
            if cached and parents[i] >= 0 and lengths[parents[i]]:
                raise ValueError(f"segment {i} is cached, but its parent {parents[i]} has rows in this part")
        object.__setattr__(self, "cached_lengths", tuple(cached_lengths))
        object.__setattr__(self, "cached_starts", tuple(cached_starts))

    @cached_property
    def first_positions(self) -> tuple[int, ...]:
        """Position of each segment's first row in its own sequence, cached ancestors counted: [S]."""
        firsts: list[int] = []
        for parent in self.parents:
            firsts.append(0 if parent < 0 else firsts[parent] + self.lengths[parent] + self.cached_lengths[parent])
        return tuple(firsts)

    @cached_property
    def cached_levels(self) -> tuple[tuple[AncestorRange, ...], ...]:
        """As `ancestor_levels`, with keys in the rows of the cache."""
        by_level: dict[int, list[AncestorRange]] = {}
        for i, (count, start) in enumerate(zip(self.cached_lengths, self.cached_starts, strict=True)):
            q_start, q_end = self.starts[i + 1], self.subtree_ends[i]
            if count and q_end > q_start:
                by_level.setdefault(self.levels[i], []).append(AncestorRange(q_start, q_end, start, start + count))
        return tuple(tuple(by_level[level]) for level in sorted(by_level))

    @cached_property
    def whole(self) -> PrefixLayout:
        """The tree with the rows of the cached segments too."""
        lengths = [own + cached for own, cached in zip(self.lengths, self.cached_lengths, strict=True)]
        return PrefixLayout(lengths, self.parents)

    @property
    def num_cached_rows(self) -> int:
        """Least number of rows that the cache must have."""
        return max(start + count for start, count in zip(self.cached_starts, self.cached_lengths, strict=True))

    @cached_property
    def area(self) -> int:
        """(query, key) pairs of this part's rows, those with cached keys included."""
        cached = sum((r.q_end - r.q_start) * (r.k_end - r.k_start) for level in self.cached_levels for r in level)
        return super().area + cached

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all that makes the part."""
        return zlib.crc32(repr((self.lengths, self.parents, self.cached_lengths, self.cached_starts)).encode())

    def repeated(self) -> PrefixLayout:
        """The layout of repeated-prefix training of this part's leaves."""
        ends = [self.first_positions[i] + self.lengths[i] for i in self.leaves if self.lengths[i]]
        return PrefixLayout(ends, [-1] * len(ends))
