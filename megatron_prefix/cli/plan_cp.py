"""`megatron-prefix plan-cp`: what context parallelism will do with a layout, before any GPU is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from megatron_prefix.cli.console import print_json, print_table, stderr_console
from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import (
    AttentionShape,
    LayerTraffic,
    inner_size,
    layer_traffic,
    plan_with_traffic,
    repeated_traffic,
)
from megatron_prefix.layout import PrefixLayout

SIZE = click.IntRange(1)
LAYOUT_FLAGS = ("prefix_len", "response_lens", "group_size")
UNITS = {"MiB": 2**20, "KiB": 2**10}
PAIRS = {"M": 10**6, "k": 10**3}


@click.command("plan-cp")
@click.option("--prefix-len", type=SIZE, default=16384, help="Rows of the shared prefix (P).")
@click.option(
    "--response-len",
    "response_lens",
    type=SIZE,
    multiple=True,
    default=(1024,),
    help="Rows of each response (R); give it once per response for unequal ones.",
)
@click.option("--group-size", type=SIZE, help="Responses (G); default: 16, or as many as there are --response-len.")
@click.option(
    "--rollouts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take the layouts of a rollouts JSONL instead, one per pack.",
)
@click.option("--max-tokens-per-pack", type=SIZE, help="Most rows of one pack of --rollouts.")
@click.option("--cp", type=SIZE, default=2, help="Context-parallel size.")
@click.option(
    "--cp-placement",
    "--placement",
    "placement",
    type=click.Choice(["auto", *PLACEMENTS]),
    default="auto",
    help="Where rows go; auto: lower predicted cost.",
)
@click.option(
    "--cp-comm-type",
    "--comm-type",
    "comm_type",
    type=click.Choice(COMM_TYPES),
    default="p2p",
    help="How keys reach queries.",
)
@click.option("--cp-a2a", type=SIZE, help="Inner size of --cp-comm-type a2a+p2p.")
@click.option("--heads", type=SIZE, default=32, help="Query heads on a tensor-parallel rank.")
@click.option("--kv-heads", type=SIZE, default=8, help="Key-value heads on a tensor-parallel rank.")
@click.option("--head-dim", type=SIZE, default=128, help="Channels of a head.")
@click.option("--bytes-per-element", type=SIZE, default=2, help="Of queries, keys and values: 2 for bf16.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the largest pack to this PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@click.pass_context
def plan_cp_command(
    ctx: click.Context,
    prefix_len: int,
    response_lens: tuple[int, ...],
    group_size: int | None,
    rollouts: Path | None,
    max_tokens_per_pack: int | None,
    cp: int,
    placement: str,
    comm_type: str,
    cp_a2a: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Rows, attention area and bytes of every context-parallel rank, and of every other way to do it.

    Bytes are those of one attention layer of one pack, forward and backward, without activation recompute. Nothing is
    run: neither megatron-core nor a process group is needed.

    \b
    megatron-prefix plan-cp --cp 8
    megatron-prefix plan-cp --prefix-len 4096 --response-len 700 --response-len 90 --response-len 2000 --cp 4
    megatron-prefix plan-cp --rollouts rollouts.jsonl --max-tokens-per-pack 8192 --cp 2 --picture plan.png
    """
    if rollouts is not None:
        given = [n for n in LAYOUT_FLAGS if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
        if given:
            flag = given[0].replace("_", "-").removesuffix("s")
            raise ValueError(f"--rollouts gives the layouts; leave out --{flag}")
        layouts = _layouts_of(rollouts, max_tokens_per_pack)
    elif max_tokens_per_pack is not None:
        raise ValueError("--max-tokens-per-pack cuts --rollouts into packs; give --rollouts, or leave it out")
    else:
        layouts = [_layout(prefix_len, response_lens, group_size)]
    if (cp_a2a is not None) != (comm_type == "a2a+p2p"):
        raise ValueError("--cp-a2a is the inner size of --cp-comm-type a2a+p2p: give both or neither")
    if picture is not None and not picture.parent.is_dir():
        raise ValueError(f"--picture {picture}: the folder {picture.parent} does not exist; make it first")
    shape = AttentionShape(heads, kv_heads, head_dim, bytes_per_element=bytes_per_element)
    plans = [_Plans(layout, cp, placement) for layout in layouts]
    for i, each in enumerate(plans):
        title = f"pack {i + 1} of {len(plans)}: {each.chosen.layout.num_rows:,} rows over {cp} ranks, {comm_type}"
        print_table(f"{title}, {each.chosen.name}", *_rank_table(each.chosen, shape, comm_type, cp_a2a))
        if placement == "auto":
            stderr_console().print(each.choice, markup=False)
    ways = _ways(plans, shape)
    print_table(f"one layer, {len(plans)} pack(s), received by the rank that receives most", *_way_table(ways))
    if picture is not None:
        from megatron_prefix.cli.plan_picture import draw_plans

        largest = max(plans, key=lambda each: each.chosen.layout.num_rows)
        draw_plans(largest.shown, shape, comm_type, cp_a2a, picture)
        stderr_console().print(f"picture: {picture}", markup=False)
    if as_json:
        packs = [
            plan_with_traffic(each.chosen, shape, comm_type, cp_a2a)
            | {"costs": {plan.name: plan.cost for plan in each.all}}
            for each in plans
        ]
        print_json({"command": "plan-cp", "comm_type": comm_type, "cp_a2a": cp_a2a, "packs": packs, "ways": ways})


class _Plans:
    """The plans of one layout with every placement, and the one that was asked for or is cheapest."""

    def __init__(self, layout: PrefixLayout, cp: int, placement: str) -> None:
        self.all = [CpPlan.build(layout, cp, name) for name in PLACEMENTS]
        name = CpPlan.build(layout, cp, "auto").name if placement == "auto" else placement
        self.chosen = next(plan for plan in self.all if plan.name == name)
        self.shown = self.all if placement == "auto" else [self.chosen]

    @property
    def choice(self) -> str:
        """What auto chose and why."""
        costs = ", ".join(f"{plan.name} {plan.cost:,}" for plan in self.all)
        return f"auto: {self.chosen.name}, by predicted cost of the slowest rank in (query, key) pairs: {costs}"


def _layout(prefix_len: int, response_lens: Sequence[int], group_size: int | None) -> PrefixLayout:
    if len(response_lens) == 1:
        response_lens = [response_lens[0]] * (group_size or 16)
    elif group_size not in (None, len(response_lens)):
        raise ValueError(
            f"--group-size {group_size} but {len(response_lens)} times --response-len; give one per response, or one"
        )
    return PrefixLayout([prefix_len, *response_lens], [-1] + [0] * len(response_lens))


def _layouts_of(rollouts: Path, max_tokens_per_pack: int | None) -> list[PrefixLayout]:
    from megatron_prefix.packing import pack_groups  # torch: not needed for a layout from flags
    from megatron_prefix.rollouts import read_rollouts

    return [pack.layout for pack in pack_groups(read_rollouts(rollouts), max_tokens_per_pack=max_tokens_per_pack)]


def _rank_table(
    plan: CpPlan, shape: AttentionShape, comm_type: str, cp_a2a: int | None
) -> tuple[list[str], list[list[str]]]:
    """Columns, and one row per rank; key rows are those that reach the rank's queries, or its group's with a2a+p2p."""
    ranks = range(plan.cp_size)
    areas = [plan.area(rank) for rank in ranks]
    mean = max(1.0, sum(areas) / len(areas))
    inner = inner_size(plan.cp_size, comm_type, cp_a2a)
    outer = plan.merged(inner)
    moved = [layer_traffic(plan, rank, shape, comm_type, cp_a2a) for rank in ranks]
    unit = _unit(max(part.received for each in moved for part in (each.forward, each.backward)))
    pairs = "M" if max(areas) >= PAIRS["M"] else "k"
    columns = ["rank", "rows", "response rows", "key rows received", f"area, {pairs} pairs", "area / mean"]
    rows = []
    for rank in ranks:
        counts = plan.local_layouts[rank].num_rows, plan.response_rows(rank), outer.rows_received(rank // inner)
        received = moved[rank].forward.received, moved[rank].backward.received
        rows.append(
            [
                str(rank),
                *(f"{count:,}" for count in counts),
                f"{areas[rank] / PAIRS[pairs]:,.1f}",
                f"{areas[rank] / mean:.3f}",
                *(f"{count / UNITS[unit]:,.1f}" for count in received),
            ]
        )
    return [*columns, f"forward {unit}", f"backward {unit}"], rows


def _ways(plans: Sequence[_Plans], shape: AttentionShape) -> list[dict[str, Any]]:
    """Every comm type, alone and with every placement: bytes that the busiest rank receives, over all packs."""
    cp = plans[0].chosen.cp_size
    inner = [size for size in range(2, cp) if cp % size == 0]
    ways = []
    for comm_type in COMM_TYPES:
        for a2a in inner if comm_type == "a2a+p2p" else [None]:
            way: dict[str, Any] = {"comm_type": comm_type, "cp_a2a": a2a}
            try:
                plain = [repeated_traffic(p.chosen.layout, cp, shape, comm_type, a2a) for p in plans]
            except ValueError as refusal:  # heads that do not divide
                ways.append(way | {"refused": str(refusal)})
                continue
            ways.append(way | {"placement": "repeated prefixes"} | _received([plain]))
            for i, name in enumerate(PLACEMENTS):
                ranks = [[layer_traffic(p.all[i], rank, shape, comm_type, a2a) for p in plans] for rank in range(cp)]
                ways.append(way | {"placement": name} | _received(ranks))
    return ways


def _received(ranks: Sequence[Sequence[LayerTraffic]]) -> dict[str, int]:
    """Most bytes that a rank receives, over its packs."""
    return {
        "forward": max(sum(moved.forward.received for moved in packs) for packs in ranks),
        "forward_backward": max(sum(moved.total.received for moved in packs) for packs in ranks),
    }


def _way_table(ways: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    unit = _unit(max((way["forward_backward"] for way in ways if "refused" not in way), default=0))
    plain: dict[tuple[str, int | None], dict[str, Any]] = {}
    rows = []
    for way in ways:
        key = way["comm_type"], way["cp_a2a"]
        name = way["comm_type"] if way["cp_a2a"] is None else f"{way['comm_type']} ({way['cp_a2a']})"
        if "refused" in way:
            rows.append([name, way["refused"], "", "", ""])
            continue
        repeated = plain.setdefault(key, way)
        both = way["forward_backward"]
        sizes = (f"{count / UNITS[unit]:,.1f}" for count in (way["forward"], both))
        less = f"{repeated['forward_backward'] / both:.1f}x" if both and way is not repeated else ""
        rows.append([name, way["placement"], *sizes, less])
    return ["comm type", "placement", f"forward {unit}", f"forward + backward {unit}", "less"], rows


def _unit(largest: int) -> str:
    """The unit in which all sizes of a table are readable."""
    return "MiB" if largest >= UNITS["MiB"] else "KiB"
