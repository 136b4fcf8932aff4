"""Every way to run a pack under context parallelism, side by side: the second table of `megatron-prefix plan-cp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape, LayerTraffic, layer_traffic, untrimmed_traffic

UNITS = {"MiB": 2**20, "KiB": 2**10}

REPEATED = "repeated"
EVERY_KEY = "every key"
BASELINES = (REPEATED, EVERY_KEY)
LESS_THAN = ("less_than_repeated", "less_than_every_key")

Way = dict[str, Any]


def ways_of(packs: Sequence[Sequence[CpPlan]], shape: AttentionShape) -> list[Way]:
    """Bytes received for one layer with every comm type, by the busiest rank and by all ranks, over all packs.

    Each comm type comes as "repeated" (plain Megatron on repeated prefixes), as "every key" (the packs' own layouts,
    every key goes to every rank), and with every placement.

    Args:
        packs: of each pack the plans of all placements, in one order.
        shape: of the layer.
    """
    cp = packs[0][0].cp_size
    layouts = [plans[0].layout for plans in packs]
    inner = [size for size in range(2, cp) if cp % size == 0]
    ways: list[Way] = []
    for comm_type in COMM_TYPES:
        for a2a in inner if comm_type == "a2a+p2p" else [None]:
            way: Way = {"comm_type": comm_type, "cp_a2a": a2a}
            how = (shape, comm_type, a2a)
            try:
                plain = [untrimmed_traffic(layout.repeated(), cp, *how) for layout in layouts]
            except ValueError as refusal:  # heads that do not divide
                ways.append(way | {"refused": str(refusal)})
                continue
            untrimmed = [untrimmed_traffic(layout, cp, *how) for layout in layouts]
            found = {REPEATED: _received([plain] * cp), EVERY_KEY: _received([untrimmed] * cp)}
            for plans in zip(*packs, strict=True):
                by_pack = [layer_traffic(plan, *how) for plan in plans]
                found[plans[0].name] = _received(list(zip(*by_pack, strict=True)))
            ways += [way | {"placement": name} | moved | _less(moved, found) for name, moved in found.items()]
    return ways


def _received(ranks: Sequence[Sequence[LayerTraffic]]) -> dict[str, int]:
    """Bytes that a rank receives over its packs: the most, and the sum over ranks."""
    forward = [sum(moved.forward.received for moved in packs) for packs in ranks]
    both = [sum(moved.total.received for moved in packs) for packs in ranks]
    return {
        "forward": max(forward),
        "forward_backward": max(both),
        "forward_all_ranks": sum(forward),
        "forward_backward_all_ranks": sum(both),
    }


def _less(moved: dict[str, int], found: dict[str, dict[str, int]]) -> dict[str, float | None]:
    """How many times fewer bytes the busiest rank receives in all than with the baselines; None where it gets none."""
    both = moved["forward_backward"]
    less = [found[name]["forward_backward"] / both if both else None for name in BASELINES]
    return dict(zip(LESS_THAN, less, strict=True))


def way_table(ways: Sequence[Way]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table."""
    unit = byte_unit(max((way["forward_backward"] for way in ways if "refused" not in way), default=0))
    rows = []
    for way in ways:
        name = way["comm_type"] if way["cp_a2a"] is None else f"{way['comm_type']} ({way['cp_a2a']})"
        if "refused" in way:
            rows.append([name, way["refused"], "", "", "", ""])
            continue
        sizes = (f"{way[key] / UNITS[unit]:,.1f}" for key in ("forward", "forward_backward"))
        less = ("" if way["placement"] in BASELINES else _times(way[key]) for key in LESS_THAN)
        rows.append([name, way["placement"], *sizes, *less])
    columns = ["comm type", "placement", f"forward\n{unit}", f"both\n{unit}"]
    return [*columns, "less than\nrepeated", "less than\nevery key"], rows


def comparison(ways: Sequence[Way], comm_type: str, a2a: int | None) -> str:
    """What `branch` saves on the same layout with one comm type, in words."""
    mine = {way["placement"]: way for way in ways if (way["comm_type"], way["cp_a2a"]) == (comm_type, a2a)}
    branch, dual, every_key = mine["branch"], mine["dual_chunk_swap"], mine[EVERY_KEY]
    if not branch["forward"]:
        return f"{comm_type}: branch sends nothing"

    def less(key: str, than: Way) -> str:
        return _times(than[key] / branch[key])

    return (
        "repeated: plain Megatron, prefixes repeated; every key: this layout, every key goes to every rank.\n"
        f"{comm_type}, branch: {less('forward', every_key)} fewer bytes forward and "
        f"{less('forward_backward', every_key)} in all than every key; "
        "than dual_chunk_swap, which sends only keys with a reader, "
        f"{less('forward', dual)} and {less('forward_backward', dual)} at the busiest rank, "
        f"{less('forward_all_ranks', dual)} and {less('forward_backward_all_ranks', dual)} over all ranks"
    )


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def byte_unit(largest: int) -> str:
    """The unit in which all sizes of a table are readable."""
    return "MiB" if largest >= UNITS["MiB"] else "KiB"
