"""Draw the attention mask of a pack beside that of repeated prefixes, coloured by the kernel call that computes it.

    python examples/mask.py --out mask.png

writes the first picture of the README.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_prefix import PrefixLayout

NOT_SEEN, OWN, ANCESTOR = 0, 1, 2
COLOURS = {NOT_SEEN: "#ffffff", OWN: "#76b900", ANCESTOR: "#2f6fb0"}
LABELS = {OWN: "own segment: one causal call", ANCESTOR: "ancestors: one call per tree level"}


def call_of_each_pair(layout: PrefixLayout) -> np.ndarray:
    """int [T, T]: which call computes (query row, key column), from the layout's own ranges."""
    calls = np.zeros((layout.num_rows, layout.num_rows), dtype=int)
    for start, length in zip(layout.starts, layout.lengths, strict=False):
        calls[start : start + length, start : start + length] = np.tril(np.full((length, length), OWN))
    for level in layout.ancestor_levels:
        for r in level:
            calls[r.q_start : r.q_end, r.k_start : r.k_end] = ANCESTOR
    return calls


def draw(axes: Axes, layout: PrefixLayout, title: str) -> None:
    """One mask, with a line at every segment's start."""
    axes.imshow(call_of_each_pair(layout), cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2)
    for start in layout.starts:
        axes.axhline(start - 0.5, color="#c8ccd4", lw=0.5)
        axes.axvline(start - 0.5, color="#c8ccd4", lw=0.5)
    axes.set(title=title, xticks=[], yticks=[], xlabel="keys", ylabel="queries")


def main() -> None:
    """Two groups in one pack: prompts of 24 and 12 rows with 4 and 3 responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mask.png"), help="PNG to write")
    args = parser.parse_args()
    layout = PrefixLayout([24, 6, 9, 4, 7, 12, 5, 8, 3], [-1, 0, 0, 0, 0, -1, 5, 5, 5])
    repeated = layout.repeated()
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(repeated.num_rows, layout.num_rows))
    draw(left, repeated, f"repeated prefixes: {repeated.num_rows} rows, {repeated.area:,} pairs")
    draw(right, layout, f"prefix groups: {layout.num_rows} rows, {layout.area:,} pairs")
    handles = [Patch(color=COLOURS[call], label=label) for call, label in LABELS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
