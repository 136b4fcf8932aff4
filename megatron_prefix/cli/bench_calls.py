"""What all benchmark commands do before and after they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.attention import check_impl
from megatron_prefix.bench.group import DTYPES
from megatron_prefix.cli.console import print_json, torchrun_ranks


def check_call(
    out: Path | None,
    impl: str,
    dtype: str,
    head_dim: int,
    *,
    processes: int = 1,
    cp_size: int = 1,
    has_parts: bool = False,
) -> torch.device:
    """Where the benchmark runs. Refuses what can be refused before any work.

    Raises:
        ValueError: another number of processes, a file in a folder that does not exist, or an implementation that
            cannot run.
    """
    started = torchrun_ranks()[1]
    if started != processes:
        raise ValueError(
            f"this benchmark runs in {processes} process(es), {started} run; start it with torchrun --nproc-per-node "
            f"{processes}, or without torchrun for 1"
        )
    check_out(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_impl(impl, device, DTYPES[dtype], head_dim, cp_size=cp_size, has_parts=has_parts)
    return device


def check_out(out: Path | None) -> None:
    """Raises ValueError when the folder of ``--out`` does not exist."""
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def write_report(report: dict[str, Any], as_json: bool, out: Path | None) -> None:
    """The report to ``--out`` and, where it is asked for, to stdout."""
    if out is not None and torchrun_ranks()[0] == 0:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(report)
