"""export: transformers computes with the folder what the model computes; imported again, the weights are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights import check_exportable, open_source, write_hf_folder
from megatron_prefix.weights.hf_writer import hf_config
from megatron_prefix.weights.names import expected_shapes
from tests.cli_runs import run_cli
from tests.distributed import run_distributed
from tests.mcore_helpers import full_logits, start, tiny_config, tokens

pytest.importorskip("safetensors", reason="needs the cli extra")
transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.ci_oldest

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_query_groups": 2, "rope_scaling": {"factor": 8.0}},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True, "num_query_groups": 2, "eos_token_ids": (2, 5)},
    "qwen3": {
        "qk_layernorm": True,
        "head_dim": 16,
        "num_query_groups": 4,
        "position_embedding": "yarn",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16},
    },
}


def config_of(kind: str) -> ModelConfig:
    return tiny_config(num_layers=4, **SHAPES[kind])


def _models(sizes: dict[str, int], kind: str, dtype: str = "float32") -> list[torch.nn.Module]:
    """This rank's chunks of one model, whatever the sizes: random weights, drawn by name."""
    from megatron_prefix.mcore.model import build_model
    from megatron_prefix.mcore.stages import whole_model_parameters

    start(**sizes)
    chunks: list[torch.nn.Module] = [
        build_model(config_of(kind), dtype=getattr(torch, dtype), vp_stage=stage)
        for stage in (range(sizes["vpp"]) if "vpp" in sizes else [None])
    ]
    with torch.no_grad():
        # Norms and biases start as ones and zeros, which would hide a mix-up.
        for name, parameter in sorted(whole_model_parameters(chunks).items()):
            torch.manual_seed(sum(map(ord, name)))
            if not getattr(parameter, "tensor_model_parallel", False):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return chunks


def _export(rank: int, world_size: int, sizes: dict[str, int], kind: str, out: str) -> dict[str, torch.Tensor]:
    """Export; where one rank has the whole model, its logits and weights."""
    from megatron_prefix.mcore.export_weights import export_weights

    chunks = _models(sizes, kind)
    export_weights(chunks, config_of(kind), out)
    if world_size > 1:
        return {}
    with torch.no_grad():
        logits = full_logits(chunks[0], tokens())
    return {"logits": logits} | {name: x.detach() for name, x in chunks[0].named_parameters()}


def _import(rank: int, world_size: int, source: str, out: str) -> dict[str, torch.Tensor]:
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.import_weights import import_weights
    from megatron_prefix.mcore.model import build_model

    start()
    opened = open_source(source)
    import_weights(opened, out, config=opened.config, dtype=torch.float32)
    model = build_model(opened.config)
    load_checkpoint(out, model)
    return {name: x.detach() for name, x in model.named_parameters()}


@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_computes_the_same_and_import_is_the_inverse(tmp_path: Path, kind: str) -> None:
    (ours,) = run_distributed(_export, 1, {}, kind, str(tmp_path / "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.model_type == kind
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, ours.pop("logits"), rtol=0, atol=1e-5)
    assert open_source(str(tmp_path / "hf")).config == config_of(kind)
    (again,) = run_distributed(_import, 1, str(tmp_path / "hf"), str(tmp_path / "again"))
    assert again.keys() == ours.keys()
    for name, value in again.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize(
    ("kind", "sizes"), [("llama", {"tp": 2, "pp": 2}), ("qwen3", {"tp": 2}), ("qwen2", {"pp": 2, "vpp": 2})]
)
def test_ranks_write_what_one_rank_writes(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    world_size = sizes.get("tp", 1) * sizes.get("pp", 1)
    run_distributed(_save, world_size, sizes, kind, str(tmp_path / "checkpoint"), str(tmp_path / "ranks"))
    run_distributed(_load_and_export, 1, kind, str(tmp_path / "checkpoint"), str(tmp_path / "one"))
    ranks, one = load_file(tmp_path / "ranks/model.safetensors"), load_file(tmp_path / "one/model.safetensors")
    assert ranks.keys() == one.keys() == expected_shapes(config_of(kind)).keys()
    for name, value in one.items():
        assert torch.equal(value, ranks[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def _save(rank: int, world_size: int, sizes: dict[str, int], kind: str, checkpoint: str, out: str) -> None:
    """Megatron-core's own checkpoint, which is cut and put together by its own code, is the oracle."""
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.export_weights import export_weights

    chunks = _models(sizes, kind)
    save_checkpoint(checkpoint, chunks, config_of(kind))
    export_weights(chunks, config_of(kind), out)


def _load_and_export(rank: int, world_size: int, kind: str, checkpoint: str, out: str) -> None:
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.export_weights import export_weights
    from megatron_prefix.mcore.model import build_model

    start()
    model = build_model(config_of(kind))
    load_checkpoint(checkpoint, model)
    export_weights(model, config_of(kind), out)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    config = config_of("llama")
    weights = {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}
    write_hf_folder(tmp_path / "hf", weights.items(), config, dtype=torch.float32, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert all((tmp_path / "hf" / file).stat().st_size < 25_000 for file in files)
    source = open_source(str(tmp_path / "hf"))
    assert all(torch.equal(source.read(name), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "norm 'layernorm' cannot be exported: Llama, Qwen2 and Qwen3 have rmsnorm only"),
        ({"activation": "gelu"}, "activation 'gelu' cannot be exported"),
        ({"position_embedding": "none"}, "position_embedding 'none' cannot be exported: .* have rope or yarn only"),
        ({"qkv_bias": True, "qk_layernorm": True}, "Qwen2 has the one, Qwen3 the other"),
    ],
)
def test_models_of_no_family_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_exportable(tiny_config(**changes))


def test_config_json_has_the_sampling_defaults_of_none() -> None:
    values = hf_config(config_of("qwen2"), torch.bfloat16)
    assert values["torch_dtype"] == "bfloat16" and values["eos_token_id"] == [2, 5]


def test_the_command_exports_what_import_made(tmp_path: Path) -> None:
    config = config_of("llama")
    weights = {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}
    write_hf_folder(tmp_path / "hf", weights.items(), config, dtype=torch.float32)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    runs = run_cli(
        ("import", tmp_path / "hf", tmp_path / "checkpoint", "--dtype", "fp32", "--no-tokenizer"),
        ("export", tmp_path / "checkpoint", tmp_path / "out", "--dtype", "fp32", "--json"),
        ("export", tmp_path / "checkpoint", tmp_path / "out"),
        ("export", tmp_path / "hf", tmp_path / "other"),
    )
    imported, exported, again, other = (ranks[0] for ranks in runs)
    assert imported.exit_code == exported.exit_code == 0, imported.crash + exported.crash
    assert exported.json == {"out": str(tmp_path / "out"), "model_type": "llama", "dtype": "fp32", "tokenizer": False}
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("hf", "out"))
        assert name == "model.safetensors" or first == second
    source = open_source(str(tmp_path / "out"))
    assert all(torch.equal(source.read(name), value) for name, value in weights.items())
    assert again.exit_code == 2 and "exists already and is not empty" in again.message
    assert other.exit_code == 2 and "is not a checkpoint folder" in other.message
