"""mcore-bridge's models with prefix-grouped attention, through its own registry of model types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mcore_bridge.model import GPTModel
from mcore_bridge.model.register import ModelLoader, get_model_meta, register_model
from torch import Tensor

from megatron_prefix.mcore.core_attention import require_layout
from megatron_prefix.mcore.layer_specs import with_prefix_attention
from megatron_prefix.mcore.support import refuse_unsupported


class PrefixGPTModel(GPTModel):
    """mcore-bridge's `GPTModel`, fed with packs.

    Its own forward picks each row's rotary frequency by ``position_ids``; so does `PrefixSelfAttention`, and so the
    whole table passes here.
    """

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Tensor:
        """As the parent's; input_ids and position_ids [1, T].

        Raises:
            ValueError: no layout came with the micro-batch.
        """
        packed = require_layout(packed_seq_params)
        if self.position_embedding_type == "rope" and not self.config.apply_rope_fusion:
            position_ids = torch.arange(packed.max_seqlen_q, device=packed.row_positions.device).unsqueeze(0)
        return super().forward(input_ids, position_ids, *args, packed_seq_params=packed, **kwargs)


class PrefixLoader(ModelLoader):
    """Goes before the loader of a model type (see `prefix_loader`): the same model with prefix-grouped attention.

    Raises:
        ValueError: a model that is not a plain GPT, and, when it is built, settings under which shared prefixes would
            not give the results of repeated ones.
    """

    model_cls: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.model_cls is not GPTModel:
            raise ValueError(
                f"model type {config.mcore_model_type!r} is a {self.model_cls.__name__}, and prefix groups work for "
                "mcore-bridge's GPTModel; train it without the prefix-sharing plugin"
            )
        self.model_cls = PrefixGPTModel

    def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        refuse_unsupported(self.config)
        return with_prefix_attention(super().get_transformer_layer_spec(vp_stage))


def prefix_loader(loader: type[ModelLoader]) -> type[ModelLoader]:
    """``loader`` as one that builds its model with prefix-grouped attention; unchanged where it already does."""
    return loader if issubclass(loader, PrefixLoader) else type("PrefixLoader", (PrefixLoader, loader), {})


def share_prefixes(model_type: str) -> None:
    """From now on mcore-bridge builds models of ``model_type`` with prefix-grouped attention. Idempotent.

    Raises:
        ValueError: a model type that mcore-bridge does not know.
    """
    meta = get_model_meta(model_type)
    if meta is None:
        raise ValueError(f"mcore-bridge knows no model type {model_type!r}; its MODEL_MAPPING lists those it knows")
    register_model(replace(meta, loader=prefix_loader(meta.loader)), exist_ok=True)
