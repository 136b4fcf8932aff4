"""The one mapping between Llama / Qwen2 / Qwen3 weights (Hugging Face names) and megatron-core's GPTModel, both ways.

Shapes: H hidden_size, N attention heads, G key/value groups, D head_dim, F ffn_hidden_size, V vocabulary.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
# Older Llama files hold this table, which every implementation computes by itself.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

FC1 = "mlp.linear_fc1.weight"
"""Gate and up projection in one tensor, below each other."""

_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "output_layer.weight": OUTPUT,
    "decoder.final_layernorm.weight": FINAL_NORM,
}
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Tensors of a layer that are one here and there."""


class WeightSource(Protocol):
    """A model in another format, under Hugging Face names."""

    config: ModelConfig

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor and its shape, known without reading the data."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the precision it is stored in (fp32 where it is quantised)."""

    def write_tokenizer(self, folder: Path) -> bool:
        """Write tokenizer.json and tokenizer_config.json to `folder`; False where the source has no tokenizer.

        Raises ValueError for a tokenizer that cannot be written exactly.
        """


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a source must hold, with its shape."""
    hidden, ffn, channels = config.hidden_size, config.ffn_hidden_size, config.channels
    q_rows, kv_rows = config.num_attention_heads * channels, config.groups * channels
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tied_embeddings:
        shapes[OUTPUT] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q_rows, hidden),
            layer + "self_attn.k_proj.weight": (kv_rows, hidden),
            layer + "self_attn.v_proj.weight": (kv_rows, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q_rows),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
        }
        if config.qkv_bias:
            rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            shapes |= {layer + f"self_attn.{x}_proj.bias": (rows[x],) for x in rows}
        if config.qk_layernorm:
            shapes |= {layer + f"self_attn.{x}_norm.weight": (channels,) for x in "qk"}
    return shapes


def check_names(source: WeightSource) -> None:
    """Compare names and shapes with what the config says, before any data is read.

    Raises ValueError naming the tensor that is missing, of another shape, or left over.
    """
    wanted = expected_shapes(source.config)
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise ValueError(f"tensor {name} (shape {shape}) is missing from the weights")
        if tuple(source.shapes[name]) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(source.shapes[name])}, the config says {shape}")
    for name in source.shapes:
        if name in wanted or _IGNORED.fullmatch(name):
            continue
        if name != OUTPUT:  # a tied model's file may repeat its embedding; `converted` compares them
            raise ValueError(f"tensor {name} is left over: the config has no place for it")
        if tuple(source.shapes[OUTPUT]) != wanted[EMBEDDING]:
            raise ValueError(f"tensor {OUTPUT} has shape {tuple(source.shapes[OUTPUT])}, the config says it is tied")


def padded_config(config: ModelConfig, tp: int) -> ModelConfig:
    """`config` with zero heads added until its key/value groups divide by `tp`; itself where they do already.

    Whole groups are added, so every head keeps its keys. A zero head adds nothing to the output, and all of its
    gradients are zero, so training leaves it zero: the function and its gradients stay the same.
    Raises ValueError when the vocabulary or the MLP does not divide by `tp`: those are not padded.
    """
    for name in ("vocab_size", "ffn_hidden_size"):
        if getattr(config, name) % tp:
            raise ValueError(f"{name} {getattr(config, name)} does not divide by tensor-parallel size {tp}")
    groups = -(-config.groups // tp) * tp
    heads = groups * (config.num_attention_heads // config.groups)
    return dataclasses.replace(config, num_attention_heads=heads, num_query_groups=groups, head_dim=config.channels)


def converted(source: WeightSource, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """megatron-core GPTModel names and full (tensor-parallel size 1) tensors, one at a time.

    config: the source's, or `padded_config` of it. Raises ValueError when a tied model's file holds another output
    layer.
    """
    embedding = source.read(EMBEDDING)
    yield "embedding.word_embeddings.weight", embedding
    if not config.tied_embeddings:
        yield "output_layer.weight", source.read(OUTPUT)
    elif OUTPUT in source.shapes and not torch.equal(embedding, source.read(OUTPUT)):
        raise ValueError(f"the config ties the embeddings, but tensor {OUTPUT} differs from {EMBEDDING}")
    del embedding
    yield "decoder.final_layernorm.weight", source.read(FINAL_NORM)
    for i in range(config.num_layers):
        yield from _layer(source, config, f"model.layers.{i}.", f"decoder.layers.{i}.")


def converted_count(config: ModelConfig) -> int:
    """How many tensors `converted` gives."""
    per_layer = 6 + config.qkv_bias + 2 * config.qk_layernorm
    return 3 - config.tied_embeddings + per_layer * config.num_layers


def _layer(source: WeightSource, config: ModelConfig, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    def read(name: str) -> Tensor:
        return source.read(theirs + name)

    yield ours + "input_layernorm.weight", read("input_layernorm.weight")
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        q, k, v = (read(f"self_attn.{x}_proj.{kind}") for x in "qkv")
        merged = merge_qkv(q, k, v, source.config)
        rows = config.groups * (config.num_attention_heads // config.groups + 2) * config.channels
        yield ours + f"self_attention.linear_qkv.{kind}", _zero_rows(merged, rows)
    if config.qk_layernorm:
        for x in "qk":
            yield ours + f"self_attention.{x}_layernorm.weight", read(f"self_attn.{x}_norm.weight")
    columns = config.num_attention_heads * config.channels
    yield ours + "self_attention.linear_proj.weight", _zero_rows(read("self_attn.o_proj.weight").T, columns).T
    yield ours + "pre_mlp_layernorm.weight", read("post_attention_layernorm.weight")
    yield ours + "mlp.linear_fc1.weight", torch.cat([read("mlp.gate_proj.weight"), read("mlp.up_proj.weight")])
    yield ours + "mlp.linear_fc2.weight", read("mlp.down_proj.weight")


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """megatron-core's linear_qkv from q [N*D, ...], k and v [G*D, ...]: per group its queries, its key, its value."""
    groups, channels = config.groups, config.channels
    parts = (
        q.reshape(groups, config.num_attention_heads // groups * channels, *q.shape[1:]),
        k.reshape(groups, channels, *k.shape[1:]),
        v.reshape(groups, channels, *v.shape[1:]),
    )
    return torch.cat(parts, dim=1).flatten(0, 1)


def _zero_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def split_qkv(merged: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `merge_qkv`: q, k and v."""
    queries = config.num_attention_heads // config.groups * config.channels
    by_group = merged.unflatten(0, (config.groups, queries + 2 * config.channels))
    q, k, v = by_group.split((queries, config.channels, config.channels), dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def exported(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `converted` for one tensor: what it is under Hugging Face names (views where it is cut).

    name, tensor: of a megatron-core GPTModel of ``config``, whole. Raises ValueError for a name that has no
    counterpart.
    """
    if name in _WHOLE:
        return {_WHOLE[name]: tensor}
    layer = _OUR_LAYER.fullmatch(name)
    theirs, part = (f"model.layers.{layer[1]}.", layer[2]) if layer else ("", "")
    if part in _SAME:
        return {theirs + _SAME[part]: tensor}
    if part == FC1:
        return dict(zip((f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), tensor.chunk(2), strict=True))
    linear, _, kind = part.rpartition(".")
    if linear == "self_attention.linear_qkv":
        names = (f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        return dict(zip(names, split_qkv(tensor, config), strict=True))
    raise ValueError(f"parameter {name} has no counterpart in a Llama, Qwen2 or Qwen3 model")
