"""Hugging Face folders: config.json with safetensors, one file or sharded."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_prefix.model_config import ModelConfig

MODEL_TYPES = ("llama", "qwen2", "qwen3")
_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class HfFolder:
    """A WeightSource: the folder's tensors under their own names. Raises ValueError, naming file and field."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_hf_config(folder)
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        named_by_index = self._index()
        for file in sorted(set(named_by_index.values())) if named_by_index else [folder / SINGLE]:
            if not file.is_file():
                raise ValueError(f"{file} is missing" + ("" if named_by_index else ": only safetensors are read"))
            with _opened(file) as data:
                for name in data.keys():  # noqa: SIM118 - not a dict
                    self.shapes[name] = tuple(data.get_slice(name).get_shape())
                    self._file_of[name] = file
        for name, file in named_by_index.items():
            if self._file_of.get(name) != file:
                raise ValueError(f"{folder / INDEX} puts tensor {name} in {file.name}, which does not hold it")

    def _index(self) -> dict[str, Path]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        return {name: self.folder / file for name, file in _read_json(path).get("weight_map", {}).items()}

    def read(self, name: str) -> Tensor:
        """See WeightSource."""
        with _opened(self._file_of[name]) as data:
            return data.get_tensor(name)

    def write_tokenizer(self, folder: Path) -> bool:
        """See WeightSource. A chat template in a file of its own moves into tokenizer_config.json."""
        if not (self.folder / "tokenizer.json").is_file():
            return False
        shutil.copyfile(self.folder / "tokenizer.json", folder / "tokenizer.json")
        settings_file, template_file = self.folder / "tokenizer_config.json", self.folder / "chat_template.jinja"
        settings = _read_json(settings_file) if settings_file.is_file() else {}
        if template_file.is_file():
            settings["chat_template"] = template_file.read_text(encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return True


def read_hf_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json. Raises ValueError naming the field that is not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: expected a Hugging Face model folder")
    return config_from_hf(_read_json(path), path)


def config_from_hf(hf: Mapping[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig of ``hf``, the values of the config.json at ``path``. Raises ValueError as `read_hf_config`."""
    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only {', '.join(MODEL_TYPES)}")
    refused = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1}
    if kind != "qwen2":  # Llama and Qwen3 would put the bias on the output projection, too
        refused["attention_bias"] = False
    for name, only in refused.items():
        if hf.get(name, only) != only:
            raise ValueError(f"{path}: {name} {hf[name]!r} is not supported, only {only!r}")
    missing = [name for name in _NEEDED if name not in hf]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    position_embedding, base, scaling = _rope(path, hf)
    return ModelConfig.from_dict(
        {
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hf["hidden_size"],
            "ffn_hidden_size": hf["intermediate_size"],
            "num_attention_heads": hf["num_attention_heads"],
            "num_query_groups": hf.get("num_key_value_heads"),
            # Qwen3's default is a number of its own, the others derive it.
            "head_dim": hf.get("head_dim") or (128 if kind == "qwen3" else None),
            "vocab_size": hf["vocab_size"],
            "max_position_embeddings": hf["max_position_embeddings"],
            "position_embedding": position_embedding,
            "rope_base": base,
            "rope_scaling": scaling,
            "norm_epsilon": hf["rms_norm_eps"],
            "qk_layernorm": kind == "qwen3",
            "qkv_bias": kind == "qwen2",
            "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "eos_token_ids": _eos(path.parent, hf),
        },
        source=str(path),
    )


def _rope(path: Path, hf: Mapping[str, Any]) -> tuple[str, float, dict[str, Any] | None]:
    """(position_embedding, rope_base, rope_scaling) from either spelling of transformers."""
    values = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    base = values.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: a partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return "rope", base, None
    if "factor" not in values:
        raise ValueError(f"{path}: rope type {kind!r} without a factor")
    if kind == "llama3":
        for name, only in LLAMA3.items():
            if values.get(name, only) != only:
                raise ValueError(
                    f"{path}: llama3 rope scaling with {name} {values[name]} is not supported, only {only}"
                )
        return "rope", base, {"factor": float(values["factor"])}
    if kind == "yarn":
        return "yarn", base, _yarn(path, values, hf["max_position_embeddings"])
    raise ValueError(f"{path}: rope type {kind!r} is not supported, only default, llama3 and yarn")


def _yarn(path: Path, values: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    factor = float(values["factor"])
    both = values.get("mscale") is not None and values.get("mscale_all_dim") is not None
    attention_factor = values.get("attention_factor")
    if attention_factor is not None and (both or not math.isclose(attention_factor, 0.1 * math.log(factor) + 1)):
        raise ValueError(f"{path}: yarn with attention_factor {attention_factor} is not supported, leave it out")
    return {
        "factor": factor,
        "original_max_position_embeddings": values.get("original_max_position_embeddings") or max_positions,
        "beta_fast": float(values.get("beta_fast") or 32.0),
        "beta_slow": float(values.get("beta_slow") or 1.0),
        "mscale": float(values["mscale"]) if both else 1.0,
        "mscale_all_dim": float(values["mscale_all_dim"]) if both else 0.0,
        "round_to_int": bool(values.get("truncate", True)),
    }


def _eos(folder: Path, hf: Mapping[str, Any]) -> list[int]:
    """generation_config.json says where generation stops; config.json where there is none."""
    file = folder / "generation_config.json"
    found = _read_json(file).get("eos_token_id") if file.is_file() else None
    found = hf.get("eos_token_id") if found is None else found
    return list(found) if isinstance(found, list) else [] if found is None else [found]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _opened(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading safetensors needs the cli extra: pip install 'megatron-prefix[cli]'") from error
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file: {error}") from error
