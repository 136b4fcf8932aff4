"""Every collective of the package. Groups come from the caller; a group of one rank (or None) costs nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks of ``group``; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process's rank in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum ``x`` over ``group`` in place; returns ``x``."""
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """Maximum of ``x`` over ``group`` in place; returns ``x``."""
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def all_gather_object(value: Any, group: Group) -> list[Any]:
    """One Python object of every rank, in rank order."""
    size = group_size(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def barrier(group: Group) -> None:
    """Wait until every rank of ``group`` is here."""
    if group_size(group) > 1:
        dist.barrier(group=group)


def device_of(group: Group) -> torch.device:
    """The device that tensors must be on for a collective of ``group``."""
    if group is not None and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
