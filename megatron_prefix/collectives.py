"""Every collective of the package. Groups come from the caller; a group of one rank (or None) costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
T = TypeVar("T")


def group_size(group: Group) -> int:
    """Ranks of ``group``; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process's rank in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def share_of_rank(count: int, group: Group) -> range:
    """The part of ``count`` items that is this rank's: even, and in rank order."""
    rank, size = group_rank(group), group_size(group)
    return range(rank * count // size, (rank + 1) * count // size)


def group_of_this_rank() -> dist.ProcessGroup:
    """A group of this process alone. Every process calls it: making groups is collective."""
    return _group_with_this_rank([[rank] for rank in range(dist.get_world_size())])


def two_levels_of_groups(
    inner_size: int, timeout: timedelta | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """All processes by ``inner_size`` neighbours, and this one with its counterparts among other neighbours.

    The groups that megatron-core makes for hierarchical_context_parallel_sizes. Every process calls it.

    Args:
        inner_size: divides the number of processes.
        timeout: of a collective that hangs; None is torch's own.
    """
    ranks = range(dist.get_world_size())
    neighbours = [ranks[first : first + inner_size] for first in ranks[::inner_size]]
    counterparts = [ranks[first::inner_size] for first in range(inner_size)]
    return _group_with_this_rank(neighbours, timeout), _group_with_this_rank(counterparts, timeout)


def _group_with_this_rank(groups: Sequence[Sequence[int]], timeout: timedelta | None = None) -> dist.ProcessGroup:
    made = [dist.new_group(list(ranks), timeout=timeout) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if dist.get_rank() in ranks)


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


def any_rank(flag: bool, group: Group) -> bool:
    """Whether ``flag`` is set on any rank of ``group``."""
    return bool(all_reduce_max(torch.tensor(int(flag), device=device_of(group)), group))


def broadcast(x: Tensor, src: int, group: Group) -> Tensor:
    """Give every rank of ``group`` the contiguous ``x`` of its rank ``src``, in place; returns ``x``."""
    if group is not None and group.size() > 1:
        dist.broadcast(x, src=dist.get_global_rank(group, src), group=group)
    return x


def all_gather(x: Tensor, group: Group) -> list[Tensor]:
    """``x`` of every rank, in rank order; the same shape and dtype on all."""
    if group_size(group) == 1:
        return [x]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def all_gather_object(value: Any, group: Group) -> list[Any]:
    """One Python object of every rank, in rank order."""
    size = group_size(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def on_all_ranks(action: Callable[[], T], group: Group, kind: type[Exception] = OSError) -> list[T]:
    """Call ``action``, which must hold no collective, on every rank; what it returns there, in rank order.

    Raises:
        Exception: one of ``kind`` of any rank, on all of them.
    """
    found: T | None = None
    failed: Exception | None = None
    try:
        found = action()
    except kind as error:
        failed = error
    results = all_gather_object((found, None if failed is None else str(failed)), group)
    reasons = [reason for _, reason in results if reason is not None]
    if reasons:
        raise kind(reasons[0]) from failed
    return [result for result, _ in results]


def all_gather_ints(values: Sequence[int], group: Group) -> list[tuple[int, ...]]:
    """A few integers of every rank, in rank order."""
    mine = torch.tensor(values, dtype=torch.long, device=device_of(group))
    if group_size(group) == 1:
        return [tuple(values)]
    parts = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [tuple(part) for part in torch.stack(parts).tolist()]


def all_gather_uneven(x: Tensor, counts: Sequence[int], group: Group) -> list[Tensor]:
    """Vectors of all ranks, in rank order; rank r gives ``counts[r]`` entries."""
    padded = x.new_zeros(max(counts))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def barrier(group: Group) -> None:
    """Wait until every rank of ``group`` is here."""
    if group_size(group) > 1:
        dist.barrier(group=group)


def device_of(group: Group) -> torch.device:
    """The device that tensors must be on for a collective of ``group``."""
    if group is not None and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass
class Traffic:
    """What one rank has sent and received through the functions below, in bytes (parts for oneself do not count).

    ``waited`` counts the seconds that its host waited for it; on CUDA the host goes on and the stream waits.
    """

    sent: int = 0
    received: int = 0
    waited: float = 0.0


@dataclass
class Pending:
    """A tensor on its way. `wait` returns it; what is sent stays alive until then."""

    received: Tensor
    sent: Tensor
    works: list[dist.Work]
    traffic: Traffic | None = None

    def wait(self) -> Tensor:
        """Block (on CUDA: make the current stream wait) until the tensor is here."""
        started = time.perf_counter()
        for work in self.works:
            work.wait()
        if self.traffic is not None:
            self.traffic.waited += time.perf_counter() - started
        return self.received


def start_exchange(
    send: Tensor, dst: int, receive_shape: Sequence[int], src: int, group: Group, traffic: Traffic | None = None
) -> Pending:
    """Send a tensor to one rank of ``group`` while another tensor comes from one. Empty tensors are not sent at all.

    Args:
        send: contiguous.
        dst, src: ranks in the group.
        receive_shape: of the tensor that comes, in the dtype of ``send``.
    """
    received = send.new_empty(receive_shape)
    assert group is not None
    operations = []
    if send.numel():
        operations.append(dist.P2POp(dist.isend, send, group=group, group_peer=dst))
    if received.numel():
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=src))
    _count(traffic, send.nbytes, received.nbytes)
    return Pending(received, send, dist.batch_isend_irecv(operations) if operations else [], traffic)


def start_all_to_all(
    send: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    traffic: Traffic | None = None,
) -> Pending:
    """Part i of a flat tensor goes to rank i of ``group``; the parts that come are concatenated in rank order.

    Args:
        send: contiguous [sum(send_counts)].
        send_counts, receive_counts: elements for and from each rank.
    """
    received = send.new_empty(sum(receive_counts))
    rank = group_rank(group)
    work = dist.all_to_all_single(received, send, list(receive_counts), list(send_counts), group=group, async_op=True)
    size = send.element_size()
    _count(traffic, size * (sum(send_counts) - send_counts[rank]), size * (sum(receive_counts) - receive_counts[rank]))
    return Pending(received, send, [work], traffic)


def _count(traffic: Traffic | None, sent: int, received: int) -> None:
    if traffic is not None:
        traffic.sent += sent
        traffic.received += received
