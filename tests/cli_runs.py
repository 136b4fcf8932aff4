"""Run `megatron-prefix` in tests: in fresh forked processes (quick), or under the real torchrun."""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from click.testing import CliRunner

from megatron_prefix import RolloutGroup
from megatron_prefix.cli.main import main
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollouts import write_rollouts
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300
Arguments = Sequence[str | Path]
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Run:
    """How one invocation ended on one rank. `crash` is the traceback of what was neither success nor bad input."""

    exit_code: int
    stdout: str
    stderr: str
    crash: str = field(default="", repr=False)

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def message(self) -> str:
        """What a refusal says: its last line, without the usage that click shows before it."""
        assert not self.crash, self.crash
        return self.stderr.strip().splitlines()[-1]


def run_cli(*invocations: Arguments, world_size: int = 1) -> list[list[Run]]:
    """Run command lines one after another in new processes, one per rank; results [invocation][rank]."""
    # As torchrun does it: the store is there before the ranks, on a port that it got from the system.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in invocations]
    texts = [([str(word) for word in words], store.port) for words, store in zip(invocations, stores, strict=True)]
    by_rank = run_distributed(invoke_all, world_size, texts, timeout_s=TIMEOUT_S)
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def run_one(*arguments: str | Path, world_size: int = 1) -> Run:
    """One command line that must not crash; rank 0's result."""
    ((run, *others),) = run_cli(arguments, world_size=world_size)
    for each in (run, *others):
        assert not each.crash, each.crash
        assert each.exit_code == run.exit_code
    return run


def invoke_all(rank: int, world_size: int, invocations: list[tuple[list[str], int]]) -> list[Run]:
    destroy()  # run_distributed's group: the command starts its own
    warnings.filterwarnings("ignore", module="megatron")
    # megatron-core's checkpoint writer starts a helper process, which Python refuses to daemonic ranks.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    runs = []
    for words, port in invocations:
        if world_size > 1:
            ranks = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= {name: str(value) for name, value in ranks.items()}
        result = CliRunner().invoke(main, words)
        destroy()  # a refused command leaves its groups to the end of the process
        error = result.exception
        crash = "" if error is None or isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
        runs.append(Run(result.exit_code, result.stdout, result.stderr, crash))
    return runs


def torchrun(world_size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node N -m megatron_prefix ...` as a user types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return subprocess.run(
        [*command, "-m", "megatron_prefix", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


def one_line(text: str) -> str:
    """Text without line breaks and runs of blanks, which depend on the terminal's width."""
    return re.sub(r"\s+", " ", text)


def write_model(folder: Path, **changes: Any) -> Path:
    """A model.json of a few thousand parameters."""
    path = folder / "model.json"
    ModelConfig(**(MODEL | changes)).to_json(path)
    return path


def groups(count: int = 5, *, seed: int = 0, log_probs: bool = False) -> list[RolloutGroup]:
    """Ragged groups of 2 to 4 responses."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(MODEL["vocab_size"]) for _ in range(length)]

    made = []
    for i in range(count):
        responses = [ids(draw.randint(1, 7)) for _ in range(draw.randint(2, 4))]
        sampled = [[-4.0 - 0.1 * (t % 5) for t in tokens] for tokens in responses] if log_probs else None
        rewards = [draw.random() for _ in responses]
        made.append(RolloutGroup(ids(draw.randint(1, 12)), responses, rewards, f"g{i}", sampled))
    return made


def write_groups(folder: Path, count: int = 5, *, name: str = "rollouts.jsonl", **options: Any) -> Path:
    """A rollouts file of `groups`."""
    path = folder / name
    write_rollouts(path, groups(count, **options))
    return path
