"""Steps out of a fixed collection of groups, planned for all ranks, and a place in them that can be saved.

Steps do not depend on how many data-parallel ranks share them nor on the token limit, so that a run goes on from its
saved place on other machines with the same global steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_prefix.balanced_plan import Group, StepPlan
from megatron_prefix.balancing import GroupLoad, StepPlanner
from megatron_prefix.epoch_order import EpochOrder
from megatron_prefix.rollout_stats import sequence_lengths


class PrefixGroupSampler:
    """Steps of exactly ``groups_per_step`` groups in seeded epochs, see `EpochOrder`.

    Args:
        groups: the collection.
        planner: packs a step.
        groups_per_step: of the global batch.
        seed: of the orders.

    Raises:
        ValueError: no groups, a step of fewer groups than data-parallel ranks, or a group that does not fit (see
            `StepPlanner.measure`).
    """

    def __init__(self, groups: Sequence[Group], planner: StepPlanner, *, groups_per_step: int, seed: int = 0) -> None:
        if not groups:
            raise ValueError("there are no groups to sample; give at least one")
        self._order = EpochOrder(len(groups), groups_per_step, seed)
        self.groups, self.planner = groups, planner
        if self.groups_per_step < planner.dp_size:
            raise ValueError(
                f"{self.groups_per_step} groups per step cannot feed {planner.dp_size} data-parallel ranks; raise "
                "groups_per_step, or give more groups"
            )
        self._loads: dict[int, GroupLoad] = {i: planner.measure(i, group) for i, group in enumerate(groups)}

    @property
    def groups_per_step(self) -> int:
        """Groups of every step's global batch."""
        return self._order.per_step

    @property
    def epoch(self) -> int:
        """Of the next step's first group, from 0."""
        return self._order.epoch

    def next_step(self) -> StepPlan:
        """The plan of the next step, with indices into `groups`.

        Raises:
            ValueError: see `StepPlanner.plan`; the place stays where it was.
        """
        plan = self.plan(self._order.upcoming(1)[0])
        self._order.take()
        return plan

    def plan(self, step: Sequence[int]) -> StepPlan:
        """The plan of some groups. Raises ValueError as `StepPlanner.plan`."""
        return self.planner.plan_loads([self._loads[i] for i in step])

    def upcoming(self, num_steps: int) -> list[tuple[int, ...]]:
        """The groups of the next steps, in ascending order, without taking them."""
        return self._order.upcoming(num_steps)

    def state_dict(self) -> dict[str, Any]:
        """The place, in values that JSON knows."""
        return self._order.state_dict() | self._identity

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place. Data-parallel size and token limit may be others than when it was saved.

        Raises:
            ValueError: the state is of other groups, another seed or another number of groups per step.
        """
        for name, mine in self._identity.items():
            if name not in state:
                raise ValueError(f"sampler state: {name} is missing; load what state_dict returned")
            if state[name] != mine:
                raise ValueError(
                    f"sampler state: it was saved with {name} {state[name]}, this sampler has {mine}; give it the "
                    "groups, seed and groups_per_step of that run, or begin anew"
                )
        self._order.load_state_dict(state)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a place is in. Lengths tell groups apart where no token id is known, however much they share."""
        lengths = json.dumps([sequence_lengths(group) for group in self.groups])
        return {
            "seed": self._order.seed,
            "groups_per_step": self.groups_per_step,
            "num_groups": len(self.groups),
            "lengths_sha256": hashlib.sha256(lengths.encode()).hexdigest(),
        }
