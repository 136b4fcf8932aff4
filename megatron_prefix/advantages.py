"""Advantages of a group's rollouts from their rewards. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float], *, normalize_std: bool = True, eps: float = 1e-6) -> list[float]:
    """Advantages of one group's responses: reward minus the group's mean, over its standard deviation plus ``eps``.

    The standard deviation is the sample's (n - 1), as in the common GRPO trainers; ``normalize_std=False`` leaves it
    out (Dr. GRPO). A group of one response, and a group whose rewards are all equal, have advantages of exactly 0.

    Raises:
        ValueError: no rewards, a reward that is not finite, or a negative ``eps``.
    """
    if not rewards:
        raise ValueError("a group needs at least one reward, got none")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {i} must be finite, got {reward!r}; score the response again or drop it")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps!r}")
    if min(rewards) == max(rewards):  # the rounded mean of equal numbers need not equal them
        return [0.0] * len(rewards)
    mean = math.fsum(reward / len(rewards) for reward in rewards)
    centred = [reward - mean for reward in rewards]
    if not normalize_std:
        return centred
    std = math.hypot(*centred) / math.sqrt(len(rewards) - 1)
    return [value / (std + eps) for value in centred]
