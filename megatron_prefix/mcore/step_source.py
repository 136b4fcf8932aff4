"""Where the groups of a step come from: a `StepSource`; rollouts that are there from the start, or that arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_prefix.balanced_plan import Group, PipelineShape
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.collectives import all_gather_ints, all_gather_object, any_rank, on_all_ranks
from megatron_prefix.mcore.pack_trainer import PackTrainer, StepInput
from megatron_prefix.sampler import PrefixGroupSampler
from megatron_prefix.streaming import RolloutStream, StreamedStep


@dataclass(frozen=True)
class StepBatch:
    """The global batch of one optimizer step, as one data-parallel rank sees it.

    Attributes:
        groups: of the global batch, with or without token ids.
        mine: this data-parallel rank's groups.
        inputs: the micro-batches of ``mine``.
        metrics: what the source has to say of the step.
    """

    groups: Sequence[Group]
    mine: Sequence[Group]
    inputs: Sequence[StepInput]
    metrics: Mapping[str, float] = field(default_factory=dict)


class StepSource(Protocol):
    """Gives every rank its part of each step in turn. All ranks call it together."""

    def next_step(self) -> StepBatch | None:
        """The batch of the next step; the policy is as the steps before have left it. None where there is no further
        one, or the run was asked to stop while the source waited for it."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` goes on after the steps given so far; the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the source was whose `state_dict` this is."""

    def close(self) -> None:
        """No further step will be asked for."""


class StoredRollouts:
    """Steps on rollouts that are there from the start, in seeded epochs.

    Args:
        trainer: with the policy that old (and reference) log-probs are those of.
        sampler: of all groups, the same on every rank.
        with_reference: whether the loss has a reference policy, which is the old one.
    """

    def __init__(self, trainer: PackTrainer, sampler: PrefixGroupSampler, *, with_reference: bool) -> None:
        self.trainer, self.sampler, self.with_reference = trainer, sampler, with_reference
        self.dp_group = trainer.dp_group
        self.old: dict[int, Tensor] = {}

    def measure_old_log_probs(self, num_steps: int, advance: Callable[..., None] = lambda **_: None) -> None:
        """Log-probs, under the policy as it is, of the groups of the next steps; known to all ranks afterwards.

        Args:
            num_steps: whose groups are wanted.
            advance: called after each group of this rank, with the rows as ``units``.
        """
        mine = self.groups_to_measure(num_steps)
        at_once = self.trainer.pp_group.size()  # enough to keep all stages busy
        found: dict[int, Tensor] = {}
        # The ranks call the trainer equally often, the last time maybe without a group.
        (most,) = max(all_gather_ints([len(mine)], self.dp_group))
        for first in range(0, most, at_once):
            wanted = {i: self.sampler.groups[i] for i in mine[first : first + at_once]}
            found |= measured_alone(self.trainer, self.sampler.planner, wanted, advance)
        for part in all_gather_object(found, self.dp_group):
            self.old |= part

    def groups_to_measure(self, num_steps: int) -> list[int]:
        """Indices of those groups of the next steps that this data-parallel rank measures."""
        wanted = sorted({i for step in self.sampler.upcoming(num_steps) for i in step})
        return wanted[self.dp_group.rank() :: self.dp_group.size()]

    def next_step(self) -> StepBatch:
        """See `StepSource`."""
        plan, groups, rank = self.sampler.next_step(), self.sampler.groups, self.dp_group.rank()
        inputs = [
            StepInput(pack, old, old if self.with_reference else None)
            for pack, old in zip(plan.packs(groups, rank), plan.by_pack(groups, rank, self.old), strict=True)
        ]
        mine = [groups[i] for i in plan.ranks[rank].groups]
        return StepBatch([groups[i] for i in plan.groups], mine, inputs, plan.metrics())

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Nothing is open."""


class StreamedRollouts:
    """Steps on rollouts that arrive while training runs, in the order of their arrival.

    Old log-probs are those of the policy right before the step. The run ends with the stream: a last step of fewer
    groups is not taken, since ranks may see the end of a growing file at different lines.

    Args:
        trainer: of the policy.
        open_stream: opens the stream behind the groups that earlier runs consumed.
        stopped: whether the run was asked to stop; the stream then ends where it waits.
    """

    def __init__(
        self, trainer: PackTrainer, open_stream: Callable[[int], RolloutStream], stopped: Callable[[], bool]
    ) -> None:
        self.trainer, self.open_stream, self.stopped = trainer, open_stream, stopped
        self.consumed = 0
        self._stream: RolloutStream | None = None

    def next_step(self) -> StepBatch | None:
        """See `StepSource`. Raises what the source of the stream raises, on all ranks."""
        if self._stream is None:
            self._stream = self.open_stream(self.consumed)
        stream = self._stream
        found: list[StreamedStep] = []  # kept here: only errors go to the other ranks

        def take() -> None:
            step = stream.next_step()
            if step is not None and len(step.groups) == stream.groups_per_step:
                found.append(step)

        on_all_ranks(take, dist.group.WORLD, ValueError)
        if any_rank(self.stopped() or not found, dist.group.WORLD):
            return None
        (step,) = found
        groups, plan, rank = step.groups, step.plan, self.trainer.dp_group.rank()
        mine = {i: groups[i] for i in plan.ranks[rank].groups}
        old = measured_alone(self.trainer, stream.planner, mine)
        inputs = [
            StepInput(pack, values)
            for pack, values in zip(plan.packs(mine, rank), plan.by_pack(mine, rank, old), strict=True)
        ]
        self.consumed += len(groups)
        return StepBatch(list(groups.values()), list(mine.values()), inputs, plan.metrics())

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StepSource`; before the first step."""
        self.consumed = state["consumed"]

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.close()


def measured_alone(
    trainer: PackTrainer,
    planner: StepPlanner,
    groups: Mapping[int, Group],
    advance: Callable[..., None] = lambda **_: None,
) -> dict[int, Tensor]:
    """Log-probs of these groups, each [response rows] on the CPU, in the order of `StepPlan.by_pack`.

    Every group is in packs of its own, so that a run that goes on from a checkpoint, with other groups left to measure,
    finds the same to the bit.
    """
    alone = replace(planner, dp_size=1, pipeline=PipelineShape())
    plans = [alone.plan({i: group}) for i, group in groups.items()]
    packs = [plan.packs(groups, 0) for plan in plans]
    results = iter(trainer.log_probs_of([pack for each in packs for pack in each]))
    found: dict[int, Tensor] = {}
    for plan, each in zip(plans, packs, strict=True):
        found |= plan.by_group(groups, 0, [next(results) for _ in each])
        advance(units=sum(pack.layout.num_rows for pack in each))
    return found
