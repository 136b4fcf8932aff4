"""`train` where things go wrong: signals, steps that are not finite, full disks, damaged checkpoints."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.checkpoint_folder import checkpoints
from megatron_prefix.cli import main
from megatron_prefix.rollouts import read_rollouts
from tests.cli_runs import Arguments, Run, invoke_all, one_line, run_cli, write_groups, write_model
from tests.distributed import MEETINGS, run_distributed, running, wait_until_ended
from tests.test_cli_train import in_two_parts, lines, succeed, tensors, train


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survives")
    write_model(folder)
    write_groups(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_stores(*invocations: Arguments) -> tuple[list[Any], list[tuple[list[str], int]]]:
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in invocations]
    return stores, [([str(word) for word in words], s.port) for words, s in zip(invocations, stores, strict=True)]


# ---- signals


def _signalled(words: Arguments, metrics: Path, number: signal.Signals, ranks: Sequence[int]) -> list[Run] | None:
    """Both ranks' runs, signalled after three steps; None where gloo could not join them, as on a busy machine."""
    stores, invocations = with_stores(words)
    with running(invoke_all, 2, invocations) as processes:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < deadline, "three steps take longer than two minutes"
            if not all(each.process.is_alive() for each in processes):
                assert not metrics.exists(), "a rank ended before the signal"
                return None
            time.sleep(0.01)
        for rank in ranks:
            pid = processes[rank].process.pid
            assert pid is not None
            os.kill(pid, number)
        assert wait_until_ended(processes, 60)
        runs: list[Run] = [pickle.loads(each.result)[0] for each in processes]
    del stores
    return runs


@pytest.mark.parametrize(
    ("number", "ranks", "saved"),
    [(signal.SIGTERM, (0, 1), True), (signal.SIGINT, (1,), True), (signal.SIGTERM, (0,), False)],
)
def test_a_signal_ends_all_ranks_after_their_step(
    files: Path, tmp_path: Path, number: signal.Signals, ranks: Sequence[int], saved: bool
) -> None:
    """Also where only one rank gets it."""
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    words = train(files, "--steps", "100000", "--metrics", metrics, "--json", *(("--save", save) if saved else ()))
    for _ in range(MEETINGS):
        if (runs := _signalled(words, metrics, number, ranks)) is not None:
            break
    assert runs is not None, "the ranks could not be joined"
    (first, _) = runs
    assert [run.exit_code for run in runs] == [0, 0], first.stderr + first.crash
    step = lines(metrics)[-1]["step"]
    assert 3 <= step < 100000 and first.json["stopped_by"] == number.name
    assert f"stopped by {number.name} after step {step} of 100000" in one_line(first.stderr)
    assert (names(save) == [f"step_{step:06d}"]) if saved else not save.exists()
    if saved:
        again = train(files, "--steps", f"{step + 1}", "--save", save, "--resume", "--json")
        (run,) = succeed(run_cli(again, world_size=2))
        assert run.json["resumed_from"] == step and run.json["step_seconds"] > 0


# ---- losses and gradients that are not finite


@pytest.fixture(scope="module")
def exploded(files: Path) -> dict[str, Run]:
    """A learning rate at which the first step makes the model's output NaN."""
    out = files / "exploded"
    huge = ("--lr", "1e30", "--lr-decay-style", "linear", "--lr-decay-steps", "100", "--steps")
    offending = out / "stop" / "nonfinite" / "step_000002_rank0.jsonl"
    invocations: dict[str, Arguments] = {
        "stop": train(files, *huge, "4", "--save", out / "stop", "--metrics", out / "stop.jsonl", "--json"),
        "skip": train(
            files, *huge, "4", "--save", out / "skip", "--metrics", out / "skip.jsonl", "--on-nonfinite", "skip"
        ),
        "one": train(files, *huge, "1", "--save", out / "one"),
        "replay": (*train(files, "--steps", "1", "--model", out / "stop" / "step_000001"), "--rollouts", offending),
        "go on": train(
            files,
            *huge,
            "3",
            "--save",
            out / "stop",
            "--metrics",
            out / "stop.jsonl",
            "--on-nonfinite",
            "skip",
            "--resume",
        ),
    }
    return {name: ranks[0] for name, ranks in zip(invocations, run_cli(*invocations.values()), strict=True)}


