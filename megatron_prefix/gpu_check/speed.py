"""How fast: repeated prefixes against a shared one through each implementation, next to alpha and the device's peak.

Results are compared at a small size first, with torch's own attention over repeated sequences in fp32, and at the full
size with each other; an implementation for which anything failed gets no number. Shapes are those of `bench.attention`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.bench.attention import (
    AttentionPath,
    AttentionSizes,
    attention_paths,
    random_inputs,
    repeated_reference,
)
from megatron_prefix.bench.group import GroupSizes
from megatron_prefix.bench.report import (
    HALF_PRECISION_LIMIT,
    ResultsDifferError,
    check_equal,
    relative_difference,
    speed_ups,
)
from megatron_prefix.gpu_check.environment import ALL_IMPLS, refusal
from megatron_prefix.gpu_check.report import Record, Report
from megatron_prefix.layout import FLOPS_PER_PAIR
from megatron_prefix.measure import interleaved_times, time_median

GRID = ((16384, 1024, 8), (16384, 1024, 16), (8192, 2048, 32), (8192, 8192, 8), (1024, 8192, 8))
"""(P, R, G): prefix rows, response rows, group size. The last one is the honest low end: alpha is 1.01."""

QUICK_GRID = ((96, 16, 4), (32, 24, 2))
HEADS, QUICK_HEADS = (32, 8, 128), (4, 2, 32)
DTYPE = torch.bfloat16
MATMUL_ROWS, QUICK_MATMUL_ROWS = 8192, 128
REPEATS = 5

BYTES_PER_CHANNEL = 40
"""Of a repeated row and query head: inputs and their copies, outputs, sums of gradients in fp32, a kernel's scratch."""

CHECK_SHRINK = 16


def measure_speed(report: Report, device: torch.device, *, quick: bool) -> None:
    """Fill ``report.speed``: matmul_tflops, and one row per size and implementation that was timed."""
    heads, kv_heads, head_dim = QUICK_HEADS if quick else HEADS
    sizes = AttentionSizes(heads, kv_heads, head_dim, "bf16")
    rows = QUICK_MATMUL_ROWS if quick else MATMUL_ROWS
    peak = matmul_tflops(rows, device)
    report.speed |= {"matmul_tflops": peak, "matmul_rows": rows, "sizes": asdict(sizes), "rows": []}
    report.output.line(f"bf16 matmul of {rows} x {rows} x {rows}: {peak:.4g} TFLOP/s, the peak that is compared with")
    for prefix, response, count in QUICK_GRID if quick else GRID:
        asked = GroupSizes(prefix, response, count)
        group = fitting(asked, sizes, device)
        what = f"P {prefix}, R {response}, G {group.group_size}"
        if group != asked:
            what += f" (not {count}: {free_bytes(device) / 2**30:.0f} GiB are free)"
        for impl in ALL_IMPLS:
            if impl == "reference":  # holds the whole mask
                continue
            report.attempt("speed", impl, what, partial(_measure, report, impl, what, group, sizes, device))
            _free(device)


def _measure(
    report: Report, impl: str, what: str, group: GroupSizes, sizes: AttentionSizes, device: torch.device
) -> Record:
    why_not = refusal(impl, device, DTYPE, (sizes.head_dim, sizes.head_dim))
    if why_not:
        return Record("speed", impl, what, "refused", why_not)
    if report.is_wrong(impl):
        return Record("speed", impl, what, "skipped", "no speed-up is reported for what has failed a check above")
    sizes = replace(sizes, impl=impl)
    try:
        differences = compare(smaller(group), sizes, device)
    except ResultsDifferError as error:
        return Record("speed", impl, what, "failed", "; ".join(error.report["failures"]))
    row = time_paths(group, sizes, device)
    if not row["difference"] <= HALF_PRECISION_LIMIT:
        note = f"prefix groups differ from repeated prefixes by {row['difference']:.1e} at this size: no speed-up"
        return Record("speed", impl, what, "failed", note, row)
    seconds, peak = row["seconds"], report.speed["matmul_tflops"]
    rates = {name: row["flops"][name] / seconds[name] / 1e12 for name in seconds}
    row |= {
        "impl": impl,
        "tflops": rates,
        "of_peak": {name: rate / peak for name, rate in rates.items()},
        "differences": differences,
        "over_alpha": row["speed_up"] / group.alpha,
    }
    report.speed["rows"].append(row)
    note = (
        f"{seconds['repeated'] * 1e3:.2f} ms repeated, {seconds['grouped'] * 1e3:.2f} ms grouped: "
        f"{row['speed_up']:.2f}x, alpha {group.alpha:.2f}; {rates['grouped']:.4g} TFLOP/s"
    )
    return Record("speed", impl, what, "ok", note)


