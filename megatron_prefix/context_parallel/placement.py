"""Which context-parallel rank owns which rows of a pack. Plain Python on integers.

`dual_chunk_swap` cuts every segment into 2 * cp_size chunks and gives rank r the chunks r and 2 * cp_size - 1 - r,
which balances a causal mask (Transformer Engine's order, per segment). `branch` cuts only segments that others attend
to in that way and places whole responses on ranks, balanced by attention area, so that the keys of a response stay
where they are; what does not fit within the balance is cut.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_prefix.layout import PrefixLayout

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

    Raises:
        ValueError: an unknown placement, or a size below 1.
    """
    if cp_size < 1:
        raise ValueError(f"cp_size must be at least 1, got {cp_size}")
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
    pieces: list[list[Piece]] = [[] for _ in range(cp_size)]
    inner = set(layout.parents)
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
    mean = (sum(loads) + sum(area(layout, piece) for piece in whole)) / len(pieces)
    room = [mean * (1 + IMBALANCE) - load for load in loads]
    left = []
    for piece in sorted(whole, key=lambda piece: (-area(layout, piece), piece)):
        rank = max(range(len(pieces)), key=lambda r: (room[r], -r))
        if area(layout, piece) <= room[rank]:
            pieces[rank].append(piece)
            room[rank] -= area(layout, piece)
        else:
            left.append(piece)
    for piece in left:
        while piece.end > piece.start:
            rank = max(range(len(pieces)), key=lambda r: (room[r], -r))
            end = piece.end if area(layout, piece) <= room[rank] else _cut(layout, piece, room[rank])
            part = piece._replace(end=end)
            pieces[rank].append(part)
            room[rank] -= area(layout, part)
            piece = piece._replace(start=end)


def _cut(layout: PrefixLayout, piece: Piece, room: float) -> int:
    """Where to end the part of a piece that fills ``room``: the last row that fits, at least one row."""
    low, high = piece.start + 1, piece.end
    while low < high:
        middle = (low + high + 1) // 2
        if area(layout, piece._replace(end=middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    joined: list[Piece] = []
    for piece in sorted(piece for piece in pieces if piece.end > piece.start):
        if joined and joined[-1].segment == piece.segment and joined[-1].end == piece.start:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return tuple(joined)
