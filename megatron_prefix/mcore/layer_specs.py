"""Layer specs with prefix-grouped attention: built from a config, or made from a spec you already have."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_prefix.attention import known_impl
from megatron_prefix.mcore.core_attention import PrefixCoreAttention
from megatron_prefix.mcore.self_attention import PrefixSelfAttention
from megatron_prefix.mcore.support import refuse_unsupported


def prefix_gpt_layer_spec(config: TransformerConfig, *, impl: str = "auto", use_te: bool = False) -> ModuleSpec:
    """megatron-core's GPT layer spec with prefix-grouped attention.

    Args:
        config: the model's configuration; experts, normalization and the norms of queries and keys are read from it.
        impl: attention implementation, see `prefix_grouped_attention`.
        use_te: Transformer Engine's linear and norm modules instead of megatron-core's own.

    Raises:
        ValueError: an unsupported configuration or an unknown impl.
        ImportError: ``use_te`` without Transformer Engine.
    """
    refuse_unsupported(config)
    options: dict[str, Any] = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "qk_l2_norm": config.qk_l2_norm,
    }
    if use_te:
        require_transformer_engine()
        spec = get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization, **options)
    return with_prefix_attention(spec, impl=impl)


def with_prefix_attention(spec: Any, *, impl: str = "auto") -> Any:
    """A copy of a spec in which every self attention is prefix-grouped; everything else stays as it is.

    Args:
        spec: a layer's `ModuleSpec`, a block's submodules (`TransformerBlockSubmodules`), or a hybrid stack's spec.
        impl: attention implementation.

    Raises:
        ValueError: an unknown impl, or a spec without a self attention, or with attention of another kind.
    """
    known_impl(impl)
    result = copy.deepcopy(spec)
    if not _replace_attention(result, impl):
        raise ValueError(f"the spec {spec!r} holds no SelfAttention to replace")
    return result


def require_transformer_engine() -> None:
    """Raises ImportError, naming the remedy, when megatron-core could not import Transformer Engine's modules."""
    if not HAVE_TE:
        raise ImportError(
            "use_te=True needs Transformer Engine: pip install 'megatron-prefix[te]', or use_te=False "
            "(megatron-core cannot import transformer_engine.pytorch)"
        )


def _replace_attention(node: Any, impl: str) -> int:
    """Replace every self attention below ``node`` in place; returns how many."""
    if isinstance(node, ModuleSpec):
        if isinstance(node.module, type) and issubclass(node.module, SelfAttention):
            if not isinstance(node.submodules, SelfAttentionSubmodules):
                raise ValueError(
                    f"{node.module.__name__} without SelfAttentionSubmodules cannot be made prefix-grouped"
                )
            if node.module not in (SelfAttention, PrefixSelfAttention):
                raise ValueError(
                    f"{node.module.__name__} changes SelfAttention in its own way; derive it from PrefixSelfAttention "
                    "and give it PrefixCoreAttention yourself"
                )
            node.module = PrefixSelfAttention
            node.submodules.core_attention = partial(PrefixCoreAttention, impl=impl)
            return 1
        return _replace_attention(node.submodules, impl)
    if isinstance(node, list | tuple):
        return sum(_replace_attention(item, impl) for item in node)
    if is_dataclass(node) and not isinstance(node, type):
        found = sum(_replace_attention(getattr(node, field.name), impl) for field in fields(node))
        if found and isinstance(node, TransformerLayerSubmodules):
            node.self_attn_bda = _residual_add(node.self_attn_bda)
        return found
    return 0


def _residual_add(bias_dropout_add: Any) -> Any:
    """``bias_dropout_add`` that drops the residual where attention returned no row: the last layer of a split group's
    prefix only exports keys, and all that follows then works on nothing."""

    function = bias_dropout_add.module if isinstance(bias_dropout_add, ModuleSpec) else bias_dropout_add

    def build(training: bool, fused: bool) -> Any:
        add = function(training, fused)

        def add_residual(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            return x_with_bias[0] if x_with_bias[0].shape[0] == 0 else add(x_with_bias, residual, prob)

        return add_residual

    return build
