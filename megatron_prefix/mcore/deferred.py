"""A backward that runs in another micro-batch's turn than its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class DeferredGraph:
    """What ran in one micro-batch, to be differentiated in another.

    Attributes:
        received: the stage's input, a leaf (None on the first stage).
        output: what backward starts from, None where the forward is to run again.
        again: runs the forward again and returns what backward starts from.
        like: of the shape, dtype and device of the stage's output, without its storage.
    """

    received: Tensor | None
    output: Tensor | None
    again: Callable[[], Tensor]
    like: Tensor

    def backward(self, grad: Tensor) -> Tensor | None:
        """Run it with the gradient of the output; returns that of ``received``."""
        torch.autograd.backward(self.again() if self.output is None else self.output, grad)
        return None if self.received is None else self.received.grad


def anchor(received: Tensor | None) -> Tensor:
    """A tensor to hang a graph on, where a first stage received none."""
    return torch.zeros((), requires_grad=True) if received is None else received


def with_rows(x: Tensor, rows: int) -> Tensor:
    """``x`` [T, ...] with its first rows only, or with rows of zeros behind."""
    if rows <= len(x):
        return x if rows == len(x) else x[:rows]
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def run_later(
    received: Tensor | None,
    value: Tensor,
    backward: Callable[[Tensor], Tensor | None],
    touched: Iterable[torch.nn.Parameter],
) -> Tensor:
    """``value`` as a stage's output whose backward is ``backward``, which returns the gradient of ``received`` or None.

    None gives ``received`` zeros. Those of the ``touched`` parameters that ``backward`` does not reach get a gradient
    of 0: an overlapped reduction waits for all of a bucket, and the last layer's MLP, the final norm and the head have
    no part in a prefix's.
    """
    return _RunLater.apply(anchor(received), value, backward, list(touched))


class _RunLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, value: Tensor, backward: Any, touched: list[torch.nn.Parameter]) -> Tensor:
        ctx.like = received.new_zeros(()).expand(received.shape)
        ctx.backward_of_value, ctx.touched = backward, touched
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), _reached(ctx.touched) as reached:
            result = ctx.backward_of_value(grad)
            missed = [parameter for parameter in ctx.touched if parameter not in reached]
            if missed:
                torch.stack([parameter.reshape(-1)[:0].sum() for parameter in missed]).sum().backward()
        return _zeros(ctx.like) if result is None else result, None, None, None


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


@contextmanager
def _reached(parameters: Iterable[torch.nn.Parameter]) -> Iterator[set[torch.nn.Parameter]]:
    """Collects the parameters whose gradients are accumulated meanwhile."""
    reached: set[torch.nn.Parameter] = set()
    handles = [parameter.register_post_accumulate_grad_hook(reached.add) for parameter in parameters]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()
