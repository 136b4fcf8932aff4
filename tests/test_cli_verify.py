"""`megatron-prefix verify`: what it reports, in every dtype, from files, under torchrun; and that it can fail."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.cli.verify import Limits, tiny_groups
from megatron_prefix.mcore.checkpoint import load_checkpoint, save_checkpoint
from megatron_prefix.mcore.equivalence import Differences
from megatron_prefix.mcore.model import build_model
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.splitting import plan_splits
from tests.cli_runs import Run, one_line, run_cli, torchrun, write_groups, write_model
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config

KEYS = {"ok", "max_log_prob_diff", "max_grad_rel_diff", "tolerance", "rows_repeated", "rows_grouped", "parts"}
SPLIT = ("--max-tokens-per-microbatch", "18")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every single-process case, in one new process."""
    folder = tmp_path_factory.mktemp("verify")
    files = ("--model", write_model(folder), "--rollouts", write_groups(folder))
    broken = folder / "broken"
    run_distributed(save_broken_model, 1, broken)
    lines: dict[str, tuple[str | Path, ...]] = {
        "fp64": ("--tiny", "--dtype", "fp64", "--steps", "5"),
        "fp32": ("--tiny", "--dtype", "fp32"),
        "other seed": ("--tiny", "--seed", "7"),
        "split": ("--tiny", "--dtype", "fp64", "--steps", "2", *SPLIT),
        "split, offloaded": ("--tiny", "--dtype", "fp64", *SPLIT, "--prefix-activations", "offload"),
        "bf16": ("--tiny", "--dtype", "bf16"),
        "impossible": ("--tiny", "--dtype", "fp64", "--tolerance", "1e-20"),
        "files": files,
        "some groups": (*files, "--max-groups", "2", "--max-tokens-per-microbatch", "40", "--recompute", "selective"),
        "nan": ("--model", broken, "--rollouts", folder / "rollouts.jsonl"),
    }
    results = run_cli(*(("verify", "--json", *line) for line in lines.values()))
    return dict(zip(lines, (run for (run,) in results), strict=True))


def save_broken_model(rank: int, world_size: int, folder: Path) -> None:
    """A checkpoint whose last norm has one NaN: log-probs and most gradients become NaN."""
    start()
    config = tiny_config(max_position_embeddings=64)
    model = build_model(config, seed=1)
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = math.nan
    save_checkpoint(folder, model, config)
    load_checkpoint(folder, model)


def report(run: Run) -> dict[str, Any]:
    assert not run.crash, run.crash
    assert len(run.stdout.splitlines()) == 1 and set(run.json) >= KEYS, run.stdout
    assert run.exit_code == (0 if run.json["ok"] else 1)
    return run.json


def tiny_rows() -> tuple[int, int]:
    """Rows by hand: every prompt with every response, or once."""
    made = tiny_groups(128, 0)
    repeated = sum(len(group.prompt) - 1 + len(tokens) for group in made for tokens in group.responses)
    return repeated, sum(len(group.prompt) - 1 + sum(map(len, group.responses)) for group in made)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_equal_within_the_tolerance_of_the_dtype(runs: dict[str, Run], dtype: str, tolerance: float) -> None:
    found = report(runs[dtype])
    assert found["ok"] is True and found["tolerance"] == tolerance and found["dtype"] == dtype
    assert 0 < found["max_grad_rel_diff"] <= tolerance and found["max_log_prob_diff"] <= 10 * tolerance
    assert (found["rows_repeated"], found["rows_grouped"]) == tiny_rows()
    assert abs(found["loss"]) > 1e-3
    assert "equal" in runs[dtype].stderr and "2/2" in runs[dtype].stderr


def test_steps_compare_trained_parameters(runs: dict[str, Run]) -> None:
    assert 0 < report(runs["fp64"])["max_param_rel_diff"] <= 1e-10
    assert "parameters after steps" in runs["fp64"].stderr
    assert report(runs["fp32"])["max_param_rel_diff"] is None


@pytest.mark.parametrize("name", ["split", "split, offloaded"])
def test_groups_over_the_limit_are_split(runs: dict[str, Run], name: str) -> None:
    found, whole = report(runs[name]), report(runs["fp64"])
    assert found["ok"] is True and found["max_grad_rel_diff"] <= 1e-10
    plans = plan_splits(tiny_groups(128, 0), max_tokens_per_pack=18)
    assert found["parts"] == sum(len(plan.parts) for plan in plans if plan) > 5 and whole["parts"] == 0
    assert (found["rows_repeated"], found["rows_grouped"]) == tiny_rows()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every case of two processes, in one new pair of them; rank 0's results."""
    folder = tmp_path_factory.mktemp("verify_two")
    rollouts = ("--rollouts", write_groups(folder), "--dtype", "fp64", "--max-tokens-per-microbatch", "14")
    tied = {"num_layers": 4, "tied_embeddings": True, "position_embedding": "learned_absolute"}
    files = ("--model", write_model(folder, **tied), *rollouts)
    lines: dict[str, tuple[str | Path, ...]] = {
        "pp": (*files, "--pp", "2", "--steps", "2"),
        "vpp": (*files, "--pp", "2", "--vpp", "2", "--recompute", "full", "--prefix-activations", "recompute"),
        "bf16": ("--tiny", "--dtype", "bf16", *SPLIT, "--pp", "2"),
        "cp": ("--tiny", "--dtype", "fp64", *SPLIT, "--cp", "2"),
        "dp": (*files, "--dp", "2"),
    }
    results = run_cli(*(("verify", "--json", *line) for line in lines.values()), world_size=2)
    assert all(other.stdout == other.stderr == "" for _, other in results)
    return dict(zip(lines, (run for run, _ in results), strict=True))


