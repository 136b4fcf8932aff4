"""`examples/launch/torchrun_multinode.sh` as two nodes on one machine: preempted, resumed, and a node that dies."""

import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.checkpoint_folder import checkpoints
from tests.cli_runs import one_line, write_groups, write_model
from tests.launching import MULTINODE, Node, environment, nodes, wait, wait_for

pytestmark = pytest.mark.ci_oldest

STARTS_S, ENDS_S = 120, 60


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its rollouts, and a recipe of two processes."""
    folder = tmp_path_factory.mktemp("two_nodes")
    write_model(folder)
    write_groups(folder)
    (folder / "tiny.args").write_text(
        "# two processes, one on each node\n--tp 2 --groups-per-step 2\n--lr 1e-3 # high\n"
    )
    return folder


def two_nodes(folder: Path, steps: int) -> list[tuple[list[str], dict[str, str]]]:
    """What each node runs; the words are the same on both."""
    words = [
        "bash",
        str(MULTINODE),
        "--model",
        str(folder / "model.json"),
        "--rollouts",
        str(folder / "rollouts.jsonl"),
    ]
    words += ["--save", str(folder / "save"), "--resume", "--metrics", str(folder / "metrics.jsonl"), "--json"]
    common: dict[str, Any] = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC": 1}
    common |= {"RECIPE": folder / "tiny.args", "PYTHON": sys.executable, "START_SECONDS": STARTS_S}
    return [([*words, "--steps", str(steps)], environment(NODE_RANK=rank, **common)) for rank in (0, 1)]


def steps_taken(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rank_0(started: list[Node]) -> dict[str, Any]:
    """The result, which the node prints that the rendezvous took for the first."""
    (line,) = [line for node in started for line in node.text.splitlines() if line.startswith('{"')]
    return json.loads(line)


def test_a_run_over_two_nodes_is_preempted_resumed_and_loses_a_node(folder: Path, tmp_path: Path) -> None:
    """One story, because every start takes seconds: SIGTERM, two more steps, and then a node that is gone."""
    with nodes(two_nodes(folder, 100_000), tmp_path) as started:
        wait_for(lambda: len(steps_taken(folder)) >= 2, started, STARTS_S)
        for node in started:
            node.signal(signal.SIGTERM)
            node.signal(signal.SIGUSR1)  # schedulers send what they like; the save goes on
        assert wait(started, ENDS_S) == [75, 75], started[0].text + started[1].text
        for rank, node in enumerate(started):
            assert f"== node {rank} of 2: stopped by SIG" in node.text and "saved; the same line goes on" in node.text
        assert rank_0(started)["stopped_by"] == "SIGTERM"
    (*_, step) = steps_taken(folder)
    assert [each.name for each in checkpoints(folder / "save")] == [f"step_{step:06d}"]

    with nodes(two_nodes(folder, step + 2), tmp_path) as started:
        assert wait(started, STARTS_S) == [0, 0], started[0].text + started[1].text
        result = rank_0(started)
    assert result["resumed_from"] == step and result["steps"] == step + 2
    assert steps_taken(folder) == [*range(1, step + 3)]  # none twice, none left out

    with nodes(two_nodes(folder, 100_000), tmp_path) as started:
        wait_for(lambda: len(steps_taken(folder)) >= step + 4, started, STARTS_S)
        started[1].kill()
        survivor, _ = wait(started, ENDS_S)
        text = one_line(started[0].text)
        assert survivor == 1, text
        assert "== node 0 of 2: failed, torchrun's exit code 1." in text
        assert "--resume the same line goes on from the last checkpoint" in text
