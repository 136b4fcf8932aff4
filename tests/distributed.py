"""Run a function on several real processes joined by gloo: `run_distributed(fn, world_size, *args)`.

Every call gets fresh processes, so nothing (process groups, megatron's parallel_state, patches, seeds) is left over
from the test before. They are forked from a server process that has imported torch and megatron-core once and has
never run anything, which makes a start cost some hundredths of a second instead of several seconds.
"""

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What test modules import; whatever is not installed is skipped.
PRELOAD = (
    "torch.distributed",
    "pytest",
    "hypothesis",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron_prefix.cli.train",
)
START_LIMIT_S = 180.0  # imports, and the first start of the server, on a busy machine
LAST_WORDS_S = 0.3  # how long the other ranks may still report after a failure or a request for a stack dump
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
MEETINGS = 3  # gloo's connections among new processes are refused at times, where other groups start beside them


class DidNotMeetError(AssertionError):
    """The ranks could not be joined in a group: nothing of the function has run."""


def fill_fresh_memory_with_nan() -> None:
    """Make torch.empty and its kin return NaN (the largest integer for integer types): reading them shows at once."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120, interface: str = "lo"
) -> list[Any]:
    """Call fn(rank, world_size, *args) on `world_size` new processes in one gloo group; return the results by rank.

    fn is a module-level function; args and results are pickled by value. timeout_s counts from the moment all ranks
    have imported fn's module. Raises AssertionError when a rank raises, exits or is killed (the first one with its full
    traceback) and at the time limit (the ranks still running, with their stacks). A rank that ends without a report
    counts as first: errors of the others follow from its closed connections. No process outlives the call. Ranks that
    cannot be joined over the network ``interface`` are started anew, `MEETINGS` times at the most.
    """
    payload = pickle.dumps((fn, args, interface))
    for meeting in range(1, MEETINGS + 1):
        try:
            return _run_once(payload, world_size, timeout_s)
        except DidNotMeetError as error:
            if meeting == MEETINGS:
                raise
            warnings.warn(f"meeting {meeting} of {MEETINGS} failed: {str(error).splitlines()[-1]}", stacklevel=2)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def running(fn: Callable[..., Any], world_size: int, *args: Any) -> Iterator["list[_Rank]"]:
    """Start as `run_distributed` does and hand over the ranks while fn runs; whatever still runs afterwards is killed.

    Nothing is made of how they end: see `wait_until_ended`, and each rank's ``result`` or ``error``.
    """
    payload = pickle.dumps((fn, args, "lo"))
    with (
        tempfile.TemporaryDirectory(prefix="run_distributed_") as folder,
        _started(world_size, payload, folder) as ranks,
    ):
        yield ranks


def wait_until_ended(ranks: "list[_Rank]", seconds: float, *, any_of_them: bool = False) -> bool:
    """Wait until all processes have ended, or the first has; False at the time limit. Reads what they report."""
    deadline = time.monotonic() + seconds
    while True:
        running = [rank for rank in ranks if rank.process.is_alive()]
        if not running or (any_of_them and len(running) < len(ranks)):
            return True
        if (left := deadline - time.monotonic()) <= 0:
            return False
        # What a killed rank has started may keep its reports open.
        connection.wait([rank.process.sentinel for rank in running], timeout=min(left, 0.1))
        _read_waiting(ranks, 0.0)


def _run_once(payload: bytes, world_size: int, timeout_s: float) -> list[Any]:
    with (
        tempfile.TemporaryDirectory(prefix="run_distributed_") as folder,
        _started(world_size, payload, folder) as ranks,
    ):
        _collect(ranks, START_LIMIT_S, "did not start", until=lambda rank: rank.ready or rank.ended, folder=folder)
        _collect(ranks, timeout_s, "still running", until=lambda rank: rank.ended, folder=folder)
        return [pickle.loads(rank.result) for rank in ranks]


@dataclass
class _Rank:
    """One process as its parent sees it."""

    rank: int
    process: ForkServerProcess
    reports: connection.Connection
    ready: bool = False
    ended: bool = False
    result: bytes = b""
    error: str = ""
    met: bool = True
    failed_at: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.error)

    def read(self) -> None:
        """Take in one report, or the end of the process."""
        try:
            kind, at, value = pickle.loads(self.reports.recv_bytes())
        except (EOFError, OSError):
            self.process.join(5)
            self.ended = True
            self.error = f"ended without a report, exit code {self.process.exitcode}"
            return
        if kind == "ready":
            self.ready = True
            return
        self.ended = True
        if kind == "result":
            self.result = value
        else:
            self.error, self.failed_at, self.met = value, at, kind != "unmet"


@contextlib.contextmanager
def _started(world_size: int, payload: bytes, folder: str) -> Iterator[list[_Rank]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOAD if _installed(name)])
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            reports, child_end = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world_size, payload, folder, child_end), name=f"rank {rank}"
            )
            process.start()
            child_end.close()
            ranks.append(_Rank(rank, process, reports))
        yield ranks
        for each in ranks:  # reached without a failure only: let the processes end by themselves
            each.process.join(10)
    finally:
        for each in ranks:
            kill(each.process)
        for each in ranks:
            each.process.join(10)
            each.reports.close()


def kill(process: ForkServerProcess) -> None:
    """Kill a rank, where it still runs, and whatever it has started (megatron-core's checkpoint writers)."""
    assert process.pid is not None
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _collect(ranks: list[_Rank], limit_s: float, what: str, *, until: Callable[[_Rank], bool], folder: str) -> None:
    """Read reports until `until` holds for every rank; AssertionError when one fails, or at the time limit."""
    deadline = time.monotonic() + limit_s
    while not all(until(rank) for rank in ranks) and not any(rank.failed for rank in ranks):
        left = deadline - time.monotonic()
        if left <= 0:
            raise AssertionError(_timeout_text(ranks, f"{what} after {limit_s:g} s", folder))
        _read_waiting(ranks, left)
    if any(rank.failed for rank in ranks):
        _drain(ranks, LAST_WORDS_S)
        raise (AssertionError if all(rank.met for rank in ranks) else DidNotMeetError)(_failure_text(ranks))


def _drain(ranks: list[_Rank], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not all(rank.ended for rank in ranks):
        _read_waiting(ranks, left)


def _read_waiting(ranks: list[_Rank], seconds: float) -> None:
    open_ends = {rank.reports: rank for rank in ranks if not rank.ended}
    for end in connection.wait(list(open_ends), timeout=seconds):
        open_ends[end].read()  # type: ignore[index]


def _failure_text(ranks: list[_Rank]) -> str:
    first, *others = sorted((rank for rank in ranks if rank.failed), key=lambda rank: rank.failed_at)
    lines = [f"rank {first.rank} of {len(ranks)} failed:", first.error.rstrip()]
    lines += [f"rank {rank.rank} then: {rank.error.rstrip().splitlines()[-1]}" for rank in others]
    lines += [f"rank {rank.rank} was still running" for rank in ranks if not rank.ended]
    return "\n".join(lines)


def _timeout_text(ranks: list[_Rank], what: str, folder: str) -> str:
    running = [rank for rank in ranks if not rank.ended]
    for rank in running:
        if rank.process.pid is not None and rank.process.exitcode is None:
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(LAST_WORDS_S)
    lines = [f"ranks {[rank.rank for rank in running]} of {len(ranks)} {what}"]
    for rank in running:
        stack = Path(folder, f"stack_{rank.rank}")
        lines += [f"rank {rank.rank} was here:", stack.read_text() if stack.exists() else "(no stack)"]
    return "\n".join(lines)


def _rank_main(rank: int, world_size: int, payload: bytes, folder: str, reports: connection.Connection) -> None:
    """Runs in the new process."""
    os.setpgid(0, 0)  # so that what this rank starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(Path(folder, f"stack_{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        try:
            _call(rank, world_size, payload, folder, reports)
        except BaseException:  # noqa: BLE001 - whatever ends this rank is reported, and the process ends either way
            # Before anything is closed: what the other ranks then see must come later.
            _report(reports, "error", traceback.format_exc())


def _call(rank: int, world_size: int, payload: bytes, folder: str, reports: connection.Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fill_fresh_memory_with_nan()
    fn, args, interface = pickle.loads(payload)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    _report(reports, "ready", None)
    # gloo's own limit is longer than any test's: the parent decides, and has the stacks.
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1))
    except RuntimeError:
        _report(reports, "unmet", traceback.format_exc())
        return
    result = pickle.dumps(fn(rank, world_size, *args))
    if dist.is_initialized():  # fn may have destroyed it
        dist.destroy_process_group()
    _report(reports, "result", result)


def _report(reports: connection.Connection, kind: str, value: Any) -> None:
    reports.send_bytes(pickle.dumps((kind, time.monotonic(), value)))


def _end_with_parent() -> None:
    """End this process when pytest is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
