"""`megatron-prefix train`: GRPO from a rollouts file or on policy, every prefix encoded once."""

from __future__ import annotations

from contextlib import closing
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
from megatron_prefix.cli.cost_option import cost_model_option, find_cost_model
from megatron_prefix.cli.engine_options import EngineFlags, engine_options
from megatron_prefix.cli.metrics import MetricsFlags, MetricsLog, metrics_options
from megatron_prefix.cli.on_policy import OnPolicyData, check_on_policy
from megatron_prefix.cli.on_policy_options import OnPolicyFlags, on_policy_options
from megatron_prefix.cli.options import (
    ModelFlags,
    ParallelFlags,
    check_writable,
    loss_options,
    model_options,
    parallel_options,
    train_options,
)
from megatron_prefix.cli.pipeline_options import max_tokens_option
from megatron_prefix.cli.resume import check_resume, check_same_model
from megatron_prefix.cli.rollout_input import RolloutInput, rollout_input_options
from megatron_prefix.cli.run_options import (
    SaveFlags,
    save_options,
    schedule_options,
)
from megatron_prefix.cli.stored_data import StepData, StoredData
from megatron_prefix.cli.streamed_data import StreamedData
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import WEIGHTS, fingerprint
from megatron_prefix.mcore.lr_schedule import LrSchedule
from megatron_prefix.mcore.nonfinite import NonFiniteError
from megatron_prefix.mcore.on_policy import OnPolicySettings
from megatron_prefix.mcore.parallel import ParallelSizes, destroy
from megatron_prefix.mcore.rng_state import load_rng_state
from megatron_prefix.mcore.run_checkpoints import RunCheckpoints
from megatron_prefix.mcore.step_source import StepBatch
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from megatron_prefix.mcore.training_loop import TrainingLoop
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.step_metrics import StepMeter
from megatron_prefix.stop_signals import StopSignals


