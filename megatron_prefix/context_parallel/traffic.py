"""Bytes that context parallelism moves for one attention layer, predicted from a plan. Plain Python on integers.

    p2p, all_gather   forward: key and value rows that others read. Backward: the same rows again, their gradients back
    a2a               forward: queries, keys and values, and the output. Backward: their gradients, the other way
    a2a+p2p           a2a inside the inner groups, p2p with the heads that are left between them

What `collectives.Traffic` counts in a run is equal to the byte; with activation recompute the forward runs twice. A
kernel that wants one head dim (see `Kernel.mixed_head_dims`) gets, and sends, the wider of the two for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_prefix.context_parallel.comm_types import HeadSplit, check_comm_type
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.layout import PrefixLayout


@dataclass(frozen=True)
class AttentionShape:
    """The tensors of one attention layer on one tensor-parallel rank.

    Attributes:
        query_heads, kv_heads: heads of this rank; the second divides the first.
        head_dim: of queries and keys.
        value_dim: of values; None is ``head_dim``.
        bytes_per_element: 2 for bf16.

    Raises:
        ValueError: a size below 1, or heads that do not divide.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    bytes_per_element: int = 2

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads", "head_dim", "value_dim", "bytes_per_element"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide query_heads={self.query_heads}, got {self.kv_heads}")

    @property
    def width(self) -> int:
        """Elements of one key and one value."""
        return self.head_dim + (self.value_dim or self.head_dim)


class Moved(NamedTuple):
    """Bytes that one rank sends and receives."""

    sent: int
    received: int

    @property
    def back(self) -> Moved:
        """The same the other way."""
        return Moved(self.received, self.sent)

    def plus(self, other: Moved) -> Moved:
        """Both."""
        return Moved(self.sent + other.sent, self.received + other.received)


@dataclass(frozen=True)
class LayerTraffic:
    """What one rank moves for one attention layer."""

    forward: Moved
    backward: Moved

    @property
    def total(self) -> Moved:
        """Forward and backward."""
        return self.forward.plus(self.backward)


def layer_traffic(
    plan: CpPlan, shape: AttentionShape, comm_type: str, a2a_size: int | None = None
) -> tuple[LayerTraffic, ...]:
    """What each rank moves for one layer.

    Args:
        plan: of the micro-batch.
        shape: of the layer.
        comm_type: one of `comm_types.COMM_TYPES`.
        a2a_size: ranks of an inner group, for a2a+p2p.

    Raises:
        ValueError: an unknown comm_type, a2a+p2p without a fitting a2a_size, or heads that it cannot split.
    """
    inner = inner_size(plan.cp_size, comm_type, a2a_size)
    split = HeadSplit.build(shape.query_heads, shape.kv_heads, inner)
    outer = plan.merged(inner)
    moved = []
    for group in range(outer.cp_size):
        counts = [plan.local_layouts[rank].num_rows for rank in range(group * inner, (group + 1) * inner)]
        ring = (outer.rows_sent(group), outer.rows_received(group))
        moved += [_traffic(shape, split, rank, counts, ring) for rank in range(inner)]
    return tuple(moved)


def computed_areas(plan: CpPlan, comm_type: str, a2a_size: int | None = None) -> list[float]:
    """(query, key) pairs that each rank computes; a rank with an n-th of the heads counts an n-th of a pair.

    Raises:
        ValueError: an unknown comm_type, or a2a+p2p without a fitting a2a_size.
    """
    inner = inner_size(plan.cp_size, comm_type, a2a_size)
    outer = plan.merged(inner)
    return [outer.area(rank // inner) / inner for rank in range(plan.cp_size)]


def untrimmed_traffic(
    layout: PrefixLayout, cp_size: int, shape: AttentionShape, comm_type: str, a2a_size: int | None = None
) -> LayerTraffic:
    """What any rank moves for one layer when every key goes to every rank, whether a query there reads it or not.

    As Transformer Engine does it: every segment is padded to a multiple of 2 * cp_size rows and cut in dual chunks;
    with p2p and all_gather all keys of a rank travel to all others, in backward the keys and their gradients. With
    ``layout.repeated()`` that is what plain Megatron moves when it trains the same sequences with repeated prefixes.

    Raises:
        ValueError: as `layer_traffic`.
    """
    inner = inner_size(cp_size, comm_type, a2a_size)
    split = HeadSplit.build(shape.query_heads, shape.kv_heads, inner)
    each = sum(-(-length // (2 * cp_size)) * 2 for length in layout.lengths)
    ring = each * inner * (cp_size // inner - 1)
    return _traffic(shape, split, 0, [each] * inner, (ring, ring))


def inner_size(cp_size: int, comm_type: str, a2a_size: int | None = None) -> int:
    """Ranks of the groups that swap heads for rows: 1 for p2p and all_gather, all for a2a.

    Raises:
        ValueError: an unknown comm_type, or a2a+p2p without an ``a2a_size`` that divides ``cp_size``.
    """
    check_comm_type(comm_type)
    if comm_type != "a2a+p2p":
        return cp_size if comm_type == "a2a" else 1
    if a2a_size is None or a2a_size < 1 or cp_size % a2a_size:
        raise ValueError(f"cp_comm_type a2a+p2p needs an a2a size that divides cp={cp_size}, got {a2a_size}")
    return a2a_size


def _traffic(
    shape: AttentionShape, split: HeadSplit, rank: int, counts: Sequence[int], ring: tuple[int, int]
) -> LayerTraffic:
    """Heads are swapped for ``counts`` rows of the inner group's ranks, and (sent, received) rows of keys go around."""
    size, queries, keys = shape.bytes_per_element, split.query_heads, split.key_heads
    values = shape.width - shape.head_dim
    others = [r for r in range(len(counts)) if r != rank]
    their_rows = sum(counts[r] for r in others)
    row_of = [len(q) * shape.head_dim + len(k) * shape.width for q, k in zip(queries, keys, strict=True)]
    swap = Moved(size * counts[rank] * sum(row_of[r] for r in others), size * their_rows * row_of[rank])
    out = Moved(
        size * their_rows * len(queries[rank]) * values,
        size * counts[rank] * sum(len(queries[r]) for r in others) * values,
    )
    row = size * len(keys[rank]) * shape.width
    moved_keys = Moved(ring[0] * row, ring[1] * row)
    heads = swap.plus(out)
    return LayerTraffic(heads.plus(moved_keys), heads.back.plus(moved_keys).plus(moved_keys.back))


def plan_with_traffic(
    plan: CpPlan, shape: AttentionShape, comm_type: str, a2a_size: int | None = None
) -> dict[str, Any]:
    """`CpPlan.to_dict` with each rank's bytes of one layer and the area that it computes in it.

    Raises:
        ValueError: as `layer_traffic`.
    """
    result = plan.to_dict()
    areas = computed_areas(plan, comm_type, a2a_size)
    for rank, moved in enumerate(layer_traffic(plan, shape, comm_type, a2a_size)):
        entry = result["ranks"][rank]
        entry["computed_area"] = areas[rank]
        entry["bytes"] = {"forward": moved.forward._asdict(), "backward": moved.backward._asdict()}
    return result
