"""A whole token sequence of an agent or a single response, with what the policy wrote in it. Plain Python."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prefix.rollout_group import finite_number, token_ids


@dataclass(frozen=True, init=False)
class Trajectory:
    """One sequence that the policy was called on: prompt, what it wrote, tools' outputs, in order.

    A conversation in several calls is one sequence, or several that extend one another: those then have the same
    ``trajectory_id`` and reward.

    Args:
        tokens: token ids of the whole sequence, at least two.
        generated: 0/1 (or bool) per token, 1 where the policy wrote the token and it is trained. The first is 0:
            nothing predicts it. At least one is 1.
        reward: finite number, of the whole trajectory.
        group_id: trajectories with one id are compared with one another: their rewards make the advantages.
        log_probs: per token, the sampler's log-probs (natural log); read where ``generated`` is 1, where each must be
            finite, and None or any number elsewhere. None where nothing was recorded.
        trajectory_id: see above; None for a trajectory of one sequence.

    Raises:
        ValueError: anything else; names the sequence, position and value, and the remedy.
    """

    tokens: tuple[int, ...]
    generated: tuple[bool, ...]
    reward: float
    group_id: str | None
    log_probs: tuple[float, ...] | None
    trajectory_id: str | None

    def __init__(
        self,
        tokens: Sequence[int],
        generated: Sequence[int | bool],
        reward: float,
        group_id: str | None = None,
        log_probs: Sequence[float | None] | None = None,
        trajectory_id: str | None = None,
    ) -> None:
        for name, value in (("group_id", group_id), ("trajectory_id", trajectory_id)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a string or None, got {reprlib.repr(value)}; write it as a string")
        where = "trajectory" if group_id is None else f"trajectory of group {group_id!r}"
        ids = tuple(token_ids(f"{where}, tokens", tokens))
        object.__setattr__(self, "tokens", ids)
        object.__setattr__(self, "generated", _generated(where, generated, len(ids)))
        object.__setattr__(
            self, "reward", finite_number(f"{where}, reward", reward, "score the trajectory again or drop it")
        )
        object.__setattr__(self, "group_id", group_id)
        object.__setattr__(self, "log_probs", _log_probs(where, log_probs, self.generated))
        object.__setattr__(self, "trajectory_id", trajectory_id)


def _generated(where: str, values: Any, count: int) -> tuple[bool, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(
            f"{where}: generated must be a list of one 0 or 1 per token ({count}), got {reprlib.repr(values)}"
        )
    if not set(map(type, values)) <= {int, bool} or not set(values) <= {0, 1}:
        position = next(t for t, value in enumerate(values) if type(value) not in (int, bool) or value not in (0, 1))
        raise ValueError(
            f"{where}, generated at position {position} must be 0 or 1, got {reprlib.repr(values[position])}"
        )
    if values[0]:
        raise ValueError(f"{where}: the first token is generated, but nothing predicts it; put the prompt before it")
    if not any(values):
        raise ValueError(f"{where}: none of {count} tokens is generated; drop it, there is nothing to train")
    return tuple(map(bool, values))


def _log_probs(where: str, values: Any, generated: Sequence[bool]) -> tuple[float, ...] | None:
    """NaN where nothing was generated."""
    if values is None:
        return None
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or len(values) != len(generated):
        raise ValueError(
            f"{where}: log_probs must be a list of one number per token ({len(generated)}), got {reprlib.repr(values)}"
        )
    return tuple(
        finite_number(f"{where}, log_probs at position {t}", value, "leave log_probs out if the sampler has none")
        if own
        else math.nan
        for t, (value, own) in enumerate(zip(values, generated, strict=True))
    )
