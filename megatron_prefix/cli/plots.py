"""Pictures that the commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from megatron_prefix.mcore.compare import StepComparison

REPEATED, GROUPED = "#b0b7c3", "#76b900"


def plot_comparison(comparison: StepComparison, path: Path) -> None:
    """A PNG with one panel per cost of a GRPO step: repeated prefixes beside prefix groups."""
    old, new = comparison.repeated, comparison.grouped
    panels = (
        ("tokens executed", old.rows, new.rows, "{:,.0f}"),
        ("attention area\n(million pairs)", old.area / 1e6, new.area / 1e6, "{:.2f}"),
        ("step time (s)", old.seconds, new.seconds, "{:.1f}"),
        ("peak memory (MiB)", old.peak_bytes / 2**20, new.peak_bytes / 2**20, "{:,.0f}"),
    )
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, before, after, form) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar(["repeated", "grouped"], [before, after], color=[REPEATED, GROUPED], width=0.6)
        axes.bar_label(bars, labels=[form.format(before), form.format(after)], padding=2)
        axes.set_title(f"{title}\n{before / after:.2f}x less", fontsize=10)
        axes.set_ylim(0, before * 1.18)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    found = comparison.found
    equal = f"log-probs differ by at most {found.max_log_prob_diff:.0e}"
    if found.gradients:
        equal += f", gradients by {found.max_grad_rel_diff:.0e} (relative)"
    figure.suptitle(f"One GRPO step, prefixes repeated vs grouped: {equal}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
