"""`megatron-prefix plan-cp`: what context parallelism will do with a layout, before any GPU is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from megatron_prefix.cli.console import print_json, print_table, stderr_console
from megatron_prefix.cli.cp_options import SIZE, CpFlags, cp_flags
from megatron_prefix.cli.plan_ways import UNITS, byte_unit, comparison, way_table, ways_of
from megatron_prefix.context_parallel.choice import FLOPS_PER_BYTE, CpLayers, choose_plan, predicted_cost
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import (
    AttentionShape,
    computed_areas,
    inner_size,
    layer_traffic,
    plan_with_traffic,
)
from megatron_prefix.layout import PrefixLayout

LAYOUT_FLAGS = ("prefix_len", "response_lens", "group_size")
PAIRS = {"M": 10**6, "k": 10**3}
FLOPS = {"TFLOP": 10**12, "GFLOP": 10**9, "MFLOP": 10**6}


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
@click.option("--max-tokens-per-microbatch", type=SIZE, help="Most rows of one pack of --rollouts.")
@cp_flags(default_cp=2)
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
    max_tokens_per_microbatch: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    picture: Path | None,
    as_json: bool,
    cp: CpFlags,
) -> None:
    """Rows, attention area and bytes of every context-parallel rank, and of every other way to do it.

    Bytes are those of one attention layer of one pack, forward and backward, without activation recompute. Nothing is
    run: neither megatron-core nor a process group is needed.

    \b
    megatron-prefix plan-cp --cp 8
    megatron-prefix plan-cp --prefix-len 4096 --response-len 700 --response-len 90 --response-len 2000 --cp 4
    megatron-prefix plan-cp --rollouts rollouts.jsonl --max-tokens-per-microbatch 8192 --cp 2 --picture plan.png
    """
    if rollouts is not None:
        given = [n for n in LAYOUT_FLAGS if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
        if given:
            flag = given[0].replace("_", "-").removesuffix("s")
            raise ValueError(f"--rollouts gives the layouts; leave out --{flag}")
        layouts = _layouts_of(rollouts, max_tokens_per_microbatch)
    elif max_tokens_per_microbatch is not None:
        raise ValueError("--max-tokens-per-microbatch cuts --rollouts into packs; give --rollouts, or leave it out")
    else:
        layouts = [_layout(prefix_len, response_lens, group_size)]
    if picture is not None and not picture.parent.is_dir():
        raise ValueError(f"--picture {picture}: the folder {picture.parent} does not exist; make it first")
    shape = AttentionShape(heads, kv_heads, head_dim, bytes_per_element=bytes_per_element)
    layers = CpLayers(shape, (cp.cp_comm_type,), cp.cp_a2a)
    plans = [_Plans(layout, cp.cp, cp.cp_placement, layers) for layout in layouts]
    for i, each in enumerate(plans):
        rows = each.chosen.layout.num_rows
        title = f"pack {i + 1} of {len(plans)}: {rows:,} rows over {cp.cp} ranks, {cp.cp_comm_type}, {each.chosen.name}"
        print_table(title, *_rank_table(each.chosen, layers))
        if cp.cp_placement == "auto":
            stderr_console().print(each.choice, markup=False)
    ways = ways_of([each.all for each in plans], shape)
    print_table(f"one layer, {len(plans)} pack(s), received by the rank that receives most", *way_table(ways))
    stderr_console().print(comparison(ways, cp.cp_comm_type, cp.cp_a2a), markup=False)
    if picture is not None:
        from megatron_prefix.cli.plan_picture import draw_plans

        largest = max(plans, key=lambda each: each.chosen.layout.num_rows)
        draw_plans(largest.shown, layers, picture)
        stderr_console().print(f"picture: {picture}", markup=False)
    if as_json:
        packs = [
            plan_with_traffic(each.chosen, shape, cp.cp_comm_type, cp.cp_a2a) | {"costs": each.costs} for each in plans
        ]
        way = {"comm_type": cp.cp_comm_type, "cp_a2a": cp.cp_a2a}
        print_json({"command": "plan-cp"} | way | {"packs": packs, "ways": ways})


class _Plans:
    """The plans of one layout with every placement, and the one that was asked for or is cheapest."""

    def __init__(self, layout: PrefixLayout, cp: int, placement: str, layers: CpLayers) -> None:
        self.all = [CpPlan.build(layout, cp, name) for name in PLACEMENTS]
        self.costs = {plan.name: predicted_cost(plan, layers) for plan in self.all}
        self.comm_type = layers.comm_types[0]
        name = choose_plan(layout, cp, placement, layers).name
        self.chosen = next(plan for plan in self.all if plan.name == name)
        self.shown = self.all if placement == "auto" else [self.chosen]

    @property
    def choice(self) -> str:
        """What auto chose and why."""
        most = max(self.costs.values())
        unit = next((unit for unit, size in FLOPS.items() if most >= size), "MFLOP")
        costs = ", ".join(f"{name} {cost / FLOPS[unit]:,.3f}" for name, cost in self.costs.items())
        return (
            f"auto: {self.chosen.name}, by predicted cost of the slowest rank with {self.comm_type}, in {unit} "
            f"(a byte counts as {FLOPS_PER_BYTE:,} FLOP): {costs}"
        )


def _layout(prefix_len: int, response_lens: Sequence[int], group_size: int | None) -> PrefixLayout:
    if len(response_lens) == 1:
        response_lens = [response_lens[0]] * (group_size or 16)
    elif group_size not in (None, len(response_lens)):
        raise ValueError(
            f"--group-size {group_size} but {len(response_lens)} times --response-len; give one per response, or one"
        )
    return PrefixLayout([prefix_len, *response_lens], [-1] + [0] * len(response_lens))


def _layouts_of(rollouts: Path, max_tokens: int | None) -> list[PrefixLayout]:
    from megatron_prefix.packing import pack_groups  # torch: not needed for a layout from flags
    from megatron_prefix.rollouts import read_rollouts

    return [pack.layout for pack in pack_groups(read_rollouts(rollouts), max_tokens_per_pack=max_tokens)]


def _rank_table(plan: CpPlan, layers: CpLayers) -> tuple[list[str], list[list[str]]]:
    """Columns, and one row per rank; key rows are those that reach the rank's queries, or its group's with a2a+p2p."""
    ranks = range(plan.cp_size)
    comm_type, cp_a2a = layers.comm_types[0], layers.a2a_size
    areas = computed_areas(plan, comm_type, cp_a2a)
    mean = max(1.0, sum(areas) / len(areas))
    inner = inner_size(plan.cp_size, comm_type, cp_a2a)
    outer = plan.merged(inner)
    moved = layer_traffic(plan, layers.shape, comm_type, cp_a2a)
    unit = byte_unit(max(part.received for each in moved for part in (each.forward, each.backward)))
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
