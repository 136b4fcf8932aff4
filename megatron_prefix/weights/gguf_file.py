"""GGUF files of the llama architecture, dequantised to fp32."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights.names import EMBEDDING, FINAL_NORM, OUTPUT

_WHOLE = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": OUTPUT}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufFile:
    """A WeightSource: the file's tensors under Hugging Face names, in Hugging Face's order of rotary channels.

    Raises ValueError naming the file and the field; ImportError naming the pip extra.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError("reading GGUF needs the cli extra: pip install 'megatron-prefix[cli]'") from error
        self.path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError) as error:  # what gguf raises on a wrong or cut-off file
            raise ValueError(f"{path}: not a complete GGUF file: {error}") from error
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {hf_name(tensor.name): tensor for tensor in reader.tensors}
        # GGUF writes the fastest dimension first.
        self.shapes = {name: tuple(int(x) for x in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.config = self._read_config()

    def _read_config(self) -> ModelConfig:
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path}: architecture {architecture!r} is not supported, only llama")
        if self.fields.get("llama.expert_count", 0):
            raise ValueError(f"{self.path}: mixture-of-experts models are not supported")
        scaling = self.fields.get("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise ValueError(f"{self.path}: RoPE scaling is not read from GGUF, import the safetensors folder instead")
        heads = self._need("llama.attention.head_count")
        channels = self.fields.get("llama.attention.key_length", self._need("llama.embedding_length") // heads)
        if self.fields.get("llama.rope.dimension_count", channels) != channels:
            raise ValueError(f"{self.path}: RoPE on a part of the channels is not supported")
        eos = self.fields.get("tokenizer.ggml.eos_token_id")
        return ModelConfig.from_dict(
            {
                "num_layers": self._need("llama.block_count"),
                "hidden_size": self._need("llama.embedding_length"),
                "ffn_hidden_size": self._need("llama.feed_forward_length"),
                "num_attention_heads": heads,
                "num_query_groups": self.fields.get("llama.attention.head_count_kv", heads),
                "head_dim": channels,
                "vocab_size": self.shapes.get(EMBEDDING, (self.fields.get("llama.vocab_size", 0),))[0],
                "max_position_embeddings": self._need("llama.context_length"),
                "rope_base": float(self.fields.get("llama.rope.freq_base", 10000.0)),
                # Stored as fp32: 9.99999975e-06 was written as 1e-5.
                "norm_epsilon": float(f"{self._need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
                "tied_embeddings": OUTPUT not in self.shapes,
                "eos_token_ids": [] if eos is None else [eos],
            },
            source=str(self.path),
        )

    def _need(self, name: str) -> Any:
        if name not in self.fields:
            raise ValueError(f"{self.path}: field {name} is missing")
        return self.fields[name]

    def read(self, name: str) -> Tensor:
        """See WeightSource; fp32."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: tensor {tensor.name} is {kind}, which gguf cannot read") from error
        weight = torch.tensor(values).reshape(self.shapes[name]).float()
        if name.endswith("self_attn.q_proj.weight"):
            return unpermute(weight, self.config.num_attention_heads)
        if name.endswith("self_attn.k_proj.weight"):
            return unpermute(weight, self.config.groups)
        return weight

    def write_tokenizer(self, folder: Path) -> bool:
        """See WeightSource; rebuilt from the file's vocabulary and merges."""
        from megatron_prefix.weights.gguf_tokenizer import write_gguf_tokenizer

        if "tokenizer.ggml.tokens" not in self.fields:
            return False
        write_gguf_tokenizer(self.fields, self.path, folder)
        return True


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; its own name where it has none there."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Q or K rows [heads*D, H] from llama.cpp's order (rotary pairs side by side) to that of two halves."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)
