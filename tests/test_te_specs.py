"""Transformer Engine's layer specs, with a stand-in for it that computes on the CPU (see `tests/te_stand_in`)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_HYBRID = find_spec("megatron.core.models.hybrid") is not None
pytestmark = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="Transformer Engine is installed; the stand-in would hide it"
)


def last_line(*arguments: str) -> dict[str, Any]:
    """What a new interpreter prints last: megatron-core looks for Transformer Engine once, on import."""
    path = os.pathsep.join([str(ROOT / "tests" / "te_stand_in"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tests.te_cases` found."""
    # not -m: the checkpoint writer's processes would import the whole program again
    return last_line("-c", "from tests.te_cases import main; main()")


def test_verify_holds_transformer_engines_layers_to_megatron_cores_own() -> None:
    """Their norms are inside linear layers, under other names."""
    report = last_line("-m", "megatron_prefix", "verify", "--tiny", "--use-te", "--dtype", "fp64", "--json")
    assert report["ok"] and report["max_grad_rel_diff"] <= 1e-10


@pytest.mark.parametrize("name", ["te", "te_qk"])
def test_only_attention_differs_from_megatron_cores_own_spec(found: dict[str, Any], name: str) -> None:
    attention = "submodules.self_attention"
    assert found["changed"][name] == {
        f"{attention}.module": ["SelfAttention", "PrefixSelfAttention"],
        f"{attention}.submodules.core_attention": ["TEDotProductAttention", "PrefixCoreAttention () {'impl': 'auto'}"],
        "submodules.self_attn_bda": ["get_bias_dropout_add", "_residual_add.<locals>.build"],
    }


CASES = ["specs.te", "specs.te_qk", "prefix_gpt_layer_spec", "with_prefix_attention", "fused rotary"]


@pytest.mark.parametrize("name", [*CASES, *["hybrid"] * HAS_HYBRID])
def test_models_equal_plain_megatron_core(found: dict[str, Any], name: str) -> None:
    case = found["equal"][name]
    assert case["log_probs"] <= 1e-12
    assert max(case["gradients"].values()) <= 1e-10 and len(case["gradients"]) >= 16


@pytest.mark.parametrize("name", CASES)
def test_layers_are_transformer_engines(found: dict[str, Any], name: str) -> None:
    layer = found["equal"][name]["layer"]
    assert layer["self_attention"] == "PrefixSelfAttention"
    assert layer["self_attention.core_attention"] == "PrefixCoreAttention"
    assert layer["self_attention.linear_qkv"] == layer["mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert layer["self_attention.linear_proj"] == layer["mlp.linear_fc2"] == "TERowParallelLinear"
    norm = {"specs.te_qk": "LayerNorm", "prefix_gpt_layer_spec": "RMSNorm"}.get(name)
    for part in ("q_layernorm", "k_layernorm"):
        made = layer.get(f"self_attention.{part}")
        assert made == norm if norm else made in (None, "IdentityOp")


def test_every_case_was_run(found: dict[str, Any]) -> None:
    assert found["equal"].keys() == {*CASES, *["hybrid"] * HAS_HYBRID}


def test_checkpoints_pass_between_local_layers_and_transformer_engines(found: dict[str, Any]) -> None:
    assert found["checkpoint"].keys() == {"local to te", "te to local"}
    assert max(found["checkpoint"].values()) <= 1e-12


def test_the_stand_in_stays_in_its_process(found: dict[str, Any]) -> None:
    assert find_spec("transformer_engine") is None and "transformer_engine" not in sys.modules
