"""`megatron-prefix train`: GRPO from a rollouts file, every prefix encoded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from megatron_prefix.attention import resolve_impl
from megatron_prefix.cli.comparison import compare_with_repeated, show_comparison
from megatron_prefix.cli.console import print_json, progress_bar, stderr_console
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
from megatron_prefix.cli.plots import plot_comparison
from megatron_prefix.cli.resume import check_resume, check_same_model
from megatron_prefix.cli.stored_data import StepData, StoredData
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import (
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
)
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.on_policy import OnPolicySettings
from megatron_prefix.mcore.parallel import ParallelSizes, destroy
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from megatron_prefix.mcore.training_loop import Checkpoints, TrainingLoop
from megatron_prefix.model_config import ModelConfig


@click.command("train")
@click.option(
    "--rollouts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Rollouts JSONL; or else --on-policy.",
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
@on_policy_options
@loss_options
@train_options
@model_options
@parallel_options
def train_command(
    rollouts: Path | None,
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
    on_policy: OnPolicyFlags,
    loss: LossConfig,
    settings: TrainSettings,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Train a model with GRPO, each prompt encoded once for all its responses, on a file of rollouts or on policy.

    The old log-probs (and the reference policy's, with --kl-coef) are those of the model at the start, through the same
    grouped path. The loss is the mean over the global batch, however it is cut into packs and over ranks.

    With --on-policy every iteration samples responses to the next prompts from the policy as it is, by the model
    itself or by a vLLM or SGLang server that is handed the weights, scores them and takes --steps-per-iteration steps.
    Old log-probs are then those of the iteration's start, and the server's own must agree with them.

    \b
    megatron-prefix train --model smollm2 --rollouts rollouts.jsonl --steps 8 --save out
    torchrun --nproc-per-node 4 -m megatron_prefix train --tp 2 --model smollm2 --rollouts rollouts.jsonl
    megatron-prefix train --model smollm2 --on-policy --task chain_sum:100 --steps 50 --save out
    megatron-prefix train --model smollm2 --on-policy --prompts mine.jsonl --reward my_rewards:length \\
        --generator vllm --server http://localhost:8000 --weights-folder /dev/shm/weights
    """
    if (resume or save_every) and save is None:
        raise ValueError("--resume and --save-every need --save, the folder of the checkpoints")
    if plot and not compare:
        raise ValueError("--plot draws the comparison: add --compare 1")
    check_on_policy(on_policy, rollouts, loss, parallel, {"--steps": steps, "--save-every": save_every or 0})
    if on_policy.on_policy and compare:
        raise ValueError(f"--compare {compare} runs groups of --rollouts both ways; leave it out with --on-policy")
    config = flags.config()
    data: StepData
    if rollouts is None:
        data = OnPolicyData.read(
            on_policy,
            flags,
            config,
            OnPolicySettings(
                groups_per_step,
                on_policy.steps_per_iteration,
                seed=seed,
                max_tokens=max_tokens_per_microbatch,
                max_sampler_gap=on_policy.max_sampler_gap,
            ),
            temperature=settings.temperature,
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
    flags.check_impl(config, parallel.cp, data.may_split)
    state = {
        "seed": seed,
        "groups_per_step": groups_per_step,
        "rollouts_sha256": data.sha256,
        "optimizer": settings.optimizer,
        "distributed_optimizer": settings.distributed_optimizer,
        "dtype": flags.dtype,
    }
    names = {"model": str(flags.model), "rollouts": data.name}
    start = latest_checkpoint(save) if save else None
    if start and not resume:
        raise ValueError(f"--save {save} already holds {start.name}; add --resume to go on, or name another folder")
    saved = check_resume(start, config, state, data.name) if start else {"step": 0}
    first: int = saved["step"]
    sizes = parallel.start(seed)
    if data.batch_groups < (sizes.dp or 1):
        raise ValueError(
            f"{data.batch_groups} groups per step cannot feed {sizes.dp} data-parallel ranks; raise --groups-per-step"
        )
    for option, path in (("--save", save), ("--metrics", metrics), ("--plot", plot)):
        if path is not None:
            check_writable(option, path if option == "--save" else path.parent)
    model = flags.build(config, parallel, seed=seed)
    if save:
        state["model_fingerprint"] = fingerprint(model)
    if start and not on_policy.on_policy:
        check_same_model(start, saved, state | names)
    trainer = PolicyTrainer(model, settings, loss)
    left = range(first, max(first, steps))
    source: Any = data.source(trainer, left)
    console = stderr_console()
    summary, *details = data.describe(source, left, sizes)
    console.print(f"{_banner(config, flags, sizes)}; {summary}")
    for line in (describe_implementations(trainer.optimizer, trainer.chunks), *details):
        console.print(line, markup=False)
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
        assert isinstance(data, StoredData)
        comparison = compare_with_repeated(
            trainer, config, flags, parallel, data.groups[: max(compare, sizes.dp or 1)], max_tokens_per_microbatch
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


def _banner(config: ModelConfig, flags: ModelFlags, sizes: ParallelSizes) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impl = resolve_impl(flags.impl, device, flags.torch_dtype, config.channels)
    return (
        f"{flags.model}: {config.num_layers} layers, hidden {config.hidden_size}, {flags.dtype} on {device}, "
        f"impl {impl}, tp {sizes.tp}, pp {sizes.pp}, vpp {sizes.vpp or 1}, dp {sizes.dp}"
    )
