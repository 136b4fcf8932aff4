"""What a measurement needs: time, memory of tensors, the machine and the commit. Imports torch only, never megatron.

Memory is measured in a run of its own: following every operation on the CPU costs time.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PACKAGES = (
    *("torch", "triton", "megatron-core", "megatron-prefix", "transformer-engine", "transformer-engine-torch"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "apex", "prefix-grouper"),
)
"""Distributions whose versions belong to a measurement."""


@dataclass(frozen=True)
class Times:
    """Wall-clock seconds of the repeats of one run, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """{"median", "min", "all"} in seconds."""
        return {"median": self.median, "min": self.minimum, "all": list(self.seconds)}


class Stopwatch:
    """Seconds of named phases of one run: `lap` ends a phase. Waits for the GPU where ``device`` is one."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.phases: dict[str, float] = {}
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """The time since the last lap (or the start) was spent on ``phase``."""
        now = self._now()
        self.phases[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def interleaved_times(
    runs: Mapping[str, Callable[[], Mapping[str, float]]],
    *,
    repeats: int,
    warmup: int = 1,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Times]]:
    """Time several runs in turn, so that other load on the machine meets all of them alike.

    Args:
        runs: by name; each returns the seconds of its phases (see `Stopwatch`).
        repeats: timed rounds over all runs, at least 1.
        warmup: rounds before, not recorded.
        after_each: called with the name after every run (progress).

    Returns:
        Times by run and phase.

    Raises:
        ValueError: repeats below 1 or warmup below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    taken: dict[str, list[Mapping[str, float]]] = {name: [] for name in runs}
    for round_ in range(warmup + repeats):
        for name, run in runs.items():
            phases = run()
            if round_ >= warmup:
                taken[name].append(phases)
            if after_each is not None:
                after_each(name)
    return {
        name: {phase: Times(tuple(phases[phase] for phases in rounds)) for phase in rounds[0]}
        for name, rounds in taken.items()
    }


def time_median(
    run: Callable[[], object], *, repeats: int = 5, warmup: int = 1, device: torch.device | str = "cpu"
) -> float:
    """Median wall-clock seconds of ``run``. Raises ValueError as `interleaved_times` does."""

    def timed() -> dict[str, float]:
        watch = Stopwatch(device)
        run()
        watch.lap("run")
        return watch.phases

    return interleaved_times({"run": timed}, repeats=repeats, warmup=warmup)["run"]["run"].median


class MemoryTracker:
    """Bytes of the tensor storages allocated since a `track_memory` block began.

    Attributes:
        peak_bytes: the most that was alive at one time inside the block.
        current_bytes: alive now. On the CPU frees are followed after the block too; on CUDA it stays as the block left
            it.
        phase_peaks: the most that was alive at one time in each phase that `lap` ended.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.current_bytes = 0
        self.phase_peaks: dict[str, int] = {}
        self._phase_peak = 0

    def lap(self, phase: str) -> None:
        """What was alive since the last lap (or the start) was so in ``phase``."""
        self.phase_peaks[phase] = self._phase_peak
        self._phase_peak = self.current_bytes

    def _add(self, num_bytes: int) -> None:
        self.current_bytes += num_bytes
        self._phase_peak = max(self._phase_peak, self.current_bytes)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


class _CudaTracker(MemoryTracker):
    """torch's allocator counts, from what was allocated when the block began."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def lap(self, phase: str) -> None:
        self.read()
        super().lap(phase)
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> None:
        torch.cuda.synchronize(self.device)
        self._phase_peak = torch.cuda.max_memory_allocated(self.device) - self.before
        self.peak_bytes = max(self.peak_bytes, self._phase_peak)
        self.current_bytes = torch.cuda.memory_allocated(self.device) - self.before


def track_memory(device: torch.device | str = "cpu") -> AbstractContextManager[MemoryTracker]:
    """Follow tensor memory inside a ``with`` block, backward and recompute included.

    On the CPU every storage that an operation returns counts from its allocation until it is freed, once however many
    views it has; storages made before the block do not count. The result depends on the program only, not on the
    machine or its load. Scratch memory inside one kernel is not seen. On CUDA it is torch's allocator,
    `torch.cuda.max_memory_allocated`, less what was allocated before.
    """
    return _CudaMemory(torch.device(device)) if torch.device(device).type == "cuda" else _CpuMemory()


