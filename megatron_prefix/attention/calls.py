"""The kernel launches that compute a layout's attention: one causal call over all segments, one per level of ancestors.

Built on the host once per micro-batch and uploaded once; forward and backward never read a tensor back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_prefix.attention.block_mask import tree_block_mask
from megatron_prefix.layout import AncestorRange, PartLayout, PrefixLayout

Range = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """Some rows of a packed tensor: a list of disjoint ascending ranges, as kernels want to see them.

    Attributes:
        ranges: host (start, end) pairs, none empty.
        cu_seqlens: int32 [len(ranges) + 1], offsets of the ranges when their rows stand together.
        max_seqlen: rows of the longest range.
        num_rows: rows of all ranges.
        index: int64 [rows] when the ranges leave gaps, None when they are one slice of the packed tensor.
        offsets: int32 [len(ranges) + 1], first row of each range within `span`, and the span's number of rows: what
            kernels that step over gaps take beside ``cu_seqlens``.
    """

    ranges: tuple[Range, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    num_rows: int
    index: Tensor | None
    offsets: Tensor

    @classmethod
    def build(cls, ranges: Sequence[Range], device: torch.device) -> Rows:
        """Rows of ``ranges`` with their index tensors on ``device``."""
        assert all(start < end for start, end in ranges), "an empty range: kernels answer it each in their own way"
        offsets = [0]
        for start, end in ranges:
            offsets.append(offsets[-1] + end - start)
        index = None
        if any(previous[1] != following[0] for previous, following in itertools.pairwise(ranges)):
            index = _upload(torch.cat([torch.arange(start, end) for start, end in ranges]), device)
        cu_seqlens = in_span = _upload(torch.tensor(offsets, dtype=torch.int32), device)
        if index is not None:
            first = ranges[0][0]
            starts = [*(start - first for start, _ in ranges), ranges[-1][1] - first]
            in_span = _upload(torch.tensor(starts, dtype=torch.int32), device)
        return cls(
            ranges=tuple(ranges),
            cu_seqlens=cu_seqlens,
            max_seqlen=max((end - start for start, end in ranges), default=0),
            num_rows=offsets[-1],
            index=index,
            offsets=in_span,
        )

    def span(self, x: Tensor) -> Tensor:
        """``x`` [T, ...] from the first of these rows to the last, gaps included: always a view."""
        return x[self.ranges[0][0] : self.ranges[-1][1]]

    def of_span(self, x: Tensor) -> Tensor:
        """These rows of ``x``, which stands for `span`: ``x`` itself where there are no gaps."""
        return x if self.index is None else x.index_select(0, self.index - self.ranges[0][0])

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [T, ...]: a view where they are one slice, a copy where they leave gaps."""
        return self.span(x) if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write ``rows`` over these rows of ``x``."""
        if self.index is None:
            self.span(x).copy_(rows)
        else:
            x.index_copy_(0, self.index, rows)

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add ``rows`` to these rows of ``x`` in place."""
        if self.index is None:
            self.span(x).add_(rows)
        else:
            x.index_add_(0, self.index, rows.to(x.dtype))


@dataclass(frozen=True)
class VarlenCall:
    """One varlen kernel launch: range i of ``q`` attends to range i of ``kv``, causally (equal ranges) or fully."""

    q: Rows
    kv: Rows
    causal: bool


@dataclass(frozen=True)
class AttentionCalls:
    """All calls of a layout: ``own`` (every row within its segment) and ``ancestors`` (one call per tree level).

    ``cached`` has one call per level of ancestors whose keys are in a cache: its key rows are rows of the cache.
    """

    layout: PrefixLayout
    own: VarlenCall
    ancestors: tuple[VarlenCall, ...]
    cached: tuple[VarlenCall, ...] = ()

    @classmethod
    def build(cls, layout: PrefixLayout, device: torch.device) -> AttentionCalls:
        """The calls of ``layout`` with their index tensors on ``device``."""
        bounds = list(zip(layout.starts, layout.starts[1:], strict=False))
        segments = Rows.build([(start, end) for start, end in bounds if end > start], device)
        ancestors = tuple(_unmasked(level, device) for level in layout.ancestor_levels)
        cached = layout.cached_levels if isinstance(layout, PartLayout) else ()
        calls = tuple(_unmasked(level, device) for level in cached)
        return cls(layout, VarlenCall(segments, segments, causal=True), ancestors, calls)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The layout's mask for FlexAttention, made when a layer first asks for it; the layout has rows."""
        ends = torch.tensor(self.layout.subtree_ends, dtype=torch.int32)
        of_rows = ends.repeat_interleave(torch.tensor(self.layout.lengths))
        return tree_block_mask(_upload(of_rows, self.own.q.cu_seqlens.device))


def _unmasked(ranges: Sequence[AncestorRange], device: torch.device) -> VarlenCall:
    return VarlenCall(
        q=Rows.build([(r.q_start, r.q_end) for r in ranges], device),
        kv=Rows.build([(r.k_start, r.k_end) for r in ranges], device),
        causal=False,
    )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device`` without making the host wait for a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
