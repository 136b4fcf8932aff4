"""Start the launchers of examples/ in tests as nodes do it, and leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MULTINODE = ROOT / "examples" / "launch" / "torchrun_multinode.sh"
SETTINGS = (
    *("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC", "RECIPE", "RUN_ID", "START_SECONDS", "PROGRAM"),
    *("PYTHON", "SLURM_NODEID", "JOB_COMPLETION_INDEX", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR"),
)
# megatron-core keeps the attention of the last model there, DeepSpeed how torch shall look for GPUs.
LEFT = ("NVTE_", "PYTORCH_NVML_BASED_CUDA_CHECK")


def environment(**settings: str | Path | int) -> dict[str, str]:
    """This one's, without settings of the launchers but those given, and without what libraries set on import."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS and not name.startswith(LEFT)}
    mine = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return kept | mine | {name: str(value) for name, value in settings.items()}


def run_script(script: Path, *arguments: str | Path, **settings: str | Path | int) -> subprocess.CompletedProcess[str]:
    """A script to its end, from the root of the checkout."""
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=60
    )  # fmt: skip


@dataclass
class Node:
    """A script that runs, with all that it has started."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """What it and its children have printed."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """To the script alone, as a scheduler does."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a power cut: the script and all below it at once."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        for each in (self.process, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _heed_interrupts() -> None:
    """What a shell starts in its background ignores SIGINT, and so does all below it: these tests, say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def nodes(scripts: list[tuple[list[str], Mapping[str, str]]], folder: Path) -> Iterator[list[Node]]:
    """Commands with their environments, started together; at the end nothing that they have started may run.

    Raises:
        AssertionError: something is still there, which is then killed.
    """
    mark = f"MEGATRON_PREFIX_TEST_{os.getpid()}_{time.monotonic_ns()}"
    started = []
    try:
        for number, (command, variables) in enumerate(scripts):
            log = folder / f"node{number}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, env={**variables, mark: "1"}, stdout=file, stderr=subprocess.STDOUT,
                    preexec_fn=_heed_interrupts,
                )  # fmt: skip
            started.append(Node(process, log))
        yield started
        deadline = time.monotonic() + 5
        while (left := _marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, [each.as_dict(["pid", "cmdline", "status"]) for each in left]
    finally:
        for each in _marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for node in started:
            node.process.wait()


def wait(started: list[Node], seconds: float) -> list[int]:
    """Exit codes of all. Raises AssertionError at the time limit, with what they have printed."""
    deadline = time.monotonic() + seconds
    for node in started:
        try:
            node.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n" + "\n".join(n.text for n in started)) from None
    return [node.process.returncode for node in started]


def wait_for(condition: Callable[[], bool], started: list[Node], seconds: float) -> None:
    """Until ``condition()`` is true. Raises AssertionError when a node ends before, or at the time limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        texts = "\n".join(node.text for node in started)
        assert all(node.process.poll() is None for node in started), f"a node ended:\n{texts}"
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{texts}"
        time.sleep(0.02)


def _marked(mark: str) -> list[psutil.Process]:
    """Processes, of whatever parent, with this variable."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if each.status() != psutil.STATUS_ZOMBIE and mark in each.environ():
                found.append(each)
    return found
