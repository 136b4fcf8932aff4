"""The shape of a decoder-only transformer, as plain data: what a checkpoint folder's `model.json` holds.

Imports nothing but the standard library, so that weight conversion and the CLI can read a model's shape without
megatron-core.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSITION_EMBEDDINGS = ("rope", "yarn", "learned_absolute", "none")
NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("swiglu", "gelu")

_LLAMA3_SCALING = {"factor": None}
# None marks a required key; the others are the values of the YaRN paper (arXiv 2309.00071) and of transformers.
_YARN_SCALING = {
    "factor": None,
    "original_max_position_embeddings": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "round_to_int": True,
}
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model. Raises ValueError, naming the field, its value and the limit.

    rope_scaling: None, or for position_embedding "rope" the Llama 3 scaling {"factor": float} (with that model's
        low/high frequency factors 1 and 4 and original length 8,192), or for "yarn" {"factor",
        "original_max_position_embeddings"} and optionally {"beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "round_to_int"}; missing optional values are filled in.
    head_dim: channels per attention head; None means hidden_size / num_attention_heads.
    num_query_groups: key/value heads; None means num_attention_heads.
    qkv_bias: a bias on the query, key and value projections only (Qwen2). No other linear layer has one.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_query_groups: int | None = None
    head_dim: int | None = None
    position_embedding: str = "rope"
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-5
    activation: str = "swiglu"
    qk_layernorm: bool = False
    qkv_bias: bool = False
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            _check_size(name, getattr(self, name))
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.groups}"
            )
        _check_choice("position_embedding", self.position_embedding, POSITION_EMBEDDINGS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_positive("rope_base", self.rope_base)
        _check_positive("norm_epsilon", self.norm_epsilon)
        for name in ("qk_layernorm", "qkv_bias", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.position_embedding in ("rope", "yarn") and self.channels % 2:
            raise ValueError(
                f"head_dim {self.head_dim} must be even for position_embedding {self.position_embedding!r}"
            )
        object.__setattr__(self, "rope_scaling", self._checked_scaling())
        object.__setattr__(self, "eos_token_ids", self._checked_eos())

    @property
    def groups(self) -> int:
        """Key/value heads (num_query_groups, never None)."""
        assert self.num_query_groups is not None
        return self.num_query_groups

    @property
    def channels(self) -> int:
        """Channels per attention head (head_dim, never None)."""
        assert self.head_dim is not None
        return self.head_dim

    def _checked_scaling(self) -> dict[str, Any] | None:
        kind, scaling = self.position_embedding, self.rope_scaling
        if kind in ("learned_absolute", "none") or (kind == "rope" and scaling is None):
            if scaling is not None:
                raise ValueError(f"rope_scaling {dict(scaling)} has no meaning with position_embedding {kind!r}")
            return None
        known = _YARN_SCALING if kind == "yarn" else _LLAMA3_SCALING
        given = dict(scaling or {})
        unknown = sorted(set(given) - set(known))
        missing = sorted(name for name, default in known.items() if default is None and name not in given)
        if unknown or missing:
            raise ValueError(
                f"rope_scaling for position_embedding {kind!r} takes {sorted(known)}: "
                f"unknown {unknown or 'none'}, missing {missing or 'none'}"
            )
        filled = {name: given.get(name, default) for name, default in known.items()}
        for name in set(filled) - {"round_to_int", "mscale_all_dim"}:
            _check_positive(f"rope_scaling[{name!r}]", filled[name])
        return filled

    def _checked_eos(self) -> tuple[int, ...]:
        ids = tuple(self.eos_token_ids)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise ValueError(f"eos_token_ids holds {token!r}, outside the vocabulary 0..{self.vocab_size - 1}")
        return ids

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "model config") -> "ModelConfig":
        """The inverse of `to_dict`; an unknown or missing key is a ValueError that names it and `source`."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            raise ValueError(
                f"{source}: unknown keys {unknown or 'none'}, missing keys {missing or 'none'}; known: {sorted(fields)}"
            )
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_json(self, path: str | Path) -> None:
        """Write this config as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Read a config. Raises FileNotFoundError, or ValueError naming the file and the field."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values, source=str(path))


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
