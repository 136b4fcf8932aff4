"""Rollouts: several scored responses to one prompt, and the files that hold them.

Token ids only: text is the tokenizer's business. A JSONL file is UTF-8 with one JSON object per line, in any of three
forms (all may stand in one file; blank lines are skipped). Parquet files hold the same, one row per line
(`formats.parquet`), and files of other programs are translated to it (`formats.read`).

Group line: one prefix group.

    {"group_id": "task-17", "prompt": [5, 6, 7],
     "responses": [{"tokens": [8, 9], "reward": 1.0, "log_probs": [-0.1, -2.3], "loss_mask": [1, 1]}, ...]}

Sample line: one response. Lines with the same ``group_id`` form a group, in the order of the file, consecutive or not;
their prompts must be the same tokens.

    {"group_id": "task-17", "prompt": [5, 6, 7], "response": [8, 9], "reward": 1.0, "log_probs": [...]}

Trajectory line: one sequence of an agent, or of a single response. Lines with the same ``group_id`` form a group, whose
sequences may share what they begin with (`prefix_trie`).

    {"group_id": "task-17", "tokens": [5, 6, 7, 8, 9], "generated": [0, 0, 0, 1, 1], "reward": 1.0, "log_probs": [...]}

=================  =============================================================================================
``group_id``       string; optional on group lines (which must not repeat one), needed on the others
``prompt``         token ids, at least one
``tokens``         token ids of a response, at least one (``response`` on a sample line); of the whole sequence, at
                   least two, on a trajectory line
``generated``      0 or 1 per token, 1 where the policy wrote it; the first is 0, at least one is 1
``reward``         finite number
``log_probs``      optional: the sampler's log-probability of every response token (natural log, of the sampling
                   distribution); all responses of a group have it or none. On a trajectory line one per token, read
                   where ``generated`` is 1
``loss_mask``      optional: 0 or 1 per response token, 0 where the policy did not write it (a tool's output); at least
                   one 1. A response without it is trained in full. Not on trajectory lines
``trajectory_id``  optional, on trajectory lines: a string that the sequences of one trajectory have in common
=================  =============================================================================================

Other keys (text, task name, ...) are ignored, except that a misspelt or misplaced ``log_probs`` or ``loss_mask`` is
refused: ignoring it would change what is trained without a word. So is a key that stands twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.formats.parquet import write_parquet
from megatron_prefix.formats.read import load_rollouts
from megatron_prefix.prefix_trie import trajectories_of
from megatron_prefix.rollout_group import RolloutGroup, check_vocabulary
from megatron_prefix.rollout_tree import RolloutTree

__all__ = ["RolloutGroup", "check_vocabulary", "read_rollouts", "write_rollouts"]


def read_rollouts(path: str | os.PathLike[str]) -> list[RolloutGroup]:
    """Reads the prefix groups of a JSONL or Parquet file (schema: module docstring), in the order of their first line.

    `formats.read.load_rollouts` has further formats and trajectories, and can skip what is bad.

    Raises:
        ValueError: the file cannot be read, holds no rollout, or has a line that is not as documented; the message
            starts with FILE:LINE (FILE alone where the file cannot be opened). Or it holds trajectories.
    """
    found = load_rollouts(path, format="native").groups
    groups = [group for group in found if isinstance(group, RolloutGroup)]
    if len(groups) < len(found):
        raise ValueError(
            f"{os.fspath(path)}: {len(found) - len(groups)} groups of the file are trajectories, not prefix groups; "
            "read it with load_rollouts"
        )
    return groups


def write_rollouts(
    path: str | os.PathLike[str],
    groups: Iterable[RolloutGroup | RolloutTree],
    notes: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes group lines, and trajectory lines for trees; rows where the name ends in `.parquet`.

    The file appears whole or not at all: it is written beside ``path`` and moved into place.

    Args:
        path: of the file.
        groups: what to write; a tree without a group_id is named after its place among them.
        notes: further keys of each group's lines (texts, task name, ...), for people and other programs.

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
    lines = []
    for i, (group, note) in enumerate(zip(groups, notes, strict=True)):
        for line in _trajectory_lines(group, i) if isinstance(group, RolloutTree) else [_group_line(group)]:
            if taken := sorted(set(line) & set(note)):
                raise ValueError(
                    f"{target}: a note uses the key {taken[0]!r} of the group itself; give it another name"
                )
            lines.append({**line, **note})
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.suffix == ".parquet":
            write_parquet(beside, lines)
        else:
            beside.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
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


def _trajectory_lines(tree: RolloutTree, index: int) -> list[dict[str, Any]]:
    lines = []
    for each in trajectories_of(tree):
        line: dict[str, Any] = {
            "group_id": f"group-{index}" if each.group_id is None else each.group_id,
            "tokens": each.tokens,
            "generated": [int(own) for own in each.generated],
            "reward": each.reward,
        }
        if each.log_probs is not None:
            line["log_probs"] = [
                value if own else None for value, own in zip(each.log_probs, each.generated, strict=True)
            ]
        if each.trajectory_id is not None:
            line["trajectory_id"] = each.trajectory_id
        lines.append(line)
    return lines
