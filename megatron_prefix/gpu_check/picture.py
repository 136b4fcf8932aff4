"""The picture of a check's speeds; the only part that needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLOURS = ("#76b900", "#2f6db3", "#e08a1e", "#8e5bb5", "#c8483f", "#3aa6a0", "#8a8f98")
REPEATED = "#b0b7c3"
Row = dict[str, Any]


def draw_speeds(result: dict[str, Any], path: Path) -> None:
    """A PNG of a report: speed-up next to alpha, share of the device's matmul peak, and peak memory, by size and impl.

    Args:
        result: a report with at least one row of speeds.
        path: of the picture.
    """
    speed = result["speed"]
    rows: list[Row] = speed["rows"]
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    colours = {impl: COLOURS[i % len(COLOURS)] for i, impl in enumerate(impls)}
    figure = Figure(figsize=(11, 9.2), layout="constrained")
    over, share, memory = figure.subplots(3, 1, sharex=True)
    _bars(over, rows, sizes, colours, lambda row: row["speed_up"], "{:.2f}")
    for place, size in enumerate(sizes):
        alpha = next(row["alpha"] for row in rows if _size(row) == size)
        over.hlines(alpha, place - 0.45, place + 0.45, color="#222222", lw=1.4, ls="--", zorder=3)
        over.annotate(f"{alpha:.2f}", (place, alpha), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    over.axhline(1, color="#999999", lw=0.8, zorder=0)
    over.set_ylabel("speed-up over repeated\nprefixes, same impl")
    _bars(share, rows, sizes, colours, lambda row: 100 * row["of_peak"]["grouped"], "{:.0f}")
    peak = speed["matmul_tflops"]
    share.set_ylabel(f"% of the matmul peak\n(bf16, {peak:,.4g} TFLOP/s)")
    share.set_ylim(0, max(100, share.get_ylim()[1]) if peak > 1 else None)
    _bars(memory, rows, sizes, dict.fromkeys(impls, REPEATED), lambda row: row["peak_bytes"]["repeated"] / 2**30)
    _bars(memory, rows, sizes, colours, lambda row: row["peak_bytes"]["grouped"] / 2**30)
    memory.set_ylabel("peak memory, GiB")
    memory.set_xticks(range(len(sizes)), [f"P {p:,}\nR {r:,}\nG {g}" for p, r, g in sizes])
    handles: list[Any] = [Patch(color=colour, label=impl) for impl, colour in colours.items()]
    handles += [Line2D([], [], color="#222222", lw=1.4, ls="--", label="alpha (ratio of areas)")]
    handles += [Patch(color=REPEATED, label="memory of repeated prefixes")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(_title(result), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(
    axes: Axes,
    rows: list[Row],
    sizes: list[tuple[int, int, int]],
    colours: dict[str, str],
    value: Callable[[Row], float],
    form: str = "",
) -> None:
    width = 0.84 / len(colours)
    for i, (impl, colour) in enumerate(colours.items()):
        mine = [row for row in rows if row["impl"] == impl]
        places = [sizes.index(_size(row)) - 0.42 + (i + 0.5) * width for row in mine]
        bars = axes.bar(places, [value(row) for row in mine], width=width * 0.92, color=colour)
        if form:
            labels = [form.format(value(row)) for row in mine]
            axes.bar_label(bars, labels=labels, label_type="center", fontsize=7.5, color="white")
    axes.margins(x=0.02, y=0.14)
    axes.spines[["top", "right"]].set_visible(False)


def _size(row: Row) -> tuple[int, int, int]:
    return row["prefix_len"], row["response_len"], row["group_size"]


def _title(result: dict[str, Any]) -> str:
    gpus, heads = result["machine"]["gpus"], result["speed"]["sizes"]
    device = gpus[0] if result["device"] == "cuda" and gpus else result["machine"]["cpu"]
    commit = (result["commit"] or "unknown")[:10]
    return (
        f"Attention of one prefix group, forward + backward, bf16, {heads['heads']} heads, {heads['kv_heads']} of "
        f"keys, dim {heads['head_dim']}\n"
        f"{device}, torch {result['versions']['torch']}, {result['date'][:10]}, commit {commit}"
    )
