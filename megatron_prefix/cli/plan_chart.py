"""The picture of a plan: where a step's time goes, repeated and grouped, and the memory of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_prefix.estimator.search import Choice, Run, Task

GIB = 2**30
MOST_CHOICES = 6

TIME_PARTS = {
    "compute": ("#76b900", ("compute",)),
    "recompute": ("#b5d96b", ("recompute",)),
    "bubble": ("#d9dde4", ("bubble",)),
    "tensor": ("#3b6fb6", ("tensor",)),
    "context": ("#6fa8dc", ("context",)),
    "pipeline": ("#8e7cc3", ("pipeline",)),
    "expert": ("#e69138", ("expert",)),
    "gradients, optimizer": ("#c0504d", ("gradients", "optimizer")),
}
MEMORY_PARTS = {
    "weights": "#274e13",
    "gradients": "#4d7a1f",
    "optimizer": "#76b900",
    "activations": "#6fa8dc",
    "prefix_cache": "#3b6fb6",
    "working": "#d9dde4",
}


def draw_plan(task: Task, choices: Sequence[Choice], path: Path) -> None:
    """A PNG of the quickest choices: stacked bars of seconds (repeated above grouped) and of GiB beside the limit."""
    shown = choices[:MOST_CHOICES]
    figure = Figure(figsize=(13, 1.8 + 0.85 * len(shown)), layout="constrained")
    time, memory = figure.subplots(1, 2, width_ratios=(1.5, 1), sharey=True)
    _draw_time(time, shown)
    _draw_memory(memory, task, shown)
    places = np.arange(len(shown))
    time.set_yticks(places, [_label(choice) for choice in shown], fontsize=9)
    time.set_ylim(len(shown) - 0.4, -0.6)
    for axes in (time, memory):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    cluster = task.cluster
    figure.suptitle(
        f"{task.model.name} on {cluster.num_gpus:,} x {cluster.device.name}, predicted: one step of "
        f"{len(task.groups):,} prefix groups",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _label(choice: Choice) -> str:
    names = ("tp", "cp", "pp", "vpp", "ep", "dp")
    sizes = " ".join(f"{name} {getattr(choice.sizes, name)}" for name in names if getattr(choice.sizes, name) > 1)
    return f"{sizes or 'one GPU'}\n{choice.max_tokens:,} rows, recompute {choice.recompute}"


def _draw_time(axes: Axes, choices: Sequence[Choice]) -> None:
    named: set[str] = set()
    longest = max(choice.repeated.step.total for choice in choices)
    for place, choice in enumerate(choices):
        for run, at, alpha in ((choice.repeated, place - 0.19, 0.55), (choice.grouped, place + 0.19, 1.0)):
            end = _draw_run(axes, run, at, alpha, named)
            text = f" {end:,.3g} s repeated" if alpha < 1 else f" {end:,.3g} s grouped, {choice.speed_up:.2f}x"
            axes.text(end + longest * 0.004, at, text, va="center", fontsize=8)
    axes.set_xlim(0, longest * 1.22)
    axes.set_xlabel("seconds of a step on the data-parallel rank with the most work")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)


def _draw_run(axes: Axes, run: Run, at: float, alpha: float, named: set[str]) -> float:
    """Returns where the bar ends."""
    left = 0.0
    for name, (colour, parts) in TIME_PARTS.items():
        width = sum(getattr(run.step, part) for part in parts)
        if width < 0.002 * run.step.total:
            left += width
            continue
        label = None if name in named or alpha < 1 else name
        named |= {name} if label else set()
        axes.barh(at, width, 0.34, left=left, color=colour, alpha=alpha, label=label)
        left += width
    return left


def _draw_memory(axes: Axes, task: Task, choices: Sequence[Choice]) -> None:
    left = np.zeros(len(choices))
    for name, colour in MEMORY_PARTS.items():
        width = np.array([getattr(choice.grouped.memory, name) for choice in choices]) / GIB
        if np.any(width > 0):
            axes.barh(range(len(choices)), width, 0.6, left=left, color=colour, label=name.replace("_", " "))
        left += width
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=8, color="#20242c")
    usable, whole = task.cluster.usable_memory / GIB, task.cluster.device.memory_bytes / GIB
    axes.axvspan(usable, whole, color="#f4cccc", alpha=0.6, lw=0)
    axes.axvline(usable, color="#c0504d", lw=1)
    axes.set_xlim(0, whole)
    axes.set_xlabel(f"GiB on the fullest GPU, grouped ({usable:.1f} of {whole:.1f} may be used)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
