"""What context parallelism will do with a pack: rows, keys that travel, attention area and bytes, per rank.

Made from lengths alone, without torch or process groups; execution follows it, and tests hold it to a brute-force mask.

A rank's own rows keep their tree: they are a pack of their own with shorter segments (`CpPlan.local_layouts`), whose
attention is the part that needs no communication. What a rank reads from another is, per segment, a prefix of the
other's rows of it: all of them where it owns descendants of the segment, else those before its own last piece.

In a part of a split group the ancestors' rows are keys without queries: each rank has those in its cache that it owned
when the prefix ran, and they are read and sent like keys of its own rows (`CpPlan.key_layouts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from megatron_prefix.context_parallel.placement import Piece, Placement, area, place
from megatron_prefix.layout import AncestorRange, PartLayout, PrefixLayout

Range = tuple[int, int]


@dataclass(frozen=True)
class Remote:
    """What one rank reads from another.

    Attributes:
        rows: ranges of the other's own rows, in order; together they are the buffer that travels.
        calls: unmasked kernel calls, each of rectangles (own query rows, buffer rows) with disjoint queries and keys.
    """

    rows: tuple[Range, ...]
    calls: tuple[tuple[AncestorRange, ...], ...]

    @property
    def num_rows(self) -> int:
        """Rows of the buffer."""
        return sum(end - start for start, end in self.rows)


@dataclass(frozen=True)
class CpPlan:
    """Context parallelism of one pack.

    Attributes:
        layout: of the whole pack.
        placement: pieces of each rank, from `place`.
        name: of the placement.
    """

    layout: PrefixLayout
    placement: Placement
    name: str

    @classmethod
    def build(cls, layout: PrefixLayout, cp_size: int, placement: str) -> CpPlan:
        """The plan of ``layout`` over ``cp_size`` ranks with one of `placement.PLACEMENTS`; see `choice` for "auto".

        Raises:
            ValueError: an unknown placement, or a size below 1.
        """
        return cls(layout, place(layout, cp_size, placement), placement)

    @cached_property
    def key_rows(self) -> tuple[tuple[int, ...], ...]:
        """Key rows that each rank reads from each source in one forward pass (p2p and all_gather); none from itself."""
        ranks = range(self.cp_size)
        return tuple(tuple(sum(p.end - p.start for p in self.keys_read(r, source)) for source in ranks) for r in ranks)

    def rows_received(self, rank: int) -> int:
        """Key rows that ``rank`` reads from all others in one forward pass."""
        return sum(self.key_rows[rank])

    def rows_sent(self, rank: int) -> int:
        """Key rows of ``rank`` that leave it in one forward pass, once for every rank that reads them."""
        return sum(read[rank] for read in self.key_rows)

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return len(self.placement)

    def rows(self, rank: int) -> list[int]:
        """Rows of the pack that ``rank`` owns, in its own order (ascending)."""
        starts = self.layout.starts
        return [row for p in self._own(rank) for row in range(starts[p.segment] + p.start, starts[p.segment] + p.end)]

    @cached_property
    def _cached(self) -> tuple[bool, ...]:
        """For each segment, whether its rows are keys in a cache."""
        if isinstance(self.layout, PartLayout):
            return tuple(length > 0 for length in self.layout.cached_lengths)
        return (False,) * len(self.layout)

    def _own(self, rank: int) -> list[Piece]:
        """Pieces of ``rank`` whose rows are in the pack."""
        return [piece for piece in self.placement[rank] if not self._cached[piece.segment]]

    @cached_property
    def key_layouts(self) -> tuple[PrefixLayout, ...]:
        """For each rank its key rows as a pack of their own: the same tree with the lengths of its pieces."""
        layouts = []
        for pieces in self.placement:
            lengths = [0] * len(self.layout)
            for piece in pieces:
                lengths[piece.segment] += piece.end - piece.start
            layouts.append(PrefixLayout(lengths, self.layout.parents))
        return tuple(layouts)

    @cached_property
    def local_layouts(self) -> tuple[PrefixLayout, ...]:
        """For each rank its rows as a pack of their own; of a part, with the keys in the rank's cache."""
        if not any(self._cached):
            return self.key_layouts
        layouts = []
        for keys in self.key_layouts:
            cached = [n if c else 0 for n, c in zip(keys.lengths, self._cached, strict=True)]
            own = [n - c for n, c in zip(keys.lengths, cached, strict=True)]
            # The prefix's pack has the same segments in the same order, so its local rows start where these do.
            starts = [s if n else 0 for s, n in zip(accumulate(cached, initial=0), cached, strict=False)]
            layouts.append(PartLayout(own, self.layout.parents, cached, starts))
        return tuple(layouts)

    def key_order(self, rank: int) -> list[int]:
        """For each key row of ``rank``, in tree order, its place among its cached rows followed by its own."""
        local = self.local_layouts[rank]
        cached = local.cached_lengths if isinstance(local, PartLayout) else (0,) * len(local)
        places: list[int] = []
        next_cached, next_own = 0, sum(cached)
        for own, behind in zip(local.lengths, cached, strict=True):
            places += [*range(next_cached, next_cached + behind), *range(next_own, next_own + own)]
            next_cached += behind
            next_own += own
        return places

    def area(self, rank: int) -> int:
        """(query, key) pairs that ``rank`` computes, its own and those with keys from others."""
        return sum(area(self.layout, piece) for piece in self._own(rank))

    def remote(self, rank: int, source: int) -> Remote:
        """What ``rank`` reads from ``source`` (another rank)."""
        mine, theirs = self.local_layouts[rank], self.key_layouts[source]
        rows: list[Range] = []
        own: dict[int, list[AncestorRange]] = {}
        by_level: dict[int, list[AncestorRange]] = {}
        offset = 0
        for segment, count in enumerate(theirs.lengths):
            below = (mine.starts[segment + 1], mine.subtree_ends[segment])
            siblings = self._own_rectangles(rank, source, segment, offset)
            needed = count if below[1] > below[0] else max((r.k_end - offset for r in siblings), default=0)
            if not needed:
                continue
            # Several pieces of one cut segment read the same first keys, so each is in a call of its own.
            for turn, rectangle in enumerate(siblings):
                own.setdefault(turn, []).append(rectangle)
            if below[1] > below[0]:
                rectangle = AncestorRange(*below, offset, offset + count)
                by_level.setdefault(self.layout.levels[segment], []).append(rectangle)
            rows.append((theirs.starts[segment], theirs.starts[segment] + needed))
            offset += needed
        calls = [tuple(call) for each in (own, by_level) for _, call in sorted(each.items())]
        return Remote(tuple(rows), tuple(calls))

    def keys_read(self, rank: int, source: int) -> tuple[Piece, ...]:
        """The pieces of ``source`` whose keys ``rank`` reads: none of a rank by itself. No piece is read in part."""
        if rank == source:
            return ()
        reach = self._reach[rank]
        return tuple(piece for piece in self.placement[source] if piece.end <= reach[piece.segment])

    @cached_property
    def _reach(self) -> list[list[int]]:
        """For each rank and segment the row before which the rank reads others' keys."""
        reach = []
        whole = self.layout.whole if isinstance(self.layout, PartLayout) else self.layout
        for rank, mine in enumerate(self.local_layouts):
            last = [0] * len(self.layout)
            for piece in self._own(rank):
                last[piece.segment] = piece.start
            for segment, length in enumerate(whole.lengths):
                if mine.subtree_ends[segment] > mine.starts[segment + 1]:
                    last[segment] = length
            reach.append(last)
        return reach

    def _own_rectangles(self, rank: int, source: int, segment: int, offset: int) -> list[AncestorRange]:
        """Rows of ``rank`` in a segment against the earlier rows of ``source`` in it, queries of one reach together."""
        theirs = [piece for piece in self.placement[source] if piece.segment == segment]
        rectangles: list[AncestorRange] = []
        row = self.local_layouts[rank].starts[segment]
        for piece in self._own(rank):
            if piece.segment != segment:
                continue
            count = piece.end - piece.start
            seen = sum(other.end - other.start for other in theirs if other.end <= piece.start)
            if rectangles and rectangles[-1].k_end == offset + seen and rectangles[-1].q_end == row:
                rectangles[-1] = rectangles[-1]._replace(q_end=row + count)
            elif seen:
                rectangles.append(AncestorRange(row, row + count, offset, offset + seen))
            row += count
        return rectangles

    def merged(self, inner: int) -> CpPlan:
        """The plan in which each ``inner`` neighbouring ranks own their rows together (two-level exchanges).

        Raises:
            ValueError: a size that does not divide the ranks.
        """
        if inner < 1 or self.cp_size % inner:
            raise ValueError(f"{self.cp_size} context-parallel ranks cannot be grouped by {inner}; use a divisor")
        if inner == 1:
            return self
        merged = []
        for first in range(0, self.cp_size, inner):
            pieces = sorted(piece for rank in self.placement[first : first + inner] for piece in rank)
            merged.append(tuple(pieces))
        return CpPlan(self.layout, tuple(merged), self.name)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON: layout, placement, and what each rank owns, reads and computes.

        Pieces are [segment, first row, end row]. keys_read has the pieces of every rank's rows whose keys are read, and
        rows_received how many those are; none of the rank itself.
        """
        ranks = range(self.cp_size)
        return {
            "lengths": list(self.layout.lengths),
            "parents": list(self.layout.parents),
            "cp_size": self.cp_size,
            "placement": self.name,
            "ranks": [
                {
                    "rank": rank,
                    "pieces": [list(piece) for piece in self.placement[rank]],
                    "rows": self.local_layouts[rank].num_rows,
                    "response_rows": self.response_rows(rank),
                    "keys_read": [[list(piece) for piece in self.keys_read(rank, source)] for source in ranks],
                    "rows_received": list(self.key_rows[rank]),
                    "area": self.area(rank),
                }
                for rank in ranks
            ],
        }

    def response_rows(self, rank: int) -> int:
        """Rows of ``rank`` in segments below a root: those that can have a target."""
        return sum(p.end - p.start for p in self._own(rank) if self.layout.parents[p.segment] >= 0)


__all__ = ["CpPlan", "Piece", "Remote"]
