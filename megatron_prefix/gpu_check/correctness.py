"""Every implementation against the fp64 oracle: whole, over emulated ranks, in parts; and its determinism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prefix.attention import KERNELS, prefix_grouped_attention
from megatron_prefix.bench.report import relative_difference
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.gpu_check.cases import (
    DTYPES,
    FIRST_SHAPE,
    HALVES,
    QUICK_SHRINK,
    SHAPES,
    Inputs,
    Shape,
    layouts,
    make_inputs,
    shrink,
)
from megatron_prefix.gpu_check.emulation import SPLIT_LAYOUT, in_parts, over_ranks
from megatron_prefix.gpu_check.environment import ALL_IMPLS, refusal
from megatron_prefix.gpu_check.oracle import NAMES, Oracle, Results, forward_backward, repeated_attention
from megatron_prefix.gpu_check.report import Record, Report
from megatron_prefix.layout import PrefixLayout

CP_RANKS = {"2 ranks": (2, 1), "4 ranks": (4, 1), "2 x 2 ranks": (4, 2)}
"""Ranks, and neighbours among them that hold their rows together (cp_comm_type a2a+p2p)."""

REPEATED_LAYOUT = PrefixLayout([1024, 512, 512, 200, 700], [-1, 0, 0, 0, 0])
"""Long enough that a kernel splits keys and queries over many blocks, whose order of summation may change."""

RUNS = 3


class _Case(NamedTuple):
    name: str
    layout: PrefixLayout
    inputs: Inputs
    oracle: Oracle


def _cases(chosen: Mapping[str, PrefixLayout], shape: Shape, dtype: torch.dtype, device: torch.device) -> list[_Case]:
    cases = []
    for name, layout in chosen.items():
        inputs = make_inputs(layout, shape, dtype, device)
        cases.append(_Case(name, layout, inputs, Oracle.build(layout, inputs)))
    return cases


class _Judge(NamedTuple):
    """Holds what an implementation computes for some cases to their oracles, and says how near the limit it came."""

    stage: str
    impl: str
    what: str
    why_not: Callable[[], str | None]
    cases: Callable[[], list[_Case]]
    compute: Callable[[_Case], Results]

    def record(self) -> Record:
        if why_not := self.why_not():
            return Record(self.stage, self.impl, self.what, "refused", why_not)
        found = {case.name: case.oracle.judge(self.compute(case)) for case in self.cases()}
        ratio, tensor, name = max(
            # NaN compares as neither more nor less: it must come out as the worst.
            ((math.inf if math.isnan(value) else value, tensor, name) for name, by in found.items()
             for tensor, value in by.items())
        )  # fmt: skip
        note = f"at most {ratio:.2g} of the limit ({tensor}, {name})"
        return Record(self.stage, self.impl, self.what, "ok" if ratio <= 1 else "failed", note, {"of_limit": found})


def check_correctness(report: Report, device: torch.device, *, quick: bool) -> None:
    """Every implementation, whole: ragged layouts, grouped-query heads, head dims, dtypes."""
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES:
            cases = cache(partial(_cases, layouts(quick=quick), shape, dtype, device))
            what = f"{dtype_name}, {shape}"
            if dtype is torch.float64:
                judge = _Judge("correctness", "oracle", f"{what}, by repeated prefixes", _runs, cases, _by_repeating)
                report.attempt("correctness", "oracle", what, judge.record)
            for impl in ALL_IMPLS:
                why_not = partial(refusal, impl, device, dtype, shape.dims)
                judge = _Judge("correctness", impl, what, why_not, cases, partial(_whole, impl))
                report.attempt("correctness", impl, what, judge.record)


def _runs() -> None:
    """The oracle refuses nothing."""


def _whole(impl: str, case: _Case) -> Results:
    attend = partial(prefix_grouped_attention, layout=case.layout, softmax_scale=case.inputs.scale, impl=impl)
    return forward_backward(attend, case.inputs)


def _by_repeating(case: _Case) -> Results:
    attend = partial(repeated_attention, layout=case.layout, softmax_scale=case.inputs.scale)
    return forward_backward(attend, case.inputs)


def check_context_parallel(report: Report, device: torch.device, *, quick: bool) -> None:
    """Every kernel over the ranks of both placements, computed one after another."""
    for dtype_name, dtype in DTYPES.items():
        cases = cache(partial(_cases, layouts(quick=quick), FIRST_SHAPE, dtype, device))
        for impl in KERNELS:
            why_not = partial(refusal, impl, device, dtype, FIRST_SHAPE.dims, needs_kernel=True)
            for name, (ranks, inner) in CP_RANKS.items():
                for placement in PLACEMENTS:
                    what = f"{dtype_name}, {name}, {placement}"
                    compute = partial(_over_ranks, impl, ranks, inner, placement)
                    judge = _Judge("context_parallel", impl, what, why_not, cases, compute)
                    report.attempt("context_parallel", impl, what, judge.record)


def _over_ranks(impl: str, ranks: int, inner: int, placement: str, case: _Case) -> Results:
    plan = CpPlan.build(case.layout, ranks, placement).merged(inner)
    return over_ranks(case.inputs, plan, KERNELS[impl])


def check_split_groups(report: Report, device: torch.device, *, quick: bool) -> None:
    """Every kernel with the keys of a prefix in a cache, and its responses in two parts."""
    chosen = {"split tree": shrink(SPLIT_LAYOUT, QUICK_SHRINK if quick else 1)}
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES:
            cases = cache(partial(_cases, chosen, shape, dtype, device))
            for impl in KERNELS:
                what = f"{dtype_name}, {shape}, in parts"
                why_not = partial(refusal, impl, device, dtype, shape.dims, needs_kernel=True)
                judge = _Judge("split_groups", impl, what, why_not, cases, partial(_in_parts, impl))
                report.attempt("split_groups", impl, what, judge.record)


def _in_parts(impl: str, case: _Case) -> Results:
    return in_parts(case.inputs, case.layout, KERNELS[impl])


def check_determinism(report: Report, device: torch.device, *, quick: bool) -> None:
    """Whether runs are equal to the bit in torch's deterministic mode, which must hold, and without it.

    `reference` is left out: it is cuBLAS alone, which needs an environment variable for that.
    """
    layout = shrink(REPEATED_LAYOUT, 8 if quick else 1)
    shape = Shape((8, 2), (128, 128))
    for dtype_name, dtype in HALVES.items():
        inputs = make_inputs(layout, shape, dtype, device)
        for impl in ALL_IMPLS:
            if impl != "reference":
                what = f"{dtype_name}, {shape}, {RUNS} runs"
                check = partial(_determinism, impl, what, layout, inputs)
                report.attempt("determinism", impl, what, check)


def _determinism(impl: str, what: str, layout: PrefixLayout, inputs: Inputs) -> Record:
    def spread() -> float:
        attend = partial(prefix_grouped_attention, layout=layout, softmax_scale=inputs.scale, impl=impl)
        first, *others = (forward_backward(attend, inputs) for _ in range(RUNS))
        return max(_difference(other[name], first[name]) for other in others for name in NAMES)

    with _deterministic():
        why_not = refusal(impl, inputs.q.device, inputs.q.dtype, (inputs.q.shape[-1], inputs.v.shape[-1]))
        if why_not:
            return Record("determinism", impl, what, "refused", why_not)
        within = spread()
    without = spread()
    note = "equal to the bit" if within == 0 else f"differs by {within:.1e} in torch's deterministic mode"
    note += ", also without the deterministic mode" if without == 0 else f"; without the mode by {without:.1e}"
    values = {"deterministic_difference": within, "usual_difference": without}
    return Record("determinism", impl, what, "ok" if within == 0 else "failed", note, values)


def _difference(a: Tensor, b: Tensor) -> float:
    """0 where equal to the bit, else relative; infinite with NaN, which equals nothing."""
    if torch.equal(a, b):
        return 0.0
    difference = relative_difference(a, b)
    return difference if difference > 0 else math.inf


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