def test_a_step_that_is_not_finite_stops_the_run_before_it(files: Path, exploded: dict[str, Run]) -> None:
    run, folder = exploded["stop"], files / "exploded" / "stop"
    kept = folder / "nonfinite" / "step_000002_rank0.jsonl"
    assert run.exit_code == 1 and not run.crash
    message = one_line(run.stderr).replace(" ", "")
    assert "Error:step2:lossnan,gradientnorm" in message and str(kept) in message and "--on-nonfiniteskip" in message
    record = json.loads(kept.with_suffix(".json").read_text())
    assert record["step"] == 2 and record["rank"] == 0 and record["metrics"]["loss"] == "nan"
    groups = read_rollouts(kept)
    everything = {group.group_id: group for group in read_rollouts(files / "rollouts.jsonl")}
    assert len(groups) == 2 and all(group == everything[group.group_id] for group in groups)
    rows = sum(len(tokens) for group in groups for tokens in group.responses)
    assert sum(len(micro_batch) for micro_batch in record["old_log_probs"]) == rows


def test_what_was_kept_is_not_finite_again(exploded: dict[str, Run]) -> None:
    run = exploded["replay"]
    assert run.exit_code == 1 and "step 1: loss nan" in one_line(run.stderr)


def test_a_skipped_step_is_as_if_it_had_not_been(files: Path, exploded: dict[str, Run]) -> None:
    out = files / "exploded"
    assert exploded["skip"].exit_code == exploded["one"].exit_code == exploded["go on"].exit_code == 0
    found = [json.loads(line) for line in (out / "skip.jsonl").read_text().splitlines()]
    assert [line["updated"] for line in found] == [1.0, 0.0, 0.0, 0.0]
    assert [line["skipped"] for line in found] == [0, 1, 2, 3]
    assert [line["lr"] for line in found] == pytest.approx([1e30, *[0.99e30] * 3])
    assert found[0]["loss"] is not None and found[1]["loss"] is None
    once, skipped = tensors(out / "one" / "step_000001"), tensors(out / "skip" / "step_000004")
    assert once.keys() == skipped.keys() and len(once) > 20
    for name, value in once.items():
        assert torch.equal(value, skipped[name]), name
    # resumed where the other run has stopped
    went_on = [json.loads(line) for line in (out / "stop.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in went_on] == [(1, 0), (2, 1), (3, 2)]


# ---- files that cannot be written

# (event that Python reports to audit hooks, part of the path, error, rank)
FAULTS = [
    ("os.mkdir", ".incomplete", errno.EROFS, 0),
    ("open", "state.json", errno.ENOSPC, 0),
    ("open", ".distcp", errno.EIO, 1),
    ("open", ".metadata", errno.ENOSPC, 0),  # megatron-core's rank 0 alone, the other waits for it
    ("open", "manifest.json", errno.ENOSPC, 0),
    ("os.rename", ".incomplete", errno.EROFS, 0),
]


def with_faults(rank: int, world_size: int, invocations: list[tuple[list[str], int]]) -> list[Run]:
    """The invocations, each after the first with one of `FAULTS` (a disk that fills up while a run goes on)."""
    armed: list[tuple[str, str, int, int]] = []

    def fail(event: str, details: tuple[Any, ...]) -> None:
        for name, part, number, where in armed:
            if (name, where) == (event, rank) and part in str(details[0]) and ".incomplete" in str(details[0]):
                raise OSError(number, f"{errno.errorcode[number]} by a test")

    sys.addaudithook(fail)
    main.PATIENCE_S = 0.0
    runs = invoke_all(rank, world_size, invocations[:1])
    for fault, invocation in zip(FAULTS, invocations[1:-1], strict=True):
        armed[:] = [fault]
        runs += invoke_all(rank, world_size, [invocation])
    armed.clear()
    return runs + invoke_all(rank, world_size, invocations[-1:])


def test_a_failed_save_ends_all_ranks_and_leaves_the_last_good_checkpoint(files: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    words = train(files, "--save", save, "--save-every", "1", "--resume", "--dp", "2", "--steps")
    words_each = [(*words, "2"), *[(*words, "3", *(("--async-save",) if i % 2 else ())) for i in range(len(FAULTS))]]
    stores, invocations = with_stores(*words_each, (*words, "3"))
    by_rank = run_distributed(with_faults, 2, invocations, timeout_s=300)
    del stores
    (first, *failed, last), (_, *others, _) = by_rank
    assert first.exit_code == last.exit_code == 0, first.stderr + last.stderr + last.crash
    for fault, run, other in zip(FAULTS, failed, others, strict=True):
        assert not run.crash and not other.crash, (fault, run.crash, other.crash)
        assert run.exit_code == other.exit_code == 2, fault
        message = one_line(run.stderr).replace(" ", "")
        assert "step_000003couldnotbewritten:" in message, (fault, run.stderr)
        # 0.19's writer names the kind of a shard's error only.
        told = (f"{errno.errorcode[fault[2]]}byatest", *(("OSError",) if fault[1] == ".distcp" else ()))
        assert any(each in message for each in told), (fault, run.stderr)
        assert "Thecheckpointsbeforeitareastheywere" in message
    assert names(save) == ["step_000002", "step_000003"], "the last run went on from the last good one"


def with_small_files(rank: int, world_size: int, invocations: list[tuple[list[str], int]]) -> list[Run]:
    """The last invocation may write files of at most 64 KiB: what a full disk does, without being root."""
    runs = invoke_all(rank, world_size, invocations[:1])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    return runs + invoke_all(rank, world_size, invocations[1:])


def test_a_full_disk(files: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    words = train(files, "--save", save, "--resume", "--steps")
    stores, invocations = with_stores((*words, "1"), (*words, "2"))
    ((first, second),) = run_distributed(with_small_files, 1, invocations)
    del stores
    assert first.exit_code == 0 and second.exit_code == 2 and not second.crash
    message = one_line(second.stderr)
    assert "step_000002 could not be written: " in message and "MiB are free there" in message
    assert names(save) == ["step_000001"]


# ---- checkpoints: damaged, kept, in the background


def test_the_newest_good_checkpoint_is_gone_on_from(files: Path, tmp_path: Path) -> None:
    save, whole = tmp_path / "save", tmp_path / "whole"
    words = train(files, "--save", save, "--resume", "--json", "--steps")
    unbroken = train(files, "--save", whole, "--save-every", "1", "--keep", "1", "--steps", "3")
    succeed(run_cli((*words, "2", "--save-every", "1", "--keep", "0"), unbroken))
    assert names(save) == ["step_000001", "step_000002"] and names(whole) == ["step_000003"]
    shard = next((save / "step_000002" / "weights").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-7])
    (save / "step_000009.0123abcd.incomplete").mkdir()
    (run,) = succeed(run_cli((*words, "1")))
    text = one_line(run.stderr)
    assert "warning: checkpoint" in text and f"step_000002 is damaged: weights/{shard.name} has" in text
    first, aside = names(save)
    assert run.json["resumed_from"] == 1 and first == "step_000001"
    assert re.fullmatch(r"step_000002\.[0-9a-f]{8}\.damaged", aside) and aside in text
    succeed(run_cli((*words, "3", "--save-every", "1")))
    assert names(save) == ["step_000002", aside, "step_000003"]
    expected, found = tensors(whole / "step_000003"), tensors(save / "step_000003")
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for path in checkpoints(save):
        (path / "state.json").write_text("{}")
    ((run,),) = run_cli((*words, "4"))
    assert run.exit_code == 2 and f"all 2 checkpoints in {save} are damaged" in one_line(run.stderr)


def test_saved_in_the_background_is_the_same(files: Path) -> None:
    out = files / "background"
    runs = in_two_parts(files, out, "b", "--async-save", "--save-every", "1", "--keep", "3")
    succeed(run_cli(*runs, train(files, "--steps", "4", "--save", out / "foreground")))
    expected = tensors(out / "foreground" / "step_000004")
    for name in ("b-whole", "b-halves"):
        assert names(out / name) == ["step_000002", "step_000003", "step_000004"]
        found = tensors(out / name / "step_000004")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)
