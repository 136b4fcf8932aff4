"""The loop of a training run: steps from a `StepSource`, their metrics, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.mcore.checkpoint import save_checkpoint, step_folder
from megatron_prefix.mcore.step_source import StepBatch, StepSource
from megatron_prefix.mcore.training import PolicyTrainer
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_tree import RolloutTree


@dataclass(frozen=True)
class Checkpoints:
    """Where and when a run saves itself.

    Attributes:
        folder: of the checkpoints.
        config: of the model.
        state: JSON values of the run that do not change.
        every: steps between checkpoints; None saves at the end only.
        tokenizer_from: see `save_checkpoint`.
    """

    folder: Path
    config: ModelConfig
    state: Mapping[str, Any]
    every: int | None = None
    tokenizer_from: Path | None = None


class TrainingLoop:
    """Takes the steps of a run.

    Args:
        trainer: of the policy.
        source: of the groups of each step.
        on_step: called after every step with its number, from 1, and its metrics.
        checkpoints: where to save; None saves nothing.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        source: StepSource,
        on_step: Callable[[int, dict[str, float]], None],
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.trainer, self.source, self.on_step, self.checkpoints = trainer, source, on_step, checkpoints
        self.step = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that ``state``, of a checkpoint, was saved at."""
        self.step = state["step"]
        self.source.load_state_dict(state["source"])

    def run(self, steps: int) -> dict[str, float]:
        """Take steps up to number ``steps``; the metrics of the last one, empty where there was none to take."""
        metrics: dict[str, float] = {}
        while self.step < steps:
            batch = self.source.next_step()
            metrics = self.trainer.step(batch.inputs) | batch_metrics(batch)
            self.step += 1
            self.on_step(self.step, metrics)
            where = self.checkpoints
            if where and (self.step == steps or (where.every and self.step % where.every == 0)):
                self.save(where)
        return metrics

    def save(self, where: Checkpoints) -> None:
        """Save the run as it is after `step`."""
        save_checkpoint(
            step_folder(where.folder, self.step),
            self.trainer.model,
            where.config,
            optimizer=self.trainer.optimizer,
            state={**where.state, "step": self.step, "source": self.source.state_dict()},
            tokenizer_from=where.tokenizer_from,
        )


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """What is known of a global batch without the policy."""
    rewards = [reward for group in batch.groups for reward in group.rewards]
    layouts = [RolloutTree.from_group(group).layout for group in batch.groups]
    return dict(batch.metrics) | {
        "reward": sum(rewards) / len(rewards),
        "tokens": sum(layout.num_rows for layout in layouts),
        "tokens_repeated": sum(layout.repeated().num_rows for layout in layouts),
    }
