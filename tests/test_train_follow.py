"""`train --follow`: rollouts that arrive while training runs make the same steps as a file that is whole."""

import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli_runs import groups, invoke_all, one_line, run_cli, run_one, write_groups, write_model
from tests.distributed import running, wait_until_ended
from tests.test_cli_train import lines, succeed, tensors
from tests.test_train_survives import with_stores

pytestmark = pytest.mark.ci_oldest

STEPS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("follow")
    write_model(folder)
    write_groups(folder, 2 * STEPS)
    return folder


def follow(folder: Path, path: Path, *more: str | Path) -> list[Any]:
    basics = ["--groups-per-step", "2", "--max-tokens-per-microbatch", "60", "--lr", "1e-2", "--seed", "3", "--json"]
    return ["train", "--model", folder / "model.json", "--rollouts", path, "--follow", *basics, *more]


def test_a_file_that_grows_gives_the_steps_of_a_whole_one(files: Path, tmp_path: Path) -> None:
    """Written piece by piece, also in the middle of a line, before and after a run that is resumed."""
    whole = files / "rollouts.jsonl"
    text = whole.read_text()
    growing = tmp_path / "growing.jsonl"

    def write() -> None:
        with growing.open("w") as file:
            for start in range(0, len(text), 97):
                file.write(text[start : start + 97])
                file.flush()
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    out = tmp_path / "out"
    runs = run_cli(
        follow(files, growing, "--steps", "1", "--save", tmp_path / "parts"),
        follow(files, growing, "--steps", f"{STEPS}", "--save", tmp_path / "parts", "--resume"),
        follow(files, whole, "--steps", f"{STEPS}", "--save", tmp_path / "whole", "--metrics", out),
        world_size=2,
    )
    writer.join()
    succeed(runs)
    expected, found = (tensors(tmp_path / name / f"step_{STEPS:06d}") for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)
    made = groups(2 * STEPS)
    for step, line in enumerate(lines(out)):
        batch = made[2 * step : 2 * step + 2]
        rewards = [reward for group in batch for reward in group.rewards]
        assert line["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert line["ratio"] == pytest.approx(1, abs=1e-5), "old log-probs are those right before the step"


def test_a_signal_ends_the_wait_for_more(files: Path, tmp_path: Path) -> None:
    few = write_groups(tmp_path, 3)
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    words = follow(files, few, "--steps", "5", "--metrics", metrics, "--save", save)
    stores, invocations = with_stores(words)
    with running(invoke_all, 2, invocations) as processes:
        deadline = time.monotonic() + 120
        while not metrics.exists():
            assert time.monotonic() < deadline and all(each.process.is_alive() for each in processes)
            time.sleep(0.01)
        time.sleep(0.5)  # now it waits for the fourth group
        for each in processes:
            assert each.process.pid is not None
            os.kill(each.process.pid, signal.SIGTERM)
        assert wait_until_ended(processes, 60)
        (run,), _ = (pickle.loads(each.result) for each in processes)
    del stores
    assert run.exit_code == 0, run.stderr + run.crash
    assert "stopped by SIGTERM after step 1 of 5" in one_line(run.stderr)
    assert [path.name for path in save.iterdir()] == ["step_000001"]
    assert json.loads((save / "step_000001" / "state.json").read_text())["source"] == {"consumed": 2}


def test_what_does_not_go_with_it_is_refused(files: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": [1, 2]}\n')
    path = files / "rollouts.jsonl"
    for more, message in (
        (("--skip-bad",), "--follow reads group lines of a JSONL file"),
        (("--kl-coef", "0.1"), "--kl-coef 0.1 with --follow"),
        (("--compare", "1"), "--compare runs groups of a whole file"),
    ):
        assert message in run_one(*follow(files, path, *more)).message
    assert f"{bad}:1: " in run_one(*follow(files, bad, "--steps", "1")).message
    without = [word for word in follow(files, path) if word not in ("--rollouts", path)]
    assert "--follow needs --rollouts" in run_one(*without, "--on-policy", "--task", "chain_sum").message
