"""Prefix groups in verl's Megatron engine, beside verl's own unpatched engine on the same tensors.

Both are the real classes of verl's source archives, initialized as a worker does it: its bridge, its DDP and optimizer,
its loss. They are compared by what a trainer sees: scores, losses, metrics, gradients.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import verl_engines
from tests.distributed import run_distributed
from tests.downloads import downloaded_source, installed_beside
from tests.tokenizer_files import write_byte_tokenizer
from tests.verl_engines import build, loss_of, rollouts, scores, start, update

SHA256 = {
    "0.8.0": "814352ab55179dab0724091313e0367e866af667f6a749cc248b73699eb15a21",
    "0.9.1": "3e03d8816b2546b2c5580705671b8d0bb3f79b8364e7b5c56dbfc1245536ba22",
}
PACKAGES = Path(__file__).with_name("verl_packages.txt").read_text().split()
"""What verl's engine and configuration import, beside the packages of our own test environment."""

LAYOUTS: dict[str, dict[str, int]] = {
    "two data-parallel ranks": {},
    "two data-parallel ranks, loss per token": {},
    "sequence parallel": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "interleaved pipeline": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "the same data on both": {},
    "context parallel": {"context_parallel_size": 2},  # verl's own has none on the CPU: compared with the one before
}
TOKENS = 60  # of a micro-batch: three of verl's, two of ours
LIMIT = "max_token_len_per_gpu"
DYNAMIC: dict[str, Any] = {"use_dynamic_bsz": True, LIMIT: TOKENS}


