"""`megatron-prefix bench`: what sharing prefixes saves on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from megatron_prefix.attention import IMPLS
from megatron_prefix.bench import attention, context_parallel, over_ranks, pipeline_report, planned_rows, split_report
from megatron_prefix.bench.group import DTYPES, GroupSizes, PipelineSizes
from megatron_prefix.bench.report import ResultsDifferError, summary, table
from megatron_prefix.cli.bench_calls import check_call, check_out, write_report
from megatron_prefix.cli.calibrate import calibrate_command
from megatron_prefix.cli.console import (
    print_table,
    progress_bar,
    start_distributed,
    stderr_console,
)
from megatron_prefix.cli.cp_options import SIZE, Command, CpFlags, cp_flags
from megatron_prefix.cli.model_shape import ShapeFlags, shape_flags
from megatron_prefix.cli.pipeline_options import PipelineFlags, pipeline_flags

# Dense scores of the default sizes fill the memory of a machine.
FUSED_IMPLS = [impl for impl in IMPLS if impl != "reference"]


@click.group("bench")
def bench_command() -> None:
    """Time prefix groups against repeated prefixes, next to the theoretical bounds.

    Results are compared first: when they differ, the command says what differs, prints no speed-up and exits with 1.
    """


class SizeList(click.ParamType):
    """Numbers of 1 or more, with commas between them; an empty text is none."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """From "4,8" to (4, 8)."""
        return tuple(SIZE.convert(size.strip(), param, ctx) for size in value.split(",")) if value else ()


def _common(command: Command, group_size: int = 8) -> Command:
    """The options of all benchmarks."""
    options = (
        click.option("--group-size", type=SIZE, default=group_size, help="Responses of the group (G)."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", help="Of all tensors."),
        click.option("--impl", type=click.Choice(FUSED_IMPLS), default="auto", help="Attention implementation."),
        click.option("--repeats", type=SIZE, default=5, help="Timed runs of each path, in turn."),
        click.option("--seed", type=int, default=0, help="Of the random data."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout."),
        click.option(
            "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON to this file."
        ),
    )
    result: Any = command
    for option in reversed(options):
        result = option(result)
    return result


@bench_command.command("attention")
@click.option("--prefix-len", type=SIZE, default=4096, help="Rows of the shared prefix (P).")
@click.option("--response-len", type=SIZE, default=256, help="Rows of each response (R).")
@click.option("--heads", type=SIZE, default=16, help="Query heads.")
@click.option("--kv-heads", type=SIZE, default=16, help="Key-value heads.")
@click.option("--head-dim", type=SIZE, default=64, help="Channels of a head.")
@cp_flags()
@_common
def attention_command(
    prefix_len: int,
    response_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cp: CpFlags,
    group_size: int,
    dtype: str,
    impl: str,
    repeats: int,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Attention alone, forward and backward, of one prefix group: bound alpha, the ratio of the attention areas.

    Also runs the prefix-grouper package where it is installed, on the same CPU kernel. On the CPU that kernel's
    backward runs in parallel over sequences and key-value heads, so give at least as many --kv-heads as threads.

    With --cp above 1, under torchrun, context-parallel ranks are compared with one rank instead.

    \b
    megatron-prefix bench attention
    megatron-prefix bench attention --dtype bf16 --heads 2 --kv-heads 2 --repeats 3
    torchrun --nproc-per-node 2 -m megatron_prefix bench attention --cp 2
    """
    device = check_call(out, impl, dtype, head_dim, processes=cp.cp, cp_size=cp.cp)
    group = GroupSizes(prefix_len, response_len, group_size)
    sizes = attention.AttentionSizes(heads, kv_heads, head_dim, dtype, impl)
    if cp.cp > 1:
        shared = _cp_sizes(cp)

        def run_over_ranks(after_each: Callable[[str], None]) -> dict[str, Any]:
            return context_parallel.bench_context_parallel(
                group, sizes, shared, repeats=repeats, seed=seed, after_each=after_each
            )

        start_distributed()
        try:
            _run_and_report("bench attention --cp", over_ranks.num_runs(repeats), run_over_ranks, as_json, out)
        finally:
            torch.distributed.destroy_process_group()
        return

    def run(after_each: Callable[[str], None]) -> dict[str, Any]:
        return attention.bench_attention(group, sizes, repeats=repeats, seed=seed, device=device, after_each=after_each)

    _run_and_report("bench attention", attention.num_runs(repeats, device), run, as_json, out)


