"""`megatron-prefix train`: GRPO from a rollouts file, every prefix encoded once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import torch

from megatron_prefix.attention import resolve_impl
from megatron_prefix.cli.comparison import compare_with_repeated, show_comparison
from megatron_prefix.cli.console import print_json, progress_bar, stderr_console
from megatron_prefix.cli.options import (
    ModelFlags,
    ParallelFlags,
    check_groups,
    check_writable,
    loss_options,
    model_options,
    parallel_options,
    train_options,
)
from megatron_prefix.cli.pipeline_options import max_tokens_option
from megatron_prefix.cli.plots import plot_comparison
from megatron_prefix.cli.resume import check_resume, check_same_model
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import (
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
)
from megatron_prefix.mcore.core_attention import attention_layers
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.mcore.step_source import StoredRollouts
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from megatron_prefix.mcore.training_loop import Checkpoints, TrainingLoop
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup, read_rollouts


@click.command("train")
@click.option(
    "--rollouts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Rollouts JSONL."
)
@click.option(
    "--steps", type=click.IntRange(0), default=10, help="Optimizer steps in all; a resumed run does the rest."
)
@click.option("--groups-per-step", type=click.IntRange(1), default=2, help="Prefix groups of the global batch.")
@max_tokens_option
@click.option("--save", type=click.Path(file_okay=False, path_type=Path), help="Folder of the checkpoints.")
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints; default: at the end only.")
@click.option("--resume", is_flag=True, help="Go on from the latest checkpoint in --save, where there is one.")
@click.option("--metrics", type=click.Path(dir_okay=False, path_type=Path), help="Append one JSON line per step.")
@click.option("--compare", type=click.IntRange(0), default=0, help="Afterwards, run so many groups both ways.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG of the comparison.")
@click.option("--seed", type=int, default=0, help="Of the order of the groups and of random weights.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@loss_options
@train_options
@model_options
@parallel_options
def train_command(
    rollouts: Path,
    steps: int,
    groups_per_step: int,
    max_tokens_per_microbatch: int | None,
    save: Path | None,
    save_every: int | None,
    resume: bool,
    metrics: Path | None,
    compare: int,
    plot: Path | None,
    seed: int,
    as_json: bool,
    loss: LossConfig,
    settings: TrainSettings,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Train a model with GRPO on a file of rollouts, each prompt encoded once for all its responses.

    The old log-probs (and the reference policy's, with --kl-coef) are those of the model at the start, through the same
    grouped path. The loss is the mean over the global batch, however it is cut into packs and over ranks.

    \b
    megatron-prefix train --model smollm2 --rollouts rollouts.jsonl --steps 8 --save out
    torchrun --nproc-per-node 4 -m megatron_prefix train --tp 2 --model smollm2 --rollouts rollouts.jsonl
    """
    if (resume or save_every) and save is None:
        raise ValueError("--resume and --save-every need --save, the folder of the checkpoints")
    if plot and not compare:
        raise ValueError("--plot draws the comparison: add --compare 1")
    config = flags.config()
    groups = read_rollouts(rollouts)
    num_parts = [len(split.parts) for split in check_groups(groups, config, max_tokens_per_microbatch)]
    flags.check_impl(config, parallel.cp, bool(num_parts))
    if loss.importance_cap is not None and groups[0].log_probs is None:
        raise ValueError(
            f"--importance-cap {loss.importance_cap} needs the sampler's log_probs, {rollouts} has none; leave it out"
        )
    state = {
        "seed": seed,
        "groups_per_step": groups_per_step,
        "rollouts_sha256": hashlib.sha256(rollouts.read_bytes()).hexdigest(),
        "optimizer": settings.optimizer,
        "distributed_optimizer": settings.distributed_optimizer,
        "dtype": flags.dtype,
    }
    names = {"model": str(flags.model), "rollouts": str(rollouts)}
    start = latest_checkpoint(save) if save else None
    if start and not resume:
        raise ValueError(f"--save {save} already holds {start.name}; add --resume to go on, or name another folder")
    saved = check_resume(start, config, state, rollouts) if start else {"step": 0}
    first: int = saved["step"]
    sizes = parallel.start(seed)
    if min(groups_per_step, len(groups)) < (sizes.dp or 1):
        raise ValueError(
            f"{min(groups_per_step, len(groups))} groups per step cannot feed {sizes.dp} data-parallel ranks; raise "
            "--groups-per-step"
        )
    for option, path in (("--save", save), ("--metrics", metrics), ("--plot", plot)):
        if path is not None:
            check_writable(option, path if option == "--save" else path.parent)
    model = flags.build(config, parallel, seed=seed)
    if save:
        state["model_fingerprint"] = fingerprint(model)
    if start:
        check_same_model(start, saved, state | names)
    trainer = PolicyTrainer(model, settings, loss)
    if not compare:  # which runs a whole model on every rank
        groups = groups_on_this_rank(groups, trainer.model)
    source = StoredRollouts(
        trainer,
        groups,
        groups_per_step,
        seed=seed,
        max_tokens=max_tokens_per_microbatch,
        with_reference=loss.kl_coef > 0,
    )
    left = range(first, steps)
    with progress_bar("old log-probs", len(source.groups_to_measure(left)), unit="tokens") as advance:
        source.measure_old_log_probs(left, advance)
    console = stderr_console()
    console.print(_banner(config, flags, sizes, len(groups), first, steps))
    console.print(describe_implementations(trainer.optimizer, trainer.chunks), markup=False)
    if num_parts:
        console.print(
            f"{len(num_parts)} of {len(groups)} groups are split, into {sum(num_parts)} parts; their prefixes run once"
        )
    if sizes.pp > 1 and left:
        packs = source.packs(source.share(source.batch(first)))
        console.print(plan_step(packs, trainer.config, max_live_prefixes=settings.max_live_prefixes).describe())
    if sizes.cp > 1:
        layers = attention_layers(trainer.config, parallel.cp_a2a)
        console.print(_placement(groups[0], sizes.cp, settings.cp_placement, layers))
    tokenizer_from = flags.model if flags.model and flags.model.is_dir() else None
    checkpoints = Checkpoints(save, config, state | names, save_every, tokenizer_from) if save else None
    result: dict[str, Any] = {"steps": steps, "resumed_from": first}
    with progress_bar("train", max(steps - first, 0), unit="tokens") as advance:

        def on_step(step: int, measured: dict[str, float]) -> None:
            advance(units=int(measured["tokens"]), note=f"loss {measured['loss']:+.4f} reward {measured['reward']:.3f}")
            _append(metrics, {"step": step} | measured)

        loop = TrainingLoop(trainer, source, on_step, checkpoints)
        if start:
            load_checkpoint(start, trainer.model, config=config, optimizer=trainer.optimizer)
            loop.load_state_dict(saved)
        result |= loop.run(steps)
    if not left:
        console.print(f"nothing to do: {start} is at step {first} of {steps}; raise --steps to train on")
    if save:
        console.print(f"checkpoint: {latest_checkpoint(save)}")
    if compare:
        comparison = compare_with_repeated(
            trainer, config, flags, parallel, groups[: max(compare, sizes.dp or 1)], max_tokens_per_microbatch
        )
        result |= show_comparison(comparison)
        if plot and torch.distributed.get_rank() == 0:
            plot_comparison(comparison, plot)
            console.print(f"plot: {plot}")
    if as_json:
        print_json(result)
    destroy()


def _append(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None and torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _banner(config: ModelConfig, flags: ModelFlags, sizes: Any, groups: int, first: int, steps: int) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impl = resolve_impl(flags.impl, device, flags.torch_dtype, config.channels)
    return (
        f"{flags.model}: {config.num_layers} layers, hidden {config.hidden_size}, {flags.dtype} on {device}, "
        f"impl {impl}, tp {sizes.tp}, pp {sizes.pp}, vpp {sizes.vpp or 1}, dp {sizes.dp}; "
        f"{groups} groups, steps {first} to {steps}"
    )


def _placement(group: RolloutGroup, cp_size: int, placement: str, layers: CpLayers) -> str:
    """Where context parallelism puts the rows of a group, which "auto" decides for every pack anew."""
    plan = choose_plan(RolloutTree.from_group(group).layout, cp_size, placement, layers)
    comm_types = ", ".join(sorted(set(layers.comm_types)))
    shares = "/".join(str(layout.num_rows) for layout in plan.local_layouts)
    return f"cp {cp_size}, {comm_types}, placement {placement}: the first group's rows go {shares} by {plan.name}"