class _CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> MemoryTracker:
        self.tracker = _CudaTracker(self.device)
        return self.tracker

    def __exit__(self, *_: object) -> None:
        self.tracker.read()


class _CpuMemory:
    """The dispatch mode is separate from what the caller holds, so that the tracker outlives the block."""

    def __init__(self) -> None:
        self.tracker = MemoryTracker()

    def __enter__(self) -> MemoryTracker:
        gc.collect()  # what earlier code left in cycles is not freed, and reused, in the middle of the measurement
        self.mode = _StorageMode(self.tracker)
        self.mode.__enter__()
        return self.tracker

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)


class _StorageMode(TorchDispatchMode):
    """Sees every operation below autograd, in forward, backward and recompute, and the storages that it returns."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self.tracker = tracker
        # By address, which is unique among living storages: an entry goes when its storage does.
        self.alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch.tensor([...]) fills a tensor out of sight and hands it to lift_fresh, whose input is thus new.
        fresh = func is torch.ops.aten.lift_fresh.default
        given = set() if fresh else {storage._cdata for storage in _cpu_storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _cpu_storages(result):
            self._see(storage, given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.alive:
            reference, before = self.alive[address]
            if size != before:  # resized in place
                self.alive[address] = reference, size
                self.tracker._add(size - before)
        elif address not in given:
            self.alive[address] = weakref.ref(storage, partial(self._freed, address)), size
            self.tracker._add(size)

    def _freed(self, address: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        self.tracker._add(-self.alive.pop(address)[1])


def _cpu_storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type == "cpu":
            yield leaf.untyped_storage()


@dataclass
class SavedBytes:
    """Bytes that autograd saved for backward inside a `track_saved_tensors` block, known when the block ends."""

    num_bytes: int = 0


@contextmanager
def track_saved_tensors() -> Iterator[SavedBytes]:
    """Count what autograd saves for backward inside a ``with`` block: every storage once, inputs and outputs included.

    Keeps those storages alive until the block ends, so that none is counted twice under a reused address.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor.detach()  # a saved output handed back as it is would hold its own graph: a cycle

    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        yield saved
    saved.num_bytes = sum(storage.nbytes() for storage in storages.values())


def machine_info() -> dict[str, Any]:
    """The machine and the versions that a measurement was taken with; JSON values.

    Keys: cpu, cores (usable by this process), threads (of torch), ram_bytes, gpus (names), cuda (see `cuda_info`),
    platform, python, versions (of `PACKAGES`, those installed).
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": cuda_info(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
    }


def cuda_info() -> dict[str, Any] | None:
    """The GPUs and what drives them; None where torch sees none. JSON values.

    Keys: runtime (CUDA that torch was built for), driver (None where nvidia-smi does not say), cudnn (as a number, None
    without), devices: name, capability ("9.0") and memory_bytes of each.
    """
    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "runtime": torch.version.cuda,
        "driver": _driver_version(),
        "cudnn": torch.backends.cudnn.version(),
        "devices": [
            {"name": each.name, "capability": f"{each.major}.{each.minor}", "memory_bytes": each.total_memory}
            for each in devices
        ],
    }


def _driver_version() -> str | None:
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def package_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def git_commit(directory: Path | None = None) -> str | None:
    """The commit of the checkout that ``directory`` (default: this package's parent) is the root of, else None.

    Ends with "-dirty" when tracked files differ from it.
    """
    root = (directory or Path(__file__).parents[1]).resolve()
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    # Installed into an environment inside someone else's checkout, that commit says nothing about this code.
    if found is None or Path(found.splitlines()[0]).resolve() != root:
        return None
    commit = found.splitlines()[1]
    return commit + "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: Path, *arguments: str) -> str | None:
    return _output(["git", "-C", str(root), *arguments])


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is not installed, fails or hangs."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def utc_date() -> str:
    """Now, ISO 8601 in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
