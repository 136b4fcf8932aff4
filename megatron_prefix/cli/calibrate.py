"""`megatron-prefix bench calibrate`: the cost model of this machine, in a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from megatron_prefix.attention import IMPLS
from megatron_prefix.bench.group import DTYPES
from megatron_prefix.bench.report import new_report
from megatron_prefix.cli.bench_calls import check_call
from megatron_prefix.cli.console import print_json, print_table, progress_bar, stderr_console
from megatron_prefix.cli.cp_options import SIZE
from megatron_prefix.cli.model_shape import ShapeFlags, shape_flags

FUSED_IMPLS = [impl for impl in IMPLS if impl != "reference"]


@click.command("calibrate")
@click.option("--max-rows", type=SIZE, default=2048, help="Rows of the largest micro-batch that is timed.")
@shape_flags
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", help="Of all tensors.")
@click.option("--impl", type=click.Choice(FUSED_IMPLS), default="auto", help="Attention implementation.")
@click.option("--repeats", type=SIZE, default=5, help="Timed runs of each micro-batch, in turn.")
@click.option("--seed", type=int, default=0, help="Of the random data.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File for the coefficients."
)
def calibrate_command(
    max_rows: int,
    shape: ShapeFlags,
    dtype: str,
    impl: str,
    repeats: int,
    seed: int,
    as_json: bool,
    out: Path,
) -> None:
    """Time a designed set of micro-batches of a model and fit the cost model that packing balances with.

    Writes the seconds of a row, a row with a target, a pair of the attention mask, a merged row, a tree level and a
    micro-batch. The time of a micro-batch that was not among them is modelled from its counts; the table shows how far
    modelled and measured times are from one another.

    \b
    megatron-prefix bench calibrate --out cost.json
    megatron-prefix bench calibrate --model smollm2 --dtype bf16 --max-rows 4096 --out cost.json
    """
    config = shape.config(max_rows)
    check_call(out, impl, dtype, config.channels)
    # megatron-core takes seconds to import: not for bad input.
    from megatron_prefix.bench.step import random_model
    from megatron_prefix.cli.options import ParallelFlags
    from megatron_prefix.mcore.calibration import calibrate, num_runs
    from megatron_prefix.mcore.parallel import destroy

    ParallelFlags(dp=1).start(seed)
    try:
        model = random_model(config, DTYPES[dtype], impl, seed)
        with progress_bar("bench calibrate", num_runs(repeats), unit="runs") as advance:
            found = calibrate(
                model, max_rows=max_rows, repeats=repeats, seed=seed, after_each=lambda name: advance(note=name)
            )
    finally:
        destroy()
    found.cost.to_json(out)
    print_table(
        f"{len(found.samples)} micro-batches, median ms of {repeats}",
        ["", "rows", "targets", "pairs", "merged", "levels", "taken", "modelled", "error"],
        [
            [
                sample.name,
                *(f"{count:,}" for count in asdict(sample.work).values()),
                f"{sample.seconds * 1e3:.2f}",
                f"{sample.modelled * 1e3:.2f}",
                f"{sample.error:+.0%}",
            ]
            for sample in found.samples
        ],
    )
    print_table(f"{out}", ["coefficient", "seconds"], [[k, f"{v:.3g}"] for k, v in asdict(found.cost).items()])
    stderr_console().print(f"root mean square of the relative errors: {found.residual:.1%}", markup=False)
    if as_json:
        sizes = {"max_rows": max_rows, "dtype": dtype, "impl": impl, "repeats": repeats}
        print_json(new_report("calibrate", sizes, seed) | {"model": asdict(config)} | found.as_dict())
