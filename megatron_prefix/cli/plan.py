"""`megatron-prefix plan`: which parallel sizes to train with on a cluster, and what a step will need and take."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from megatron_prefix.cli.console import print_json, print_table, stderr_console
from megatron_prefix.cli.cp_options import SIZE, gather
from megatron_prefix.estimator.cluster import Cluster
from megatron_prefix.estimator.lengths import FORMS, Lengths, draw_groups
from megatron_prefix.estimator.model import PRESETS, read_model
from megatron_prefix.estimator.search import GIB, Choice, Fixed, Found, Run, Task, search
from megatron_prefix.estimator.sizes import BYTES, MODULES, RECOMPUTE, RunSettings
from megatron_prefix.estimator.step_time import bubble_share
from megatron_prefix.hardware import DEVICES, find_device
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.workload import Workload

LENGTH_FLAGS = ("prompt_len", "response_len", "group_size", "groups_per_step", "seed")
COLUMNS = ("tp", "cp", "pp", "vpp", "ep", "dp")


def _fixed_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each size that can be fixed; the command gets them as ``fixed: Fixed``."""
    sizes = [click.option(f"--{name}", type=SIZE, help=f"Fix {name}; default: search.") for name in COLUMNS]
    return gather(
        command,
        "fixed",
        Fixed,
        *sizes,
        click.option("--recompute", type=click.Choice(RECOMPUTE), help="Fix activation recompute; default: search."),
        click.option(
            "--max-tokens-per-microbatch", "max_tokens", type=SIZE, help="Fix a micro-batch's rows; default: search."
        ),
    )


