"""The comparison "repeated prefixes vs grouped": its counts against hand counts, its costs, its table and picture."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix import LossConfig, RolloutGroup
from megatron_prefix.cli.comparison import show_comparison
from megatron_prefix.cli.plots import plot_comparison
from megatron_prefix.mcore.compare import StepComparison, StepCost, compare_step
from megatron_prefix.mcore.equivalence import Differences
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config

pytestmark = pytest.mark.ci_newest

# Prompt of 4 (3 prefix rows) with responses of 2 and 3 rows; prompt of 1 (no prefix row) with responses of 2 and 1.
GROUPS = [
    RolloutGroup([1, 2, 3, 4], [[5, 6], [7, 8, 9]], [1.0, 0.0]),
    RolloutGroup([9], [[8, 7], [6]], [0.0, 0.5]),
]
ROWS_GROUPED = (3 + 2 + 3) + (2 + 1)
ROWS_REPEATED = (5 + 6) + (2 + 1)
# A row sees itself and what stands before it: causal triangles, and in groups every response row all prefix rows.
AREA_GROUPED = (6 + (3 + 2 * 3) + (6 + 3 * 3)) + (3 + 1)
AREA_REPEATED = (15 + 21) + (3 + 1)


def trainers(*, other_weights: bool = False) -> tuple[PolicyTrainer, PolicyTrainer]:
    config = tiny_config()
    settings = TrainSettings(learning_rate=1e-3, clip_grad=0.0)
    spec = prefix_gpt_layer_spec(transformer_config(config, dtype=torch.float64))
    grouped = build_model(config, layer_spec=spec, dtype=torch.float64, seed=1)
    plain = build_model(config, dtype=torch.float64, seed=2 if other_weights else 1)
    return (
        PolicyTrainer(grouped, settings, LossConfig()),
        PolicyTrainer(plain, settings, LossConfig(), log_probs=repeated_log_probs),
    )


def compare(rank: int, world_size: int) -> dict[str, Any]:
    start(dp=world_size)
    trainer, plain = trainers()
    before = [value.detach().clone() for value in trainer.model.parameters()]
    advanced: list[tuple[int, int]] = []

    def advance(steps: int = 1, *, units: int = 0, note: str = "") -> None:
        advanced.append((steps, units))

    found = compare_step(trainer, plain, trainer.shard(GROUPS), None, advance)
    same = all(torch.equal(x, y) for x, y in zip(before, trainer.model.parameters(), strict=True))
    first = list(advanced)
    cut = compare_step(trainer, plain, trainer.shard(GROUPS), 8, advance)
    split = compare_step(trainer, plain, trainer.shard(GROUPS), 4, advance)
    return {"found": found, "cut": cut, "split": split, "same": same, "steps": sum(steps for steps, _ in first),
            "units": [units for _, units in first]}  # fmt: skip


def compare_what_must_show(rank: int, world_size: int) -> tuple[StepComparison, list[str]]:
    start()
    found = compare_step(*trainers(other_weights=True), GROUPS, None, lambda *_, **__: None)
    messages = []
    for groups, limit in ((GROUPS, 2), ([], None)):
        try:
            compare_step(*trainers(), groups, limit, lambda *_, **__: None)
        except ValueError as error:
            messages.append(str(error))
    return found, messages


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    (result,) = run_distributed(compare, 1)
    return result


def test_rows_and_areas_are_those_counted_by_hand(one_rank: dict[str, Any]) -> None:
    for found in (one_rank["found"], one_rank["cut"], one_rank["split"]):
        assert (found.repeated.rows, found.grouped.rows) == (ROWS_REPEATED, ROWS_GROUPED) == (14, 11)
        assert (found.repeated.area, found.grouped.area) == (AREA_REPEATED, AREA_GROUPED) == (40, 34)


def test_both_ways_agree_and_nothing_is_changed(one_rank: dict[str, Any]) -> None:
    for found in (one_rank["found"], one_rank["cut"], one_rank["split"]):
        assert found.found.worst < 1e-10 and len(found.found.gradients) > 10
    assert one_rank["same"]


def test_costs_are_measured(one_rank: dict[str, Any]) -> None:
    found = one_rank["found"]
    for cost in (found.repeated, found.grouped):
        assert 0 < cost.seconds < 60 and cost.peak_bytes > 1000
    assert one_rank["cut"].grouped.peak_bytes < found.grouped.peak_bytes  # two packs, one after the other


def test_progress_is_five_steps(one_rank: dict[str, Any]) -> None:
    assert one_rank["steps"] == 5
    assert one_rank["units"] == [14, 28, 22, 11]  # forward and backward twice: for the time and for the memory


def test_two_ranks_count_together(one_rank: dict[str, Any]) -> None:
    ranks = run_distributed(compare, 2)
    costs = [(rank["found"].repeated, rank["found"].grouped) for rank in ranks]
    assert costs[0] == costs[1]  # sums of counts, the slowest rank's time, the largest peak
    repeated, grouped = costs[0]
    assert (repeated.rows, grouped.rows, repeated.area, grouped.area) == (14, 11, 40, 34)
    assert all(rank["found"].found.worst < 1e-10 for rank in ranks)


def test_what_is_wrong_shows() -> None:
    ((found, messages),) = run_distributed(compare_what_must_show, 1)
    assert found.found.worst > 0.1  # other weights: never taken for equal
    assert "group 0: node 2 has 3 tokens, max_tokens_per_pack is 2; raise it to at least 3" in messages[0]
    assert "nothing to pack" in messages[1]


# ---- shown


def comparison(gradients: dict[str, float]) -> StepComparison:
    return StepComparison(
        repeated=StepCost(rows=4000, area=3_000_000, seconds=8.0, peak_bytes=500 * 2**20),
        grouped=StepCost(rows=1000, area=2_000_000, seconds=4.0, peak_bytes=100 * 2**20),
        found=Differences(2e-6, 1e-6, 1e-7, gradients, {}),
    )


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = show_comparison(comparison({"w": 3e-6}))
    text = " ".join(capsys.readouterr().err.split())
    for row in (
        "tokens executed │ 4,000 │ 1,000 │ 4.00x",
        "attention area (pairs) │ 3,000,000 │ 2,000,000 │ 1.50x",
        "step time (s) │ 8.00 │ 4.00 │ 2.00x",
        "peak memory (MiB) │ 500 │ 100 │ 5.00x",
    ):
        assert row in text
    assert "2.0e-06" in text and "3.0e-06" in text
    assert numbers["rows_repeated"] == 4000 and numbers["peak_bytes_grouped"] == 100 * 2**20
    assert numbers["max_grad_rel_diff"] == 3e-6 and numbers["max_log_prob_diff"] == 2e-6


@pytest.mark.parametrize("gradients", [{"w": 3e-6}, {}])
def test_picture(tmp_path: Path, gradients: dict[str, float]) -> None:
    path = tmp_path / "new folder" / "plot.png"
    plot_comparison(comparison(gradients), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > 1000 and height > 300
