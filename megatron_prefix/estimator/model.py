"""The shape of a model that is planned for, experts included, and four public ones by name.

Parameters and FLOPs are those of `ModelSize`: a model with experts has the matrices of all of them, and computes a row
with those that the router chooses, which is a dense model with a wider MLP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of every layer's MLP; ``ModelConfig.ffn_hidden_size`` is that of one expert.

    Raises:
        ValueError: a number below 1, or more experts for a token than there are.
    """

    num_experts: int
    experts_per_token: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}; lower it"
            )


@dataclass(frozen=True)
class PlannedModel:
    """A model's shape.

    Attributes:
        name: shown in tables.
        config: of a dense model; with experts, ``ffn_hidden_size`` is that of one of them.
        experts: None for a dense model.
    """

    name: str
    config: ModelConfig
    experts: Experts | None = None

    def __hash__(self) -> int:  # the config holds a dict; equality compares everything
        return hash((self.name, self.experts, self.config.num_layers, self.config.hidden_size))

    @cached_property
    def active_config(self) -> ModelConfig:
        """The dense model that computes a row with as many matrix products (the router's left out)."""
        width = self.config.ffn_hidden_size * (self.experts.experts_per_token if self.experts else 1)
        return replace(self.config, ffn_hidden_size=width)

    @cached_property
    def size(self) -> ModelSize:
        """Of all parameters."""
        count = self.experts.num_experts if self.experts else 1
        return self._size(self.config.ffn_hidden_size * count)

    @cached_property
    def active_size(self) -> ModelSize:
        """Of the parameters that compute one row."""
        return self._size(self.active_config.ffn_hidden_size)

    @cached_property
    def router_parameters(self) -> int:
        """Of one layer."""
        return self.config.hidden_size * self.experts.num_experts if self.experts else 0

    @cached_property
    def expert_parameters(self) -> int:
        """Of all experts of one layer; 0 for a dense model."""
        matrices = 3 if self.config.activation == "swiglu" else 2
        count = self.experts.num_experts if self.experts else 0
        return count * matrices * self.config.hidden_size * self.config.ffn_hidden_size

    def _size(self, ffn_hidden_size: int) -> ModelSize:
        size = ModelSize.of(replace(self.config, ffn_hidden_size=ffn_hidden_size))
        return replace(size, layer_parameters=size.layer_parameters + self.router_parameters)


def _qwen3(num_layers: int, hidden_size: int, ffn_hidden_size: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_base=1e6,
        norm_epsilon=1e-6,
        qk_layernorm=True,
    )


_LLAMA_3_1_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_base=500000.0,
    rope_scaling={"factor": 8.0},
)

PRESETS = {
    model.name: model
    for model in (
        PlannedModel("qwen3-8b", _qwen3(36, 4096, 12288, 32, 8)),
        PlannedModel("qwen3-32b", _qwen3(64, 5120, 25600, 64, 8)),
        PlannedModel("qwen3-30b-a3b", _qwen3(48, 2048, 768, 32, 4), Experts(128, 8)),
        PlannedModel("llama-3.1-8b", _LLAMA_3_1_8B),
    )
}
"""By name. Source: config.json of Qwen/Qwen3-8B, Qwen/Qwen3-32B, Qwen/Qwen3-30B-A3B and meta-llama/Llama-3.1-8B on
huggingface.co. Their model cards name 8.2, 32.8, 30.5 (3.3 activated) and 8 billion parameters."""


def read_model(name: str) -> PlannedModel:
    """A preset by name, or what a path holds: a checkpoint folder or its model.json, a Hugging Face folder or its
    config.json (Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral).

    Raises:
        ValueError: neither a preset nor a path, or a file that describes no such model.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in ("model.json", "config.json") if (path / file).is_file()]
        if not found:
            raise ValueError(f"{path} has neither model.json (a checkpoint) nor config.json (a Hugging Face folder)")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"model {name!r} is neither a file or folder nor one of {', '.join(PRESETS)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read a model's shape: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    title = path.resolve().parent.name
    if "model_type" not in values:
        return PlannedModel(title, ModelConfig.from_dict(values, source=str(path)))
    return _from_hf(title, values, path)


def _from_hf(title: str, hf: dict[str, Any], path: Path) -> PlannedModel:
    from megatron_prefix.weights.hf_folder import config_from_hf  # torch: not needed for the other sources

    kind = hf["model_type"]
    if kind == "mixtral":
        count = hf.get("num_local_experts")
        dense = hf | {"model_type": "llama", "use_sliding_window": hf.get("sliding_window") is not None}
    elif kind == "qwen3_moe":
        if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
            raise ValueError(f"{path}: some layers without experts are not supported, only experts in every layer")
        count = hf.get("num_experts")
        dense = hf | {"model_type": "qwen3", "intermediate_size": hf.get("moe_intermediate_size")}
    else:
        return PlannedModel(title, config_from_hf(hf, path))
    try:
        experts = Experts(count, hf.get("num_experts_per_tok"))  # type: ignore[arg-type]  # checked there
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return PlannedModel(title, config_from_hf(dense, path), experts)
