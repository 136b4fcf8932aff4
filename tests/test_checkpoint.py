"""Checkpoint folders: training goes on as if never stopped, at other parallel sizes too; what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.checkpoint_folder import latest_checkpoint, step_folder
from megatron_prefix.mcore.checkpoint import load_config
from megatron_prefix.model_config import ModelConfig
from tests.distributed import run_distributed
from tests.mcore_helpers import Trainer, full_logits, start, tiny_config, tokens

CHANGES: dict[str, Any] = {"qk_layernorm": True, "tied_embeddings": True}


def _train_save_train(rank: int, world_size: int, path: str, tp: int, kind: str, settings: dict[str, Any]) -> Any:
    """Three steps, save, three more; logits at the save and at the end."""
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start(tp=tp)
    config = tiny_config(**CHANGES)
    trainer = Trainer(build_model(config, seed=1, **settings), kind)
    for step in range(3):
        trainer.step(tokens(seed=step))
    save_checkpoint(path, trainer.ddp, config, optimizer=trainer.optimizer, state={"step": 3})
    return _logits(trainer), _three_more(trainer)


def _load_train(rank: int, world_size: int, path: str, tp: int, kind: str, settings: dict[str, Any]) -> Any:
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.model import build_model

    start(tp=tp)
    model = build_model(tiny_config(**CHANGES), seed=2, **settings)
    assert load_checkpoint(path, model) == {"step": 3}
    with torch.no_grad():
        weights_alone = full_logits(model, tokens(seed=9))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    trainer = Trainer(model, kind)
    state = load_checkpoint(path, trainer.ddp, config=tiny_config(**CHANGES), optimizer=trainer.optimizer)
    assert state == {"step": 3}
    return weights_alone, _three_more(trainer)


def _logits(trainer: Trainer) -> torch.Tensor:
    with torch.no_grad():
        return full_logits(trainer.ddp, tokens(seed=9))


def _three_more(trainer: Trainer) -> torch.Tensor:
    for step in range(3, 6):
        trainer.step(tokens(seed=step))
    return _logits(trainer)


@pytest.mark.parametrize(
    ("kind", "dtype", "saved", "loaded", "tolerance"),
    [
        ("plain", torch.float32, (2, 2, True), (1, 1, False), 1e-5),
        ("distributed", torch.float32, (2, 1, False), (2, 2, True), 1e-5),
        ("distributed_overlap", torch.bfloat16, (2, 1, False), (1, 1, False), 0.0),
        ("distributed_overlap", torch.float32, (2, 1, False), (2, 1, False), 0.0),
    ],
)
def test_training_goes_on_at_any_sizes(
    tmp_path: Path, kind: str, dtype: torch.dtype, saved: Any, loaded: Any, tolerance: float
) -> None:
    path = str(tmp_path / "step_000003")
    settings = [{"dtype": dtype, "sequence_parallel": sp} for _, _, sp in (saved, loaded)]
    at_save, at_end = run_distributed(_train_save_train, saved[0], path, saved[1], kind, settings[0])[0]
    assert (at_save - at_end).abs().max() > 0.1, "the steps after the save must matter"
    for weights_alone, end in run_distributed(_load_train, loaded[0], path, loaded[1], kind, settings[1]):
        torch.testing.assert_close(weights_alone, at_save, rtol=0, atol=tolerance)
        torch.testing.assert_close(end, at_end, rtol=0, atol=tolerance)


def _save(rank: int, world_size: int, path: str, changes: dict[str, Any]) -> None:
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start()
    config = tiny_config(**changes)
    save_checkpoint(path, build_model(config, seed=1), config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny_config(), without optimizer."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    run_distributed(_save, 1, str(path), {})
    return path


def _refused_loads(rank: int, world_size: int, path: str, cases: list[tuple[dict[str, Any], bool, str]]) -> None:
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.model import build_model

    start(tp=world_size)
    for changes, with_config, named in cases:
        config = tiny_config(**changes)
        model = build_model(config, seed=2)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=named):
            load_checkpoint(path, model, config=config if with_config else None)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), f"{name} changed"
    trainer = Trainer(build_model(tiny_config(), seed=2), "plain")
    with pytest.raises(ValueError, match="no optimizer state"):
        load_checkpoint(path, trainer.ddp, optimizer=trainer.optimizer)


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_model_is_refused_before_anything_changes(saved: Path, world_size: int) -> None:
    cases: list[tuple[dict[str, Any], bool, str]] = [
        ({"hidden_size": 64}, True, "hidden_size is 32 there, expected 64"),
        ({"rope_base": 5e5, "norm_epsilon": 1e-6}, True, r"rope_base is 10000.0 there.*also different: norm_epsilon"),
        ({"ffn_hidden_size": 64}, False, r"linear_fc1.weight has shape \(2, 96, 32\), expected \(2, 128, 32\)"),
        ({"num_layers": 3}, False, r"has shape \(2, .*expected \(3, "),
        ({"qk_layernorm": True}, False, "no tensor decoder.layers.self_attention.q_layernorm.weight"),
        ({"tied_embeddings": True}, False, "holds tensor output_layer.weight, which the model does not have"),
    ]
    run_distributed(_refused_loads, world_size, str(saved), cases)


def _refused_folders(rank: int, world_size: int, folder: str) -> None:
    from megatron_prefix.mcore.checkpoint import load_checkpoint, save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start()
    config = tiny_config()
    model = build_model(config)
    (Path(folder) / "other").mkdir()
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        load_checkpoint(Path(folder) / "other", model)
    config.to_json(Path(folder) / "other" / "model.json")
    (Path(folder) / "other" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no megatron-core weights"):
        load_checkpoint(Path(folder) / "other", model)
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(Path(folder) / "other", model, config)
    with pytest.raises(ValueError, match="JSON values only"):
        save_checkpoint(Path(folder) / "new", model, config, state={"step": torch.tensor(3)})
    assert sorted(x.name for x in Path(folder).iterdir()) == ["other"]


def test_wrong_folders_and_states_are_refused(tmp_path: Path) -> None:
    run_distributed(_refused_folders, 1, str(tmp_path))


class _Breaks(ModelConfig):
    """A config whose file cannot be written: the save breaks off after the weights."""

    def to_json(self, path: str | Path) -> None:
        raise OSError("disk full")


def _broken_save(rank: int, world_size: int, folder: str) -> None:
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start()
    config = tiny_config()
    model = build_model(config)
    path = step_folder(folder, 7)
    with pytest.raises(ValueError, match=r"step_000007 could not be written: disk full .* The checkpoints before it"):
        save_checkpoint(path, model, _Breaks(**config.to_dict()))
    assert not list(Path(folder).iterdir())
    assert latest_checkpoint(folder) is None
    (Path(folder) / "tokenizer.json").write_text("{}")
    save_checkpoint(path, model, config, tokenizer_from=folder)
    assert latest_checkpoint(folder) == path
    assert (path / "tokenizer.json").read_text() == "{}"
    assert sorted(x.name for x in Path(folder).iterdir()) == [path.name, "tokenizer.json"]


def test_a_save_that_breaks_off_leaves_no_checkpoint(tmp_path: Path) -> None:
    run_distributed(_broken_save, 1, str(tmp_path))


def _fingerprints(rank: int, world_size: int, tp: int) -> dict[str, str]:
    from megatron.core import parallel_state

    from megatron_prefix.mcore.checkpoint import fingerprint
    from megatron_prefix.mcore.model import build_model

    start(tp=tp)
    config = tiny_config(**CHANGES)
    names = ("model", "again", "one bit", "queries' norm", "keys' norm")
    models = {name: build_model(config, seed=1) for name in names}
    if parallel_state.get_tensor_model_parallel_rank() == tp - 1:
        last = models["one bit"].decoder.layers[1].mlp.linear_fc2.weight.data[-1, -1:]
        last.copy_(last.nextafter(torch.tensor(9.0)))
    models["queries' norm"].decoder.layers[0].self_attention.q_layernorm.weight.data.fill_(2.0)
    models["keys' norm"].decoder.layers[0].self_attention.k_layernorm.weight.data.fill_(2.0)
    models |= {"seed": build_model(config, seed=2), "dtype": build_model(config, seed=1, dtype=torch.bfloat16)}
    return {name: fingerprint(model) for name, model in models.items()}


def test_a_fingerprint_is_that_of_the_weights_at_any_sizes() -> None:
    (one,) = run_distributed(_fingerprints, 1, 1)
    assert one["model"] == one["again"] and len(set(one.values())) == len(one) - 1
    for tp in (1, 2):
        assert run_distributed(_fingerprints, 2, tp) == [one, one]


def test_latest_checkpoint_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for name in ("step_000009", "step_000100", "step_1000000", "step_9000000.incomplete", "final"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


def test_config_of_a_folder(saved: Path) -> None:
    assert load_config(saved) == tiny_config()
    assert json.loads((saved / "state.json").read_text()) == {}
