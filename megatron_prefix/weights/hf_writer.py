"""Write a Hugging Face folder: config.json, generation_config.json and safetensors. The inverse of `hf_folder`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.generation.tokenizer import SETTINGS_FILE, TOKENIZER_FILE
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights.hf_folder import INDEX, LLAMA3, SINGLE

MAX_SHARD_BYTES = 5 * 10**9

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OPTIONAL_YARN = {"mscale": 1.0, "mscale_all_dim": 0.0}
"""Left out at these values, where transformers computes the same without them."""


def check_exportable(config: ModelConfig) -> str:
    """The model_type ("llama", "qwen2" or "qwen3") that a model of ``config`` is.

    Raises:
        ValueError: none of them is such a model; names the field.
    """
    only = {"norm": ("rmsnorm",), "activation": ("swiglu",), "position_embedding": ("rope", "yarn")}
    for name, allowed in only.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} {getattr(config, name)!r} cannot be exported: Llama, Qwen2 and Qwen3 have "
                f"{' or '.join(allowed)} only"
            )
    if config.qkv_bias and config.qk_layernorm:
        raise ValueError("qkv_bias with qk_layernorm cannot be exported: Qwen2 has the one, Qwen3 the other, none both")
    return "qwen3" if config.qk_layernorm else "qwen2" if config.qkv_bias else "llama"


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The values of config.json. RoPE as every release of transformers reads it. Raises as `check_exportable`."""
    kind = check_exportable(config)
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.channels,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    if kind != "qwen2":  # which always has the bias, on queries, keys and values alone
        values["attention_bias"] = False
    if config.rope_scaling is not None:
        values["rope_scaling"] = _rope_scaling(config.position_embedding, dict(config.rope_scaling))
    return values


def _rope_scaling(position_embedding: str, scaling: dict[str, Any]) -> dict[str, Any]:
    if position_embedding == "rope":
        return {"rope_type": "llama3", "factor": scaling["factor"], **LLAMA3}
    kept = {name: value for name, value in scaling.items() if _OPTIONAL_YARN.get(name) != value}
    return {"rope_type": "yarn", "truncate": kept.pop("round_to_int"), **kept}


def write_hf_folder(
    out: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers, vLLM, SGLang and `import` read.

    Everything is written to a folder beside and renamed at the end, so nobody reads half a model.

    Args:
        out: the folder to make.
        tensors: all of them, by Hugging Face name, of any device; one at a time is on the host beside a shard.
        config: of the model.
        dtype: of the tensors.
        tokenizer_from: a folder whose tokenizer files are copied, where it has them.
        max_shard_bytes: a file takes no tensor beyond this, but for a single larger one.

    Raises:
        ValueError: ``out`` exists and holds something, or a model that `check_exportable` refuses.
        ImportError: the cli extra is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("writing safetensors needs the cli extra: pip install 'megatron-prefix[cli]'") from error
    out = Path(out)
    check_new_folder(out)
    values = hf_config(config, dtype)
    beside = out.with_name(out.name + ".incomplete")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        save_file(held, beside / f"{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    total = 0
    for name, tensor in tensors:
        if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > max_shard_bytes:
            write()
        # A copy of its own: safetensors refuses views of one storage.
        held[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        total += tensor.nbytes
    write()
    _name_shards(beside, shards, total)
    (beside / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    # Without this file a server would take the sampling defaults of none; with it, it knows where responses end.
    generation = {"eos_token_id": values["eos_token_id"]}
    (beside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for file in (TOKENIZER_FILE, SETTINGS_FILE):
        if tokenizer_from is not None and (Path(tokenizer_from) / file).is_file():
            shutil.copyfile(Path(tokenizer_from) / file, beside / file)
    beside.replace(out)


def check_new_folder(out: Path) -> None:
    """Raises ValueError where ``out`` is there and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty: choose another folder or remove it")


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
