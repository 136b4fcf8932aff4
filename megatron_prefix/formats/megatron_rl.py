"""Megatron-RL's rollouts (megatron/rl/agent/api.py), as JSON Lines of their `model_dump_json()`, or Parquet.

A `TokenRollout` per line, or a `RolloutGroup` of them: ``{"rollouts": [...], "batch_id": 0, "index_in_batch": 3}``.

    {"trajectory": [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10]], "generation_mask": [[0, 0, 1, 1], [0, 0, 0, 0, 0, 1]],
     "logprobs": [[-0.1, -2.3], [-0.7]], "reward": 1.0, "env_id": "sums", "problem_id": "task-17"}

A turn holds the whole context that the policy was given and what it wrote then, so the turns of a rollout are several
sequences that extend one another: they become trajectories of one ``trajectory_id``. ``trajectory`` may also be one
flat list of tokens (older versions), with a flat mask and flat log-probs. ``logprobs`` of a turn are those of its
generated tokens, or of all its tokens.

Rollouts of one `RolloutGroup` are a group. Alone, those of the same ``env_id`` and ``problem_id`` are. A rollout
without turns is Megatron-RL's placeholder of a failed episode and is left out.
"""

from __future__ import annotations

import reprlib
from typing import Any

from megatron_prefix.formats.lines import LeftOutError, key_of, list_of
from megatron_prefix.formats.names import id_of


def megatron_rl_lines(record: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The trajectory lines of a rollout or of a group of them; ``number`` tells the record from others.

    Raises:
        ValueError: keys are missing or their lists do not fit one another.
        LeftOutError: only placeholders.
    """
    if "rollouts" not in record:
        problem = id_of(key_of(record, "problem_id", "rollout"), "problem_id")
        lines = _turns(record, f"{record.get('env_id') or ''}/{problem}", str(number))
    else:
        # Ids count anew in every iteration, so they name no group among those of a whole run.
        batch, index = (id_of(record.get(key, 0), key) for key in ("batch_id", "index_in_batch"))
        lines = []
        for i, rollout in enumerate(list_of(record["rollouts"], "'rollouts'", "rollouts")):
            if not isinstance(rollout, dict):
                raise ValueError(f"rollout {i} must be an object, got {reprlib.repr(rollout)}")
            try:
                lines += _turns(rollout, f"{number}: batch {batch}, group {index}", f"{number}.{i}")
            except ValueError as error:
                raise ValueError(f"rollout {i}: {error}") from error
    if not lines:
        raise LeftOutError("the trajectory is empty: a placeholder for an episode that failed")
    return lines


def _turns(rollout: dict[str, Any], group_id: str, trajectory_id: str) -> list[dict[str, Any]]:
    """A trajectory line per turn."""
    turns = list_of(key_of(rollout, "trajectory", "rollout"), "trajectory", "turns")
    if any(isinstance(turn, str) for turn in turns):
        raise ValueError("trajectory holds text; write the TokenRollouts, which have the tokens")
    masks = list_of(key_of(rollout, "generation_mask", "rollout"), "generation_mask", "turns")
    log_probs = rollout.get("logprobs")
    if turns and not isinstance(turns[0], list):
        turns, masks = [turns], [masks]
        log_probs = None if log_probs is None else [log_probs]
    if log_probs is None:
        log_probs = [None] * len(turns)
    for name, values in (("generation_mask", masks), ("logprobs", list_of(log_probs, "logprobs", "turns"))):
        if len(values) != len(turns):
            raise ValueError(f"{name} has {len(values)} turns, trajectory has {len(turns)}")
    shared = {"group_id": group_id, "reward": _reward(key_of(rollout, "reward", "rollout"))}
    if len(turns) > 1:
        shared["trajectory_id"] = trajectory_id
    return [
        {**shared, "tokens": tokens, "generated": mask, "log_probs": _per_token(i, mask, values)}
        for i, (tokens, mask, values) in enumerate(zip(turns, masks, log_probs, strict=True))
    ]


def _per_token(turn: int, mask: Any, log_probs: Any) -> list[Any] | None:
    """Log-probs with one entry for every token, None where nothing was generated."""
    if log_probs is None:
        return None
    generated = list_of(mask, f"turn {turn}, generation_mask")
    values = list_of(log_probs, f"turn {turn}, logprobs")
    if len(values) == len(generated):
        return values
    count = sum(bool(own) for own in generated)
    if len(values) != count:
        raise ValueError(
            f"turn {turn} has {len(values)} logprobs for {count} generated of {len(generated)} tokens; give one per "
            "generated token"
        )
    own = iter(values)
    return [next(own) if here else None for here in generated]


def _reward(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"reward is a list of {len(value)}; a rollout needs one, for all its turns")
    return value[0]
