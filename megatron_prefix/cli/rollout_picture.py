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

BINS = 36
INK = "#444444"


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
    """Bars, one per whole number where there are few; a line at the median, or at the value of all groups together."""
    found = np.asarray(values)
    integers = found.dtype.kind == "i"
    low, high = found.min(), found.max()
    if integers and high - low < BINS:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    axes.hist(found, bins=edges.tolist(), color=colour, rwidth=0.92)
    line = quantiles(values)["median"] if whole is None else whole
    axes.axvline(line, color=INK, lw=1, ls="--")
    text = f"median {line:,.0f}" if whole is None else f"all groups together {line:.2f}x"
    axes.set_title(f"{title}\n{text}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=integers))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c8ccd4")
