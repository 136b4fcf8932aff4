"""Split prefix groups in megatron-core's own schedules: the prefix once per step, on every pipeline stage.

A split group is three kinds of micro-batches in one ordinary step (1F1B, interleaved, or without a pipeline):

    A   the prefix's pack. Its forward encodes it and exports every layer's keys. In its turn of the backward order it
        only passes zeros on, since the responses have not run.
    B   the parts: ordinary micro-batches whose attention reads the keys and adds to the sums of their gradients.
    C   no pack. Its forward passes an unused tensor on; its backward is that of A, once, after that of all parts.

Nothing of megatron-core's schedules is replaced: order, communication, no_sync, gradient synchronisation and
finalize_model_grads are theirs. Source: Prefix Grouper (arXiv 2506.05433) for the sharing; the split is this package's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.prefix_cache import PrefixCache
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.log_probs import attention_layer_numbers, prefix_hidden_states, unwrap
from megatron_prefix.packing import Pack

PREFIX_ACTIVATIONS = ("keep", "recompute", "offload")

_NOTHING = object()
"""What micro-batches without a loss leave among megatron-core's results."""


def forward_backward_prefix_groups(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    forward_only: bool = False,
    prefix_activations: str = "keep",
    **settings: Any,
) -> list[Any]:
    """megatron-core's forward_backward_func for steps whose prefix groups may be split over micro-batches.

    Arguments and result are those of the function that ``get_forward_backward_func()`` returns. What ``data_iterator``
    yields must be packs, or have their pack as ``.pack``, in the order of `pack_and_split`: a prefix before its parts.
    ``num_microbatches`` counts them all; ``forward_step_func`` is called for those with targets. A loss that
    megatron-core averages over micro-batches is averaged over these.

    Args:
        prefix_activations: what becomes of a prefix's activations until its backward, beyond keys and values: "keep"
            (under the model's own recompute setting), "recompute" (the stage's input is kept, its forward runs again)
            or "offload" (to host memory).

    Raises:
        ValueError: a part whose prefix does not stand before it, a prefix without parts, no micro-batch with responses,
            or pipeline stages with different micro-batches (on every stage, naming the first that differs).
    """
    if prefix_activations not in PREFIX_ACTIVATIONS:
        raise ValueError(
            f"prefix_activations must be one of {', '.join(PREFIX_ACTIVATIONS)}, got {prefix_activations!r}"
        )
    chunks = model if isinstance(model, list) else [model]
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    queues = [_jobs([next(iterator) for _ in range(num_microbatches)], forward_only) for iterator in iterators]
    for queue in queues:
        _check_stages(queue)
    config = unwrap(chunks[0]).config  # the one that megatron-core's schedules read
    idle = _idle_jobs(len(queues[0]), config)
    total = len(queues[0]) + idle
    if not config.calculate_per_token_loss and any(job.kind == "A" and job.has_targets for job in queues[0]):
        raise ValueError("a tree split below trained tokens needs calculate_per_token_loss=True: set it in the config")
    average = 1.0 if config.calculate_per_token_loss else total / sum(job.kind == "B" for job in queues[0])
    for queue in queues:
        queue += [_Job("idle") for _ in range(idle)]
        queue[-1].is_last = True
    ready = [iter(queue) for queue in queues]
    try:
        results = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, forward_step_func, average, prefix_activations),
            data_iterator=ready if isinstance(data_iterator, list) else ready[0],
            model=model,
            num_microbatches=total,
            forward_only=forward_only,
            **settings,
        )
    finally:
        for job in (job for queue in queues for job in queue):
            job.close()
    return [result for result in results if result is not _NOTHING]


@dataclass(eq=False)
class _Job:
    """One micro-batch on one model chunk.

    Attributes:
        kind: "A", "B", "C", or "idle": neither loss nor work, where an interleaved pipeline needs one more.
        item: what the data iterator yielded (A and B).
        begin: the A of a C.
        is_last: of the step: its backward is the one during which megatron-core synchronises gradients.
        ends_prefix: a forward-only part after which no other reads the prefix.
        graph: of an A that has run, held until C.
    """

    kind: str
    item: Any = None
    begin: _Job | None = None
    is_last: bool = False
    ends_prefix: bool = False
    graph: _PrefixGraph | None = None

    @property
    def has_targets(self) -> bool:
        """Whether an A has a loss of its own: in a tree, trained tokens that several parts continue."""
        return bool(self.pack.response_rows.numel())

    @property
    def pack(self) -> Pack:
        return _pack_of(self.item)

    def close(self) -> None:
        """Free what an unfinished step left."""
        self.graph = None
        if self.item is not None and self.pack.prefix is not None:
            self.pack.prefix.cache = None


def _pack_of(item: Any) -> Pack:
    return item if isinstance(item, Pack) else item.pack


