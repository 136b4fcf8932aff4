"""Tables of what `bench step` and `bench split` report of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_prefix.bench.report import worst_difference


def table(report: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for a terminal, of a report whose results are equal. One column per path.

    Bubbles are modelled; seconds are medians of the slowest stage, the peak is that of the largest, and the difference
    is the worst relative one from the first path.
    """
    results = report["results"]
    baseline = next(iter(results))
    seconds = {name: result["seconds"]["total"]["median"] for name, result in results.items()}

    def row(label: str, cell: Callable[[str, Mapping[str, Any]], str]) -> list[str]:
        return [label, *(cell(name, result) for name, result in results.items())]

    rows = [
        row("micro-batches", lambda _, result: f"{result['micro_batches']}"),
        row("rows", lambda _, result: f"{result['rows']:,}"),
        row("pairs", lambda _, result: f"{result['area']:,}"),
        row("bubble", lambda _, result: f"{result['bubble']:.2f}"),
        row("even bubble", lambda _, result: f"{result['even_bubble']:.2f}"),
        row("live prefixes", lambda _, result: f"{result['live_prefixes'] or ''}"),
        row("step, s", lambda name, _: f"{seconds[name]:.3f}"),
        row("speed", lambda name, _: f"{seconds[baseline] / seconds[name]:.2f}x"),
        row("peak, MiB", lambda _, result: f"{result['peak_bytes'] / 2**20:.1f}"),
        row("difference", lambda name, _: worst_difference(report["differences"].get(name))),
    ]
    sizes = ", ".join(f"{key} {value}" for key, value in report["sizes"].items())
    headers = (_title(name).replace("split ", "split\n") for name in results)
    return f"{report['bench']}: {sizes}", ["", *headers], rows


def summary(report: Mapping[str, Any]) -> str:
    """What the step of each path is in the pipeline, one line each, and what the table's rows mean."""
    note = "bubbles are modelled; seconds: median of the slowest stage; peak: the largest stage's, beside parameters"
    return note + "\n" + "\n".join(f"{_title(name)}: {result['plan']}" for name, result in report["results"].items())


def _title(name: str) -> str:
    return name.replace("_", " ").replace("re ", "re-")
