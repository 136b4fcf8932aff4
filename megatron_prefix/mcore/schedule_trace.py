"""When the micro-batches of a step work on each pipeline stage: what `forward_backward_prefix_groups` can record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.pipeline_plan import JobSpan, PipelineJob, PipelineRun


class ScheduleTrace:
    """Records one step at a time: forwards and backwards of every model chunk of this rank, without what they wait for.

    A forward lasts from the call of the forward step to the end of its loss function. A backward begins when autograd
    reaches the output and ends when it has left the graph; what it does between, tensor-parallel collectives and
    overlapped reductions included, counts as work. On a GPU every start and end waits for the device, so that a traced
    step is slower. Clocks of stages are comparable on one machine only.
    """

    def __init__(self) -> None:
        self.jobs: tuple[PipelineJob, ...] = ()
        self.spans: list[JobSpan] = []
        self._chunks: list[Any] = []
        self._started: list[int] = []
        self._stages: Any = None

    def start(self, chunks: Sequence[Any], jobs: Sequence[PipelineJob], stages: Any) -> None:
        """Begin a step of ``jobs`` on this rank's model chunks, one of the ``stages`` of a pipeline's group."""
        self.jobs, self.spans, self._stages = tuple(jobs), [], stages
        self._chunks, self._started = list(chunks), [0] * len(chunks)

    def around(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_step`` of a megatron-core schedule, recorded."""

        def step(iterator: Any, model: Any, *rest: Any) -> tuple[Tensor, Callable[..., Any]]:
            chunk = next(i for i, each in enumerate(self._chunks) if each is model)
            number = self._started[chunk]
            self._started[chunk] += 1
            span = JobSpan(self._stages.rank(), chunk, number, self.jobs[number].kind, False)
            forward = _Timer(self.spans, span)
            output, loss_func = forward_step(iterator, model, *rest)
            forward.stop()
            backward = replace(span, kind=self.jobs[number].half(True).kind, backward=True)
            _time_backward(output, self.spans, backward)

            def loss(output: Tensor, **how: Any) -> Any:
                result = loss_func(output, **how)
                forward.stop()
                if not how.get("non_loss_data"):
                    _time_backward(result[0], self.spans, backward)
                return result

            return output, loss

        return step

    def gather(self) -> PipelineRun:
        """The step on all stages, whose ranks all call this. The first start is at 0 seconds."""
        stages = all_gather_object(self.spans, self._stages)
        first = min(span.start for spans in stages for span in spans)
        moved = [
            replace(span, start=span.start - first, end=span.end - first)
            for spans in stages
            for span in sorted(spans, key=lambda span: span.start)
        ]
        return PipelineRun(len(stages), self.jobs, tuple(moved))


class _Timer:
    """Adds a span when stopped; stopped again, it replaces it by the longer one."""

    def __init__(self, spans: list[JobSpan], span: JobSpan) -> None:
        self.spans, self.at = spans, len(spans)
        self.cpu = time.thread_time()
        self.span = replace(span, start=_now())

    def stop(self) -> None:
        done = replace(self.span, end=_now(), cpu_seconds=time.thread_time() - self.cpu)
        self.spans[self.at : self.at + 1] = [done]


def _time_backward(output: Tensor, spans: list[JobSpan], span: JobSpan) -> None:
    """Record the backward pass that goes through ``output``, once."""
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(partial(_begin_backward, spans, span))


def _begin_backward(spans: list[JobSpan], span: JobSpan, _: Any) -> None:
    # A backward that starts from the loss comes by the output as well.
    if not any((s.chunk, s.number, s.backward) == (span.chunk, span.number, True) for s in spans):
        timer = _Timer(spans, span)
        timer.stop()
        torch.autograd.Variable._execution_engine.queue_callback(timer.stop)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