def _jobs(items: list[Any], forward_only: bool) -> list[_Job]:
    """The step's micro-batches of one model chunk, with a C behind the last part of every prefix."""
    last_part: dict[int, int] = {}
    begins: dict[int, _Job] = {}
    for i, item in enumerate(items):
        pack = _pack_of(item)
        if pack.prefix is None:
            continue
        key = id(pack.prefix)
        if pack.is_prefix:
            if key in begins:
                raise ValueError(f"micro-batch {i} is a prefix that came before; give every prefix once a step")
            begins[key] = _Job("A", item)
        elif key not in begins:
            raise ValueError(
                f"micro-batch {i} is a part without its prefix before it; keep the order of pack_and_split"
            )
        else:
            last_part[key] = i
    for key, begin in begins.items():
        if key not in last_part:
            rows = begin.pack.layout.num_rows
            raise ValueError(f"a prefix of {rows} rows has no part in this step; keep pack_and_split's packs together")
    jobs: list[_Job] = []
    for i, item in enumerate(items):
        pack = _pack_of(item)
        key = id(pack.prefix)
        if pack.is_prefix:
            jobs.append(begins[key])
            continue
        ends = pack.prefix is not None and last_part[key] == i
        jobs.append(_Job("B", item, ends_prefix=ends and forward_only))
        if ends and not forward_only:
            jobs.append(_Job("C", begin=begins[key]))
    if not any(job.kind == "B" for job in jobs):
        raise ValueError(f"none of the {len(items)} micro-batches has a response; give at least one")
    return jobs


def _check_stages(jobs: list[_Job]) -> None:
    """Raises ValueError on every stage when stages would run different micro-batches, once per step."""
    mine = [job.pack.layout.checksum if job.item is not None else 0 for job in jobs]
    stages = all_gather_object(mine, parallel_state.get_pipeline_model_parallel_group())
    for stage, theirs in enumerate(stages):
        if theirs == stages[0]:
            continue
        same = zip(theirs, stages[0], strict=False)
        first = next((i for i, (a, b) in enumerate(same) if a != b), min(len(theirs), len(stages[0])))
        raise ValueError(
            f"pipeline stages 0 and {stage} have different micro-batches: of {len(stages[0])} and {len(theirs)}, "
            f"number {first} is the first that differs; build the same packs in the same order on every stage"
        )


def _idle_jobs(count: int, config: Any) -> int:
    """How many micro-batches an interleaved pipeline needs beside ``count``: its last group must not be short."""
    if config.virtual_pipeline_model_parallel_size is None:
        return 0
    stages = config.pipeline_model_parallel_size
    group = config.microbatch_group_size_per_vp_stage or stages
    total = max(count, group)
    while 0 < total % group < stages:
        total += 1
    return total - count


def _forward_step(
    forward_step_func: Callable[..., Any],
    average: float,
    prefix_activations: str,
    jobs: Iterator[_Job],
    model: Any,
    *rest: Any,
) -> tuple[Tensor, Callable[..., Any]]:
    """The forward of one micro-batch; ``average`` makes up for those without a loss in megatron-core's mean."""
    job = next(jobs)
    if job.kind == "B":
        output, loss_func = forward_step_func(iter([job.item]), model, *rest)
        if job.ends_prefix:
            _cache_of(job).release(attention_layer_numbers(model))
        return output, partial(_mean_over_parts, loss_func, average)
    received = _received(unwrap(model))
    if job.kind == "A":

        def run() -> Any:
            return forward_step_func(iter([job.item]), model, *rest)

        return _encode_prefix(job, model, received, prefix_activations, run if job.has_targets else None)
    return _RunLater.apply(_anchor(received), job, model, _output_like(job, unwrap(model))), _no_loss


@dataclass
class _PrefixGraph:
    """A prefix on one model chunk between its forward and its backward.

    Attributes:
        received: the stage's input, a leaf (None on the first stage).
        output: what backward starts from, None where the forward is to run again.
        again: runs the forward again and returns what backward starts from.
        like: of the shape, dtype and device of the output, without its storage.
    """

    received: Tensor | None
    output: Tensor | None
    again: Callable[[], Tensor]
    like: Tensor

    def backward(self, grad: Tensor) -> Tensor | None:
        """Run it with the gradient of the output; returns that of ``received``."""
        torch.autograd.backward(self.again() if self.output is None else self.output, grad)
        return None if self.received is None else self.received.grad


