"""How a pack's layout reaches every layer: a `PackedSeqParams` that carries it.

megatron-core passes `packed_seq_params` unharmed through every layer, full and selective recompute included (they
capture it), but not between pipeline stages: every stage builds it from its own data iterator.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass, field
from typing import Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix.attention import grouped_attention, kernel_named, layout_attention
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.prefix_cache import PrefixCache, SplitLayer
from megatron_prefix.collectives import Group, Traffic, all_gather_ints, group_size
from megatron_prefix.context_parallel.attention import CpShare, context_parallel_attention
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.layout import PartLayout, PrefixLayout


@dataclass(frozen=True)
class LayerSettings:
    """What a layer's attention needs beside q, k and v.

    Attributes:
        number: megatron-core's layer number, from 1.
        softmax_scale: factor of the scores.
        impl: name of the implementation, resolved.
        cp_comm_type: see `context_parallel.attention`; unused on one rank.
    """

    number: int
    softmax_scale: float
    impl: str
    cp_comm_type: str = "p2p"


@dataclass(frozen=True)
class ContextParallel:
    """Context-parallel groups and where rows go.

    Attributes:
        group: all context-parallel ranks.
        layers: the model's attention layers, by which "auto" chooses.
        placement: "dual_chunk_swap", "branch" or "auto", see `context_parallel.placement` and `choice`.
        inner, outer: the two levels of groups of cp_comm_type "a2a+p2p", where there are any.
        traffic: counts bytes where given.
    """

    group: Group
    layers: CpLayers
    placement: str = "auto"
    inner: Group = None
    outer: Group = None
    traffic: Traffic | None = None

    def share(self, layout: PrefixLayout, device: torch.device, content: int) -> CpShare:
        """This rank's part in a micro-batch of ``layout``; ``content`` is a checksum of its tokens.

        Raises:
            ValueError: an unknown placement, or ranks with different packs (on every rank, naming the difference).
        """
        self.check_equal(layout, content)
        plan = choose_plan(layout, group_size(self.group), self.placement, self.layers)
        return CpShare(plan, self.group, device, self.inner, self.outer, self.traffic)

    def check_equal(self, layout: PrefixLayout, content: int) -> None:
        """Compare packs, placements and the layers' cp_comm_type over the ranks by checksum, once per micro-batch.

        Ranks with different layouts or placements would wait for each other; different tokens would go unnoticed.

        Raises:
            ValueError: on every rank, when they differ; names what each rank has.
        """
        way = zlib.crc32(repr((self.placement, self.layers)).encode())
        mine = (layout.checksum, len(layout), layout.num_rows, way, content)
        ranks = all_gather_ints(mine, self.group)
        if any(theirs != mine for theirs in ranks):
            shown = "; ".join(
                f"rank {i}: {segments} segments, {rows} rows, checksums of the layout {layout_sum:08x}, "
                f"the placement and cp_comm_type {way_sum:08x}, the tokens {token_sum:08x}"
                for i, (layout_sum, segments, rows, way_sum, token_sum) in enumerate(ranks)
            )
            raise ValueError(
                f"context-parallel ranks have different layouts, placements or tokens of one micro-batch ({shown}); "
                "give all the same pack, cp_placement and cp_comm_type"
            )


@dataclass
class PrefixPackedSeqParams(PackedSeqParams):
    """Packed-sequence parameters of a prefix-grouped micro-batch.

    Attributes:
        layout: segments of the pack, T rows.
        calls: kernel launches of the layout, uploaded once (under context parallelism ``share`` has them).
        row_positions: int64 [T + padding], position of each row in its own sequence (0 in the padding).
        share: this rank's part under context parallelism, else None.
        rows: int64 on the CPU, the pack's rows that this rank owns under context parallelism, else None.
        prefix_cache: of a split group's prefix on this stage: filled by the prefix's pack, read by those of its parts.
        keys_only_layer: number of the layer that only exports keys (the last one of a prefix's pack), else None.
    """

    layout: PrefixLayout = None  # type: ignore[assignment]  # the parent's fields have defaults, so these must
    calls: AttentionCalls = None  # type: ignore[assignment]
    row_positions: Tensor = None  # type: ignore[assignment]
    share: CpShare | None = None
    rows: Tensor | None = None
    prefix_cache: PrefixCache | None = None
    keys_only_layer: int | None = None
    _rotary: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        layout: PrefixLayout,
        device: torch.device,
        *,
        multiple_of: int = 1,
        cp: ContextParallel | None = None,
        content: int = 0,
    ) -> Self:
        """The parameters of ``layout`` on ``device``, padded at the end to ``multiple_of`` rows.

        Sequence parallelism needs a multiple of the tensor-parallel size. Padding rows attend to nothing and are
        attended by nothing. With ``cp`` (two ranks or more), rows are those that this rank owns, and ``content`` is a
        checksum of the pack's tokens, to be compared over the ranks.

        Raises:
            ValueError: context-parallel ranks have different packs.
        """
        share = None if cp is None else cp.share(layout, device, content)
        positions = torch.tensor(layout.positions, dtype=torch.long)
        rows = None
        if share is not None:
            rows = torch.tensor(share.plan.rows(share.rank), dtype=torch.long)
            positions = positions[rows]
        # A rank without a row still runs the model on padding: others wait for its part in every collective.
        padded = -(-max(len(positions), 1) // multiple_of) * multiple_of
        padded_positions = torch.zeros(padded, dtype=torch.long)
        padded_positions[: len(positions)] = positions
        return cls(
            qkv_format="thd",
            # megatron-core builds its table of rotary frequencies for this many positions.
            max_seqlen_q=layout.max_sequence_length,
            max_seqlen_kv=layout.max_sequence_length,
            layout=layout,
            calls=AttentionCalls.build(layout, device) if share is None else None,  # type: ignore[arg-type]
            row_positions=padded_positions.to(device),
            share=share,
            rows=rows,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the micro-batch on this rank, without padding."""
        return self.layout.num_rows if self.rows is None else len(self.rows)

    @property
    def num_padded_rows(self) -> int:
        """Rows of the micro-batch on this rank, with padding."""
        return self.row_positions.numel()

    @property
    def is_prefix(self) -> bool:
        """Whether the micro-batch is the prefix of a split group, whose keys are exported."""
        return self.prefix_cache is not None and not isinstance(self.layout, PartLayout)

    def take(self, x: Tensor) -> Tensor:
        """This rank's rows of ``x`` [T, ...] on the CPU."""
        return x if self.rows is None else x[self.rows]

    def padded(self, x: Tensor) -> Tensor:
        """This rank's rows of ``x`` [T, ...] on the CPU, with zeros in the padding."""
        padded = x.new_zeros(self.num_padded_rows, *x.shape[1:])
        padded[: self.num_rows] = self.take(x)
        return padded

    def as_sbhd(self) -> Self:
        """The same, marked "sbhd": inside an attention layer each row then takes its own rotary frequency (the thd path
        of megatron-core restarts positions at every segment)."""
        same = copy.copy(self)
        same.qkv_format = "sbhd"
        return same

    def rotary_rows(self, table: Tensor) -> Tensor:
        """Each row's frequencies [T + padding, 1, 1, D], contiguous, out of a model's ``table`` [positions, 1, 1, D].

        All layers get the same tensor, which lives as long as the micro-batch. Only the last table's rows are kept:
        recomputed layers bring another tensor object over the same memory, and offloaded ones other memory.
        """
        if self._rotary is None or not self._rotary[0].is_set_to(table):
            self._rotary = table, table.index_select(0, self.row_positions)
        return self._rotary[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSettings) -> Tensor:
        """The attention of one layer: q [T, Hq, D], k and v [T, Hkv, D] without padding -> [T, Hq, D].

        Keys of a split group's prefix are exported to ``prefix_cache``, and read from there, by ``layer.number``.

        Raises:
            ValueError: what the implementation or the exchange of context parallelism cannot do.
        """
        split = self._split_layer(layer.number)
        if self.share is None and split is None:
            return layout_attention(q, k, v, self.calls, layer.softmax_scale, layer.impl)
        kernel, scale = kernel_named(layer.impl), layer.softmax_scale
        if self.share is not None:
            return context_parallel_attention(q, k, v, self.share, layer.cp_comm_type, scale, kernel, split)
        assert split is not None
        if split.keys_only:
            return split.export_only(k, v, kernel).reshape(0, q.shape[1], v.shape[2])
        if split.reads:
            return grouped_attention(q, k, v, self.calls, scale, kernel, split.keys())
        return grouped_attention(q, *split.export(k, v, kernel), self.calls, scale, kernel)

    def _split_layer(self, number: int) -> SplitLayer | None:
        if self.prefix_cache is None:
            return None
        reads = not self.is_prefix
        return SplitLayer(self.prefix_cache, number, reads, number == self.keys_only_layer)
