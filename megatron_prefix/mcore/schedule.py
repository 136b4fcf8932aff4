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
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.layout import PartLayout
from megatron_prefix.mcore.deferred import DeferredGraph, hold_back, run_later
from megatron_prefix.mcore.log_probs import attention_layer_numbers, prefix_hidden_states
from megatron_prefix.mcore.schedule_trace import ScheduleTrace
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.step_errors import StepErrors
from megatron_prefix.mcore.step_plan import ordered_jobs
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
    if prefix_activations not in PREFIX_ACTIVATIONS:
        raise ValueError(
            f"prefix_activations must be one of {', '.join(PREFIX_ACTIVATIONS)}, got {prefix_activations!r}"
        )
    if prefix_grad_dtype not in PREFIX_GRAD_DTYPES:
        raise ValueError(f"prefix_grad_dtype must be one of {', '.join(PREFIX_GRAD_DTYPES)}, got {prefix_grad_dtype!r}")
    chunks = model if isinstance(model, list) else [model]
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    items = [list(islice(iterator, num_microbatches)) for iterator in iterators]
    stages = parallel_state.get_pipeline_model_parallel_group() if pg_collection is None else pg_collection.pp
    for mine in items:
        _check_stages(mine, stages)
    queues = [_jobs(mine, num_microbatches, forward_only) for mine in items]
    config = unwrap(chunks[0]).config  # the one that megatron-core's schedules read
    packs = [job.pack for job in queues[0] if job.item is not None]
    plan = ordered_jobs(packs, config, stages.size(), max_live_prefixes, forward_only)
    total = len(plan)
    if not config.calculate_per_token_loss and any(job.kind == "A" and job.has_targets for job in queues[0]):
        raise ValueError("a tree split below trained tokens needs calculate_per_token_loss=True: set it in the config")
    average = 1.0 if config.calculate_per_token_loss else total / sum(job.kind == "B" for job in queues[0])
    for queue in queues:
        queue += [_Job("idle") for _ in range(total - len(queue))]
        queue[:] = [queue[given] for given, _ in plan]
        queue[-1].is_last = True
        for number, job in enumerate(queue):
            job.number = number
    ready = [iter(queue) for queue in queues]
    step = _Step(forward_step_func, average, prefix_activations, prefix_grad_dtype, StepErrors())
    forward = step.forward
    if trace is not None:
        trace.start(chunks, [job for _, job in plan], stages)
        forward = trace.around(forward)
    try:
        schedule = forward_backward_no_pipelining if stages.size() == 1 else get_forward_backward_func()
        results = schedule(
            forward_step_func=forward,
            data_iterator=ready if isinstance(data_iterator, list) else ready[0],
            model=model,
            num_microbatches=total,
            forward_only=forward_only,
            pg_collection=pg_collection,
            **settings,
        )
        step.errors.raise_first(next(chunks[0].parameters()).device, forward_only=forward_only)
    finally:
        for job in (job for queue in queues for job in queue):
            job.close()
    found = sorted(zip(plan, results, strict=False), key=lambda pair: pair[0][0])  # stages but the last have no results
    return [result for _, result in found if result is not _NOTHING]


@dataclass(eq=False)
class _Job:
    """One micro-batch on one model chunk.

    Attributes:
        kind: "A", "B", "C", or "idle": neither loss nor work, where an interleaved pipeline needs one more.
        item: what the data iterator yielded (A and B).
        begin: the A of a C.
        number: in the step, from 0, in the order of the forwards.
        is_last: of the step: its backward is the one during which megatron-core synchronises gradients.
        ends_prefix: a forward-only part after which no other reads the prefix.
        graph: of an A that has run, held until C.
    """

    kind: str
    item: Any = None
    begin: _Job | None = None
    number: int = 0
    is_last: bool = False
    ends_prefix: bool = False
    graph: DeferredGraph | None = None

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


def _jobs(items: list[Any], num_microbatches: int, forward_only: bool) -> list[_Job]:
    """The step's micro-batches of one model chunk, with a C behind the last part of every prefix."""
    if len(items) < num_microbatches:
        raise ValueError(f"the data iterator ended after {len(items)} of {num_microbatches} micro-batches")
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
            _check_part(i, pack)
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