@bench_command.command("step")
@click.option("--prefix-len", type=SIZE, default=2048, help="Rows of the shared prefix (P).")
@click.option("--response-len", type=SIZE, default=128, help="Rows of each response (R).")
@shape_flags
@cp_flags()
@pipeline_flags(with_limit=True)
@_common
def step_command(
    prefix_len: int,
    response_len: int,
    shape: ShapeFlags,
    cp: CpFlags,
    pipeline: PipelineFlags,
    group_size: int,
    dtype: str,
    impl: str,
    repeats: int,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """A whole training step (forward, log-probs, loss, backward; no optimizer): bound rho, the ratio of the rows.

    With --cp above 1, under torchrun, context-parallel ranks are compared with one rank instead; their step ends with
    the sum of gradients over them.

    With --pp above 1, under torchrun, or --groups or --max-tokens-per-microbatch, the step is one of several groups
    through megatron-core's schedule: repeated prefixes, one sequence a micro-batch, against prefix groups, one a
    micro-batch or, where that is over the limit, split. The modelled bubble of both stands beside the times.

    \b
    megatron-prefix bench step
    megatron-prefix bench step --model smollm2 --prefix-len 512 --response-len 64 --repeats 3
    torchrun --nproc-per-node 2 -m megatron_prefix bench step --cp 2 --cp-comm-type a2a
    torchrun --nproc-per-node 2 -m megatron_prefix bench step --pp 2 --groups 4 --max-tokens-per-microbatch 2048
    """
    if cp.cp > 1 and pipeline.given:
        raise ValueError(
            f"bench step measures context parallelism or a pipeline, got --cp {cp.cp} and {pipeline.given[0]}; leave "
            "one of them out"
        )
    group = GroupSizes(prefix_len, response_len, group_size)
    config = shape.config(prefix_len + response_len)
    pipeline.check_layers(config.num_layers)
    limit = pipeline.max_tokens_per_microbatch
    processes = cp.cp * pipeline.pp
    check_call(out, impl, dtype, config.channels, processes=processes, cp_size=cp.cp, has_parts=limit is not None)
    # megatron-core takes seconds to import: not for `bench attention`, nor for bad input.
    from megatron_prefix.bench import in_pipeline, step, step_over_ranks
    from megatron_prefix.cli.options import ParallelFlags, check_limit
    from megatron_prefix.mcore.parallel import destroy

    settings = step.StepSettings(dtype, impl)
    sizes = _pipeline_sizes(pipeline)
    check_limit(in_pipeline.random_groups(group, config.vocab_size, 1, seed), limit)

    def run(after_each: Callable[[str], None]) -> dict[str, Any]:
        return step.bench_step(group, config, settings, repeats=repeats, seed=seed, after_each=after_each)

    def run_over_ranks(after_each: Callable[[str], None]) -> dict[str, Any]:
        return step_over_ranks.bench_step_over_ranks(
            group, config, settings, _cp_sizes(cp), repeats=repeats, seed=seed, after_each=after_each
        )

    def run_in_pipeline(after_each: Callable[[str], None]) -> dict[str, Any]:
        bench = in_pipeline.PipelineBench(group, config, settings, sizes, seed=seed)
        return bench.step(max_tokens=limit, repeats=repeats, after_each=after_each)

    ParallelFlags(
        pp=pipeline.pp, vpp=pipeline.vpp, cp=cp.cp, cp_comm_type=cp.cp_comm_type, cp_a2a=cp.cp_a2a, dp=1
    ).start(seed)
    try:
        if cp.cp > 1:
            _run_and_report("bench step --cp", over_ranks.num_runs(repeats), run_over_ranks, as_json, out)
        elif pipeline.given:
            _run_and_report("bench step --pp", in_pipeline.num_runs(2, repeats, dtype), run_in_pipeline, as_json, out)
        else:
            _run_and_report("bench step", step.num_runs(repeats), run, as_json, out)
    finally:
        destroy()


@bench_command.command("split")
@click.option("--prefix-len", type=SIZE, default=2048, help="Rows of the shared prefix (P).")
@click.option("--response-len", type=SIZE, default=128, help="Rows of each response (R).")
@click.option("--parts", type=SIZE, default=4, help="Micro-batches that the responses are spread over.")
@click.option(
    "--prefix-activations",
    type=click.Choice(["keep", "recompute", "offload"]),
    multiple=True,
    default=("keep", "recompute"),
    help="What the prefix's backward starts from; give it several times to compare.",
)
@click.option(
    "--group-sizes",
    type=SizeList(),
    default="4,8,16,32",
    help="Groups (numbers of responses) whose memory is compared, in parts of one size.",
)
@click.option("--repeated", is_flag=True, help="Also run every response as a sequence of its own.")
@click.option("--dry-run", is_flag=True, help="Run nothing: count the rows of the planned micro-batches.")
@shape_flags
@pipeline_flags(with_limit=False)
@partial(_common, group_size=16)
def split_command(
    prefix_len: int,
    response_len: int,
    parts: int,
    prefix_activations: tuple[str, ...],
    group_sizes: tuple[int, ...],
    repeated: bool,
    dry_run: bool,
    shape: ShapeFlags,
    pipeline: PipelineFlags,
    group_size: int,
    dtype: str,
    impl: str,
    repeats: int,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """A training step of a group that does not fit a micro-batch: the prefix once and responses in parts, against the
    unsplit group, and against parts that encode the prefix again.

    Memory is counted beside the parameters and their gradient buffers. On the CPU, offloading keeps the activations
    where they are.

    With --pp above 1, under torchrun, or --groups, the step is one of several groups through megatron-core's schedule,
    with the modelled bubble of every path. Stages are in different phases at one time, so that memory is that of the
    whole step, and --group-sizes has nothing to compare.

    \b
    megatron-prefix bench split
    torchrun --nproc-per-node 2 -m megatron_prefix bench split --pp 2 --groups 4
    megatron-prefix bench split --group-size 32 --parts 8 --prefix-activations recompute --repeated
    megatron-prefix bench split --dry-run --prefix-len 16384 --response-len 1024 --group-size 16 --parts 4
    """
    group = GroupSizes(prefix_len, response_len, group_size)
    if dry_run and pipeline.given:
        raise ValueError(f"--dry-run counts the rows of one group, whatever runs it; leave out {pipeline.given[0]}")
    if dry_run:
        check_out(out)
        planned = planned_rows.planned_rows(group, parts)
        print_table(*planned_rows.table(planned))
        write_report(planned, as_json, out)
        return
    if pipeline.given:
        if click.get_current_context().get_parameter_source("group_sizes") is ParameterSource.COMMANDLINE:
            raise ValueError(
                f"--group-sizes compares memory by phase, and the stages of a pipeline ({pipeline.given[0]}) are in "
                "different ones at one time; leave one of them out"
            )
        group_sizes = ()
    config = shape.config(prefix_len + response_len)
    pipeline.check_layers(config.num_layers)
    check_call(out, impl, dtype, config.channels, processes=pipeline.pp, has_parts=True)
    from megatron_prefix.bench import in_pipeline, split
    from megatron_prefix.bench.step import StepSettings
    from megatron_prefix.cli.options import ParallelFlags
    from megatron_prefix.mcore.parallel import destroy

    settings = split.SplitSettings(parts, prefix_activations, group_sizes, repeated)
    settings.check(group)

    def run(after_each: Callable[[str], None]) -> dict[str, Any]:
        return split.bench_split(
            group, config, StepSettings(dtype, impl), settings, repeats=repeats, seed=seed, after_each=after_each
        )

    def run_in_pipeline(after_each: Callable[[str], None]) -> dict[str, Any]:
        bench = in_pipeline.PipelineBench(
            group, config, StepSettings(dtype, impl), _pipeline_sizes(pipeline), seed=seed
        )
        return bench.split(settings, repeats=repeats, after_each=after_each)

    ParallelFlags(pp=pipeline.pp, vpp=pipeline.vpp, dp=1).start(seed)
    try:
        if pipeline.given:
            runs = in_pipeline.num_runs(2 + len(prefix_activations) + repeated, repeats, dtype)
            _run_and_report("bench split --pp", runs, run_in_pipeline, as_json, out)
        else:
            _run_and_report("bench split", split.num_runs(settings, repeats, dtype), run, as_json, out)
    finally:
        destroy()


def _pipeline_sizes(flags: PipelineFlags) -> PipelineSizes:
    return PipelineSizes(flags.pp, flags.vpp, flags.num_groups)


def _cp_sizes(cp: CpFlags) -> over_ranks.CpSizes:
    return over_ranks.CpSizes(cp.cp_comm_type, cp.cp_placement, cp.cp_a2a)


def _run_and_report(
    title: str, runs: int, run: Callable[[Callable[[str], None]], dict[str, Any]], as_json: bool, out: Path | None
) -> None:
    """Run with a progress bar, then print the table or what differed; exit with 1 in that case."""
    console = stderr_console()
    try:
        with progress_bar(title, runs, unit="runs") as advance:
            report = run(lambda note: advance(note=note))
    except ResultsDifferError as error:
        report = error.report
        console.print(str(error), style="red", markup=False)
    else:
        if "stages" in next(iter(report.get("results", {}).values()), {}):
            print_table(*pipeline_report.table(report))
            console.print(pipeline_report.summary(report), markup=False)
        elif report["bench"] == "split":
            print_table(*split_report.table(report))
            if report["by_group_size"]:
                print_table(*split_report.memory_table(report))
            console.print(split_report.summary(report), markup=False)
        elif "ranks" in report:
            print_table(*over_ranks.table(report))
        else:
            print_table(*table(report))
            console.print(summary(report), markup=False)
    write_report(report, as_json, out)
    if not report["ok"]:
        raise SystemExit(1)


bench_command.add_command(calibrate_command)
