"""The tensors of verl's DataProto, in memory or in a file.

A tensor file (`.pt`) holds what `torch.save` writes of a dict with them; B samples, P prompt and R response positions:

=======================  ==========  =================================================================================
``prompts``              [B, P]      token ids, padded on the left
``responses``            [B, R]      token ids, padded on the right
``attention_mask``       [B, P + R]  1 for tokens, 0 for padding: the only thing that tells padding; the ids do not
``response_mask``        [B, R]      optional: 0 for tokens that the policy did not write; also as ``loss_mask``, [B, R]
                                     or [B, P + R]
``rollout_log_probs``    [B, R]      optional: the sampler's; ``old_log_probs`` are the trainer's and are not read
``token_level_rewards``  [B, R]      summed over the response; else ``token_level_scores``, ``rm_scores``, or
                                     ``rewards`` of [B]
``uid``                  B           list of strings, or integers: samples with the same one are a group
=======================  ==========  =================================================================================

    torch.save({**batch.batch, "uid": batch.non_tensor_batch["uid"].tolist()}, "step7.pt")

They are read with ``weights_only=True``: a file cannot run code. What `DataProto.save_to_disk` writes is a pickle that
could, and is refused.
"""

from __future__ import annotations

import math
import pickle
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from zipfile import BadZipFile

import torch

from megatron_prefix.formats.assemble import Assembly, Load, Problems
from megatron_prefix.formats.names import id_of
from megatron_prefix.rollout_group import RolloutGroup

REWARDS = ("token_level_rewards", "token_level_scores", "rm_scores", "rewards")
MASKS = ("response_mask", "loss_mask")
LOG_PROBS = "rollout_log_probs"


def from_data_proto(batch: Mapping[str, torch.Tensor], non_tensor: Mapping[str, Sequence[Any]]) -> list[RolloutGroup]:
    """The groups of a DataProto: ``data.batch`` and ``data.non_tensor_batch`` (keys: module docstring).

    Raises:
        ValueError: tensors that are missing or do not fit one another, or a sample that is not as documented.
    """
    assembly = Assembly("DataProto", lambda record, number: [record], unit="sample")
    return [placed.group for placed in assembly.run(data_proto_samples(batch, non_tensor), Problems())]  # type: ignore[misc]


def tensor_rows(file: str) -> Iterator[tuple[int, Load]]:
    """Sample numbers, counted from 1, and what gives the sample line of each, of a tensor file.

    Raises:
        ValueError: the file cannot be read, or holds no dict of tensors that fit one another.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: not a file of plain tensors, and pickles could run code; in verl, save with "
            "torch.save({**data.batch, 'uid': data.non_tensor_batch['uid'].tolist()}, FILE)"
        ) from error
    except OSError as error:
        raise ValueError(f"{file}: cannot read rollouts: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise ValueError(f"{file}: the tensor file is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: a tensor file must hold a dict of tensors, got {type(found).__name__}")
    if isinstance(found.get("batch"), dict):
        found = {**found["batch"], **(found.get("non_tensor_batch") or {})}
    try:
        yield from data_proto_samples(found, found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_DAMAGED = (
    *(RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, OverflowError, AssertionError),
    BadZipFile,
)
"""What torch.load raises on a file that was cut or overwritten."""


def data_proto_samples(
    batch: Mapping[str, torch.Tensor], non_tensor: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[int, Load]]:
    """Numbers, counted from 1, and what gives the sample line of each. Raises ValueError as `from_data_proto`."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    for name in ("prompts", "responses", "attention_mask"):
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing, got {reprlib.repr(sorted(tensors))}")
    size, prompt_width = _matrix(tensors, "prompts")
    rewards = next((name for name in REWARDS if name in tensors), None)
    if rewards is None:
        raise ValueError(f"there are no rewards: one of the tensors {', '.join(REWARDS)} is needed")
    width = _matrix(tensors, "responses")[1]
    shapes: dict[str, list[tuple[int, ...]]] = {"responses": [(size, width)]}
    shapes |= {"attention_mask": [(size, prompt_width + width)]}
    shapes |= {name: [(size, width), (size, prompt_width + width)] for name in MASKS if name in tensors}
    shapes |= {LOG_PROBS: [(size, width)]} if LOG_PROBS in tensors else {}
    shapes[rewards] = [(size, width)] if rewards != "rewards" else [(size, width), (size,)]
    for name, allowed in shapes.items():
        if tuple(tensors[name].shape) not in allowed:
            raise ValueError(
                f"{name} must have the shape {' or '.join(map(str, allowed))} beside prompts of "
                f"{tuple(tensors['prompts'].shape)}, got {tuple(tensors[name].shape)}"
            )
    uid = non_tensor.get("uid")
    if uid is None or len(uid) != size:
        raise ValueError(
            f"uid must be a list of {size} names, one per sample, got "
            f"{'none' if uid is None else len(uid)}; samples are grouped by it"
        )
    uid = uid.tolist() if isinstance(uid, torch.Tensor) else uid
    for i in range(size):
        yield i + 1, partial(_sample, tensors, rewards, uid[i], i)


def _sample(tensors: Mapping[str, torch.Tensor], rewards: str, uid: Any, i: int) -> dict[str, Any]:
    prompt, response = tensors["prompts"][i].tolist(), tensors["responses"][i].tolist()
    attended = _zeros_and_ones("attention_mask", tensors["attention_mask"][i])
    before, after = attended[: len(prompt)], attended[len(prompt) :]
    if before != sorted(before):
        raise ValueError("attention_mask: the padding of the prompt is not all on its left")
    if after != sorted(after, reverse=True):
        raise ValueError("attention_mask: the padding of the response is not all on its right")
    count = sum(after)
    sample = {
        "group_id": id_of(uid, "uid"),
        "prompt": prompt[len(prompt) - sum(before) :],
        "response": response[:count],
        "reward": _reward(tensors[rewards][i]),
    }
    mask_name = next((name for name in MASKS if name in tensors), None)
    if mask_name is not None:
        mask = _zeros_and_ones(mask_name, tensors[mask_name][i])[-len(response) :]
        if any(mask[count:]):
            raise ValueError(
                f"{mask_name} is 1 at position {mask.index(1, count)}, which attention_mask says is padding"
            )
        sample["loss_mask"] = mask[:count]
    if LOG_PROBS in tensors:
        sample["log_probs"] = tensors[LOG_PROBS][i].tolist()[:count]
    return sample


def _matrix(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, int]:
    tensor = tensors[name]
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be a matrix of integers, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _zeros_and_ones(name: str, row: torch.Tensor) -> list[int]:
    values = row.tolist()
    for position, value in enumerate(values):
        if value not in (0, 1):
            raise ValueError(f"{name} at position {position} must be 0 or 1, got {value}")
    return [int(value) for value in values]


def _reward(row: torch.Tensor) -> float:
    return math.fsum(row.tolist()) if row.ndim else float(row)
