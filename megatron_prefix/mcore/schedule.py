"""Split prefix groups in megatron-core's own schedules: the prefix once per step, on every pipeline stage.

A split group is three kinds of micro-batches in one ordinary step (1F1B, interleaved, or without a pipeline):

    A   the prefix's pack. Its forward encodes it and exports every layer's keys. In its turn of the backward order it
        only passes zeros on, since the responses have not run.
    B   the parts: ordinary micro-batches whose attention reads the keys and adds to the sums of their gradients.
    C   no pack. Its forward passes an unused tensor on; its backward is that of A, once, after that of all parts.

Where a C would come directly before the A of another prefix, the two are one micro-batch, with that forward and this
backward. Their rows differ in number: what stages send each other then has the larger one, with zeros behind the other.

Nothing of megatron-core's schedules is replaced: order, communication, no_sync, gradient synchronisation and
finalize_model_grads are theirs. Source: Prefix Grouper (arXiv 2506.05433) for the sharing; the split is this package's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from torch import Tensor

from megatron_prefix.attention.prefix_cache import PREFIX_GRAD_DTYPES, PrefixCache
from megatron_prefix.mcore.deferred import DeferredGraph, run_later, with_rows
from megatron_prefix.mcore.log_probs import attention_layer_numbers, prefix_hidden_states
from megatron_prefix.mcore.schedule_trace import ScheduleTrace
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.step_errors import StepErrors
from megatron_prefix.mcore.step_jobs import Job, check_stages, in_turns, jobs_of
from megatron_prefix.mcore.step_plan import ordered_jobs

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
    prefix_grad_dtype: str = "fp32",
    max_live_prefixes: int | None = None,
    trace: ScheduleTrace | None = None,
    pg_collection: Any = None,
    **settings: Any,
) -> list[Any]:
    """megatron-core's forward_backward_func for steps whose prefix groups may be split over micro-batches.

    Arguments and result are those of the function that ``get_forward_backward_func()`` returns. What ``data_iterator``
    yields must be packs, or have their pack as ``.pack``, in the order of `pack_and_split`: a prefix before its parts.
    ``num_microbatches`` counts them all; ``forward_step_func`` is called for those with targets. A loss that
    megatron-core averages over micro-batches is averaged over these. Steps with a backward run in the order that
    `order_jobs` finds; results come in that of the iterator.

    Args:
        prefix_activations: what becomes of a prefix's activations until its backward, beyond keys and values: "keep"
            (under the model's own recompute setting), "recompute" (the stage's input is kept, its forward runs again)
            or "offload" (to host memory).
        prefix_grad_dtype: in which the gradients of a prefix's keys add up over its parts: "fp32" (fp64 in an fp64
            model) or "param", the dtype of the parameters.
        max_live_prefixes: the most split groups that a pipeline stage may hold the prefixes of: more of them make for
            smaller bubbles. None for as few as keep the bubble at megatron-core's, see `order_jobs`; `plan_step` tells
            both numbers.
        trace: records this step.
        pg_collection: the model's process groups; None for those of megatron-core's ``parallel_state``.

    Raises:
        ValueError: an unknown setting, a part whose prefix does not stand before it, a prefix without parts, no
            micro-batch with responses, or pipeline stages with different micro-batches (on every stage, naming the
            first that differs).
        Exception: what ``forward_step_func`` raised; on all other ranks a RuntimeError that names it.
    """
    prefixes = PrefixSettings(prefix_activations, prefix_grad_dtype, max_live_prefixes)
    stages = parallel_state.get_pipeline_model_parallel_group() if pg_collection is None else pg_collection.pp
    return run_split_groups(
        forward_backward_no_pipelining if stages.size() == 1 else get_forward_backward_func(),
        stages,
        prefixes,
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        forward_only=forward_only,
        trace=trace,
        pg_collection=pg_collection,
        **settings,
    )


@dataclass(frozen=True)
class PrefixSettings:
    """What becomes of the prefixes of split groups, see `forward_backward_prefix_groups`.

    Raises:
        ValueError: an unknown setting.
    """

    activations: str = "keep"
    grad_dtype: str = "fp32"
    max_live: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in PREFIX_ACTIVATIONS:
            raise ValueError(
                f"prefix_activations must be one of {', '.join(PREFIX_ACTIVATIONS)}, got {self.activations!r}"
            )
        if self.grad_dtype not in PREFIX_GRAD_DTYPES:
            raise ValueError(
                f"prefix_grad_dtype must be one of {', '.join(PREFIX_GRAD_DTYPES)}, got {self.grad_dtype!r}"
            )


def run_split_groups(
    schedule: Callable[..., list[Any]],
    stages: Any,
    prefixes: PrefixSettings,
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    forward_only: bool = False,
    trace: ScheduleTrace | None = None,
    **settings: Any,
) -> list[Any]:
    """`forward_backward_prefix_groups` by another schedule than megatron-core's.

    Args:
        schedule: called with the arguments of megatron-core's ``forward_backward_no_pipelining``, of which A, B and C
            are ordinary micro-batches, and ``settings``.
        stages: the pipeline's process group.
        prefixes: of split groups.
    """
    chunks = model if isinstance(model, list) else [model]
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    items = [list(islice(iterator, num_microbatches)) for iterator in iterators]
    for mine in items:
        check_stages(mine, stages)
    queues = [jobs_of(mine, num_microbatches, forward_only) for mine in items]
    config = unwrap(chunks[0]).config  # the one that megatron-core's schedules read
    packs = [job.pack for job in queues[0] if job.item is not None]
    plan = ordered_jobs(packs, config, stages.size(), prefixes.max_live, forward_only)
    turns, total = [turn for turn, _ in plan], len(plan)
    if not config.calculate_per_token_loss and any(job.kind == "A" and job.has_targets for job in queues[0]):
        raise ValueError("a tree split below trained tokens needs calculate_per_token_loss=True: set it in the config")
    average = 1.0 if config.calculate_per_token_loss else total / sum(job.kind == "B" for job in queues[0])
    for queue in queues:
        queue += [Job("idle") for begin, _ in turns if begin >= len(queue)]
        queue[:] = in_turns(queue, turns)
        queue[-1].is_last = True
        for number, job in enumerate(queue):
            job.number = number
    ready = [iter(queue) for queue in queues]
    step = _Step(forward_step_func, average, prefixes, StepErrors())
    forward = step.forward
    if trace is not None:
        trace.start(chunks, [job for _, job in plan], stages)
        forward = trace.around(forward)
    try:
        results = schedule(
            forward_step_func=forward,
            data_iterator=ready if isinstance(data_iterator, list) else ready[0],
            model=model,
            num_microbatches=total,
            forward_only=forward_only,
            **settings,
        )
        step.errors.raise_first(next(chunks[0].parameters()).device, forward_only=forward_only)
    finally:
        for job in (job for queue in queues for job in queue):
            job.close()
    found = sorted(zip(turns, results, strict=False), key=lambda pair: pair[0])  # only the last stage has results
    return [result for _, result in found if result is not _NOTHING]


@dataclass(frozen=True)
class _Step:
    """The forward of a step's micro-batches.

    Attributes:
        forward_step_func: the caller's.
        average: makes up for micro-batches without a loss in megatron-core's mean.
        prefixes: of split groups.
        errors: after the first one, the rest of the step does no work.
    """

    forward_step_func: Callable[..., Any]
    average: float
    prefixes: PrefixSettings
    errors: StepErrors

    def forward(self, jobs: Iterator[Job], model: Any, *rest: Any) -> tuple[Tensor, Callable[..., Any]]:
        """One micro-batch, as megatron-core calls its forward_step_func."""
        job = next(jobs)
        received = _received(unwrap(model))
        if self.errors.error is None:
            with self.errors.during(job.number):
                return self._run(job, received, model, *rest)
        idle = Job("idle", is_last=job.is_last)
        return _output_of_turn(idle, received, model), _no_loss

    def _run(self, job: Job, received: Tensor | None, model: Any, *rest: Any) -> tuple[Tensor, Callable[..., Any]]:
        def run() -> Any:
            return self.forward_step_func(iter([job.item]), model, *rest)

        if job.kind == "B":
            output, loss_func = run()
            if job.ends_prefix:
                _cache_of(job).release(attention_layer_numbers(model))
            return output, partial(self._loss, job.number, loss_func)
        if job.kind == "A":
            shared = job.pack.prefix
            assert shared is not None
            if shared.cache is None:  # another model chunk of this rank may have opened it
                shared.cache = PrefixCache(shared.num_rows, self.prefixes.grad_dtype)
            return _encode_prefix(job, model, received, self.prefixes.activations, run if job.has_targets else None)
        return _output_of_turn(job, received, model), _no_loss

    def _loss(self, number: int, loss_func: Any, output: Tensor, **how: Any) -> Any:
        with self.errors.during(number):
            result = loss_func(output, **how)
            if how.get("non_loss_data") or self.average == 1:
                return result
            return (result[0] * self.average, *result[1:])
        return _no_loss(output.sum() * 0, **how)


def _encode_prefix(
    job: Job, model: Any, received: Tensor | None, activations: str, run: Callable[[], Any] | None
) -> tuple[Tensor, Callable[..., Any]]:
    """A: the stage's output without its graph, which waits for C, and the loss where there are targets."""
    inner = unwrap(model)
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
    if torch.is_grad_enabled():
        kept = None if has_loss or activations == "recompute" else output
        zero = output.new_zeros(())
        job.graph = DeferredGraph(leaf, kept, again, zero if has_loss else zero.expand(output.shape))
    passed_on = _output_of_turn(job, received, model, output.detach())
    return passed_on, partial(_loss_of_prefix, job, loss_func, output, activations) if has_loss else _no_loss


