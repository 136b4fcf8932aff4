"""The core attention module that a layer spec puts in place of megatron-core's `DotProductAttention`."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from megatron_prefix.attention import known_impl, resolve_impl
from megatron_prefix.attention.grouped import check_tensors, resolve_scale
from megatron_prefix.context_parallel.choice import CpLayers
from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.traffic import AttentionShape
from megatron_prefix.mcore.packed import LayerSettings, PrefixPackedSeqParams
from megatron_prefix.mcore.support import refuse_unsupported


class PrefixCoreAttention(MegatronModule):
    """Prefix-grouped attention with the constructor and the call of megatron-core's core attention.

    Tensor parallelism needs nothing here: heads are already this rank's share, and grouped-query heads are not
    expanded.

    Raises:
        ValueError: at construction, a configuration that prefix groups do not support (see `support`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(config=config)
        refuse_unsupported(config)
        if attention_dropout:
            raise ValueError(f"attention_dropout={attention_dropout} is not supported with prefix groups; set it to 0")
        if attention_type != "self":
            raise ValueError(f"prefix-grouped attention is self attention, got attention_type={attention_type!r}")
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(
                f"prefix-grouped attention is causal, got attn_mask_type={attn_mask_type}; use AttnMaskType.causal"
            )
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.impl = known_impl(impl)
        self.cp_comm_type = _comm_type_of_layer(config, layer_number, cp_comm_type)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, 1, Hq, D], key and value [T, 1, Hkv, D] -> [T, 1, Hq * D], with T rows padding included.

        The last layer of a split group's prefix only exports its keys: its output has no row.

        Raises:
            ValueError: no layout came with the micro-batch, an attention bias, or rows that do not fit the layout.
        """
        packed = require_layout(packed_seq_params)
        if attention_bias is not None:
            raise ValueError("prefix-grouped attention takes no attention_bias (ALiBi and the like are not supported)")
        if query.dim() != 4 or query.shape[1] != 1:
            raise ValueError(
                f"a pack is one sequence of rows: expected query [T, 1, heads, head_dim], got {tuple(query.shape)}"
            )
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        check_tensors(q, k, v, packed.num_padded_rows)
        rows = packed.num_rows
        scale = resolve_scale(self.softmax_scale, q.shape[-1])
        impl = resolve_impl(self.impl, q.device, q.dtype, q.shape[-1], v.shape[-1])
        layer = LayerSettings(self.layer_number, scale, impl, self.cp_comm_type)
        out = self._attend(packed, q[:rows], k[:rows], v[:rows], layer)
        if packed.keys_only_layer == self.layer_number:
            # Part of the graph all the same: under recompute, queries without a gradient would leave the parameters of
            # their norm without one, and an overlapped reduction refuses that.
            out = out + query[:0].sum()
        elif packed.num_padded_rows > rows:  # for none it would copy all the same
            out = pad(out, (0, 0, 0, 0, 0, packed.num_padded_rows - rows))
        return out.reshape(out.shape[0], 1, out.shape[1] * out.shape[2])

    def _attend(self, packed: PrefixPackedSeqParams, q: Tensor, k: Tensor, v: Tensor, layer: LayerSettings) -> Tensor:
        """Rows without padding, see `PrefixPackedSeqParams.attend`."""
        return packed.attend(q, k, v, layer)


def _comm_type_of_layer(config: TransformerConfig, layer_number: int, given: str | None) -> str:
    """The layer's cp_comm_type: its entry of a list in the config (megatron-core 0.16 passes its neighbour's), else the
    one given, else "p2p"."""
    per_layer = config.cp_comm_type
    chosen = per_layer[layer_number - 1] if isinstance(per_layer, list) else (given or per_layer or "p2p")
    if chosen not in COMM_TYPES:
        raise ValueError(
            f"layer {layer_number}: unknown cp_comm_type {chosen!r}; choose one of {', '.join(COMM_TYPES)}"
        )
    return chosen


def attention_layers(config: TransformerConfig, a2a_size: int | None = None) -> CpLayers:
    """All attention layers of a model, of every pipeline stage, for the choice of a placement.

    Args:
        config: of the model.
        a2a_size: ranks of an inner group of cp_comm_type "a2a+p2p".

    Raises:
        ValueError: an unknown cp_comm_type.
    """
    per_layer = config.cp_comm_type
    comm_types = tuple(per_layer) if isinstance(per_layer, list) else (per_layer or "p2p",)
    tp = config.tensor_model_parallel_size
    query_heads, kv_heads = config.num_attention_heads // tp, max(1, config.num_query_groups // tp)
    size = config.params_dtype.itemsize
    return CpLayers(
        AttentionShape(query_heads, kv_heads, config.kv_channels, bytes_per_element=size), comm_types, a2a_size
    )


def require_layout(packed_seq_params: PackedSeqParams | None) -> PrefixPackedSeqParams:
    """The layout's parameters; a micro-batch without a layout is an error, never a fallback to plain attention.

    Raises:
        ValueError: anything but `PrefixPackedSeqParams`.
    """
    if isinstance(packed_seq_params, PrefixPackedSeqParams):
        return packed_seq_params
    raise ValueError(
        f"a layer with prefix-grouped attention got packed_seq_params={type(packed_seq_params).__name__}, which has no "
        "layout; pass packed_seq_params=PrefixPackedSeqParams.build(pack.layout, device) to the model on every stage"
    )
