"""`train`: where metrics go, schedules, generators' states, memory over many steps."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_prefix import LossConfig, RolloutGroup
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cli.metrics import JsonLines, MetricsFlags
from megatron_prefix.cost_model import CostModel
from megatron_prefix.sampler import PrefixGroupSampler
from tests.cli_runs import Run, run_cli, write_groups, write_model
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config
from tests.test_cli_train import in_two_parts, lines, succeed

pytestmark = pytest.mark.ci_newest

WARMUP_STEPS, STEPS = 100, 500


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    write_model(folder)
    write_groups(folder)
    return folder


@pytest.fixture(scope="module")
def runs(files: Path) -> list[Run]:
    """A whole run and one in halves, between which steps were made that its checkpoint does not know."""
    more = ("--peak-tflops", "0.5", "--lr-decay-style", "linear", "--lr-warmup-steps", "2", "--lr-decay-steps", "6",
            "--min-lr", "1e-3")  # fmt: skip
    whole, first, second = in_two_parts(files, files / "out", "run", *more)
    board = ("--tensorboard", files / "out" / "board")
    whole = (*whole, "--tensorboard", files / "out" / "whole-board")
    made = succeed(run_cli(whole, (*first, *board), (*second, *board, "--steps", "3")))
    shutil.rmtree(files / "out" / "run-halves" / "step_000003")
    return made + succeed(run_cli((*second, *board)))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_and_json_lines_have_the_same(files: Path, runs: list[Run]) -> None:
    found, records = scalars(files / "out" / "whole-board"), lines(files / "out" / "run-whole.jsonl")
    for name in ("loss", "reward", "no_advantage", "old_kl", "clip_high", "grad_norm", "lr", "tokens",
                 "tokens_repeated", "saving", "mfu", "mfu_repeated", "skipped"):  # fmt: skip
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]
        assert found[name] == expected, name
    assert len(records) == 4 and min(value for _, value in found["step_seconds"]) > 0


def test_a_resumed_run_leaves_no_step_twice(files: Path, runs: list[Run]) -> None:
    assert [run.json["resumed_from"] for run in runs] == [0, 0, 2, 2]
    machine = ("mfu", "mfu_repeated")  # depend on the time
    whole, halves = (lines(files / "out" / f"run-{name}.jsonl") for name in ("whole", "halves"))
    for record in (*whole, *halves):
        assert all(record.pop(name) > 0 for name in machine)
    assert whole == halves
    assert [step for step, _ in scalars(files / "out" / "board")["loss"]] == [1, 2, 3, 4]


def test_the_schedule_goes_on_where_it_was(files: Path, runs: list[Run]) -> None:
    rates = [record["lr"] for record in lines(files / "out" / "run-halves.jsonl")]
    # 1e-2 after two updates of warm-up, then a line to 1e-3 at the sixth
    assert rates == pytest.approx([0.0, 5e-3, 1e-2, 1e-2 - 9e-3 / 4])


def test_json_lines_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonLines(path, None)
    for step in range(1, 5):
        writer.write(step, {"loss": 0.5, "kl": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    JsonLines(path, 3).write(4, {"loss": 1.0})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0] == {"step": 1, "loss": 0.5, "kl": None} and records[3] == {"step": 4, "loss": 1.0}
    JsonLines(path, None).write(1, {})
    assert len(path.read_text().splitlines()) == 5, "another run is appended"


def test_a_writer_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--wandb needs the package wandb: pip install wandb, or leave it out"):
        MetricsFlags(wandb="project")
    with pytest.raises(ValueError, match=r"--tensorboard needs the package tensorboard"):
        MetricsFlags(tensorboard=Path("board"))
    MetricsFlags()


# ---- generators


def draw_after_save(rank: int, world_size: int, path: str) -> list[float]:
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start(tp=2)
    config = tiny_config()
    model = build_model(config, seed=1)
    torch.rand(rank + 1)
    save_checkpoint(path, model, config, with_rng=True)
    return draws()


def draw_after_load(rank: int, world_size: int, path: str, tp: int) -> tuple[bool, list[float]]:
    from megatron_prefix.mcore.rng_state import load_rng_state

    start(tp=tp)
    return load_rng_state(Path(path) / "weights"), draws()


def draws() -> list[float]:
    """Of torch's generator, and of megatron-core's for what tensor-parallel ranks have parts of."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    outside = torch.rand(2).tolist()
    with get_cuda_rng_tracker().fork():
        return outside + torch.rand(2).tolist()


def test_every_rank_draws_on(tmp_path: Path) -> None:
    path = str(tmp_path / "step_000001")
    expected = run_distributed(draw_after_save, 2, path)
    assert expected[0][:2] != expected[1][:2] and expected[0][2:] != expected[1][2:]
    assert run_distributed(draw_after_load, 2, path, 2) == [(True, each) for each in expected]
    for restored, drawn in run_distributed(draw_after_load, 2, path, 1):
        assert not restored and drawn not in expected


# ---- memory


def resident_bytes(rank: int, world_size: int) -> list[int]:
    """Of the process, after every step of a run of `STEPS`."""
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
    from megatron_prefix.mcore.model import build_model, transformer_config
    from megatron_prefix.mcore.step_source import StepBatch, StoredRollouts
    from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
    from megatron_prefix.mcore.training_loop import TrainingLoop

    start()
    config = tiny_config(num_layers=1)
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(64, (length,), generator=draw).tolist()

    groups = [RolloutGroup(ids(5 + i), [ids(3), ids(1 + i)], [0.0, 1.0], f"{i}") for i in range(8)]
    model = build_model(config, seed=1, layer_spec=prefix_gpt_layer_spec(transformer_config(config)))
    trainer = PolicyTrainer(model, TrainSettings(learning_rate=1e-4), LossConfig(kl_coef=0.1))
    sampler = PrefixGroupSampler(groups, StepPlanner(CostModel(row=1.0), 1, 16), groups_per_step=2)
    source = StoredRollouts(trainer, sampler, with_reference=True)
    source.measure_old_log_probs(8)
    process, found = psutil.Process(), []

    def on_step(step: int, batch: StepBatch, metrics: dict[str, Any]) -> None:
        found.append(process.memory_info().rss)

    TrainingLoop(trainer, source, on_step).run(STEPS)
    return found


@pytest.mark.slow
def test_memory_is_flat_over_many_steps() -> None:
    (found,) = run_distributed(resident_bytes, 1, timeout_s=500)
    assert len(found) == STEPS
    growth = max(found[WARMUP_STEPS:]) / found[WARMUP_STEPS] - 1
    assert growth < 0.01, f"{found[WARMUP_STEPS] / 2**20:.1f} MiB after {WARMUP_STEPS} steps, then {growth:.2%} more"
