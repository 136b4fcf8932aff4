"""The loop of a training run: steps from a `StepSource`, checkpoints, an end when it is asked for or must be."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prefix.collectives import all_gather_object, any_rank, on_all_ranks
from megatron_prefix.mcore.nonfinite import NonFiniteError, save_offending
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.run_checkpoints import RunCheckpoints
from megatron_prefix.mcore.step_source import StepBatch, StepSource
from megatron_prefix.stop_signals import StopSignals

OnStep = Callable[[int, StepBatch, dict[str, float]], None]


class TrainingLoop:
    """Takes the steps of a run. Every rank has one.

    Args:
        trainer: of the policy.
        source: of the groups of each step.
        on_step: called after every step with its number, from 1, its batch and its metrics: those of
            `PackTrainer.step` and of the batch, the seconds that the step took (``step_seconds``) and the steps of
            this run so far that updated nothing (``skipped``).
        checkpoints: saves the run when it is due, at the end, and before it stops; None saves nothing.
        stop: asks to stop after the step that runs.
        nonfinite_folder: where the groups of a step are kept whose loss or gradient was not finite; None keeps none.
        skip_nonfinite: go on after such a step; else the run stops.

    Attributes:
        step: steps taken, with those of the runs that this one goes on with.
        skipped: how many of them updated nothing, because their loss or gradient was not finite.
        stopped_by: name of the signal that ended `run` early; None also where the source ended before.
    """

    def __init__(
        self,
        trainer: PackTrainer,
        source: StepSource,
        on_step: OnStep,
        *,
        checkpoints: RunCheckpoints | None = None,
        stop: StopSignals | None = None,
        nonfinite_folder: Path | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        self.trainer, self.source, self.on_step, self.checkpoints = trainer, source, on_step, checkpoints
        self.stop = stop or StopSignals()
        self.nonfinite_folder, self.skip_nonfinite = nonfinite_folder, skip_nonfinite
        self.step = self.skipped = 0
        self.stopped_by: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the run after the steps taken, beside what `RunCheckpoints` saves itself."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "source": self.source.state_dict(),
            "trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that ``state`` was saved at."""
        self.step, self.skipped = state["step"], state["skipped"]
        self.source.load_state_dict(state["source"])
        self.trainer.load_state_dict(state["trainer"])

    def run(self, steps: int) -> dict[str, float]:
        """Take steps up to number ``steps``; the metrics of the last one, empty where there was none to take.

        Raises:
            NonFiniteError: a step's loss or gradient is not finite, and such steps are not skipped.
            ValueError: a checkpoint or the groups of such a step cannot be written.
        """
        metrics: dict[str, float] = {}
        saved = self.step
        while self.step < steps and self.stopped_by is None:
            before = self.state_dict()
            started = time.perf_counter()
            batch = self.source.next_step()
            if batch is None:
                self.stopped_by = self._signal()
                break
            metrics = self.trainer.step(batch.inputs) | dict(batch.metrics)
            finite = metrics["updated"] > 0
            self.step += 1
            self.skipped += not finite
            metrics |= {"skipped": self.skipped, "step_seconds": time.perf_counter() - started}
            self.on_step(self.step, batch, metrics)
            if not finite:
                kept = self._keep_offending(batch, metrics)
                if not self.skip_nonfinite:
                    if self.checkpoints and saved != before["step"]:
                        self.checkpoints.save(before["step"], before)
                        self.checkpoints.wait()
                    raise NonFiniteError(self._why_stopped(metrics, kept))
            self.stopped_by = self._signal()
            if self.checkpoints:
                self.checkpoints.poll()
                if self.checkpoints.due(self.step):
                    self.checkpoints.save(self.step, self.state_dict())
                    saved = self.step
        if self.checkpoints:
            if saved != self.step:
                self.checkpoints.save(self.step, self.state_dict())
            self.checkpoints.wait()
        return metrics

    def _signal(self) -> str | None:
        """Name of the signal that a rank got, None where none did."""
        if not any_rank(self.stop.received is not None, dist.group.WORLD):
            return None
        return next(filter(None, all_gather_object(self.stop.received, dist.group.WORLD)))

    def _keep_offending(self, batch: StepBatch, metrics: Mapping[str, float]) -> list[Path]:
        """Files with the groups of the step just made, of all ranks."""
        folder = self.nonfinite_folder
        if folder is None:
            return []
        try:
            paths = on_all_ranks(lambda: save_offending(folder, self.step, batch, metrics), dist.group.WORLD)
        except OSError as error:
            raise ValueError(f"step {self.step} was not finite, and its groups could not be kept: {error}") from error
        return [path for path in paths if path is not None]

    def _why_stopped(self, metrics: Mapping[str, float], kept: Sequence[Path]) -> str:
        found = f"step {self.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; nothing was updated"
        where = f"; its groups are in {', '.join(map(str, kept))}" if kept else ""
        return f"{found}{where}. --on-nonfinite skip goes on without it"
