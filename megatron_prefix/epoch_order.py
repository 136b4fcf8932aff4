"""Which of a fixed number of things make each step: seeded epochs without a rest, and a place in them to go on from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class _Place:
    """Where the next step begins.

    Attributes:
        epoch: from 0.
        position: things of it that are taken.
        carried: the rest of the epoch before, which its last step took with this epoch's first things.
    """

    epoch: int = 0
    position: int = 0
    carried: tuple[int, ...] = ()


class EpochOrder:
    """Steps of exactly ``per_step`` of the numbers 0 to ``count`` - 1.

    An epoch has every number once, in an order of its own. Where it does not end with a whole step, the next epoch's
    first numbers fill that step up; none of them is one that the step has already.

    Args:
        count: of the things.
        per_step: of them in a step; with fewer things than that, every step is all of them.
        seed: of the orders.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, count: int, per_step: int, seed: int = 0) -> None:
        for name, value in (("count", count), ("per_step", per_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.count, self.per_step, self.seed = count, min(per_step, count), seed
        self._place = _Place()

    @property
    def epoch(self) -> int:
        """Of the next step's first number, from 0."""
        return self._place.epoch

    def take(self) -> tuple[int, ...]:
        """The next step, ascending."""
        step, self._place = self._step(self._place)
        return step

    def upcoming(self, num_steps: int) -> list[tuple[int, ...]]:
        """The next steps, without taking them."""
        steps, place = [], self._place
        for _ in range(num_steps):
            step, place = self._step(place)
            steps.append(step)
        return steps

    def state_dict(self) -> dict[str, Any]:
        """The place, in values that JSON knows."""
        return asdict(self._place) | {"carried": list(self._place.carried)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place of an order with the same count, size and seed."""
        self._place = _Place(int(state["epoch"]), int(state["position"]), tuple(state["carried"]))

    def _step(self, place: _Place) -> tuple[tuple[int, ...], _Place]:
        """The step at a place, and the place behind it."""
        order = self._order(place.epoch, place.carried)
        end = place.position + self.per_step
        taken, rest = order[place.position : end], len(order) - end
        if rest > 0:
            return tuple(sorted(taken)), _Place(place.epoch, end, place.carried)
        if rest == 0:
            return tuple(sorted(taken)), _Place(place.epoch + 1)
        following = _Place(place.epoch + 1, -rest, tuple(taken))
        first = self._order(following.epoch, following.carried)[:-rest]
        return tuple(sorted([*taken, *first])), following

    def _order(self, epoch: int, carried: Sequence[int]) -> list[int]:
        """An epoch's order. Of the numbers that share a step with ``carried`` none is among those: they come later."""
        order = list(range(self.count))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if not carried:
            return order
        before = set(carried)
        first = [i for i in order if i not in before][: self.per_step - len(carried)]
        taken = set(first)
        return first + [i for i in order if i not in taken]