@pytest.mark.parametrize("name", ["pp", "vpp", "bf16", "cp", "dp"])
def test_split_groups_over_two_ranks(two_ranks: dict[str, Run], name: str) -> None:
    found = report(two_ranks[name])
    assert found["ok"] is True and found["parts"] > 4, two_ranks[name].stderr
    sizes = {"pp": (2, 1, 1), "vpp": (2, 2, 1), "bf16": (2, 1, 1), "cp": (1, 1, 1), "dp": (1, 1, 2)}
    assert (found["pp"], found["vpp"], found["dp"]) == sizes[name] and found["cp"] == (2 if name == "cp" else 1)
    if name != "bf16":
        assert 0 < found["max_grad_rel_diff"] <= 1e-10 and found["loss"] != 0
    if name == "pp":
        assert 0 < found["max_param_rel_diff"] <= 1e-10


def test_another_seed_is_another_case(runs: dict[str, Run]) -> None:
    assert report(runs["other seed"])["loss"] != report(runs["fp32"])["loss"]
    assert report(runs["other seed"])["ok"] is True


def test_bf16_is_judged_by_the_plain_paths_own_error(runs: dict[str, Run]) -> None:
    found = report(runs["bf16"])
    assert found["ok"] is True and "repeated prefixes in fp32" in one_line(runs["bf16"].stderr)
    assert 1e-3 < found["max_grad_rel_diff"] <= found["tolerance"] < 0.2  # bf16's, not fp32's


def test_a_tolerance_that_cannot_hold_is_not_ok(runs: dict[str, Run]) -> None:
    found = report(runs["impossible"])
    assert found["ok"] is False and found["tolerance"] == 1e-20
    assert "NOT EQUAL" in runs["impossible"].stderr and "OVER" in runs["impossible"].stderr


def test_files(runs: dict[str, Run]) -> None:
    everything, some = report(runs["files"]), report(runs["some groups"])
    assert everything["ok"] is some["ok"] is True
    assert everything["rows_repeated"] > everything["rows_grouped"] > some["rows_grouped"]


def test_nan_is_not_ok(runs: dict[str, Run]) -> None:
    found = report(runs["nan"])
    assert found["ok"] is False and found["max_log_prob_diff"] is None
    assert "NOT EQUAL" in runs["nan"].stderr


GOOD = Differences(1e-8, 1e-8, 1e-8, {"a": 1e-8, "b": 1e-8}, {"a": 1e-8, "b": 1e-8})


@pytest.mark.parametrize("wrong", [1e-4, math.inf, math.nan])
@pytest.mark.parametrize("name", ["max_log_prob_rel_diff", "loss_rel_diff", "gradients", "parameters"])
def test_every_difference_counts(name: str, wrong: float) -> None:
    limits = Limits.uniform(1e-5)
    assert limits.hold(GOOD)
    bad = {"a": 1e-8, "b": wrong} if name in ("gradients", "parameters") else wrong
    wrong_way = replace(GOOD, **{name: bad})  # type: ignore[arg-type]
    assert not limits.hold(wrong_way)
    # nor by a plain path that is as broken
    assert math.isfinite(wrong) or not Limits.twice(wrong_way, 1e-5).hold(wrong_way)


def test_twice_the_plain_paths_own_error_and_nothing_else() -> None:
    own = Differences(7.0, 0.01, 0.02, {"a": 0.03, "b": 0.04}, {"a": 0.05, "b": 0.001})
    assert Limits.twice(own, 0.0) == Limits(0.02, 0.04, 0.08, 0.1)
    assert Limits.twice(own, 0.05) == Limits(0.05, 0.05, 0.08, 0.1)
    exact = Differences(0.0, 0.0, 0.0, {"a": 0.0}, {})
    assert Limits.twice(exact, 0.0) == Limits.uniform(0.0)  # in bf16 too


def test_tiny_groups_are_seeded_and_ragged() -> None:
    assert tiny_groups(50, 3) == tiny_groups(50, 3) != tiny_groups(50, 4)
    made = tiny_groups(50, 3)
    assert {1} < {len(group.prompt) for group in made} and {1} < {len(group) for group in made}
    assert {1} < {len(tokens) for group in made for tokens in group.responses}
    assert max(token for group in made for token in group.prompt) < 50


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        pytest.param(("--tp", "2", "--sequence-parallel"), (2, 1, 1), marks=pytest.mark.ci_newest),
        pytest.param(("--pp", "2", "--recompute", "full", *SPLIT), (1, 2, 1), marks=pytest.mark.ci_oldest),
    ],
)
def test_torchrun(arguments: tuple[str, ...], sizes: tuple[int, int, int]) -> None:
    run = torchrun(2, "verify", "--tiny", "--json", *arguments)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    found = json.loads(line)
    assert set(found) >= KEYS and found["ok"] is True
    assert (found["tp"], found["pp"], found["dp"]) == sizes
    assert (found["rows_repeated"], found["rows_grouped"]) == tiny_rows()
    assert one_line(run.stderr).count("repeated prefixes (") == 1  # one table, of rank 0


def test_torchrun_passes_the_failure_on() -> None:
    ranks = run_cli(("verify", "--tiny", "--json", "--dp", "2", "--tolerance", "1e-20"), world_size=2)[0]
    assert [run.exit_code for run in ranks] == [1, 1]
    assert ranks[0].json["ok"] is False and ranks[1].stdout == ranks[1].stderr == ""


def test_model_config_of_the_broken_model_is_that_of_the_file(tmp_path: Path) -> None:
    """Else the NaN case would be refused as bad input and prove nothing."""
    assert ModelConfig.from_json(write_model(tmp_path)) == tiny_config(max_position_embeddings=64)
