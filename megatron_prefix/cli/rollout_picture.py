"""The picture of a file of rollouts: histograms of lengths, group sizes and of what sharing saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_prefix.cli.plots import GROUPED, REPEATED
from megatron_prefix.rollout_stats import RolloutStats, quantiles

BARS = 36
INK, FRAME = "#444444", "#c8ccd4"


def draw_rollouts(stats: RolloutStats, name: str, path: Path) -> None:
    """A PNG of four panels; ``name`` stands in its title."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    prompts, responses, sizes, savings = figure.subplots(1, 4)
    _histogram(prompts, stats.prompts, "prompt tokens", REPEATED)
    _histogram(responses, stats.responses, "response tokens", REPEATED)
    _histogram(sizes, stats.sizes, "responses per group", REPEATED)
    if stats.cost is None:
        _histogram(savings, stats.row_ratios, "rows: repeated / shared", GROUPED, whole=stats.rho)
    else:
        _histogram(savings, stats.savings, "modelled cost: repeated / shared", GROUPED, whole=stats.saving[0])
    for axes, what in ((prompts, "groups"), (responses, "responses")):
        axes.set_ylabel(what, color=INK)
    low, high = stats.saving
    saving = f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"
    figure.suptitle(
        f"{name}: {len(stats.sizes):,} groups, {len(stats.responses):,} responses. {stats.prefix_ratio:.0%} of all "
        f"rows are repeated prefixes; shared, a step costs {saving} less",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _histogram(axes: Axes, values: Sequence[float], title: str, colour: str, whole: float | None = None) -> None:
    """A line stands at the median, or at the value of all groups together."""
    found = np.asarray(values)
    integers = found.dtype.kind == "i"
    axes.hist(found, bins=_edges(found).tolist(), color=colour, rwidth=0.9)
    line = quantiles(values)["median"] if whole is None else whole
    axes.axvline(line, color=INK, lw=1, ls="--")
    text = f"median {line:,.0f}" if whole is None else f"all groups together {line:.2f}x"
    axes.set_title(f"{title}\n{text}", fontsize=10)
    axes.set_xlim(left=0, right=1.05 * max(found.max(), 1) + integers)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=integers))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    axes.tick_params(color=FRAME, labelcolor=INK, labelsize=8)
    axes.grid(axis="y", color=FRAME, lw=0.5, alpha=0.6)
    axes.set_axisbelow(True)


def _edges(values: np.ndarray) -> np.ndarray:
    """One bar per whole number where they are few, else as many bars as the number of values bears."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "i" and high - low < BARS:
        return np.arange(low, high + 2) - 0.5
    bars = int(np.clip(2 * np.cbrt(len(values)) + 4, 8, BARS))
    return np.linspace(low, high if high > low else low + 0.5, bars + 1)
