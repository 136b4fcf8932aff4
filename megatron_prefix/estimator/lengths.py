"""How long prompts and responses are: numbers, or distributions to draw from."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from megatron_prefix.rollout_group import RolloutGroup, TokenCount

FORMS = "a number, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: between ``low`` and ``high``, or with ``sigma`` around the median ``low`` (their logarithms
    are normal) up to ``high``."""

    low: int
    high: int | None
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "4096", "uniform:1000:8000", "lognormal:2000:0.6" or "lognormal:2000:0.6:16384".

        Raises:
            ValueError: anything else, lengths below 1, or bounds in the wrong order.
        """
        kind, *values = text.split(":")
        try:
            if not values:
                found = cls(int(kind), int(kind))
            elif kind == "uniform" and len(values) == 2:
                found = cls(int(values[0]), int(values[1]))
            elif kind == "lognormal" and len(values) in (2, 3):
                found = cls(int(values[0]), int(values[2]) if values[2:] else None, float(values[1]))
            else:
                raise ValueError("no such form")
        except ValueError as error:
            raise ValueError(f"lengths {text!r} are not understood; give {FORMS}") from error
        if found.low < 1 or (found.high is not None and found.high < found.low):
            raise ValueError(f"lengths {text!r}: they must be at least 1, and the first no more than the last")
        if found.sigma is not None and not (found.sigma >= 0 and math.isfinite(found.sigma)):
            raise ValueError(f"lengths {text!r}: sigma must be a finite number of 0 or more")
        return found

    def draw(self, generator: random.Random) -> int:
        """One length."""
        if self.sigma is None:
            return generator.randint(self.low, self.high or self.low)
        drawn = max(1, round(self.low * math.exp(generator.gauss(0.0, self.sigma))))
        return drawn if self.high is None else min(drawn, self.high)


def draw_groups(
    prompt: Lengths, response: Lengths, *, group_size: int, num_groups: int, seed: int = 0
) -> list[RolloutGroup]:
    """The groups of a step, as lengths alone.

    Args:
        prompt, response: their lengths.
        group_size: responses of a group, G.
        num_groups: of the step, over all data-parallel ranks.
        seed: the same groups for the same seed.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("group_size", group_size), ("num_groups", num_groups)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = random.Random(seed)
    return [
        RolloutGroup(
            TokenCount(prompt.draw(generator)),
            [TokenCount(response.draw(generator)) for _ in range(group_size)],
            [0.0] * group_size,
        )
        for _ in range(num_groups)
    ]
