"""The three native records (schema: `megatron_prefix.rollouts`). Other formats are translated to them, so that
everything that is read is checked here."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.trajectory import Trajectory

ID_LIMIT = 2**63
"""Token ids are below it, whatever the vocabulary: they become int64 tensors."""


@dataclass(frozen=True)
class Sample:
    """A group of one response, to which further records of its group_id add."""

    group: RolloutGroup


Parsed = RolloutGroup | Sample | Trajectory


class LeftOutError(ValueError):
    """A record that its own file marks as not to be trained: nothing is wrong, and nothing is read."""


def parse(record: dict[str, Any], vocab_size: int | None = None) -> Parsed:
    """What a native record holds.

    Args:
        record: with the keys of a group, sample or trajectory line.
        vocab_size: token ids must be below it; None where it is not known.

    Raises:
        ValueError: the record is not as documented; says what is and the remedy.
    """
    kinds = [key for key in ("responses", "response", "generated") if key in record]
    if len(kinds) != 1:
        raise ValueError(
            "a line must have either the key 'responses' (a group), 'response' (a sample) or 'generated' (a "
            f"trajectory), got the keys {reprlib.repr(sorted(record))}"
        )
    parsed: Parsed
    if kinds[0] == "responses":
        parsed = _group(record)
    else:
        parsed = _sample(record) if kinds[0] == "response" else _trajectory(record)
    _check_ids(parsed, ID_LIMIT if vocab_size is None else vocab_size)
    return parsed


def key_of(record: dict[str, Any], key: str, where: str) -> Any:
    """``record[key]``. Raises ValueError, which starts with ``where``, when it is not there."""
    if key not in record:
        raise ValueError(f"{where}: missing key {key!r}, got the keys {reprlib.repr(sorted(record))}")
    return record[key]


def list_of(value: Any, where: str, what: str = "values") -> list[Any]:
    """``value``. Raises ValueError, which starts with ``where``, when it is no list."""
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of {what}, got {reprlib.repr(value)}")
    return value


def _group(record: dict[str, Any]) -> RolloutGroup:
    _check_keys(record, "group line", {})
    return _responses(record, list_of(record["responses"], "'responses'", "objects"))


def _sample(record: dict[str, Any]) -> Sample:
    _need_group_id(record, "sample")
    _check_keys(record, "sample line", _BESIDE_REWARD)
    return Sample(_responses(record, [{**record, "tokens": record["response"]}]))


def _responses(record: dict[str, Any], responses: list[Any]) -> RolloutGroup:
    for i, response in enumerate(responses):
        if not isinstance(response, dict):
            raise ValueError(f"response {i} must be an object with 'tokens' and 'reward', got {reprlib.repr(response)}")
        _check_keys(response, f"response {i}", _BESIDE_REWARD)
    return RolloutGroup(
        key_of(record, "prompt", "the line"),
        [key_of(response, "tokens", f"response {i}") for i, response in enumerate(responses)],
        [key_of(response, "reward", f"response {i}") for i, response in enumerate(responses)],
        record.get("group_id"),
        [response.get("log_probs") for response in responses],
        [response.get("loss_mask") for response in responses],
    )


def _trajectory(record: dict[str, Any]) -> Trajectory:
    _need_group_id(record, "trajectory")
    _check_keys(record, "trajectory line", {"logprob": "log_probs"})
    return Trajectory(
        key_of(record, "tokens", "trajectory line"),
        record["generated"],
        key_of(record, "reward", "trajectory line"),
        record["group_id"],
        record.get("log_probs"),
        record.get("trajectory_id"),
    )


def _need_group_id(record: dict[str, Any], kind: str) -> None:
    if record.get("group_id") is None:
        raise ValueError(f"missing key 'group_id': {kind} lines are grouped by it")


_BESIDE_REWARD = {"logprob": "log_probs", "lossmask": "loss_mask"}


def _check_keys(found: Iterable[str], where: str, allowed: dict[str, str]) -> None:
    """Refuses what looks like log-probs or a mask and would not be read."""
    for key in found:
        plain = key.lower().replace("_", "").replace("-", "").rstrip("s")
        if plain in _BESIDE_REWARD and key != allowed.get(plain):
            name = _BESIDE_REWARD[plain]
            remedy = f"write it as {name!r} beside each response's 'reward'"
            if where.startswith("trajectory"):
                remedy = f"write it as {allowed.get(plain, 'generated')!r}, one value per token"
            raise ValueError(f"{where}: key {key!r} is not read here; {remedy}")


def _check_ids(parsed: Parsed, limit: int) -> None:
    named: list[tuple[str, Sequence[int]]]
    if isinstance(parsed, Trajectory):
        named = [("tokens", parsed.tokens)]
    else:
        group = parsed.group if isinstance(parsed, Sample) else parsed
        named = [("prompt", group.prompt), *((f"response {i}", tokens) for i, tokens in enumerate(group.responses))]
    for name, tokens in named:
        if max(tokens) >= limit:
            position = next(t for t, token in enumerate(tokens) if token >= limit)
            raise ValueError(
                f"{name}, position {position}: token id {reprlib.repr(tokens[position])} is outside the vocabulary "
                f"of {limit} tokens; tokenize with the tokenizer of this model"
            )
