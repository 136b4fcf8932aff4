"""What prefix groups cannot be combined with, refused by name before a model is built."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def refuse_unsupported(config: TransformerConfig) -> None:
    """Check a megatron-core configuration.

    Raises:
        ValueError: a setting under which shared prefixes would not give the results of repeated ones, or that is not
            implemented. The message names the setting, its value and the remedy.
    """
    for name, allowed, why in _RULES:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported with prefix groups: {why}; set {name}={allowed[0]!r}")
    if config.deterministic_mode and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic_mode=True, but the attention kernels go by torch's own switch: call "
            "torch.use_deterministic_algorithms(True), as Megatron-LM's --deterministic-mode does"
        )


_EXPERTS = "shared prefixes change the statistics of the router"

# (setting of TransformerConfig, values that are fine with the remedy first, reason)
_RULES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("attention_dropout", (0.0,), "dropout draws one mask for a prefix that repeated prefixes draw G times"),
    ("hidden_dropout", (0.0,), "dropout draws one mask for a prefix that repeated prefixes draw G times"),
    ("window_size", (None,), "sliding-window attention is not implemented"),
    ("window_attn_skip_freq", (None,), "sliding-window attention is not implemented"),
    ("softmax_type", ("vanilla",), "attention sinks are not implemented"),
    ("attn_logit_softcapping", (None, 0.0), "softcapped scores are not implemented"),
    ("mrope_section", (None,), "mRoPE takes three positions per row"),
    ("fp8_dot_product_attention", (False,), "fp8 attention has no log-sum-exp in full precision"),
    ("fp8_multi_head_attention", (False,), "fp8 attention has no log-sum-exp in full precision"),
    ("multi_latent_attention", (False,), "multi-latent attention builds its own positions inside the layer"),
    ("qk_clip", (False,), "the largest logit of each head is not tracked"),
    ("log_max_attention_logit", (False,), "the largest logit of each head is not tracked"),
    ("fused_single_qkv_rope", (False,), "the fused kernel does not take per-row positions"),
    ("flash_decode", (False,), "flash decoding is an inference path"),
    ("mtp_num_layers", (None, 0), "multi-token prediction rolls labels across segments"),
    ("use_mup", (False,), "muP scales logits outside the output layer"),
    ("moe_aux_loss_coeff", (0.0, 0, [0.0]), _EXPERTS),
    ("moe_z_loss_coeff", (None, 0.0), _EXPERTS),
    ("moe_input_jitter_eps", (None, 0.0), _EXPERTS),
    ("moe_expert_capacity_factor", (None,), _EXPERTS),
    ("moe_router_enable_expert_bias", (False,), _EXPERTS),
)
