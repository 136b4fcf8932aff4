"""The calibrated cost model: the fit, the designed packs, and a calibration of a real (tiny) model."""

import json
import math
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix import RolloutGroup
from megatron_prefix.cost_model import CostModel
from megatron_prefix.mcore.calibration import (
    Calibration,
    calibrate,
    designed_packs,
    fit,
    nonnegative_least_squares,
    num_runs,
)
from megatron_prefix.workload import Workload
from tests.cli_runs import run_cli
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config

pytestmark = pytest.mark.ci_oldest

NAMES = [field.name for field in fields(CostModel)]
COEFFICIENTS = st.floats(0, 2).map(lambda x: 0.0 if x < 0.2 else x)


def works() -> list[Workload]:
    packs = designed_packs(1024, 50, 0).values()
    return [Workload.of_layout(pack.layout, len(pack.response_rows)) for pack in packs]


def counts() -> torch.Tensor:
    return torch.tensor([[*astuple(work), 1] for work in works()], dtype=torch.float64)


def test_the_designed_packs_tell_all_coefficients_apart() -> None:
    table = counts()
    shares = table / (table @ torch.tensor([1e-4, 5e-5, 1e-7, 1e-5, 1e-3, 1e-2], dtype=torch.float64))[:, None]
    assert torch.linalg.cond(shares / shares.norm(dim=0)) < 50
    assert int(table[:, 0].max()) <= 1024 and set(table[:, 4].tolist()) == {0.0, 1.0, 2.0}


@settings(max_examples=20)
@given(st.lists(COEFFICIENTS, min_size=6, max_size=6))
def test_exact_times_give_the_coefficients_back(given_: list[float]) -> None:
    scales = [1e-4, 5e-5, 1e-7, 1e-5, 1e-3, 1e-2]
    expected = [max(x, 0.3 if i == 0 else 0.0) * scale for i, (x, scale) in enumerate(zip(given_, scales, strict=True))]
    cost = fit(works(), (counts() @ torch.tensor(expected, dtype=torch.float64)).tolist())
    for found, wanted, scale in zip(astuple(cost), expected, scales, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6 * scale, rel=1e-6)


@settings(max_examples=20)
@given(st.lists(st.floats(0.05, 3.0), min_size=12, max_size=12))
def test_any_times_give_the_best_solution_without_negative_coefficients(seconds: list[float]) -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope at a coefficient above 0, none downwards at one that is 0."""
    shares = counts() / torch.tensor(seconds, dtype=torch.float64)[:, None]
    found = nonnegative_least_squares(shares)
    assert (found >= 0).all()
    slopes = shares.T @ (shares @ found - 1) / shares.norm(dim=0)
    assert (slopes >= -1e-6).all() and (slopes[found > 0].abs() <= 1e-6).all(), (found, slopes)


def test_times_that_do_not_grow_with_the_work_are_refused() -> None:
    with pytest.raises(ValueError, match="12 micro-batches of up to 1024 rows do not grow with their work"):
        fit(works(), [1 / work.rows for work in works()])


def calibrate_tiny(rank: int, world_size: int) -> tuple[Calibration, list[str]]:
    from megatron_prefix.bench.step import random_model

    start(dp=world_size)
    model = random_model(tiny_config(max_position_embeddings=512), torch.float32, "auto", 0)
    notes: list[str] = []
    found = calibrate(model, max_rows=512, repeats=2, after_each=notes.append)
    for message, options in (
        ("at least 64, got 63", {"max_rows": 63}),
        ("513 is over the model's 512", {"max_rows": 513}),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, **options)
    assert all(parameter.grad is None for parameter in model.parameters())
    return found, notes


def test_a_calibrated_model_ranks_what_it_has_not_seen() -> None:
    """And is the same on every rank."""
    (found, notes), (other, _) = run_distributed(calibrate_tiny, 2)
    assert found == other and len(notes) == num_runs(2) == 3 * len(found.samples)
    assert all(math.isfinite(value) and value >= 0 for value in astuple(found.cost))
    assert math.isfinite(found.residual)
    small, middle, large = (
        Workload.of_group(RolloutGroup([1] * p, [[2] * r] * 4, [0.0] * 4)) for p, r in ((9, 9), (90, 90), (900, 900))
    )
    assert found.cost.cost(small) < found.cost.cost(middle) < found.cost.cost(large)
    assert all(sample.seconds > 0 and sample.modelled > 0 for sample in found.samples)


def test_the_command_writes_a_cost_model(tmp_path: Path) -> None:
    shape = ["--layers", "1", "--hidden-size", "64", "--heads", "2", "--kv-heads", "1", "--vocab-size", "32"]
    command: list[Any] = ["bench", "calibrate", *shape, "--repeats", "1", "--json", "--out"]
    out = tmp_path / "cost.json"
    runs = run_cli(
        [*command, out, "--max-rows", "512"], [*command, out, "--max-rows", "32"], [*command, tmp_path / "no" / "x"]
    )
    good, few, lost = (ranks[0] for ranks in runs)
    assert good.exit_code == 0, good
    report = json.loads(good.stdout.splitlines()[-1])
    assert report["bench"] == "calibrate" and report["sizes"]["max_rows"] == 512
    assert CostModel.from_json(out) == CostModel(**report["cost"]) and list(report["cost"]) == NAMES
    assert len(report["samples"]) == 12 and "relative errors" in good.stderr
    assert few.exit_code == 2 and "max_rows must be at least 64, got 32" in few.stderr
    assert lost.exit_code == 2 and "does not exist" in lost.stderr