def compare(group: GroupSizes, sizes: AttentionSizes, device: torch.device) -> dict[str, Any]:
    """Both ways against torch's attention in fp32; relative differences by path and tensor.

    Raises:
        ResultsDifferError: one of them is wrong.
    """
    inputs = random_inputs(group, sizes, 0, device)
    exact = repeated_reference(group, inputs)
    paths = attention_paths(group, inputs, sizes.impl)
    measured = {name: path.measure()[0] for name, path in paths.items()}
    found = {
        name: {x: relative_difference(value, exact[x]) for x, value in by.items()} for name, by in measured.items()
    }
    compared: dict[str, Any] = {}
    check_equal(compared, found, DTYPE)
    return compared["differences"]


def time_paths(group: GroupSizes, sizes: AttentionSizes, device: torch.device) -> dict[str, Any]:
    """Time and memory of both ways; the runs that measure memory are also the warm-up.

    Returns:
        prefix_len, response_len, group_size, alpha, rho; difference (grouped from repeated, worst tensor); by path:
        seconds (median of forward and backward together), phases, flops, rows, peak_bytes; speed_up.
    """
    paths = attention_paths(group, random_inputs(group, sizes, 0, device), sizes.impl)
    results, peaks = {}, {}
    for name, path in paths.items():
        results[name], memory = path.measure()
        peaks[name] = memory["peak_bytes"]
    difference = _worst_difference(results["grouped"], results["repeated"])
    del results
    times = interleaved_times({name: path.time for name, path in paths.items()}, repeats=REPEATS, warmup=1)
    return {
        **asdict(group),
        "alpha": group.alpha,
        "rho": group.rho,
        "difference": difference,
        "seconds": {name: taken["total"].median for name, taken in times.items()},
        "phases": {name: {phase: each.as_dict() for phase, each in taken.items()} for name, taken in times.items()},
        "flops": {name: _flops(path, sizes) for name, path in paths.items()},
        "rows": {name: path.inputs[0].shape[0] for name, path in paths.items()},
        "peak_bytes": peaks,
        "speed_up": speed_ups(times["repeated"], times["grouped"])["total"],
    }


def _worst_difference(grouped: dict[str, Tensor], repeated: dict[str, Tensor]) -> float:
    found = [relative_difference(grouped[name], repeated[name]) for name in grouped]
    return math.inf if any(math.isnan(value) for value in found) else max(found)


def _flops(path: AttentionPath, sizes: AttentionSizes) -> int:
    return FLOPS_PER_PAIR * path.area * sizes.heads * sizes.head_dim


def matmul_tflops(rows: int, device: torch.device) -> float:
    """TFLOP/s of a square bf16 matmul, by the median of 20: what the device gives, not what its data sheet says."""
    a, b = (torch.randn(rows, rows, device=device, dtype=DTYPE) for _ in range(2))
    seconds = time_median(lambda: a @ b, repeats=20, warmup=3, device=device)
    return 2 * rows**3 / seconds / 1e12


def fitting(group: GroupSizes, sizes: AttentionSizes, device: torch.device) -> GroupSizes:
    """``group`` with as many responses as repeated prefixes fit into the free memory: halved until they do."""
    while group.group_size > 1 and _needed_bytes(group, sizes) > free_bytes(device):
        group = replace(group, group_size=group.group_size // 2)
    return group


def _needed_bytes(group: GroupSizes, sizes: AttentionSizes) -> int:
    rows = group.group_size * (group.prefix_len + group.response_len)
    return rows * sizes.heads * sizes.head_dim * BYTES_PER_CHANNEL


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of a CPU, which only runs small sizes, 1 GiB."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**30


def smaller(group: GroupSizes) -> GroupSizes:
    """The group with segments so short that torch's attention in fp32 fits beside it."""
    prefix, response = (max(1, n // CHECK_SHRINK) for n in (group.prefix_len, group.response_len))
    return GroupSizes(prefix, response, min(group.group_size, 8))


def _free(device: torch.device) -> None:
    """Hand back what the last size held, so that it does not count against the next one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
