"""`megatron-prefix train`: GRPO from a rollouts file, every prefix encoded once."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from megatron_prefix.attention import resolve_impl
from megatron_prefix.checkpoint_folder import latest_checkpoint
from megatron_prefix.cli.comparison import compare_with_repeated, show_comparison
from megatron_prefix.cli.console import print_json, progress_bar, stderr_console
from megatron_prefix.cli.metrics import MetricsFlags, MetricsLog, metrics_options
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
from megatron_prefix.cli.resume import check_resume, check_same_model
from megatron_prefix.cli.run_options import (
    SaveFlags,
    bytes_per_parameter,
    save_options,
    schedule_options,
)
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import WEIGHTS, fingerprint, load_checkpoint
from megatron_prefix.mcore.core_attention import attention_layers
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.lr_schedule import LrSchedule
from megatron_prefix.mcore.nonfinite import NonFiniteError
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.mcore.rng_state import load_rng_state
from megatron_prefix.mcore.run_checkpoints import RunCheckpoints
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.mcore.step_source import StepBatch, StoredRollouts
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from megatron_prefix.mcore.training_loop import TrainingLoop
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup, read_rollouts
from megatron_prefix.step_metrics import StepMeter
from megatron_prefix.stop_signals import StopSignals


@click.command("train")
@click.option(
    "--rollouts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Rollouts JSONL."
)
@click.option(
    "--steps", type=click.IntRange(0), default=10, help="Optimizer steps in all; a resumed run does the rest."
)
@click.option("--groups-per-step", type=click.IntRange(1), default=2, help="Prefix groups of the global batch.")
@max_tokens_option
@click.option(
    "--on-nonfinite",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="A step whose loss or gradient is not finite updates nothing: stop there, or go on with the next.",
)
@click.option("--compare", type=click.IntRange(0), default=0, help="Afterwards, run so many groups both ways.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG of the comparison.")
@click.option("--seed", type=int, default=0, help="Of the order of the groups and of random weights.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@save_options
@metrics_options
@loss_options
@train_options
@schedule_options
@model_options
@parallel_options
def train_command(
    rollouts: Path,
    steps: int,
    groups_per_step: int,
    max_tokens_per_microbatch: int | None,
    on_nonfinite: str,
    compare: int,
    plot: Path | None,
    seed: int,
    as_json: bool,
    saving: SaveFlags,
    writers: MetricsFlags,
    loss: LossConfig,
    settings: TrainSettings,
    schedule: LrSchedule,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Train a model with GRPO on a file of rollouts, each prompt encoded once for all its responses.

    The old log-probs (and the reference policy's, with --kl-coef) are those of the model at the start, through the same
    grouped path. The loss is the mean over the global batch, however it is cut into packs and over ranks.

    SIGTERM or Ctrl-C ends a run after the step that it is in; with --save it is saved there, and --resume goes on.

    \b
    megatron-prefix train --model smollm2 --rollouts rollouts.jsonl --steps 8 --save out
    torchrun --nproc-per-node 4 -m megatron_prefix train --tp 2 --model smollm2 --rollouts rollouts.jsonl
    """
    if plot and not compare:
        raise ValueError("--plot draws the comparison: add --compare 1")
    if schedule.lr_decay_steps is None:
        schedule = replace(schedule, lr_decay_steps=max(steps, 1))
    settings = replace(settings, schedule=schedule)
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
    size = ModelSize.of(config)
    saving.check(size.parameters * bytes_per_parameter(flags.torch_dtype, settings.optimizer))
    for option, folder in (*writers.folders(), *([("--plot", plot.parent)] if plot else [])):
        check_writable(option, folder)
    sizes = parallel.start(seed)
    if min(groups_per_step, len(groups)) < (sizes.dp or 1):
        raise ValueError(
            f"{min(groups_per_step, len(groups))} groups per step cannot feed {sizes.dp} data-parallel ranks; raise "
            "--groups-per-step"
        )
    console = stderr_console()
    start = saving.start_from(console)
    saved = check_resume(start, config, state, rollouts) if start else {"step": 0}
    first: int = saved["step"]
    model = flags.build(config, parallel, seed=seed)
    if saving.save:
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
    checkpoints = None
    if save_settings := saving.settings():
        checkpoints = RunCheckpoints(save_settings, trainer, config, state | names, tokenizer_from=tokenizer_from)
    meter = StepMeter(size, dist.get_world_size(), writers.peak_flops())
    result: dict[str, Any] = {"steps": steps, "resumed_from": first}
    with (
        progress_bar("train", max(steps - first, 0), unit="tokens") as advance,
        MetricsLog(writers, meter, first if saving.resume else None) as log,
        StopSignals() as stop,
    ):

        def on_step(step: int, batch: StepBatch, measured: dict[str, float]) -> None:
            line = log.write(step, batch.groups, measured)
            advance(units=int(line["tokens"]), note=f"loss {line['loss']:+.4f} reward {line['reward']:.3f}")
            result.update(line)

        loop = TrainingLoop(
            trainer,
            source,
            on_step,
            checkpoints=checkpoints,
            stop=stop,
            nonfinite_folder=saving.save / "nonfinite" if saving.save else writers.beside("nonfinite"),
            skip_nonfinite=on_nonfinite == "skip",
        )
        if start:
            load_checkpoint(start, trainer.model, config=config, optimizer=trainer.optimizer)
            if not load_rng_state(start / WEIGHTS):
                console.print("random generators start anew: the checkpoint was saved at other parallel sizes")
            loop.load_state_dict(saved)
        try:
            loop.run(steps)
        except NonFiniteError as error:
            raise click.ClickException(str(error)) from error
    if not left:
        console.print(f"nothing to do: {start} is at step {first} of {steps}; raise --steps to train on")
    if saving.save:
        console.print(f"checkpoint: {latest_checkpoint(saving.save)}")
    if loop.step < steps:
        console.print(f"stopped by {loop.stopped_by} after step {loop.step} of {steps}")
        result["stopped_by"] = loop.stopped_by
    elif compare:
        comparison = compare_with_repeated(
            trainer, config, flags, parallel, groups[: max(compare, sizes.dp or 1)], max_tokens_per_microbatch
        )
        result |= show_comparison(comparison)
        if plot and torch.distributed.get_rank() == 0:
            from megatron_prefix.cli.plots import plot_comparison  # matplotlib takes a second to import

            plot_comparison(comparison, plot)
            console.print(f"plot: {plot}")
    if as_json:
        print_json(result)
    destroy()


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
