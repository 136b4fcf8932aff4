"""`megatron-prefix inspect`: what a file of rollouts holds, what sharing its prefixes saves, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from megatron_prefix.cli.console import print_json, print_table, stderr_console
from megatron_prefix.cli.cp_options import SIZE
from megatron_prefix.cli.rollout_input import RolloutInput, describe, rollout_input_options
from megatron_prefix.cost_model import CostModel
from megatron_prefix.formats.assemble import Problems
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_stats import RolloutStats

SHOWN_PROBLEMS = 5


@click.command("inspect")
@click.option("--vocab-size", type=SIZE, help="Token ids of this and above are bad; default: that of --model.")
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    help="Checkpoint folder or model.json: model the saving of a training step in FLOPs, check ids and lengths.",
)
@click.option("--max-tokens-per-microbatch", type=SIZE, help="Find groups with more rows than this.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG with histograms.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@rollout_input_options(click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path)))
def inspect_command(
    vocab_size: int | None,
    model: Path | None,
    max_tokens_per_microbatch: int | None,
    plot: Path | None,
    as_json: bool,
    rollouts: RolloutInput,
) -> None:
    """Look at a file of rollouts: JSONL or Parquet of this package, or what verl, NeMo-RL or Megatron-RL left.

    \b
    rho    rows that repeated prefixes take, over those with shared prefixes
    alpha  the same for the pairs of the attention mask
    A step with repeated prefixes costs between alpha and rho times as much, the output layer aside.
    --model says how much in FLOPs, with it.

    Groups are read one after another, so that large files fit (those of several records wait for the end of the file).
    Exits with 0 whatever is found, and with 2 when the file cannot be read.

    \b
    megatron-prefix inspect rollouts.jsonl --plot rollouts.png
    megatron-prefix inspect step7.pt --model smollm2 --max-tokens-per-microbatch 8192 --skip-bad
    megatron-prefix inspect chats.jsonl --tokenizer smollm2 --json
    """
    assert rollouts.path is not None
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"--plot {plot}: the folder {plot.parent} does not exist; make it first")
    config = None if model is None else ModelConfig.from_json(model / "model.json" if model.is_dir() else model)
    if vocab_size is None and config is not None:
        vocab_size = config.vocab_size
    stats = RolloutStats(
        None if config is None else CostModel.of_model(config),
        max_positions=None if config is None else config.max_position_embeddings,
        max_tokens=max_tokens_per_microbatch,
    )
    problems = Problems()
    unit = "row" if rollouts.path.suffix in (".parquet", ".pt") else "line"
    for number, group in rollouts.reader(vocab_size).stream(rollouts.path, problems):
        stats.add(f"{unit} {number}", group)
    result = stats.to_dict() | {
        "file": str(rollouts.path),
        "skipped": problems.skipped,
        "left_out": problems.left_out,
        "problems": [problem._asdict() for problem in problems.first],
    }
    _show(rollouts.path, stats, result, problems)
    if plot is not None:
        from megatron_prefix.cli.rollout_picture import draw_rollouts

        draw_rollouts(stats, rollouts.path.name, plot)
        stderr_console().print(f"plot: {plot}", markup=False)
    if as_json:
        print_json(result)


def _show(path: Path, stats: RolloutStats, result: dict[str, Any], problems: Problems) -> None:
    reward = result["reward"]
    print_table(
        f"{path}: {result['groups']:,} groups, {result['responses']:,} responses, "
        f"{stats.trained:,} trained tokens ({result['trained_share']:.1%} of the responses), "
        f"reward {reward['mean']:.3f} +- {reward['std']:.3f}",
        ("", "min", "median", "p90", "max"),
        [
            _row("prompt tokens", result["prompt_length"], "{:,.0f}"),
            _row("response tokens", result["response_length"], "{:,.0f}"),
            _row("responses per group", result["group_size"], "{:,.0f}"),
            _row("levels of sharing", result["levels"], "{:,.0f}"),
            _row("rho per group", result["group_rho"], "{:.2f}"),
            _row("alpha per group", result["group_alpha"], "{:.2f}"),
        ],
    )
    rows, pairs = result["rows"], result["pairs"]
    print_table(
        f"{stats.prefix_ratio:.1%} of all rows are prefixes that need not be repeated",
        ("all groups", "repeated", "shared", "less"),
        [
            ["rows (rho)", f"{rows['repeated']:,}", f"{rows['shared']:,}", f"{stats.rho:.2f}x"],
            ["attention pairs (alpha)", f"{pairs['repeated']:,}", f"{pairs['shared']:,}", f"{stats.alpha:.2f}x"],
            [_saving_name(stats), "", "", _saving(stats)],
        ],
    )
    found = [
        (what, f"{each.count:,}", ", ".join(each.places) + (", ..." if each.count > len(each.places) else ""))
        for what, each in stats.findings.items()
    ]
    if found:
        print_table("findings", ("what", "times", "where"), found)
    console = stderr_console()
    if problems.first:
        console.print(describe(problems), markup=False)
        for problem in problems.first[1:SHOWN_PROBLEMS]:
            console.print(f"  {problem.place}: {problem.message}", markup=False)
    elif not found:
        console.print("no problems found")


def _row(name: str, values: dict[str, float], form: str) -> Sequence[str]:
    return [name, *(form.format(value) for value in values.values())]


def _saving_name(stats: RolloutStats) -> str:
    return "cost of a step, output layer aside" if stats.cost is None else "FLOPs of a step (modelled)"


def _saving(stats: RolloutStats) -> str:
    low, high = stats.saving
    return f"{low:.2f}x" if stats.cost is not None else f"{low:.2f}x to {high:.2f}x"