def _sources(version: str) -> list[str]:
    return [str(downloaded_source(f"verl=={version}", SHA256[version])), str(installed_beside("verl", *PACKAGES))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen2 without weights."""
    made = write_byte_tokenizer(tmp_path_factory.mktemp("qwen2") / "model", pad_token="</s>")
    (made / "config.json").write_text(json.dumps(verl_engines.CONFIG))
    return str(made)


@pytest.fixture(
    scope="module",
    params=[pytest.param("0.8.0", marks=pytest.mark.ci_oldest), pytest.param("0.9.1", marks=pytest.mark.ci_newest)],
)
def found(request: pytest.FixtureRequest, folder: str) -> Any:
    """What one process found with this verl: `_on_one_rank`."""
    return run_distributed(_on_one_rank, 1, _sources(request.param), folder)[0]


@pytest.fixture(scope="module")
def over_ranks(folder: str) -> Any:
    """What two processes found: `_on_two_ranks`, by rank."""
    return run_distributed(_on_two_ranks, 2, _sources("0.9.1"), folder)


def _worst(expected: Any, actual: Any) -> float:
    """The largest difference of two dicts of tensors, each relative to its tensor's largest value."""
    assert expected.keys() == actual.keys()
    return max((float((x - actual[name]).abs().max() / x.abs().max()) for name, x in expected.items()), default=0.0)


def _same_weights(source: Any, target: Any) -> None:
    for one, other in zip(source.module, target.module, strict=True):
        for given, taken in zip(one.parameters(), other.parameters(), strict=True):
            taken.data.copy_(given.data)


def _compare(plain: Any, ours: Any, batch: Any, other_batch: Any = None, **settings: Any) -> dict[str, Any]:
    """How far apart the two engines are on a batch. ``other_batch``: what ours gets, if it is not the same."""
    mine = batch if other_batch is None else other_batch
    _same_weights(plain, ours)
    results = [
        (scores(engine, each), update(engine, each, loss_of(**settings)))
        for engine, each in ((plain, batch), (ours, mine))
    ]
    return _differences(*results)


def _differences(one: tuple[Any, Any], other: tuple[Any, Any]) -> dict[str, Any]:
    (expected_scores, expected), (actual_scores, actual) = one, other
    return {
        "scores": _worst(expected_scores, actual_scores),
        "names": sorted(actual_scores),
        "loss": abs(expected["loss"] - actual["loss"]),
        "metrics": max((abs(x - actual["metrics"][name]) for name, x in expected["metrics"].items()), default=0.0),
        "gradients": _worst(expected["gradients"], actual["gradients"]),
        "grad_norm": abs(expected["grad_norm"] - actual["grad_norm"]),
        "micro_batches": (expected["micro_batches"], actual["micro_batches"]),
    }


def _on_one_rank(rank: int, world_size: int, sources: list[str], folder: str) -> dict[str, Any]:
    start(sources)
    plain, ours = (build(Path(folder), prefix=prefix) for prefix in (False, True))
    dynamic = rollouts(**DYNAMIC)
    fixed = rollouts(use_dynamic_bsz=False, micro_batch_size_per_gpu=4)
    scattered = rollouts(order_seed=1, **DYNAMIC)
    return {
        "modes": {
            mode: _compare(plain, ours, dynamic, loss_agg_mode=mode)
            for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
        },
        "batches": {
            "fixed": _compare(plain, ours, fixed),
            "scattered": _compare(plain, ours, scattered),
            "without padding": _compare(plain, ours, dynamic, verl_engines.without_padding(dynamic)),
        },
        "balanced": _balanced(),
        "spec": verl_engines.own_spec_is_back(ours),
        "forms": verl_engines.takes_prefix_attention(),
        "example": verl_engines.example_engines(sources[0], folder),
        "refused": verl_engines.refusals(ours, dynamic),
    }


def _on_two_ranks(rank: int, world_size: int, sources: list[str], folder: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    start(sources)
    found: dict[str, Any] = {}
    for name, sizes in LAYOUTS.items():
        settings = {"calculate_per_token_loss": True} if "per token" in name else {}
        differs = "two data" in name
        ours = build(Path(folder), prefix=True, sizes=sizes, **settings)
        tokens = 45 if "interleaved" in name else TOKENS // sizes.get("context_parallel_size", 1)
        batch = rollouts(4 - 2 * rank if differs else 4, rank if differs else 0, **DYNAMIC | {LIMIT: tokens})
        if name != "context parallel":
            plain = build(Path(folder), prefix=False, sizes=sizes, **settings)
            weights = [p.detach().clone() for p in plain.module[0].parameters()]
            _same_weights(plain, ours)
            expected = scores(plain, batch), update(plain, batch, loss_of())
        else:
            for given, taken in zip(weights, ours.module[0].parameters(), strict=True):
                taken.data.copy_(given)
        found[name] = _differences(expected, (scores(ours, batch), update(ours, batch, loss_of())))
        parallel_state.destroy_model_parallel()
    return found


def _agrees(difference: dict[str, Any]) -> None:
    assert difference["scores"] < 1e-6
    assert difference["loss"] < 1e-6
    assert difference["metrics"] < 1e-5
    assert difference["gradients"] < 5e-6  # fp32
    assert difference["grad_norm"] < 1e-6


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_scores_losses_and_gradients_are_verls(found: Any, mode: str) -> None:
    _agrees(found["modes"][mode])
    assert found["modes"][mode]["names"] == ["entropy", "log_probs"]


@pytest.mark.parametrize("batch", ["fixed", "scattered", "without padding"])
def test_of_every_form_of_batch(found: Any, batch: str) -> None:
    _agrees(found["batches"][batch])


def test_groups_share_a_micro_batch_and_fewer_are_needed(found: Any) -> None:
    """``max_token_len_per_gpu`` counts a prompt once; scattered sequences find together; a fixed size is verl's."""
    assert found["modes"]["token-mean"]["micro_batches"] == (3, 2)
    assert found["batches"]["scattered"]["micro_batches"] == (3, 2)
    assert found["batches"]["fixed"]["micro_batches"] == (3, 3)


def test_the_bridge_has_its_own_layer_spec_back(found: Any) -> None:
    assert found["spec"]


def test_every_form_of_a_bridges_layer_spec_is_taken(found: Any) -> None:
    """mbridge has a method, Megatron-Bridge a spec or a function, and looks for ``vp_stage`` in its signature."""
    assert len(found["forms"]) == 5
    assert all(found["forms"].values()), found["forms"]


def test_two_lines_switch_it_on_and_off_is_verls_own_engine(found: Any) -> None:
    assert found["example"] == {
        ("actor", True): "PrefixMegatronEngine",
        ("ref", True): "PrefixMegatronEngine",
        ("actor", False): "MegatronEngineWithLMHead",
        ("ref", False): "MegatronEngineWithLMHead",
    }


def test_what_is_not_implemented_is_refused_by_name(found: Any) -> None:
    assert len(found["refused"]) >= 17
    for setting, message in found["refused"].items():
        assert message is not None, setting
        assert setting.rpartition(".")[2] in message, message


@pytest.mark.ci_newest
@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_two_ranks(over_ranks: Any, layout: str) -> None:
    for found in over_ranks:
        _agrees(found[layout])
    assert over_ranks[-1][layout]["names"] == ["entropy", "log_probs"]


@pytest.mark.ci_newest
def test_all_ranks_run_a_number_of_micro_batches_that_suits_all(over_ranks: Any) -> None:
    """Rank 1's sequences alone would fit one; an interleaved pipeline of two stages wants an even number, not three."""
    assert [found["two data-parallel ranks"]["micro_batches"][1] for found in over_ranks] == [2, 2]
    assert over_ranks[1]["interleaved pipeline"]["micro_batches"][1] == 4


def test_the_trainers_balancing_keeps_groups_on_one_rank(found: Any) -> None:
    """verl spreads a batch over data-parallel ranks itself, by ``uid`` when use_prefix_grouper is on."""
    parts = found["balanced"]
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert not {i // 3 for i in parts[0]} & {i // 3 for i in parts[1]}


def _balanced() -> list[list[int]]:
    from verl.utils.seqlen_balancing import get_group_balanced_partitions

    return get_group_balanced_partitions([5, 9, 80, 31, 33, 32, 6, 7, 8, 90, 1, 2], [i // 3 for i in range(12)], 2)