@click.command("plan")
@click.option("--model", required=True, help=f"{', '.join(PRESETS)}, a checkpoint or Hugging Face folder, or its JSON.")
@click.option(
    "--rollouts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take a step's groups from a rollouts JSONL instead of lengths.",
)
@click.option("--prompt-len", default="4096", help=f"Tokens of a prompt (P): {FORMS}.")
@click.option("--response-len", default="lognormal:1024:0.5:8192", help="Tokens of a response (R), likewise.")
@click.option("--group-size", type=SIZE, default=16, help="Responses to a prompt (G).")
@click.option("--groups-per-step", type=SIZE, default=256, help="Prompts of a step, over all ranks.")
@click.option("--seed", type=int, default=0, help="Of the drawn lengths.")
@click.option("--gpu", default="h100", help=f"{', '.join(DEVICES)}.")
@click.option("--num-gpus", type=SIZE, default=8, help="GPUs of the job.")
@click.option("--gpus-per-node", type=SIZE, default=8, help="GPUs that NVLink joins.")
@click.option("--network-gbps", type=float, default=400.0, help="Gbit/s of a GPU to other nodes, one direction.")
@click.option("--memory-share", type=float, default=0.9, help="Of a GPU's memory, for tensors.")
@click.option("--dtype", type=click.Choice(list(BYTES)), default="bf16", help="Of parameters and activations.")
@click.option("--modules", type=click.Choice(MODULES), default="te", help="te is --use-te of train, local without.")
@click.option(
    "--distributed-optimizer/--no-distributed-optimizer",
    default=True,
    help="Shard optimizer state over data- and context-parallel ranks.",
)
@click.option("--chunk-rows", type=SIZE, default=4096, help="Most rows whose logits exist at once.")
@_fixed_options
@click.option("--top", type=SIZE, default=5, help="Choices to show, the quickest of each sizes but vpp.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the choices to this PNG.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@click.pass_context
def plan_command(
    ctx: click.Context,
    model: str,
    rollouts: Path | None,
    prompt_len: str,
    response_len: str,
    group_size: int,
    groups_per_step: int,
    seed: int,
    gpu: str,
    num_gpus: int,
    gpus_per_node: int,
    network_gbps: float,
    memory_share: float,
    dtype: str,
    modules: str,
    distributed_optimizer: bool,
    chunk_rows: int,
    fixed: Fixed,
    top: int,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Memory, communication, bubble and step time of every sensible choice of parallel sizes, the quickest first.

    Nothing is run: no GPU, no megatron-core. Times are modelled from data sheets (a matrix product at half of the peak)
    and were not compared with a GPU; memory is within 10% of tracked allocations on the CPU with --modules local.
    The formulas and their sources are in megatron_prefix/estimator.

    \b
    megatron-prefix plan --model qwen3-8b --num-gpus 64 --prompt-len 4096 --response-len lognormal:1024:0.5:8192
    megatron-prefix plan --model HF_FOLDER --rollouts rollouts.jsonl --gpu h200 --num-gpus 16 --plot plan.png
    megatron-prefix plan --model qwen3-30b-a3b --num-gpus 512 --groups-per-step 512 --tp 1 --out plan.json
    """
    for option, path in (("--plot", plot), ("--out", out)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if not network_gbps > 0:
        raise ValueError(f"--network-gbps must be above 0, got {network_gbps}")
    if rollouts is None:
        lengths = Lengths.parse(prompt_len), Lengths.parse(response_len)
        groups = draw_groups(*lengths, group_size=group_size, num_groups=groups_per_step, seed=seed)
    else:
        given = [n for n in LENGTH_FLAGS if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
        if given:
            raise ValueError(f"--rollouts gives the groups; leave out --{given[0].replace('_', '-')}")
        groups = _lengths_of(rollouts)
    cluster = Cluster(find_device(gpu), num_gpus, gpus_per_node, network_gbps * 1e9 / 8, memory_share)
    task = Task(read_model(model), groups, cluster, RunSettings(dtype, modules, distributed_optimizer, chunk_rows))
    found = search(task, fixed)
    shown = found.distinct[:top]
    print_table(_title(task), *_table(shown))
    console = stderr_console()
    console.print(_summary(task, found), markup=False)
    command = train_command_line(task, model, shown[0])
    console.print(command, markup=False, soft_wrap=True)
    if plot is not None:
        from megatron_prefix.cli.plan_chart import draw_plan

        draw_plan(task, shown, plot)
        console.print(f"picture: {plot}", markup=False)
    result = _result(task, found, shown, command)
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)


def train_command_line(task: Task, model: str, choice: Choice) -> str:
    """What to run with a choice: `megatron-prefix train`, or with experts Megatron-LM's own flags."""
    sizes, cluster = choice.sizes, task.cluster
    if task.model.experts is not None:
        flags = {
            "tensor-model-parallel-size": sizes.tp,
            "pipeline-model-parallel-size": sizes.pp,
            "context-parallel-size": sizes.cp,
            "expert-model-parallel-size": sizes.ep,
            "expert-tensor-parallel-size": 1,
        }
        words = [f"--{name} {value}" for name, value in flags.items()]
        if sizes.vpp > 1:
            layers = task.model.config.num_layers // (sizes.pp * sizes.vpp)
            words.append(f"--num-layers-per-virtual-pipeline-stage {layers}")
        words += ["--sequence-parallel"] * (sizes.tp > 1)
        words += ["--use-distributed-optimizer"] * task.settings.distributed_optimizer
        if choice.recompute != "none":
            words.append(f"--recompute-granularity {choice.recompute}")
        if choice.recompute == "full":
            words.append("--recompute-method uniform --recompute-num-layers 1")
        return "`train` has no experts yet; in a Megatron-LM script: " + " ".join(words)
    nodes = max(1, cluster.num_gpus // cluster.gpus_per_node)
    words = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
    words += ["--nproc-per-node", str(min(cluster.num_gpus, cluster.gpus_per_node)), "-m", "megatron_prefix", "train"]
    words += ["--model", model if Path(model).exists() else "CHECKPOINT", "--rollouts", "ROLLOUTS.jsonl"]
    words += ["--groups-per-step", str(len(task.groups)), "--dtype", task.settings.dtype]
    for name in ("tp", "cp", "pp", "vpp"):
        words += [f"--{name}", str(getattr(sizes, name))] if getattr(sizes, name) > 1 else []
    words += ["--sequence-parallel"] * (sizes.tp > 1)
    words += ["--max-tokens-per-microbatch", str(choice.max_tokens), "--recompute", choice.recompute]
    words += ["--max-live-prefixes", str(choice.live_prefixes)] if choice.live_prefixes else []
    words += ["--chunk-rows", str(task.settings.chunk_rows), "--overlap-grad-reduce"]
    words += ["--distributed-optimizer"] * task.settings.distributed_optimizer
    words += ["--use-te"] * (task.settings.modules == "te")
    return shlex.join(words)


def _lengths_of(rollouts: Path) -> list[RolloutGroup]:
    from megatron_prefix.rollouts import read_rollouts

    return [group.lengths_only() for group in read_rollouts(rollouts)]


def _title(task: Task) -> str:
    cluster, rows = task.cluster, _rows(task)
    return (
        f"{task.model.name} ({task.model.size.parameters / 1e9:.2f}B) on {cluster.num_gpus:,} x {cluster.device.name}, "
        f"{len(task.groups):,} groups: {rows[1]:,} rows repeated, {rows[0]:,} grouped ({rows[1] / rows[0]:.2f}x); "
        f"seconds of a step"
    )


def _rows(task: Task) -> tuple[int, int]:
    """(grouped, repeated) of a step, over all ranks."""
    both = (Workload.of_group, Workload.repeated)
    grouped, repeated = (sum(count(group).rows for group in task.groups) for count in both)
    return grouped, repeated


def _table(choices: Sequence[Choice]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in COLUMNS if any(getattr(choice.sizes, name) > 1 for choice in choices)] or ["tp"]
    recompute = ["recompute"] if any(choice.recompute != "none" for choice in choices) else []
    columns = ["/".join(names), "rows", *recompute, "GiB", "bubble", "comm", "repeated", "grouped", "ratio"]
    rows = []
    for choice in choices:
        run = choice.grouped
        rows.append(
            [
                "/".join(str(getattr(choice.sizes, name)) for name in names),
                f"{choice.max_tokens:,}",
                *([choice.recompute] if recompute else []),
                f"{run.memory.total / GIB:.1f}",
                f"{bubble_share(run.step):.2f}",
                f"{run.step.communication:,.2f}",
                f"{choice.repeated.step.total:,.2f}",
                f"{run.step.total:,.2f}",
                f"{choice.speed_up:.2f}x",
            ]
        )
    return columns, rows


def _summary(task: Task, found: Found) -> str:
    best, repeated = found.choices[0], found.best_repeated
    memory, step = best.grouped.memory, best.grouped.step
    lines = [
        f"looked at {found.evaluated:,} choices, {len(found.choices):,} fit {task.cluster.usable_memory / GIB:.1f} GiB",
        f"best: {memory.total / GIB:.1f} GiB ({memory.at_rest / GIB:.1f} at rest), {step.total:,.2f} s a step "
        f"({_tflops(task, best.grouped):,.0f} TFLOP/s a GPU)",
    ]
    if repeated is None:
        lines.append("repeated prefixes: no choice fits")
    else:
        sizes = " ".join(f"{name} {value}" for name, value in asdict(repeated.sizes).items() if value > 1)
        total = repeated.repeated.step.total
        lines.append(
            f"repeated prefixes, with their own best choice ({sizes}): {total:,.2f} s, {total / step.total:.2f}x longer"
        )
    return "\n".join(lines)


def _tflops(task: Task, run: Run) -> float:
    """Model FLOPs (without recompute) per second and GPU."""
    flops = sum(task.model.active_size.step_flops(Workload.of_group(group)) for group in task.groups)
    return flops / run.step.total / task.cluster.num_gpus / 1e12


def _result(task: Task, found: Found, shown: Sequence[Choice], command: str) -> dict[str, object]:
    model, rows = task.model, _rows(task)
    return {
        "command": "plan",
        "model": {
            "name": model.name,
            "parameters": model.size.parameters,
            "active_parameters": model.active_size.parameters,
            "config": model.config.to_dict(),
            "experts": None if model.experts is None else asdict(model.experts),
        },
        "cluster": asdict(task.cluster) | {"usable_memory": task.cluster.usable_memory},
        "settings": asdict(task.settings),
        "groups": len(task.groups),
        "rows": {"grouped": rows[0], "repeated": rows[1]},
        "step_flops": sum(model.active_size.step_flops(Workload.of_group(group)) for group in task.groups),
        "evaluated": found.evaluated,
        "fitting": len(found.choices),
        "choices": [choice.to_dict() for choice in shown],
        "best_repeated": None if found.best_repeated is None else found.best_repeated.to_dict(),
        "train": command,
    }
