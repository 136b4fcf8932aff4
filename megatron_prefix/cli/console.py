"""What the commands share: output, and the start of torch.distributed from torchrun's environment.

Progress and tables go to stderr, so that stdout can be read by a machine: its last line is the JSON object. Both come
from rank 0 only.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """This process in the job. device: "cpu" or "cuda:<local rank>"."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def torchrun_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) without torchrun.

    Raises ValueError when only some of the variables are set, or one is not a whole number in range.
    """
    given = {name: os.environ[name] for name in _TORCHRUN if name in os.environ}
    if not given:
        return 0, 1, 0
    missing = [name for name in _TORCHRUN if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} set without {', '.join(missing)}: start with torchrun, or unset them")
    for name, value in given.items():
        if not value.isdecimal():
            raise ValueError(
                f"{name} must be a whole number of 0 or more, got {value!r}: start with torchrun, or unset it"
            )
    rank, size, local_rank = (int(given[name]) for name in _TORCHRUN)
    if rank >= size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={size}: start with torchrun, or unset them")
    return rank, size, local_rank


def start_distributed(*, timeout_s: float = 600) -> World:
    """Start the process group (nccl where there is a GPU, else gloo) as torchrun says; of one process without torchrun.

    timeout_s: seconds after which a collective that hangs fails. Raises ValueError as `torchrun_ranks` does, or when
    this machine has fewer GPUs than processes.
    """
    rank, size, local_rank = torchrun_ranks()
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank} needs {local_rank + 1} GPUs, this machine has {torch.cuda.device_count()}: "
            "start at most one process per GPU"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # One process needs neither a port nor MASTER_ADDR.
    where: dict[str, Any] = {"store": dist.HashStore()} if size == 1 else {"init_method": "env://"}
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s), **where
    )
    return World(rank, size, local_rank, device)


def stderr_console() -> Console:
    """The rich console on stderr; silent on every rank but 0."""
    return Console(stderr=True, quiet=torchrun_ranks()[0] != 0, highlight=False)


@contextmanager
def progress_bar(description: str, total: int, *, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr of rank 0, also readable in a log file (one line at the end when it is not a terminal).

    Yields advance(steps=1, *, units=0, note=""): `units` (tokens, ...) done in these steps feed the rate shown in
    `unit`/s; `note` replaces the text at the end of the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr_console()) as progress:
        task = progress.add_task(description, total=total, rate="", note="")
        done = 0

        def advance(steps: int = 1, *, units: int = 0, note: str = "") -> None:
            nonlocal done
            done += units
            elapsed = progress.tasks[task].elapsed or 0.0
            rate = f"{done / elapsed:,.0f} {unit}/s" if done and elapsed > 0 else ""
            progress.update(task, advance=steps, rate=rate, note=note)

        yield advance


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stderr of rank 0; every column but the first is right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    stderr_console().print(table)


def print_json(result: dict[str, Any]) -> None:
    """`result` as one line of JSON on stdout of rank 0. NaN and infinities, which JSON lacks, become null."""
    if torchrun_ranks()[0] == 0:
        sys.stdout.write(json.dumps(finite(result), allow_nan=False) + "\n")
        sys.stdout.flush()


def finite(value: Any) -> Any:
    """``value`` with None for every float that is not finite, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
