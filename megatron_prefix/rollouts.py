"""Rollouts: several scored responses to one prompt, and the JSONL files that hold them.

Token ids only: text is the tokenizer's business. A file is UTF-8 with one JSON object per line, in either of two forms
(both may stand in one file; blank lines are skipped).

Group line: one prefix group.

    {"group_id": "task-17", "prompt": [5, 6, 7],
     "responses": [{"tokens": [8, 9], "reward": 1.0, "log_probs": [-0.1, -2.3], "loss_mask": [1, 1]}, ...]}

Sample line: one response. Lines with the same ``group_id`` form a group, in the order of the file, consecutive or not;
their prompts must be the same tokens.

    {"group_id": "task-17", "prompt": [5, 6, 7], "response": [8, 9], "reward": 1.0, "log_probs": [...]}

==============  =============================================================================================
``group_id``    string; optional on group lines (which must not repeat one), needed on sample lines
``prompt``      token ids, at least one
``tokens``      token ids of a response, at least one (``response`` on a sample line)
``reward``      finite number
``log_probs``   optional: the sampler's log-probability of every response token (natural log, of the sampling
                distribution); all responses of a group have it or none
``loss_mask``   optional: 0 or 1 per response token, 0 where the policy did not write it (a tool's output); at least
                one 1. A response without it is trained in full
==============  =============================================================================================

Other keys (text, task name, ...) are ignored, except that a misspelt or misplaced ``log_probs`` or ``loss_mask`` is
refused: ignoring it would change what is trained without a word.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_prefix.rollout_group import RolloutGroup, check_same_prompt, check_vocabulary

__all__ = ["RolloutGroup", "check_vocabulary", "read_rollouts", "write_rollouts"]


def read_rollouts(path: str | os.PathLike[str]) -> list[RolloutGroup]:
    """Reads a rollouts file (schema: module docstring); groups come in the order of their first line.

    Raises:
        ValueError: the file cannot be read, holds no rollout, or has a line that is not as documented; the message
            starts with FILE:LINE (FILE alone where the file cannot be opened).
    """
    file = os.fspath(path)
    groups: dict[str | int, _OpenGroup] = {}
    number = 0
    try:
        with open(file, "rb") as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    try:
                        _read_line(groups, number, raw)
                    except ValueError as error:
                        raise ValueError(f"{file}:{number}: {error}") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot read rollouts: {error.strerror or error}") from error
    if not groups:
        raise ValueError(
            f"{file}:{max(number, 1)}: the file holds no rollouts; write at least one group line or sample line"
        )
    return [group.close() for group in groups.values()]


def write_rollouts(
    path: str | os.PathLike[str],
    groups: Iterable[RolloutGroup],
    notes: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes group lines. The file appears whole or not at all: it is written beside ``path`` and moved into place.

    Args:
        path: of the file.
        groups: what to write.
        notes: further keys of each group's line (texts, task name, ...), for people and other programs.

    Raises:
        ValueError: no groups, two groups with one id (such a file could not be read back), or notes that do not fit.
        OSError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    groups = list(groups)
    if not groups:
        raise ValueError(f"{target}: no groups to write; a rollouts file holds at least one")
    ids = [group.group_id for group in groups if group.group_id is not None]
    if len(set(ids)) != len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise ValueError(f"{target}: two groups have the id {twice!r}; give each its own, or merge them")
    if notes is None:
        notes = [{}] * len(groups)
    if len(notes) != len(groups):
        raise ValueError(f"{target}: {len(notes)} notes for {len(groups)} groups; give one per group")
    lines = [_group_line(group) for group in groups]
    for line, note in zip(lines, notes, strict=True):
        if taken := sorted(set(line) & set(note)):
            raise ValueError(f"{target}: a note uses the key {taken[0]!r} of the group itself; give it another name")
        line.update(note)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _group_line(group: RolloutGroup) -> dict[str, Any]:
    responses: list[dict[str, Any]] = []
    for i, (tokens, reward) in enumerate(zip(group.responses, group.rewards, strict=True)):
        response: dict[str, Any] = {"tokens": tokens, "reward": reward}
        if group.log_probs is not None:
            response["log_probs"] = group.log_probs[i]
        if group.loss_masks is not None:
            response["loss_mask"] = [int(kept) for kept in group.loss_masks[i]]
        responses.append(response)
    named = {} if group.group_id is None else {"group_id": group.group_id}
    return {**named, "prompt": group.prompt, "responses": responses}


@dataclass
class _OpenGroup:
    """A group while its file is read: sample lines may still add to it."""

    line: int  # where it began
    first: RolloutGroup
    from_samples: bool
    parts: list[RolloutGroup] = field(default_factory=list)

    def add(self, sample: RolloutGroup, number: int) -> None:
        first = self.first
        check_same_prompt(first.group_id, first.prompt, sample.prompt, places=(f"line {self.line}", f"line {number}"))
        if (first.log_probs is None) != (sample.log_probs is None):
            raise ValueError(
                f"group {first.group_id!r}: only one of lines {self.line} and {number} has log_probs; "
                "give them on all lines of a group or on none"
            )
        self.parts.append(sample)

    def close(self) -> RolloutGroup:
        parts = [self.first, *self.parts]
        if len(parts) == 1:
            return self.first
        return RolloutGroup(
            self.first.prompt,
            [part.responses[0] for part in parts],
            [part.rewards[0] for part in parts],
            self.first.group_id,
            [part.log_probs[0] if part.log_probs else None for part in parts],
            [part.loss_masks[0] if part.loss_masks else None for part in parts],
        )


def _read_line(groups: dict[str | int, _OpenGroup], number: int, raw: bytes) -> None:
    """Adds one line to ``groups``, whose keys are group ids and, for groups without one, line numbers."""
    group, is_sample = _parse_line(raw)
    key = number if group.group_id is None else group.group_id
    known = groups.get(key)
    if known is None:
        groups[key] = _OpenGroup(number, group, is_sample)
    elif is_sample and known.from_samples:
        known.add(group, number)
    else:
        raise ValueError(
            f"group {group.group_id!r} was given already on line {known.line}; only sample lines may share a group_id"
        )


def parse_group_line(raw: bytes) -> RolloutGroup:
    """The group of one group line, UTF-8.

    Raises:
        ValueError: it is none, or a sample line.
    """
    group, is_sample = _parse_line(raw)
    if is_sample:
        raise ValueError("a sample line, but more samples of its group may follow; write group lines")
    return group


def _parse_line(raw: bytes) -> tuple[RolloutGroup, bool]:
    """The group on a line (of one response for a sample line), and whether it is a sample line."""
    try:
        line = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}; save as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        ending = "" if raw.rstrip().endswith(b"}") else "; the line is cut short (truncated?): write it again"
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{ending}") from error
    except RecursionError as error:
        raise ValueError("not a rollout: the JSON is nested too deeply") from error
    if not isinstance(line, dict):
        raise ValueError(f"a line must be a JSON object, got {reprlib.repr(line)}")
    if ("responses" in line) == ("response" in line):
        raise ValueError(
            "a line must have either the key 'responses' (a group) or the key 'response' (a sample), "
            f"got the keys {reprlib.repr(sorted(line))}"
        )
    group_id = line.get("group_id")
    if "response" in line:
        if group_id is None:
            raise ValueError("missing key 'group_id': sample lines are grouped by it")
        _check_keys(line, "sample line", optional_here=True)
        samples = [{**line, "tokens": line["response"]}]
    else:
        _check_keys(line, "group line", optional_here=False)
        samples = line["responses"]
        if not isinstance(samples, list):
            raise ValueError(f"'responses' must be a list of objects, got {reprlib.repr(samples)}")
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise ValueError(f"response {i} must be an object with 'tokens' and 'reward', got {reprlib.repr(sample)}")
        _check_keys(sample, f"response {i}", optional_here=True)
    group = RolloutGroup(
        _key(line, "prompt", "the line"),
        [_key(sample, "tokens", f"response {i}") for i, sample in enumerate(samples)],
        [_key(sample, "reward", f"response {i}") for i, sample in enumerate(samples)],
        group_id,
        [sample.get("log_probs") for sample in samples],
        [sample.get("loss_mask") for sample in samples],
    )
    return group, "response" in line


def _check_keys(found: dict[str, Any], where: str, *, optional_here: bool) -> None:
    for key in found:
        plain = key.lower().replace("_", "").replace("-", "").rstrip("s")
        meant = {"logprob": "log_probs", "lossmask": "loss_mask"}.get(plain)
        if meant is not None and not (optional_here and key == meant):
            raise ValueError(
                f"{where}: key {key!r} is not read here; write it as {meant!r} beside each response's 'reward'"
            )


def _key(found: dict[str, Any], key: str, where: str) -> Any:
    if key not in found:
        raise ValueError(f"{where}: missing key {key!r}, got the keys {reprlib.repr(sorted(found))}")
    return found[key]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON knows; rewards and log_probs must be finite")