def _check_part(number: int, pack: Pack) -> None:
    """Raises ValueError for a part that was made for another prefix."""
    assert pack.prefix is not None and isinstance(pack.layout, PartLayout)
    if pack.layout.num_cached_rows > pack.prefix.num_rows:
        raise ValueError(
            f"micro-batch {number} reads {pack.layout.num_cached_rows} rows of a prefix that has "
            f"{pack.prefix.num_rows}; keep pack_and_split's packs together"
        )


def _check_stages(items: list[Any], group: Any) -> None:
    """Raises ValueError on every stage when stages would run different micro-batches, once per step."""
    packs = [_pack_of(item) for item in items]
    prefixes: dict[int, int] = {}  # numbered as they come: parts of equal layout may belong to different groups
    mine = [(pack.layout.checksum, prefixes.setdefault(id(pack.prefix), len(prefixes))) for pack in packs]
    stages = all_gather_object(mine, group)
    for stage, theirs in enumerate(stages):
        if theirs == stages[0]:
            continue
        same = zip(theirs, stages[0], strict=False)
        first = next((i for i, (a, b) in enumerate(same) if a != b), min(len(theirs), len(stages[0])))
        raise ValueError(
            f"pipeline stages 0 and {stage} have different micro-batches: of {len(stages[0])} and {len(theirs)}, "
            f"number {first} is the first that differs; build the same packs in the same order on every stage"
        )


@dataclass(frozen=True)
class _Step:
    """The forward of a step's micro-batches.

    Attributes:
        forward_step_func: the caller's.
        average: makes up for micro-batches without a loss in megatron-core's mean.
        prefix_activations, prefix_grad_dtype: see `forward_backward_prefix_groups`.
        errors: after the first one, the rest of the step does no work.
    """

    forward_step_func: Callable[..., Any]
    average: float
    prefix_activations: str
    prefix_grad_dtype: str
    errors: StepErrors

    def forward(self, jobs: Iterator[_Job], model: Any, *rest: Any) -> tuple[Tensor, Callable[..., Any]]:
        """One micro-batch, as megatron-core calls its forward_step_func."""
        job = next(jobs)
        received = _received(unwrap(model))
        if self.errors.error is None:
            with self.errors.during(job.number):
                return self._run(job, received, model, *rest)
        idle = _Job("idle", is_last=job.is_last)
        return _later(idle, received, model), _no_loss

    def _run(self, job: _Job, received: Tensor | None, model: Any, *rest: Any) -> tuple[Tensor, Callable[..., Any]]:
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
                shared.cache = PrefixCache(shared.num_rows, self.prefix_grad_dtype)
            return _encode_prefix(job, model, received, self.prefix_activations, run if job.has_targets else None)
        return _later(job, received, model), _no_loss

    def _loss(self, number: int, loss_func: Any, output: Tensor, **how: Any) -> Any:
        with self.errors.during(number):
            result = loss_func(output, **how)
            if how.get("non_loss_data") or self.average == 1:
                return result
            return (result[0] * self.average, *result[1:])
        return _no_loss(output.sum() * 0, **how)


def _encode_prefix(
    job: _Job, model: Any, received: Tensor | None, activations: str, run: Callable[[], Any] | None
) -> tuple[Tensor, Callable[..., Any]]:
    """A: the stage's output (or loss, where there are targets) without its graph, which waits for C."""
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
    value = output.new_zeros(()) if has_loss else output.detach()
    if torch.is_grad_enabled():
        kept = None if has_loss or activations == "recompute" else output
        job.graph = DeferredGraph(leaf, kept, again, value.new_zeros(()).expand(value.shape))
    held = hold_back(received, value)
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


def _later(job: _Job, received: Tensor | None, model: Any) -> Tensor:
    """C and idle: an unused output, and the backward of a prefix or none."""

    def backward(grad: Tensor) -> Tensor | None:
        if job.begin is None or job.begin.graph is None:
            return None
        result = job.begin.graph.backward(grad)
        job.begin.graph = None
        _cache_of(job.begin).release(attention_layer_numbers(model))
        return result

    overlap = getattr(getattr(model, "ddp_config", None), "overlap_grad_reduce", True)
    touched = [parameter for parameter in model.parameters() if parameter.requires_grad and overlap and job.is_last]
    return run_later(received, _output_like(job, unwrap(model)), backward, touched)


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


def _no_loss(output: Tensor, non_loss_data: bool = False) -> Any:
    """The loss function of a micro-batch without one."""
    if non_loss_data:
        return _NOTHING
    return output.sum(), torch.zeros((), dtype=torch.int, device=output.device), _NOTHING