def _holding(activations: str) -> Any:
    """How a prefix's forward keeps what its backward needs."""
    if activations == "recompute":
        return torch.no_grad()
    if activations == "offload":
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    return contextlib.nullcontext()


def _loss_of_prefix(
    job: Job, loss_func: Any, prefix_output: Tensor, activations: str, output: Tensor, **how: Any
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


def _output_of_turn(job: Job, received: Tensor | None, model: Any, encoded: Tensor | None = None) -> Tensor:
    """A, C, both in one, and idle: what the stage passes on, whose backward is that of a prefix or none.

    Args:
        encoded: the output of an A.
    """
    inner = unwrap(model)
    ended = None if job.ends is None or job.ends.graph is None else job.ends.graph.like

    def backward(grad: Tensor) -> Tensor | None:
        if ended is None:
            return None
        assert job.ends is not None and job.ends.graph is not None
        result = job.ends.graph.backward(
            grad.expand(ended.shape) if inner.post_process else with_rows(grad, len(ended))
        )
        job.ends.graph = None
        _cache_of(job.ends).release(attention_layer_numbers(model))
        return None if result is None or received is None else with_rows(result, len(received))

    overlap = job.is_last and getattr(getattr(model, "ddp_config", None), "overlap_grad_reduce", True)
    touched = [parameter for parameter in model.parameters() if overlap and parameter.requires_grad]
    return run_later(received, _value_of_turn(inner, encoded, ended), backward, touched)


def _value_of_turn(inner: Any, encoded: Tensor | None, ended: Tensor | None) -> Tensor:
    """A stage's output with the rows of the prefix that begins or of that which ends, whichever has more.

    One row where there is neither. On the last stage a zero for the backward to begin at, of the dtype of losses.
    """
    like = next(inner.parameters())
    if inner.post_process:
        return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
    if encoded is None:
        encoded = like.new_zeros(1, 1, inner.config.hidden_size, dtype=inner.config.pipeline_dtype)
    return encoded if ended is None else with_rows(encoded, max(len(encoded), len(ended)))


def _cache_of(job: Job) -> PrefixCache:
    shared = job.pack.prefix
    assert shared is not None and shared.cache is not None
    return shared.cache


def _no_loss(output: Tensor, non_loss_data: bool = False) -> Any:
    """The loss function of a micro-batch without one."""
    if non_loss_data:
        return _NOTHING
    return output.sum(), torch.zeros((), dtype=torch.int, device=output.device), _NOTHING
