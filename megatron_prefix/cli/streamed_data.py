"""What `train --rollouts FILE --follow` trains on: groups that are appended to the file while training runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.balanced_plan import Group
from megatron_prefix.cli.options import check_groups
from megatron_prefix.cli.rollout_input import RolloutInput
from megatron_prefix.cost_model import CostModel
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.parallel import ParallelSizes
from megatron_prefix.mcore.step_plan import step_planner
from megatron_prefix.mcore.step_source import StreamedRollouts
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import has_log_probs
from megatron_prefix.sharing import share_where_it_pays
from megatron_prefix.stop_signals import StopSignals
from megatron_prefix.streaming import RolloutStream, follow_rollouts


@dataclass(frozen=True)
class StreamedData:
    """`StepData` of a file that grows.

    Attributes:
        path: the file; it may not be there yet.
        config: of the model.
        needs_log_probs: whether the loss needs those of the sampler.
        groups_per_step: of the global batch, and what the buffer holds at the most besides.
        max_tokens: most rows of a micro-batch.
        stop: ends the wait for more.

    Raises:
        ValueError: options that do not go with such a file.
    """

    path: Path
    config: ModelConfig
    needs_log_probs: bool
    groups_per_step: int
    max_tokens: int | None
    stop: StopSignals

    @classmethod
    def of(
        cls,
        rollouts: RolloutInput,
        config: ModelConfig,
        loss: LossConfig,
        *,
        groups_per_step: int,
        max_tokens: int | None,
        compare: int,
        stop: StopSignals,
    ) -> StreamedData:
        """As the options say."""
        assert rollouts.path is not None
        if rollouts.format not in ("auto", "native") or rollouts.skip_bad:
            raise ValueError("--follow reads group lines of a JSONL file: leave out --format and --skip-bad")
        if loss.kl_coef:
            raise ValueError(
                f"--kl-coef {loss.kl_coef} with --follow: the policy of the start is not kept to measure the KL to; "
                "leave it out"
            )
        if compare:
            raise ValueError("--compare runs groups of a whole file both ways; leave it out with --follow")
        return cls(rollouts.path, config, loss.importance_cap is not None, groups_per_step, max_tokens, stop)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The file changes all the time."""
        return "followed"

    @property
    def batch_groups(self) -> int:
        return self.groups_per_step

    @property
    def may_split(self) -> bool:
        return self.max_tokens is not None

    def source(
        self, trainer: PackTrainer, cost: CostModel, steps: range, saved: Mapping[str, Any] | None
    ) -> StreamedRollouts:
        """See `StepData`."""
        planner = step_planner(trainer.config, trainer.dp_group.size(), cost, self.max_tokens)

        def open_stream(consumed: int) -> RolloutStream:
            return RolloutStream(
                self._checked(cost),
                planner,
                groups_per_step=self.groups_per_step,
                capacity=self.groups_per_step,
                consumed=consumed,
                stop=self.stop.event,
            )

        return StreamedRollouts(trainer, open_stream, self.stop.event.is_set)

    def describe(self, source: StreamedRollouts, steps: range, sizes: ParallelSizes) -> Iterator[str]:
        """See `StepData`."""
        yield f"groups as they are appended to {self.path}, steps {steps.start} to {steps.stop}"

    def _checked(self, cost: CostModel) -> Iterator[Group]:
        """The groups of the file, which ends only when the run is asked to stop."""
        for number, group in enumerate(follow_rollouts(self.path, stop=self.stop.event)):
            check_groups([group], self.config, self.max_tokens)
            if self.needs_log_probs and not has_log_probs(group):
                raise ValueError(
                    f"--importance-cap needs the sampler's log_probs, group {number} of {self.path} has none"
                )
            (shared,), _ = share_where_it_pays([group], cost)
            yield shared
