"""Runs that are killed, again and again: each goes on from a good checkpoint, and the end is that of an unbroken run.

A rank is killed by SIGKILL at a seeded moment: when it (or its checkpoint writer) opens its n-th file of a checkpoint
that is being written, when it renames one, or some milliseconds after a step. The others are killed with it, or left to
find out by themselves.
"""

import os
import pickle
import random
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix import RolloutGroup
from megatron_prefix.checkpoint_folder import checkpoints, find_damage, latest_checkpoint
from megatron_prefix.cli import main
from megatron_prefix.mcore.checkpoint import load_state
from megatron_prefix.rollouts import write_rollouts
from tests.cli_runs import Arguments, Run, invoke_all, run_cli, write_model
from tests.distributed import kill, running, wait_until_ended
from tests.test_cli_train import tensors

KILLS, CI_KILLS = 25, 10
TINY: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2,
                        "num_query_groups": 2, "vocab_size": 32}  # fmt: skip
PATIENCE_S = 120.0  # how long a rank may take to find out that another is gone, on a busy machine


@dataclass(frozen=True)
class Doom:
    """When to kill.

    Attributes:
        rank: which rank's doings count.
        event: "write" counts files opened in the folder of a checkpoint that is being written, "rename" folders
            renamed, "step" lines of metrics.
        count: at the how-manieth.
        delay_s: so much later.
        alone: whether the others are left to themselves.
    """

    rank: int
    event: str
    count: int
    delay_s: float
    alone: bool


def draw_dooms(seed: int, kills: int) -> list[Doom]:
    """Half of them during writes, half between; every fifth rank dies alone."""
    draw = random.Random(seed)
    dooms = []
    for i in range(kills):
        alone = i % 5 == 4
        if i % 2:
            dooms.append(Doom(0, "step", draw.randint(1, 5), draw.uniform(0, 0.01), alone))
        else:
            rank = draw.randrange(2)
            files = draw.randint(1, 40 if rank == 0 else 3)  # of up to two checkpoints
            dooms.append(Doom(rank, "write", files, draw.choice((0.0, draw.uniform(0, 0.03))), alone))
    # Each of the two renames that make a checkpoint and take an old one away.
    for i, count in ((0, 1), (kills * 2 // 5, 2), (kills * 4 // 5, 4)):
        dooms[i] = replace(dooms[i], rank=0, event="rename", count=count, delay_s=0.0)
    return dooms


def doomed(rank: int, world_size: int, invocation: tuple[list[str], int], doom: Doom) -> list[Run]:
    """A run of the command line in which one rank is killed."""
    main.PATIENCE_S = 0.0
    if rank == doom.rank:
        _kill_at(doom)
    return invoke_all(rank, world_size, [invocation])


def _kill_at(doom: Doom) -> None:
    pid, seen = os.getpid(), 0

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename"):
            return
        path, mode = str(details[0]), str(details[1])
        happens = {
            "write": event == "open" and ".incomplete" in path,
            "rename": event == "os.rename" and "step_" in Path(path).name,
            "step": event == "open" and path.endswith("metrics.jsonl") and mode.startswith("a"),
        }[doom.event]
        seen += happens
        if happens and seen == doom.count:
            threading.Timer(doom.delay_s, kill).start() if doom.delay_s else kill()

    sys.addaudithook(watch)  # processes that this one forks have it too, and kill this one


def run_and_kill(words: Arguments, doom: Doom) -> bool:
    """Whether the run was killed: with other groups starting beside them, ranks cannot always be joined."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with running(doomed, 2, ([str(word) for word in words], store.port), doom) as ranks:
        assert wait_until_ended(ranks, PATIENCE_S, any_of_them=True), "nothing was killed"
        if ranks[doom.rank].process.exitcode != -signal.SIGKILL:
            return False
        # With what it has started: its orphaned writers would keep its connections open (0.16's may wait for ever).
        for each in [ranks[doom.rank]] if doom.alone else ranks:
            kill(each.process)
        assert wait_until_ended(ranks, PATIENCE_S), "the other rank goes on, or waits, without the one that was killed"
        if doom.alone and (result := ranks[1 - doom.rank].result):
            (run,) = pickle.loads(result)
            assert run.exit_code != 0
        return True


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    write_model(folder, **TINY)
    draw = random.Random(0)
    groups = [RolloutGroup([1, 2, 3], [[4, 5], [6, 7, 8]], [draw.random(), draw.random()], f"{i}") for i in range(6)]
    write_rollouts(folder / "rollouts.jsonl", groups)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kills", "sizes"),
    [
        pytest.param("dp", CI_KILLS, ("--dp", "2", "--distributed-optimizer"), marks=pytest.mark.ci_oldest),
        pytest.param("tp", CI_KILLS, ("--tp", "2"), marks=pytest.mark.ci_newest),
        pytest.param("dp-long", KILLS, ("--dp", "2", "--distributed-optimizer"), marks=pytest.mark.not_in_ci),
        pytest.param("tp-long", KILLS, ("--tp", "2"), marks=pytest.mark.not_in_ci),
    ],
)
def test_killed_runs_end_as_an_unbroken_one(files: Path, name: str, kills: int, sizes: tuple[str, ...]) -> None:
    common = ("train", "--model", files / "model.json", "--rollouts", files / "rollouts.jsonl", "--lr", "1e-2", *sizes)
    save, metrics = files / name, files / name / "metrics.jsonl"
    halves = (*common, "--save", save, "--save-every", "2", "--resume", "--metrics", metrics)
    in_writes, reached = 0, 0
    for number, doom in enumerate(draw_dooms(len(sizes), kills)):
        # Some write in the background.
        words = (*halves, "--steps", "1000", *(("--async-save",) if number % 4 == 3 else ()))
        assert any(run_and_kill(words, doom) for _ in range(5)), "five runs ended before they were killed"
        left = [path.name for path in save.iterdir() if path.suffix in (".incomplete", ".removed")]
        in_writes += bool(left)
        good = checkpoints(save)
        assert all(find_damage(path) is None for path in good), "a checkpoint under its name is whole"
        newest = load_state(good[-1])["step"] if good else 0
        assert newest >= reached
        reached = newest
    assert kills // 3 <= in_writes <= kills - kills // 3, f"{in_writes} of {kills} were killed while they wrote"
    assert reached >= kills * 2 // 5, "they got on"
    steps = ("--steps", f"{reached + 3}")
    ((end, _), (unbroken, _)) = run_cli(
        (*halves, *steps), (*common, "--save", files / f"{name}-unbroken", *steps), world_size=2
    )
    assert end.exit_code == unbroken.exit_code == 0, end.stderr + end.crash + unbroken.stderr
    assert not [path for path in save.iterdir() if path.suffix in (".incomplete", ".removed")]
    found, expected = (latest_checkpoint(folder) for folder in (save, files / f"{name}-unbroken"))
    assert found and expected and found.name == expected.name == f"step_{reached + 3:06d}"
    before, after = tensors(expected), tensors(found)
    assert before.keys() == after.keys() and len(before) > 20
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    numbers = [line.partition(",")[0] for line in metrics.read_text().splitlines()]
    assert numbers == [f'{{"step": {step}' for step in range(1, reached + 4)]
