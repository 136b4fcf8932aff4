"""The picture of a context-parallel plan: who computes which part of the mask, with what area and how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from megatron_prefix.context_parallel.choice import CpLayers
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import computed_areas, layer_traffic
from megatron_prefix.layout import PrefixLayout

MOST_PIXELS = 720
"""Rows of a mask that are drawn; a longer pack is sampled evenly."""

MOST_LINES = 64
NOT_SEEN = -1


def owners_of_pairs(plan: CpPlan, rows: np.ndarray) -> np.ndarray:
    """int [n, n] for n rows of the pack: the rank that computes (query, key), or `NOT_SEEN`.

    Segments stand depth-first, so a row is read by itself and by what follows up to the end of its segment's subtree.
    """
    layout = plan.layout
    lengths = np.array(layout.lengths)
    last_reader = np.repeat(np.array(layout.subtree_ends), lengths)[rows]
    owner = np.empty(layout.num_rows, dtype=int)
    for rank in range(plan.cp_size):
        owner[plan.rows(rank)] = rank
    queries, keys = rows[:, None], rows[None, :]
    seen = (keys <= queries) & (queries < last_reader[None, :])
    return np.where(seen, owner[rows][:, None], NOT_SEEN)


def draw_plans(plans: Sequence[CpPlan], layers: CpLayers, path: Path) -> None:
    """A PNG with one line per plan of one layout: the mask coloured by the query's rank, bars of area and of bytes.

    Layers are alike: of their comm_types the first is drawn.
    """
    figure = Figure(figsize=(11, 4.3 * len(plans)), layout="constrained")
    panels = figure.subplots(len(plans), 3, width_ratios=(1.35, 1, 1), squeeze=False)
    for (mask, area, received), plan in zip(panels, plans, strict=True):
        _draw_mask(mask, plan)
        _draw_area(area, plan, layers)
        _draw_bytes(received, plan, layers)
    # The same scale in every line, so that plans can be compared.
    for column in (1, 2):
        most = max(axes.get_ylim()[1] for axes in panels[:, column])
        for axes in panels[:, column]:
            axes.set_ylim(0, most * 1.06 or 1)
    figure.savefig(path, dpi=130)


def _colours(cp_size: int) -> list[tuple[float, float, float]]:
    return [colormaps["turbo"]((rank + 0.5) / cp_size)[:3] for rank in range(cp_size)]


def _draw_mask(axes: Axes, plan: CpPlan) -> None:
    layout: PrefixLayout = plan.layout
    count = min(layout.num_rows, MOST_PIXELS)
    rows = (np.arange(count) + 0.5) * layout.num_rows // max(1, count)
    colours = ListedColormap([(1.0, 1.0, 1.0), *_colours(plan.cp_size)])
    axes.imshow(
        owners_of_pairs(plan, rows.astype(int)), cmap=colours, vmin=NOT_SEEN, vmax=plan.cp_size - 1,
        extent=(0, layout.num_rows, layout.num_rows, 0), interpolation="nearest",
    )  # fmt: skip
    if len(layout) <= MOST_LINES:
        for start in layout.starts[1:-1]:
            axes.axhline(start, color="#c8ccd4", lw=0.5)
            axes.axvline(start, color="#c8ccd4", lw=0.5)
    axes.set(xticks=[], yticks=[], xlabel="keys", ylabel="queries")
    axes.set_title(f"{plan.name}: who computes which pairs", fontsize=10)


def _draw_area(axes: Axes, plan: CpPlan, layers: CpLayers) -> None:
    areas = computed_areas(plan, layers.comm_types[0], layers.a2a_size)
    mean = sum(areas) / len(areas)
    axes.bar(range(plan.cp_size), areas, color=_colours(plan.cp_size), width=0.7)
    axes.axhline(mean, color="#444444", lw=0.8, ls="--")
    axes.set_title(f"attention area (pairs)\nlargest over mean {max(areas) / max(mean, 1):.3f}", fontsize=10)
    _plain(axes, plan.cp_size)


def _draw_bytes(axes: Axes, plan: CpPlan, layers: CpLayers) -> None:
    comm_type = layers.comm_types[0]
    moved = layer_traffic(plan, layers.shape, comm_type, layers.a2a_size)
    forward = np.array([each.forward.received for each in moved]) / 2**20
    backward = np.array([each.backward.received for each in moved]) / 2**20
    ranks, colours = range(plan.cp_size), _colours(plan.cp_size)
    axes.bar(ranks, forward, color=colours, width=0.7)
    axes.bar(ranks, backward, bottom=forward, color=colours, width=0.7, alpha=0.45)
    most = float(np.max(forward + backward))
    axes.set_title(f"MiB received per layer, {comm_type}\nforward (solid) + backward: at most {most:,.3g}", fontsize=10)
    _plain(axes, plan.cp_size)


def _plain(axes: Axes, cp_size: int) -> None:
    axes.set_xticks(range(cp_size))
    axes.set_xlabel("rank")
    axes.spines[["top", "right"]].set_visible(False)
