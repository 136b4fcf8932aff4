"""Where the groups of a step come from: a `StepSource`, and the one that has all its rollouts from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from megatron_prefix.balanced_plan import Group, PipelineShape
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.training import PolicyTrainer, StepInput
from megatron_prefix.sampler import PrefixGroupSampler


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

    def next_step(self) -> StepBatch:
        """The batch of the next step; the policy is as the steps before have left it."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` goes on after the steps given so far; the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the source was whose `state_dict` this is."""


class StoredRollouts:
    """Steps on rollouts that are there from the start, in seeded epochs.

    Args:
        trainer: with the policy that old (and reference) log-probs are those of.
        sampler: of all groups, the same on every rank.
        with_reference: whether the loss has a reference policy, which is the old one.
    """

    def __init__(self, trainer: PolicyTrainer, sampler: PrefixGroupSampler, *, with_reference: bool) -> None:
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
        for first in range(0, len(mine), at_once):
            found |= measured_alone(self.trainer, self.sampler, mine[first : first + at_once], advance)
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


def measured_alone(
    trainer: PolicyTrainer, sampler: PrefixGroupSampler, wanted: Sequence[int], advance: Callable[..., None]
) -> dict[int, Tensor]:
    """Log-probs of these groups, each [response rows] on the CPU, in the order of `StepPlan.by_pack`.

    Every group is in packs of its own, so that a run that goes on from a checkpoint, with other groups left to measure,
    finds the same to the bit.
    """
    groups = sampler.groups
    planner = replace(sampler.planner, dp_size=1, pipeline=PipelineShape())
    plans = [planner.plan({i: groups[i]}) for i in wanted]
    packs = [plan.packs(groups, 0) for plan in plans]
    results = iter(trainer.log_probs_of([pack for each in packs for pack in each]))
    found: dict[int, Tensor] = {}
    for plan, each in zip(plans, packs, strict=True):
        found |= plan.by_group(groups, 0, [next(results) for _ in each])
        advance(units=sum(pack.layout.num_rows for pack in each))
    return found
