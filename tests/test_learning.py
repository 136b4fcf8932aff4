"""Training on policy: repeated prefixes and prefix groups learn alike, and they learn."""

import importlib.util
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.parallel import ParallelSizes, initialize
from megatron_prefix.mcore.training import TrainSettings
from tests.distributed import run_distributed

pytestmark = pytest.mark.ci_newest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "learning_curve.py"
SEED = 0


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learning_curve", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(rank: int, world_size: int, ways: list[str], iterations: int, prompts: int, size: int) -> list[list[float]]:
    """The example's own `learn`, for every way: "repeated", "grouped", or "slower" (grouped, with other updates)."""
    warnings.filterwarnings("ignore", module="megatron")
    run_on_cpu()
    initialize(ParallelSizes(), seed=SEED)
    found = []
    for way in ways:
        module = example()
        if way == "slower":
            module.TrainSettings = partial(slower, module.TrainSettings)  # type: ignore[attr-defined]
        found.append(module.learn(way != "repeated", iterations, prompts, size, SEED))
    return found


def slower(settings: type[TrainSettings], learning_rate: float, **others: Any) -> TrainSettings:
    return settings(learning_rate=0.9 * learning_rate, **others)


def test_repeated_and_grouped_runs_give_the_same_curve() -> None:
    ways = ["repeated", "grouped", "slower"]
    ((repeated, grouped, slower),) = run_distributed(curves, 1, ways, 15, 4, 8, timeout_s=300)
    assert len(grouped) == 15
    assert grouped == pytest.approx(repeated, abs=1e-12)
    # The curve tells what was trained: after updates a tenth smaller, other tokens are sampled.
    assert grouped[0] == slower[0] and grouped != pytest.approx(slower, abs=1e-2)


@pytest.mark.slow
def test_the_task_is_learned() -> None:
    ((curve,),) = run_distributed(curves, 1, ["grouped"], 120, 8, 16, timeout_s=500)
    assert curve[0] < 0.2
    assert sum(curve[-10:]) / 10 >= 0.9
