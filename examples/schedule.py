"""Trace one step of split groups and whole packs through a pipeline, and draw who worked when.

    python examples/schedule.py --pp 4 --out schedule.png

The stages are processes of this machine, a thread each. Where it has fewer processors than stages, they take turns, and
times by the clock say little: then the picture shows the order as traced, every piece as long as its processor time.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from torch import Tensor
from torch.multiprocessing import start_processes

from megatron_prefix import RolloutGroup, pack_and_split, prefix_gpt_layer_spec
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.parallel import ParallelSizes, destroy, initialize
from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
from megatron_prefix.mcore.schedule_trace import ScheduleTrace
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack
from megatron_prefix.pipeline_plan import PipelineRun, pipeline_jobs, plan_pipeline

LAYERS_PER_STAGE = 4
HIDDEN = 384
LIMIT = 640  # rows of a micro-batch
COLOURS = {"A": "#2f6fb0", "B": "#76b900", "C": "#8e44ad", "whole": "#e08e0b"}
LABELS = {
    "A": "A: prefix, forward",
    "B": "B: part of a split group (backward lighter)",
    "C": "C: prefix, backward",
    "whole": "groups that fit (backward lighter)",
}


def packs_of_a_step(seed: int) -> list[Pack]:
    """Four groups too large for a micro-batch, and some that fit."""
    draw = random.Random(seed)

    def group(prompt: int, *responses: int) -> RolloutGroup:
        tokens = [[draw.randrange(64) for _ in range(n)] for n in (prompt, *responses)]
        return RolloutGroup(tokens[0], tokens[1:], [draw.random() for _ in responses])

    groups = [
        group(641, *[310] * 6),
        group(501, 600, 280, 330, 150, 400, 620),
        group(601, *[200] * 9),
        group(551, 500, 610, 90, 480, 350, 170),
        *[group(200, 100, 130, 90, 80) for _ in range(3)],
    ]
    return pack_and_split(groups, max_tokens_per_pack=LIMIT)


def trace_stage(rank: int, pp: int, vpp: int, seed: int, folder: str) -> None:
    """One stage: a step to warm up, then the one that is traced. The first stage writes what all did."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", pp)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=pp)
    run_on_cpu()
    initialize(ParallelSizes(pp=pp, vpp=vpp if vpp > 1 else None), seed=seed)
    config = ModelConfig(
        num_layers=LAYERS_PER_STAGE * pp,
        hidden_size=HIDDEN,
        ffn_hidden_size=1024,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=64,
        max_position_embeddings=2048,
    )
    spec = prefix_gpt_layer_spec(transformer_config(config))
    stages = range(vpp) if vpp > 1 else (None,)
    model = [build_model(config, layer_spec=spec, seed=seed, vp_stage=stage) for stage in stages]
    packs, trace = packs_of_a_step(seed), ScheduleTrace()
    for _ in range(2):
        iterators = [iter(packs) for _ in model]
        forward_backward_prefix_groups(
            forward_step_func=forward_step,
            data_iterator=iterators if vpp > 1 else iterators[0],
            model=model if vpp > 1 else model[0],
            num_microbatches=len(packs),
            seq_length=1,
            micro_batch_size=1,
            trace=trace,
        )
    run = trace.gather()
    if rank == 0:
        torch.save(run, f"{folder}/run")
    destroy()


def forward_step(iterator: object, model: torch.nn.Module) -> tuple[Tensor, object]:
    """Any loss will do: the mean log-prob."""
    return response_log_probs(model, next(iterator)), lambda output: (-output.mean(), {})


def draw(axes: Axes, run: PipelineRun, title: str) -> None:
    """A bar per piece of work: forward in the full colour, backward lighter. Virtual stages share their stage's row."""
    for span in run.spans:
        width, prefix = span.end - span.start, run.prefix_of(span)
        if width < 2e-3 * run.total:  # the empty half of A or C, or idle
            continue
        light = span.backward and span.kind != "C"
        axes.barh(
            span.stage, width, left=span.start, height=0.82, color=COLOURS[span.kind], alpha=0.5 if light else 1,
            edgecolor="white", lw=0.6,
        )  # fmt: skip
        if prefix is not None and width > 0.01 * run.total:
            colour, at = "black" if light else "white", (span.start + span.end) / 2
            axes.text(at, span.stage, str(prefix + 1), ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(run.num_stages), [f"stage {stage}" for stage in range(run.num_stages)])
    axes.set_ylim(run.num_stages - 0.5, -0.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def main() -> None:
    """A step in the order that the schedule finds; for comparison, the modelled one of one group after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), help="PNG to write")
    parser.add_argument("--pp", type=int, default=4, help="pipeline stages")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    few = len(os.sched_getaffinity(0)) < args.pp
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that the imports are paid for once.
        start_processes(trace_stage, (args.pp, args.vpp, args.seed, folder), args.pp, start_method="fork")
        run = torch.load(f"{folder}/run", weights_only=False)
    chunks = args.vpp if args.vpp > 1 else None
    jobs = pipeline_jobs(packs_of_a_step(args.seed), pair_cost=1 / (6 * HIDDEN))
    in_turn = plan_pipeline(jobs, args.pp, num_chunks=chunks)
    modelled = plan_pipeline([job for job in run.jobs if job.kind != "idle"], args.pp, num_chunks=chunks)
    by_cpu = run.replayed(lambda span: span.cpu_seconds)
    console.print(f"one group after the other: {in_turn.describe()} as modelled")
    console.print(
        f"as ordered: {modelled.describe()} as modelled; {run.bubble:.2f} traced by the clock, "
        f"{by_cpu.bubble:.2f} with a processor per stage; {run.total:.1f} s and {by_cpu.total:.1f} s"
    )
    shown = by_cpu if few else run
    figure = Figure(figsize=(11, 1.4 + 0.5 * args.pp), layout="constrained")
    axes = figure.subplots()
    live = f"at most {run.live_prefixes} prefixes live"
    draw(axes, shown, f"{live}, bubble {shown.bubble:.2f} (modelled {modelled.bubble:.2f})")
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    axes.set_xlabel("seconds of processor time" if few else "seconds")
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
