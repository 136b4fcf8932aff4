"""Where the groups of a step come from: a `StepSource`, and the one that has all its rollouts from the start."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.training import PolicyTrainer, StepInput
from megatron_prefix.packing import Pack, balance_groups
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split, plan_splits, split_first


@dataclass(frozen=True)
class StepBatch:
    """The global batch of one optimizer step, as one data-parallel rank sees it.

    Attributes:
        groups: of the global batch, with or without token ids.
        mine: this data-parallel rank's groups.
        inputs: the micro-batches of ``mine``.
        metrics: what the source has to say of the step.
    """

    groups: Sequence[RolloutGroup]
    mine: Sequence[RolloutGroup]
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
        groups: all of them, on every rank.
        groups_per_step: of the global batch.
        seed: of the order.
        max_tokens: most rows of a micro-batch.
        with_reference: whether the loss has a reference policy, which is the old one.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        groups: Sequence[RolloutGroup],
        groups_per_step: int,
        *,
        seed: int,
        max_tokens: int | None,
        with_reference: bool,
    ) -> None:
        self.trainer, self.groups, self.max_tokens = trainer, groups, max_tokens
        self.groups_per_step, self.seed, self.with_reference = groups_per_step, seed, with_reference
        self.dp_group = trainer.dp_group
        self.step = 0
        self.old: dict[int, Tensor] = {}

    def batch(self, step: int) -> list[int]:
        """Indices of the groups of a step, which counts from 0."""
        return batch_of_step(len(self.groups), self.groups_per_step, step, self.seed)

    def measure_old_log_probs(self, steps: range, advance: Callable[..., None] = lambda **_: None) -> None:
        """Log-probs under the policy as it is, each group on one data-parallel rank, known to all afterwards.

        Args:
            steps: whose groups are wanted.
            advance: called after each group of this rank, with the rows as ``units``.
        """
        mine = self.groups_to_measure(steps)
        found = {}
        at_once = self.trainer.pp_group.size()  # enough to keep all stages busy
        for some in (mine[first : first + at_once] for first in range(0, len(mine), at_once)):
            packs = {i: pack_and_split([self.groups[i]], max_tokens_per_pack=self.max_tokens) for i in some}
            results = iter(self.trainer.log_probs_of([pack for each in packs.values() for pack in each]))
            for i, each in packs.items():
                found[i] = torch.cat([next(results) for _ in each])
                advance(units=sum(pack.layout.num_rows for pack in each))
        for part in all_gather_object(found, self.dp_group):
            self.old |= part

    def groups_to_measure(self, steps: range) -> list[int]:
        """Indices of those groups of the steps that this data-parallel rank measures."""
        wanted = sorted({i for step in steps for i in self.batch(step)})
        return wanted[self.dp_group.rank() :: self.dp_group.size()]

    def share(self, batch: Sequence[int]) -> list[int]:
        """This data-parallel rank's groups of a batch."""
        share = balance_groups([self.groups[i] for i in batch], self.dp_group.size())[self.dp_group.rank()]
        return [batch[n] for n in share]

    def packs(self, share: Sequence[int]) -> list[Pack]:
        """The micro-batches of these groups."""
        return pack_and_split([self.groups[i] for i in share], max_tokens_per_pack=self.max_tokens)

    def next_step(self) -> StepBatch:
        batch = self.batch(self.step)
        share = self.share(batch)
        mine = [self.groups[i] for i in share]
        order = split_first(plan_splits(mine, max_tokens_per_pack=self.max_tokens))
        old = torch.cat([self.old[share[n]] for n in order])
        inputs = []
        for pack in self.packs(share):
            count = pack.response_rows.numel()
            inputs.append(StepInput(pack, old[:count], old[:count] if self.with_reference else None))
            old = old[count:]
        self.step += 1
        return StepBatch([self.groups[i] for i in batch], mine, inputs)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


def batch_of_step(num_groups: int, groups_per_step: int, step: int, seed: int) -> list[int]:
    """Groups of a step. Each epoch is a new seeded order, cut into whole steps; what is left over sits it out."""
    size = min(groups_per_step, num_groups)
    epoch, index = divmod(step, num_groups // size)
    order = list(range(num_groups))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return sorted(order[index * size : (index + 1) * size])
