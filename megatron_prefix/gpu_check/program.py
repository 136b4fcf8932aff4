"""The whole check: its stages in order, the tables that end it, and its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.gpu_check.correctness import (
    check_context_parallel,
    check_correctness,
    check_determinism,
    check_split_groups,
)
from megatron_prefix.gpu_check.environment import check_can_run, describe, environment_lines
from megatron_prefix.gpu_check.report import DeviceLostError, Output, Record, Report, text_table
from megatron_prefix.gpu_check.speed import measure_speed

Stage = Callable[..., None]

STAGES: dict[str, Stage] = {
    "correctness against a dense oracle in fp64, forward and backward": check_correctness,
    "context parallelism, its ranks one after another in this process": check_context_parallel,
    "split groups: the prefix in a cache, responses in parts": check_split_groups,
    "determinism": check_determinism,
    "speed, bf16, forward and backward": measure_speed,
}
DEVICES = ("cuda", "cpu")
DEFAULT_OUT = Path("gpu_check.json")
DEFAULT_SECONDS = 360


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: "cuda" or "cpu"; the CPU only gets quick sizes.
        quick: tiny sizes, in seconds.
        seconds: after which what is left is skipped, in so many words.
        out: the JSON file; the picture stands beside it.
    """

    device: str = "cuda"
    quick: bool = False
    seconds: float = DEFAULT_SECONDS
    out: Path = DEFAULT_OUT


class PlainOutput:
    """Lines and aligned tables on stdout, flushed, so that a run that is killed has shown what it found."""

    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.line(f"{title}\n{text_table(columns, rows)}")

    def progress(self, note: str, steps: int = 0) -> None:
        """Lines are progress enough."""


def run_all(settings: Settings, output: Output) -> Report:
    """Run every stage and write the JSON after each; the picture at the end.

    Raises:
        ValueError: it cannot run here; says what is missing.
    """
    check_can_run(settings.device)
    if settings.out.suffix != ".json":
        raise ValueError(f"--out {settings.out} must end in .json: the picture stands beside it")
    quick = settings.quick or settings.device == "cpu"
    device = torch.device(settings.device)
    report = Report(describe(settings.device, quick=quick), output, settings.out, settings.seconds)
    output.line("== environment\n" + "\n".join(environment_lines(report.head)))
    try:
        report.write()
    except OSError as error:
        raise ValueError(f"--out {settings.out} cannot be written ({error.strerror}); name another file") from error
    precision = torch.get_float32_matmul_precision()
    # Some containers let fp32 products run in TF32, which no fp32 limit would survive.
    torch.set_float32_matmul_precision("highest")
    try:
        for title, stage in STAGES.items():
            output.line(f"== {title}")
            stage(report, device, quick=quick)
            report.write()
            output.progress(title, steps=1)
        report.finished = True
    except DeviceLostError as error:
        output.line(f"STOPPED  {error}")
    finally:
        torch.set_float32_matmul_precision(precision)
        report.write()  # also when the user stops it
    _conclude(report)
    return report


def _conclude(report: Report) -> None:
    output = report.output
    if report.speed.get("rows"):
        output.table(*speed_table(report.speed))
        output.line(_draw_or_say_how(report))
    for (stage, impl), failures in _by_stage(report.failures).items():
        first = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        output.line(f"FAILED   {stage}: {impl} {first.what}: {first.note}{more}")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(report.counts.items()))
    verdict = "all that ran is right" if report.ok else "NOT ALL RIGHT"
    output.line(f"{counts}, {report.as_dict()['seconds']:.0f} s: {verdict}; {report.path}")


def _by_stage(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.stage, record.impl), []).append(record)
    return found


def speed_table(speed: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    columns = ["P, R, G", "impl", "alpha", "repeated ms", "grouped ms", "speed-up", "of alpha", "over the fastest"]
    columns += ["TFLOP/s", "of matmul", "repeated MiB", "grouped MiB"]
    rows = []
    for row in speed["rows"]:
        same = [other for other in speed["rows"] if _size(other) == _size(row)]
        fastest = min(other["seconds"]["repeated"] for other in same)
        rows.append(
            [
                _size(row), row["impl"], f"{row['alpha']:.2f}",
                *(f"{row['seconds'][name] * 1e3:.2f}" for name in ("repeated", "grouped")),
                f"{row['speed_up']:.2f}x", f"{row['over_alpha']:.2f}", f"{fastest / row['seconds']['grouped']:.2f}x",
                f"{row['tflops']['grouped']:.4g}", f"{row['of_peak']['grouped']:.0%}",
                *(f"{row['peak_bytes'][name] / 2**20:,.0f}" for name in ("repeated", "grouped")),
            ]
        )  # fmt: skip
    sizes = speed["sizes"]
    title = (
        f"== {sizes['heads']} heads, {sizes['kv_heads']} of keys, dim {sizes['head_dim']}, bf16, forward + backward; "
        "'over the fastest' is over the fastest repeated of all impls"
    )
    return title, columns, rows


def _size(row: dict[str, Any]) -> str:
    return f"{row['prefix_len']}, {row['response_len']}, {row['group_size']}"


def _draw_or_say_how(report: Report) -> str:
    if find_spec("matplotlib") is None:
        command = f"megatron-prefix gpu-check --draw {report.path}"
        return f"no picture: matplotlib is not installed; on a machine that has it: {command}"
    return f"picture: {draw(report.as_dict(), report.path)}"


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a report beside its JSON file; returns the picture's path.

    Raises:
        ValueError: a report without speeds.
        ImportError: matplotlib is not installed.
    """
    if not result.get("speed", {}).get("rows"):
        raise ValueError(f"{path} has no speeds to draw: its run was stopped before, or every implementation failed")
    from megatron_prefix.gpu_check.picture import draw_speeds

    picture = path.with_suffix(".png")
    draw_speeds(result, picture)
    return picture


def read_report(path: Path) -> dict[str, Any]:
    """A report that a run has written.

    Raises:
        ValueError: no file, or not such a report.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give the JSON that gpu-check wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; give the file that gpu-check wrote") from error
    if not isinstance(result, dict) or result.get("check") != "gpu-check":
        raise ValueError(f"{path} is not a report of gpu-check; give the JSON that it wrote")
    return result
