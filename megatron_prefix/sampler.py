"""Which groups make a step, in what order: seeded epochs without a rest, and a place in them that can be saved.

Steps do not depend on how many data-parallel ranks share them nor on the token limit, so that a run goes on from its
saved place on other machines with the same global steps.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megatron_prefix.balanced_plan import Group, StepPlan
from megatron_prefix.balancing import GroupLoad, StepPlanner
from megatron_prefix.rollout_tree import RolloutTree


@dataclass(frozen=True)
class _Place:
    """Where the next step begins.

    Attributes:
        epoch: from 0.
        position: groups of it that are taken.
        carried: the rest of the epoch before, which its last step took with this epoch's first groups.
    """

    epoch: int = 0
    position: int = 0
    carried: tuple[int, ...] = ()


class PrefixGroupSampler:
    """Steps of exactly `groups_per_step` groups out of a fixed collection, planned for all ranks.

    An epoch has every group once, in an order of its own. Where it does not end with a whole step, the next epoch's
    first groups fill that step up; none of them is one that the step has already. With fewer groups than a step takes,
    every step is all groups.

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
        size = min(groups_per_step, len(groups))
        if size < planner.dp_size:
            raise ValueError(
                f"{size} groups per step cannot feed {planner.dp_size} data-parallel ranks; raise groups_per_step, or "
                "give more groups"
            )
        self.groups, self.planner, self.groups_per_step, self.seed = groups, planner, size, seed
        self._loads: dict[int, GroupLoad] = {i: planner.measure(i, group) for i, group in enumerate(groups)}
        self._place = _Place()

    @property
    def epoch(self) -> int:
        """Of the next step's first group, from 0."""
        return self._place.epoch

    def next_step(self) -> StepPlan:
        """The plan of the next step, with indices into `groups`.

        Raises:
            ValueError: see `StepPlanner.plan`; the place stays where it was.
        """
        step, place = self._step(self._place)
        plan = self.planner.plan_loads([self._loads[i] for i in step])
        self._place = place
        return plan

    def upcoming(self, num_steps: int) -> list[tuple[int, ...]]:
        """The groups of the next steps, in ascending order, without taking them."""
        steps, place = [], self._place
        for _ in range(num_steps):
            step, place = self._step(place)
            steps.append(step)
        return steps

    def state_dict(self) -> dict[str, Any]:
        """The place, in values that JSON knows."""
        place = asdict(self._place) | {"carried": list(self._place.carried)}
        return place | self._identity

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
        self._place = _Place(int(state["epoch"]), int(state["position"]), tuple(state["carried"]))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a place is in."""
        lengths = hashlib.sha256(json.dumps([_lengths(group) for group in self.groups]).encode()).hexdigest()
        return {
            "seed": self.seed,
            "groups_per_step": self.groups_per_step,
            "num_groups": len(self.groups),
            "lengths_sha256": lengths,
        }

    def _step(self, place: _Place) -> tuple[tuple[int, ...], _Place]:
        """The groups of the step at a place, and the place behind it."""
        order = self._order(place.epoch, place.carried)
        end = place.position + self.groups_per_step
        taken, rest = order[place.position : end], len(order) - end
        if rest > 0:
            return tuple(sorted(taken)), _Place(place.epoch, end, place.carried)
        if rest == 0:
            return tuple(sorted(taken)), _Place(place.epoch + 1)
        following = _Place(place.epoch + 1, -rest, tuple(taken))
        first = self._order(following.epoch, following.carried)[:-rest]
        return tuple(sorted([*taken, *first])), following

    def _order(self, epoch: int, carried: Sequence[int]) -> list[int]:
        """An epoch's order. Of the groups that share a step with ``carried`` none is among those: they come later."""
        order = list(range(len(self.groups)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if not carried:
            return order
        shared = self.groups_per_step - len(carried)
        others = [i for i in order if i not in set(carried)]
        first = others[:shared]
        taken = set(first)
        return first + [i for i in order if i not in taken]


def _lengths(group: Group) -> list[Any]:
    """What tells groups apart where no token id is known."""
    if isinstance(group, RolloutTree):
        return [[len(node.tokens), node.parent] for node in group.nodes]
    return [len(group.prompt), *(len(tokens) for tokens in group.responses)]
