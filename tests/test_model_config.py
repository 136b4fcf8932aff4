"""ModelConfig: what it fills in, what it refuses, and its JSON file."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.model_config import ModelConfig
from tests.mcore_helpers import SIZES, tiny_config

YARN = {"position_embedding": "yarn", "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"factor": 8.0}},
        YARN,
        {"position_embedding": "learned_absolute", "norm": "layernorm", "activation": "gelu"},
        {"qk_layernorm": True, "qkv_bias": True, "tied_embeddings": True, "head_dim": 16, "eos_token_ids": (2, 7)},
    ],
)
def test_json_gives_the_same_config_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    config.to_json(tmp_path / "model.json")
    assert ModelConfig.from_json(tmp_path / "model.json") == config


def test_derived_values_are_filled_in() -> None:
    config = tiny_config(num_query_groups=None, **YARN)
    assert (config.groups, config.channels) == (4, 8)
    assert config.rope_scaling is not None
    assert config.rope_scaling["beta_fast"] == 32.0
    assert config.rope_scaling["mscale_all_dim"] == 0.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 0}, "num_layers .* 0"),
        ({"hidden_size": 3.5}, r"hidden_size .* 3\.5"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"position_embedding": "alibi"}, "position_embedding .* 'alibi'"),
        ({"norm": "batchnorm"}, "norm .* 'batchnorm'"),
        ({"activation": "relu"}, "activation .* 'relu'"),
        ({"rope_base": float("nan")}, "rope_base .* nan"),
        ({"norm_epsilon": 0}, "norm_epsilon .* 0"),
        ({"tied_embeddings": 1}, "tied_embeddings .* 1"),
        ({"eos_token_ids": (64,)}, "64, outside the vocabulary 0..63"),
        ({"rope_scaling": {}}, "missing .*factor"),
        ({"rope_scaling": {"factor": 8.0, "beta_fast": 1.0}}, "unknown .*beta_fast"),
        ({"rope_scaling": {"factor": -1.0}}, "factor.* -1.0"),
        ({"position_embedding": "yarn"}, "missing .*original_max_position_embeddings"),
        ({"position_embedding": "none", "rope_scaling": {"factor": 8.0}}, "no meaning .*'none'"),
    ],
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        (json.dumps({**SIZES, "hidden": 3}), "unknown keys .'hidden'"),
        (
            json.dumps({name: size for name, size in SIZES.items() if name != "vocab_size"}),
            "missing keys .'vocab_size'",
        ),
        (json.dumps({**SIZES, "num_layers": -1}), "num_layers"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_field(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "model.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=named) as caught:
        ModelConfig.from_json(file)
    assert str(file) in str(caught.value)
