"""Which context-parallel rank owns which rows of a pack. Plain Python on integers.

`dual_chunk_swap` cuts every segment into 2 * cp_size chunks and gives rank r the chunks r and 2 * cp_size - 1 - r,
which balances a causal mask (Transformer Engine's order, per segment). `branch` cuts only segments that others attend
to in that way and places whole responses on ranks, balanced by attention area, so that the keys of a response stay
where they are; what does not fit within the balance is cut between as few ranks as balance, in dual chunks again.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from megatron_prefix.layout import PartLayout, PrefixLayout

PLACEMENTS = ("dual_chunk_swap", "branch")

IMBALANCE = 0.03
"""How far over the mean area `branch` may fill a rank with whole responses before it cuts one."""


class Piece(NamedTuple):
    """Rows [start, end) of one segment, counted from the segment's first row."""

    segment: int
    start: int
    end: int


Placement = tuple[tuple[Piece, ...], ...]
"""For each rank its pieces, ordered by segment and row; pieces that touch are one."""


def place(layout: PrefixLayout, cp_size: int, placement: str) -> Placement:
    """The pieces of every rank. Every row is in exactly one piece; a rank may own no row of a segment, or none at all.

    Of a part of a split group, the rows in the cache are placed too, as the prefix's pack was: in dual chunks.

    Raises:
        ValueError: an unknown placement, or a size below 1.
    """
    if cp_size < 1:
        raise ValueError(f"cp_size must be at least 1, got {cp_size}")
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
    pieces: list[list[Piece]] = [[] for _ in range(cp_size)]
    inner = set(layout.parents)
    if isinstance(layout, PartLayout):
        inner |= {segment for segment, length in enumerate(layout.cached_lengths) if length}
        layout = layout.whole
    whole = []
    for segment, length in enumerate(layout.lengths):
        if placement == "branch" and segment not in inner:
            whole.append(Piece(segment, 0, length))
            continue
        bounds = [length * i // (2 * cp_size) for i in range(2 * cp_size + 1)]
        for rank in range(cp_size):
            for chunk in (rank, 2 * cp_size - 1 - rank):
                pieces[rank].append(Piece(segment, bounds[chunk], bounds[chunk + 1]))
    if whole:
        _place_whole(layout, whole, pieces)
    return tuple(_joined(mine) for mine in pieces)


def area(layout: PrefixLayout, piece: Piece) -> int:
    """Keys that the rows of a piece attend to, summed: a row at position p sees p + 1 keys."""
    count = piece.end - piece.start
    first = layout.first_positions[piece.segment] + piece.start + 1
    return count * first + count * (count - 1) // 2


def _place_whole(layout: PrefixLayout, whole: list[Piece], pieces: list[list[Piece]]) -> None:
    """Add the responses to the ranks' pieces: largest first where it fits best, the rest cut to fill what is left."""
    loads = [sum(area(layout, piece) for piece in mine) for mine in pieces]
    limit = (sum(loads) + sum(area(layout, piece) for piece in whole)) / len(pieces) * (1 + IMBALANCE)
    left = []
    for piece in sorted(whole, key=lambda piece: (-area(layout, piece), piece)):
        rank = loads.index(min(loads))
        if loads[rank] + area(layout, piece) <= limit:
            pieces[rank].append(piece)
            loads[rank] += area(layout, piece)
        else:
            left.append(piece)
    if left:
        room = _room(loads, sum(area(layout, piece) for piece in left), limit)
        for piece in left:
            for rank, part in _cut(layout, piece, _take(room, area(layout, piece))):
                pieces[rank].append(part)


def _room(loads: list[int], total: int, limit: float) -> dict[int, Fraction]:
    """What each rank gets of an area that is cut: as few ranks as stay under the limit share it, and end up equal."""
    ranks = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    together = total
    for count, rank in enumerate(ranks, 1):
        together += loads[rank]
        if together <= limit * count:
            break
    return {rank: Fraction(together, count) - loads[rank] for rank in ranks[:count]}


def _take(room: dict[int, Fraction], total: int) -> dict[int, Fraction]:
    """Fill ranks with ``total``, the one with most room first, so that few share one response; lowers their room."""
    taken = {}
    left = Fraction(total)
    for rank in sorted(room, key=lambda rank: (-room[rank], rank)):
        taken[rank] = min(left, room[rank])
        room[rank] -= taken[rank]
        left -= taken[rank]
    return {rank: share for rank, share in taken.items() if share > 0}


def _cut(layout: PrefixLayout, piece: Piece, shares: dict[int, Fraction]) -> list[tuple[int, Piece]]:
    """Cut a response between ranks in proportion to ``shares`` of its area.

    Each rank gets a chunk from the front and its mirror image from the back. The mean row of such a pair is that of the
    response, so shares of the area are shares of the rows as well. What rounding adds at the back, where rows are
    dearest, the chunk at the front makes up for.
    """
    parts = []
    whole, total, done = area(layout, piece), sum(shares.values()), Fraction(0)
    front, back = piece.start, piece.end
    for i, (rank, share) in enumerate(shares.items(), 1):
        done += share / total
        last = i == len(shares)
        cut = front if last else max(front, piece.end - round(done * (piece.end - piece.start) / 2))
        behind = area(layout, piece._replace(start=cut))
        end = cut if last else _end_at(layout, piece._replace(start=front, end=cut), piece.start, done * whole - behind)
        parts += [(rank, piece._replace(start=front, end=end)), (rank, piece._replace(start=cut, end=back))]
        front, back = end, cut
    return parts


def _end_at(layout: PrefixLayout, piece: Piece, start: int, target: Fraction) -> int:
    """The end within ``piece`` at which the area from row ``start`` on is closest to ``target``."""

    def miss(end: int) -> Fraction:
        return area(layout, Piece(piece.segment, start, end)) - target

    low, high = piece.start, piece.end
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if miss(middle) >= 0 else (middle + 1, high)
    return low - 1 if low > piece.start and -miss(low - 1) < miss(low) else low


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    joined: list[Piece] = []
    for piece in sorted(piece for piece in pieces if piece.end > piece.start):
        if joined and joined[-1].segment == piece.segment and joined[-1].end == piece.start:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return tuple(joined)
