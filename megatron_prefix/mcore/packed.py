"""How a pack's layout reaches every layer: a `PackedSeqParams` that carries it.

megatron-core passes `packed_seq_params` unharmed through every layer, full and selective recompute included (they
capture it), but not between pipeline stages: every stage builds it from its own data iterator.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix.attention import KERNELS, grouped_attention, reference_attention
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.layout import PrefixLayout


@dataclass
class PrefixPackedSeqParams(PackedSeqParams):
    """Packed-sequence parameters of a prefix-grouped micro-batch.

    Attributes:
        layout: segments of the pack, T rows.
        calls: kernel launches of the layout, uploaded once.
        row_positions: int64 [T + padding], position of each row in its own sequence (0 in the padding).
    """

    layout: PrefixLayout = None  # type: ignore[assignment]  # the parent's fields have defaults, so these must
    calls: AttentionCalls = None  # type: ignore[assignment]
    row_positions: Tensor = None  # type: ignore[assignment]

    @classmethod
    def build(cls, layout: PrefixLayout, device: torch.device, *, multiple_of: int = 1) -> Self:
        """The parameters of ``layout`` on ``device``, padded at the end to ``multiple_of`` rows.

        Sequence parallelism needs a multiple of the tensor-parallel size. Padding rows attend to nothing and are
        attended by nothing.
        """
        calls = AttentionCalls.build(layout, device)
        padded = -(-layout.num_rows // multiple_of) * multiple_of
        positions = torch.zeros(padded, dtype=torch.long)
        positions[: layout.num_rows] = torch.tensor(layout.positions, dtype=torch.long)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=calls.own.q.cu_seqlens,
            cu_seqlens_kv=calls.own.kv.cu_seqlens,
            # megatron-core builds its table of rotary frequencies for this many positions.
            max_seqlen_q=layout.max_sequence_length,
            max_seqlen_kv=layout.max_sequence_length,
            layout=layout,
            calls=calls,
            row_positions=positions.to(device),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the micro-batch without its padding."""
        return self.layout.num_rows

    @property
    def num_padded_rows(self) -> int:
        """Rows of the micro-batch with its padding."""
        return self.row_positions.numel()

    def as_sbhd(self) -> Self:
        """The same, marked "sbhd": inside an attention layer each row then takes its own rotary frequency (the thd path
        of megatron-core restarts positions at every segment)."""
        same = copy.copy(self)
        same.qkv_format = "sbhd"
        return same

    def attend(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, impl: str) -> Tensor:
        """The attention of one layer: q [T, Hq, D], k and v [T, Hkv, D] without padding -> [T, Hq, D].

        A subclass that keeps keys between micro-batches does so here, by ``layer_number`` (megatron-core's, from 1).
        ``impl`` is resolved.
        """
        if impl == "reference":
            return reference_attention(q, k, v, self.layout, softmax_scale)
        return grouped_attention(q, k, v, self.calls, softmax_scale, KERNELS[impl])