def _encode_prefix(
    job: _Job, model: Any, received: Tensor | None, activations: str, run: Callable[[], Any] | None
) -> tuple[Tensor, Callable[..., Any]]:
    """A: the stage's output (or loss, where there are targets) without its graph, which waits for C."""
    shared, inner = job.pack.prefix, unwrap(model)
    assert shared is not None
    if shared.cache is None:  # another model chunk of this rank may have opened it
        shared.cache = PrefixCache(shared.num_rows)
    leaf = None if received is None else received.detach().requires_grad_()
    has_loss = run is not None and inner.post_process

    def forward() -> tuple[Tensor, Any]:
        inner.set_input_tensor(leaf)
        return (prefix_hidden_states(model, job.pack), None) if run is None else run()

    def again() -> Tensor:
        output, loss_func = forward()
        return loss_func(output)[0] if has_loss else output

    with _holding(activations):
        output, loss_func = forward()
    value = output.new_zeros(()) if has_loss else output.detach()
    if torch.is_grad_enabled():
        kept = None if has_loss or activations == "recompute" else output
        job.graph = _PrefixGraph(leaf, kept, again, value.new_zeros(()).expand(value.shape))
    held = _Held.apply(_anchor(received), value)
    return held, partial(_loss_of_prefix, job, loss_func, output, activations) if has_loss else _no_loss


def _holding(activations: str) -> Any:
    """How a prefix's forward keeps what its backward needs."""
    if activations == "recompute":
        return torch.no_grad()
    if activations == "offload":
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    return contextlib.nullcontext()


def _loss_of_prefix(
    job: _Job, loss_func: Any, prefix_output: Tensor, activations: str, output: Tensor, **how: Any
) -> Any:
    """The loss of a prefix that has targets; its backward waits for C, so megatron-core gets a zero to start from."""
    result = loss_func(prefix_output, **how)
    if how.get("non_loss_data"):
        return result
    if job.graph is not None and activations != "recompute":
        job.graph.output = result[0]
    return (output.sum(), *result[1:])


def _received(inner: Any) -> Tensor | None:
    """What the stage before sent, None on the first stage."""
    return None if inner.pre_process else inner.decoder.input_tensor


def _anchor(received: Tensor | None) -> Tensor:
    """A tensor to hang a graph on where a first stage received none."""
    return torch.zeros((), requires_grad=True) if received is None else received


def _output_like(job: _Job, inner: Any) -> Tensor:
    """An unused stage output: of the shape of the prefix's for C, of as few rows as there can be for an idle one."""
    if job.begin is not None and job.begin.graph is not None:
        like = job.begin.graph.like
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    like = next(inner.parameters())
    return like.new_zeros(1, 1, inner.config.hidden_size, dtype=inner.config.pipeline_dtype or like.dtype)


def _cache_of(job: _Job) -> PrefixCache:
    shared = job.pack.prefix
    assert shared is not None and shared.cache is not None
    return shared.cache


class _Held(torch.autograd.Function):
    """Passes on a value and, in backward, zeros: the real gradient comes with C."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), None


class _RunLater(torch.autograd.Function):
    """Passes on an unused value; in backward, runs the backward of the prefix (C), or nothing (idle)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, job: _Job, model: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        ctx.job, ctx.model = job, model
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (anchor,) = ctx.saved_tensors
        job: _Job = ctx.job
        reached: set[torch.nn.Parameter] = set()
        result = torch.zeros_like(anchor)
        with torch.enable_grad(), _recording(ctx.model.parameters() if job.is_last else (), reached):
            if job.begin is not None:
                assert job.begin.graph is not None
                received_grad = job.begin.graph.backward(grad)
                result = result if received_grad is None else received_grad
                job.begin.graph = None
                _cache_of(job.begin).release(attention_layer_numbers(ctx.model))
            if job.is_last:
                _touch(parameter for parameter in ctx.model.parameters() if parameter not in reached)
        return result, None, None, None


class _recording:  # noqa: N801  (a context manager, used like a function)
    """Collects the parameters whose gradients a backward accumulates."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], reached: set[torch.nn.Parameter]) -> None:
        self.parameters, self.reached = parameters, reached
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        self.handles = [p.register_post_accumulate_grad_hook(self.reached.add) for p in self.parameters]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _touch(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters a gradient of 0, so that an overlapped reduction, which waits for all of them, goes on.

    The last layer's MLP, the final norm and the head have no part in the prefix's backward.
    """
    nothing = [parameter.reshape(-1)[:0].sum() for parameter in parameters if parameter.requires_grad]
    if nothing:
        torch.stack(nothing).sum().backward()


def _no_loss(output: Tensor, non_loss_data: bool = False) -> Any:
    """The loss function of a micro-batch without one."""
    if non_loss_data:
        return _NOTHING
    return output.sum(), torch.zeros((), dtype=torch.int, device=output.device), _NOTHING


def _mean_over_parts(loss_func: Any, average: float, output: Tensor, **how: Any) -> Any:
    result = loss_func(output, **how)
    if how.get("non_loss_data") or average == 1:
        return result
    return (result[0] * average, *result[1:])
