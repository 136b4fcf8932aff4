"""Where the metrics of a run go: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import click
import torch
import torch.distributed as dist

from megatron_prefix.balanced_plan import Group
from megatron_prefix.cli.console import finite
from megatron_prefix.cli.cp_options import Command, gather
from megatron_prefix.hardware import find_device
from megatron_prefix.step_metrics import StepMeter


class MetricsWriter(Protocol):
    """Takes the metrics of every step, on rank 0."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of step number ``step``."""

    def close(self) -> None:
        """No more will come."""


class JsonLines:
    """One JSON object per step, appended to a file; numbers that are not finite are null.

    Args:
        path: of the file.
        after: number of the step that a resumed run goes on from: what the file has of later ones is removed, and a
            last line that was not written to its end. None only appends.
    """

    def __init__(self, path: Path, after: int | None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if after is not None and path.exists():
            _cut(path, after)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        line = json.dumps(finite({"step": step, **metrics}), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Nothing is open."""


def _cut(path: Path, after: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    while lines and (not lines[-1].endswith("\n") or json.loads(lines[-1])["step"] > after):
        lines.pop()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(path)


class TensorBoard:
    """Scalars in a TensorBoard folder. ``after`` as for `JsonLines`: TensorBoard then hides what came later."""

    def __init__(self, folder: Path, after: int | None) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a W&B project; W&B's own WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str) -> None:
        self._run = importlib.import_module("wandb").init(project=project)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class MetricsFlags:
    """--metrics, --tensorboard, --wandb and --peak-tflops.

    Raises:
        ValueError: a package that is asked for is not installed.
    """

    metrics: Path | None = None
    tensorboard: Path | None = None
    wandb: str | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        for option, given, package in (
            ("--tensorboard", self.tensorboard, "tensorboard"),
            ("--wandb", self.wandb, "wandb"),
        ):
            if given is not None and importlib.util.find_spec(package) is None:
                raise ValueError(f"{option} needs the package {package}: pip install {package}, or leave it out")

    def folders(self) -> list[tuple[str, Path]]:
        """(option, folder) that files will be written to."""
        found = [("--metrics", self.metrics.parent)] if self.metrics else []
        return found + ([("--tensorboard", self.tensorboard)] if self.tensorboard else [])

    def beside(self, name: str) -> Path | None:
        """A folder beside the file of --metrics; None without one."""
        return self.metrics.parent / name if self.metrics else None

    def open(self, after: int | None) -> list[MetricsWriter]:
        """The writers; rank 0 calls it. ``after`` is the step that a resumed run goes on from."""
        writers: list[MetricsWriter] = []
        if self.metrics:
            writers.append(JsonLines(self.metrics, after))
        if self.tensorboard:
            writers.append(TensorBoard(self.tensorboard, after))
        if self.wandb:
            writers.append(WeightsAndBiases(self.wandb))
        return writers

    def peak_flops(self) -> float | None:
        """Of a device: as given, or from its data sheet; None where neither is known."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        if not torch.cuda.is_available():
            return None
        try:
            return find_device(torch.cuda.get_device_name()).flops
        except ValueError:
            return None


class MetricsLog:
    """A context in which every step's metrics are measured and, on rank 0, given to all writers.

    Args:
        flags: which writers.
        meter: of the steps.
        after: number of the step that a resumed run goes on from, else None.
    """

    def __init__(self, flags: MetricsFlags, meter: StepMeter, after: int | None) -> None:
        self.meter = meter
        self.writers = flags.open(after) if dist.get_rank() == 0 else []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *raised: object) -> None:
        for writer in self.writers:
            writer.close()

    def write(self, step: int, groups: Sequence[Group], measured: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a step, with those that were ``measured`` already; returns them all."""
        line = {**measured, **self.meter.measure(groups, measured["step_seconds"])}
        for writer in self.writers:
            writer.write(step, line)
        return line


def metrics_options(command: Command) -> Command:
    """Add where metrics go; the command gets it as ``writers: MetricsFlags``."""
    return gather(
        command,
        "writers",
        MetricsFlags,
        click.option("--metrics", type=click.Path(dir_okay=False, path_type=Path), help="Append a JSON line per step."),
        click.option("--tensorboard", type=click.Path(file_okay=False, path_type=Path), help="TensorBoard's folder."),
        click.option("--wandb", metavar="PROJECT", help="Weights & Biases project (package wandb)."),
        click.option(
            "--peak-tflops",
            type=click.FloatRange(0, min_open=True),
            help="Of one device, for the MFU; default: its data sheet's, where it is known.",
        ),
    )