@click.command("train")
@rollout_input_options(
    click.option(
        "--rollouts",
        "path",
        type=click.Path(dir_okay=False, path_type=Path),
        help="File of rollouts; or else --on-policy.",
    )
)
@click.option("--follow", is_flag=True, help="Train on groups as they are appended to --rollouts, in their order.")
@click.option(
    "--steps", type=click.IntRange(0), default=10, help="Optimizer steps in all; a resumed run does the rest."
)
@click.option("--groups-per-step", type=click.IntRange(1), default=2, help="Prefix groups of the global batch.")
@max_tokens_option
@cost_model_option
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
@on_policy_options
@save_options
@metrics_options
@loss_options
@train_options
@engine_options
@schedule_options
@model_options
@parallel_options
def train_command(
    rollouts: RolloutInput,
    follow: bool,
    steps: int,
    groups_per_step: int,
    max_tokens_per_microbatch: int | None,
    cost_model: Path | None,
    on_nonfinite: str,
    compare: int,
    plot: Path | None,
    seed: int,
    as_json: bool,
    on_policy: OnPolicyFlags,
    saving: SaveFlags,
    writers: MetricsFlags,
    loss: LossConfig,
    settings: TrainSettings,
    engine: EngineFlags,
    schedule: LrSchedule,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Train a model with GRPO, each prompt encoded once for all its responses, on a file of rollouts or on policy.

    The old log-probs (and the reference policy's, with --kl-coef) are those of the model at the start, through the same
    grouped path. The loss is the mean over the global batch, however it is cut into packs and over ranks.

    With --on-policy every iteration samples responses to the next prompts from the policy as it is, by the model
    itself or by a vLLM or SGLang server that is handed the weights, scores them and takes --steps-per-iteration steps.
    Old log-probs are then those of the iteration's start, and the server's own must agree with them.

    With --follow the file grows while training runs, by group lines; old log-probs are those right before each step.

    SIGTERM or Ctrl-C ends a run after the step that it is in; with --save it is saved there, and --resume goes on.

    \b
    megatron-prefix train --model smollm2 --rollouts rollouts.jsonl --steps 8 --save out
    torchrun --nproc-per-node 4 -m megatron_prefix train --tp 2 --model smollm2 --rollouts rollouts.jsonl
    torchrun --nproc-per-node 4 -m megatron_prefix train --engine deepspeed --ds-config zero2.json ...
    megatron-prefix train --model smollm2 --on-policy --task chain_sum:100 --steps 50 --save out
    megatron-prefix train --model smollm2 --on-policy --prompts mine.jsonl --reward my_rewards:length \\
        --generator vllm --server http://localhost:8000 --weights-folder /dev/shm/weights
    """
    if plot and not compare:
        raise ValueError("--plot draws the comparison: add --compare 1")
    step_counts = {"--steps": steps, "--save-every": saving.save_every or 0, "--compare": compare}
    check_on_policy(on_policy, rollouts.path, loss, parallel, step_counts)
    if follow and rollouts.path is None:
        raise ValueError("--follow needs --rollouts, the file to follow")
    stop = StopSignals()
    if schedule.lr_decay_steps is None:
        schedule = replace(schedule, lr_decay_steps=max(steps, 1))
    settings = replace(settings, schedule=schedule)
    config = flags.config()
    run = engine.open(settings, flags.torch_dtype, parallel, groups_per_step)
    run.check_options(
        {"--compare": compare > 0, "--async-save": saving.async_save, "--on-policy": rollouts.path is None}
    )
    data: StepData
    if rollouts.path is None:
        iterations = OnPolicySettings(
            groups_per_step,
            on_policy.steps_per_iteration,
            seed=seed,
            max_tokens=max_tokens_per_microbatch,
            max_sampler_gap=on_policy.max_sampler_gap,
        )
        data = OnPolicyData.read(
            on_policy, flags, config, iterations, tokenizer=rollouts.tokenizer, temperature=settings.temperature
        )
    elif follow:
        data = StreamedData.of(
            rollouts,
            config,
            loss,
            groups_per_step=groups_per_step,
            max_tokens=max_tokens_per_microbatch,
            compare=compare,
            stop=stop,
        )
    else:
        data = StoredData.read(
            rollouts,
            config,
            loss,
            groups_per_step=groups_per_step,
            max_tokens=max_tokens_per_microbatch,
            seed=seed,
            keep_ids=compare > 0,  # which runs a whole model on every rank
        )
    run.check_parts(data.may_split)
    flags.check_impl(config, parallel.cp, data.may_split)
    cost, source_of_cost = find_cost_model(cost_model, config, tp=parallel.tp, cp=parallel.cp)
    state = {
        "seed": seed,
        "groups_per_step": groups_per_step,
        "rollouts_sha256": data.sha256,
        "optimizer": settings.optimizer,
        "distributed_optimizer": settings.distributed_optimizer,
        "dtype": flags.dtype,
    }
    names = {"model": str(flags.model), "rollouts": data.name}
    size = ModelSize.of(config)
    saving.check(size.parameters * run.bytes_per_parameter(flags.torch_dtype, settings.optimizer))
    for option, folder in (*writers.folders(), *([("--plot", plot.parent)] if plot else [])):
        check_writable(option, folder)
    sizes = parallel.start(seed)
    if data.batch_groups < (sizes.dp or 1):
        raise ValueError(
            f"{data.batch_groups} groups per step cannot feed {sizes.dp} data-parallel ranks; raise --groups-per-step"
        )
    state |= run.state(sizes)
    console = stderr_console()
    start = saving.start_from(console)
    saved: dict[str, Any] = check_resume(start, config, state, data.name) if start else {"step": 0}
    first: int = saved["step"]
    model = flags.build(config, parallel, seed=seed)
    if saving.save:
        state["model_fingerprint"] = fingerprint(model)
    if start and isinstance(data, StoredData):
        check_same_model(start, saved, state | names)
    notes = run.start()
    trainer = run.trainer(model, settings, loss)
    left = range(first, max(first, steps))
    source: Any = data.source(trainer, cost, left, saved["source"] if start else None)
    summary, *details = data.describe(source, left, sizes)
    console.print(f"{_banner(config, flags, sizes)}; {summary}")
    for line in (
        trainer.implementations,
        *notes,
        f"packed by modelled time, from {source_of_cost}",
        *details,
    ):
        console.print(line, markup=False)
    tokenizer_from = flags.model if flags.model and flags.model.is_dir() else None
    checkpoints = None
    if save_settings := saving.settings():
        checkpoints = RunCheckpoints(save_settings, trainer, config, state | names, tokenizer_from=tokenizer_from)
    meter = StepMeter(size, dist.get_world_size(), writers.peak_flops())
    result: dict[str, Any] = {"steps": steps, "resumed_from": first}
    with (
        progress_bar("train", max(steps - first, 0), unit="tokens") as advance,
        MetricsLog(writers, meter, first if saving.resume else None) as log,
        stop,
        closing(source),
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
            trainer.load_checkpoint(start, config)
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
        console.print(f"stopped by {loop.stopped_by or 'the end of the rollouts'} after step {loop.step} of {steps}")
        result["stopped_by"] = loop.stopped_by
    elif compare:
        assert isinstance(data, StoredData) and isinstance(trainer, PolicyTrainer)
        comparison = compare_with_repeated(
            trainer, config, flags, parallel, data.groups[: max(compare, sizes.dp or 1)], max_tokens_per_microbatch
        )
        result |= show_comparison(comparison)
        if plot and torch.distributed.get_rank() == 0:
            from megatron_prefix.cli.plots import plot_comparison  # matplotlib takes a second to import

            plot_comparison(comparison, plot)
            console.print(f"plot: {plot}")
    if as_json:
        print_json(result)
    destroy()


def _banner(config: ModelConfig, flags: ModelFlags, sizes: ParallelSizes) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impl = resolve_impl(flags.impl, device, flags.torch_dtype, config.channels)
    return (
        f"{flags.model}: {config.num_layers} layers, hidden {config.hidden_size}, {flags.dtype} on {device}, "
        f"impl {impl}, tp {sizes.tp}, pp {sizes.pp}, vpp {sizes.vpp or 1}, dp {sizes.dp}"
    )
