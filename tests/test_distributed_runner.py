"""The multi-process runner itself: results, failures, limits, and that no process is left behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests import distributed
from tests.distributed import MEETINGS, DidNotMeetError, run_distributed

pytestmark = pytest.mark.ci_oldest


def _sum_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor, int]:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return rank, value, os.getpid()


def _environment(rank: int, world_size: int) -> tuple[str, int, bool, str]:
    return (
        os.environ["GLOO_SOCKET_IFNAME"],
        torch.get_num_threads(),
        bool(torch.empty(4).isnan().all()),
        dist.get_backend(),
    )


def _rank_1_raises(rank: int, world_size: int, pids: str) -> None:
    _leave_pid(pids)
    if rank == 1:
        raise ArithmeticError("this rank has had enough")
    dist.barrier()


def _rank_1_hangs(rank: int, world_size: int, pids: str) -> None:
    _leave_pid(pids)
    if rank == 1:
        _sleep_here_for_ever()


def _sleep_here_for_ever() -> None:
    while True:
        time.sleep(1)


def _rank_1_exits(rank: int, world_size: int, pids: str) -> None:
    _leave_pid(pids)
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _rank_0_calls_sys_exit(rank: int, world_size: int, pids: str) -> None:
    _leave_pid(pids)
    if rank == 0:
        sys.exit(0)


def _leaves_a_child(rank: int, world_size: int) -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def _all_hang(rank: int, world_size: int, pids: str) -> None:
    _leaves_a_child(rank, world_size)
    _leave_pid(pids)
    dist.barrier()
    _sleep_here_for_ever()


def _leave_pid(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()


def _gone(pids: list[int], seconds: float = 0.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _pids(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def test_results_come_back_by_rank_and_processes_end() -> None:
    results = run_distributed(_sum_over_ranks, 3, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    assert all(total.item() == 33 for _, total, _ in results)
    pids = [pid for _, _, pid in results]
    assert len({*pids, os.getpid()}) == 4, "every rank is a process of its own"
    assert _gone(pids)


def test_a_rank_has_one_thread_loopback_gloo_and_nan_in_fresh_memory() -> None:
    assert run_distributed(_environment, 2) == [("lo", 1, True, "gloo")] * 2


def test_the_first_rank_that_raises_is_named_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_distributed(_rank_1_raises, 3, str(tmp_path))
    text = str(failure.value)
    assert text.startswith("rank 1 of 3 failed:")
    assert "in _rank_1_raises" in text and "ArithmeticError: this rank has had enough" in text
    assert text.count("Traceback (most recent call last)") == 1, "only the first failure is shown in full"
    assert len(_pids(tmp_path)) == 3 and _gone(_pids(tmp_path))


def test_a_hanging_rank_is_named_with_its_stack_and_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_distributed(_rank_1_hangs, 2, str(tmp_path), timeout_s=2)
    text = str(failure.value)
    assert "ranks [1] of 2 still running after 2 s" in text
    assert "_sleep_here_for_ever" in text
    assert time.monotonic() - start < 60
    assert len(_pids(tmp_path)) == 2 and _gone(_pids(tmp_path))


def test_a_rank_that_dies_without_a_word_is_the_first_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 3 failed:\nended without a report, exit code 7"):
        run_distributed(_rank_1_exits, 3, str(tmp_path))
    assert len(_pids(tmp_path)) == 3 and _gone(_pids(tmp_path))


def test_sys_exit_is_a_failure_whatever_its_code(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 0 of 2 failed:.*SystemExit: 0"):
        run_distributed(_rank_0_calls_sys_exit, 2, str(tmp_path))
    assert _gone(_pids(tmp_path))


class _NotLoadable:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("not a number",)


def test_an_argument_that_does_not_load_is_a_failure_not_a_time_limit() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank \d of 3 failed:.*in _call.*ValueError: invalid literal"):
        run_distributed(_sum_over_ranks, 3, _NotLoadable())


def test_what_a_rank_started_ends_with_it() -> None:
    assert _gone(run_distributed(_leaves_a_child, 2), seconds=5)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_pytest_is_stopped(tmp_path: Path, how: signal.Signals) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    test = tmp_path / "test_stopped.py"
    test.write_text(
        "from tests import distributed\n"
        "from tests.test_distributed_runner import _all_hang\n"
        "distributed.PRELOAD = ('torch.distributed',)  # a quick start\n"
        f"def test_hang() -> None:\n    distributed.run_distributed(_all_hang, 2, {str(pids)!r})\n"
    )
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and Python then leaves it so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240  # a machine with many at work
        while len(_pids(pids)) < 2:
            assert run.poll() is None and time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        helpers = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
        assert set(_pids(pids)) <= set(helpers)
        run.send_signal(how)
        run.wait(60)
        assert _gone(helpers, seconds=30), "ranks, their server and the resource tracker must all end"
    finally:
        run.kill()
        run.wait()


def test_ranks_that_cannot_be_joined_are_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network interface that is not there, and on one that comes with the last start."""
    with pytest.warns(UserWarning, match="meeting 2 of 3 failed"), pytest.raises(DidNotMeetError, match="no_such_if0"):
        run_distributed(_environment, 2, interface="no_such_if0")
    once, tries = distributed._run_once, []

    def third_time_lucky(payload: bytes, *rest: Any) -> list[Any]:
        tries.append(payload)
        fn, args, interface = pickle.loads(payload)
        mended = "lo" if len(tries) == MEETINGS else interface
        return once(pickle.dumps((fn, args, mended)), *rest)

    monkeypatch.setattr(distributed, "_run_once", third_time_lucky)
    with pytest.warns(UserWarning, match="meeting 2 of 3 failed"):
        found = run_distributed(_environment, 2, interface="no_such_if0")
    assert len(tries) == MEETINGS and [each[0] for each in found] == ["lo", "lo"]
