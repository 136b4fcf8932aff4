"""What benchmarks report: plain data for JSON, and rows for a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.measure import Times, git_commit, machine_info, utc_date

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest relative difference by dtype."""

HALF_PRECISION_FACTOR = 2.0
"""In half precision a path may be this many times as far from the exact result as repeated prefixes are..."""

HALF_PRECISION_LIMIT = 0.05
"""...which themselves may be this far from it."""

Differences = dict[str, float]


class ResultsDifferError(Exception):
    """Two paths that must give one result do not: there is no speed-up to report.

    Attributes:
        report: the report without times, with ``ok`` false and the list of ``failures``.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("results differ, so there is no speed-up to report:\n" + "\n".join(report["failures"]))
        self.report = report


def new_report(bench: str, sizes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The part of a report that says what ran where: machine, versions, date, commit, sizes."""
    machine = machine_info()
    versions = {"python": machine.pop("python"), **machine.pop("versions")}
    return {
        "bench": bench,
        "ok": True,
        "date": utc_date(),
        "commit": git_commit(),
        "machine": machine,
        "versions": versions,
        "sizes": dict(sizes),
        "seed": seed,
    }


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference, in fp64; 0 where both are zero."""
    exact = reference.double()
    difference = torch.linalg.vector_norm(result.double() - exact).item()
    if difference == 0:
        return 0.0
    norm = torch.linalg.vector_norm(exact).item()
    return difference / norm if norm > 0 else math.inf


def check_equal(
    report: dict[str, Any], differences: Mapping[str, Differences], dtype: torch.dtype, baseline: str = "repeated"
) -> None:
    """Add the differences and their limits to the report.

    Args:
        report: gets ``differences`` (by path and tensor) and ``tolerance``.
        differences: relative differences from one reference, by path and tensor.
        dtype: in which the paths ran.
        baseline: the path that sets the limit of the others in half precision.

    Raises:
        ResultsDifferError: a difference is over its limit, or not a number.
    """
    if dtype in TOLERANCE:
        limits = dict.fromkeys(differences, TOLERANCE[dtype])
    else:
        own = HALF_PRECISION_FACTOR * max(differences[baseline].values())
        limits = dict.fromkeys(differences, own) | {baseline: HALF_PRECISION_LIMIT}
    report["differences"] = {
        path: {tensor: value if math.isfinite(value) else None for tensor, value in values.items()}  # JSON has no NaN
        for path, values in differences.items()
    }
    report["tolerance"] = {path: limit if math.isfinite(limit) else None for path, limit in limits.items()}
    failures = [
        f"{path}: {tensor} differs by {value:.2e} (relative; limit {limits[path]:.2e})"
        for path, values in differences.items()
        for tensor, value in values.items()
        if not value <= limits[path]  # NaN is never within a limit
    ]
    if failures:
        raise ResultsDifferError(report | {"ok": False, "failures": failures})


def with_total(phases: Mapping[str, float]) -> dict[str, float]:
    """The phases of one run and their sum as ``total``."""
    return {**phases, "total": sum(phases.values())}


def speed_ups(baseline: Mapping[str, Times], times: Mapping[str, Times]) -> dict[str, float]:
    """Median of the baseline over median, by phase."""
    return {phase: baseline[phase].median / times[phase].median for phase in times}


def table(report: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for a terminal, of a report whose results are equal. One column per path."""
    results = report["results"]
    baseline = results["repeated"]["seconds"]["total"]["median"]

    def row(label: str, cell: Callable[[str, Mapping[str, Any]], str]) -> list[str]:
        return [label, *(cell(name, result) for name, result in results.items())]

    rows = [
        row("rows", lambda _, result: f"{result['rows']:,}"),
        row("attention area", lambda _, result: f"{result['area']:,}"),
        row("forward, median s", lambda _, result: f"{result['seconds']['forward']['median']:.3f}"),
        row("backward, median s", lambda _, result: f"{result['seconds']['backward']['median']:.3f}"),
        row("both, median s", lambda _, result: f"{result['seconds']['total']['median']:.3f}"),
        row("speed-up", lambda _, result: f"{baseline / result['seconds']['total']['median']:.2f}x"),
        row("peak memory, MiB", lambda _, result: f"{result['peak_bytes'] / 2**20:.1f}"),
        row("worst relative difference", lambda name, _: worst_difference(report["differences"].get(name))),
    ]
    if "saved_bytes" in results["grouped"]:
        rows.insert(-1, row("saved for backward, MiB", lambda _, result: f"{result['saved_bytes'] / 2**20:.1f}"))
    sizes = ", ".join(f"{key} {value}" for key, value in report["sizes"].items())
    return f"{report['bench']}: {sizes}", ["", *(name.replace("_", "-") for name in results)], rows


def worst_difference(differences: Mapping[str, float] | None) -> str:
    """For a table: the largest of a path's differences; None is the path that others are compared with."""
    return "reference" if differences is None else f"{max(differences.values()):.1e}"


def summary(report: Mapping[str, Any]) -> str:
    """The speed-ups next to their bounds, one line each."""
    bound, exact, gained = report["bound"], report["ratios"], report["speed_up"]
    lines = [
        f"speed-up {gained['total']:.2f}x (forward {gained['forward']:.2f}x, backward {gained['backward']:.2f}x), "
        f"{report['speed_up_over_bound']:.2f} of the bound {bound['name']} = {bound['value']:.2f}",
        f"exact ratios: rows {exact['rows']:.3f}, attention area {exact['area']:.3f}"
        + (f", FLOPs {exact['flops']:.3f}" if "flops" in exact else ""),
    ]
    if "prefix_grouper" in report:
        peer = report["prefix_grouper"]
        compared = "speed_up" in peer
        lines.append(
            f"prefix-grouper {peer['version']}: {peer['speed_up']['total']:.2f}x faster than it, "
            f"{peer['speed_up_over_tuned']['total']:.2f}x faster than with masks tuned by hand, "
            f"{peer['saved_bytes_ratio']:.2f}x fewer bytes saved for backward"
            if compared
            else f"prefix-grouper: {peer['status']}"
        )
    return "\n".join(lines)
