"""`megatron-prefix train`: GRPO from a rollouts file, every prefix encoded once."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from megatron_prefix.attention import resolve_impl
from megatron_prefix.cli.console import print_json, print_table, progress_bar, stderr_console
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
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import (
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    step_folder,
)
from megatron_prefix.mcore.compare import StepComparison, compare_step
from megatron_prefix.mcore.core_attention import attention_layers
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup, read_rollouts
from megatron_prefix.splitting import pack_and_split, plan_splits, split_first


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
    saved = _check_resume(start, config, state, rollouts) if start else {"step": 0}
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
        _check_model(start, saved, state | names)
    trainer = PolicyTrainer(model, settings, loss)
    batches = [_batch(len(groups), groups_per_step, step, seed) for step in range(first, steps)]
    if not compare:  # which runs a whole model on every rank
        groups = groups_on_this_rank(groups, trainer.model)
    run = _Run(trainer, groups, max_tokens_per_microbatch, with_reference=loss.kl_coef > 0)
    run.measure_old_log_probs(sorted({i for batch in batches for i in batch}))
    if start:
        load_checkpoint(start, trainer.model, config=config, optimizer=trainer.optimizer)
    console = stderr_console()
    console.print(_banner(config, flags, sizes, len(groups), first, steps))
    console.print(describe_implementations(trainer.optimizer, trainer.chunks), markup=False)
    if num_parts:
        console.print(
            f"{len(num_parts)} of {len(groups)} groups are split, into {sum(num_parts)} parts; their prefixes run once"
        )
    if sizes.pp > 1 and batches:
        packs = run.packs(run.share(batches[0]))
        console.print(plan_step(packs, trainer.config, max_live_prefixes=settings.max_live_prefixes).describe())
    if sizes.cp > 1:
        layers = attention_layers(trainer.config, parallel.cp_a2a)
        console.print(_placement(groups[0], sizes.cp, settings.cp_placement, layers))
    result: dict[str, Any] = {"steps": steps, "resumed_from": first}
    with progress_bar("train", max(steps - first, 0), unit="tokens") as advance:
        for step, batch in enumerate(batches, start=first + 1):
            measured = run.step(batch)
            advance(units=int(measured["tokens"]), note=f"loss {measured['loss']:+.4f} reward {measured['reward']:.3f}")
            _append(metrics, {"step": step} | measured)
            result |= measured
            if save and (step == steps or (save_every and step % save_every == 0)):
                save_checkpoint(
                    step_folder(save, step),
                    trainer.model,
                    config,
                    optimizer=trainer.optimizer,
                    state=state | names | {"step": step},
                    tokenizer_from=flags.model if flags.model and flags.model.is_dir() else None,
                )
    if not batches:
        console.print(f"nothing to do: {start} is at step {first} of {steps}; raise --steps to train on")
    if save:
        console.print(f"checkpoint: {latest_checkpoint(save)}")
    if compare:
        comparison = _compare(
            trainer, config, flags, parallel, groups[: max(compare, sizes.dp or 1)], max_tokens_per_microbatch
        )
        result |= show_comparison(comparison)
        if plot and torch.distributed.get_rank() == 0:
            plot_comparison(comparison, plot)
            console.print(f"plot: {plot}")
    if as_json:
        print_json(result)
    destroy()


class _Run:
    """The global batches of a run: this rank's share of each, and the log-probs that its loss is measured against."""

    def __init__(
        self, trainer: PolicyTrainer, groups: Sequence[RolloutGroup], max_tokens: int | None, *, with_reference: bool
    ) -> None:
        self.trainer, self.groups, self.max_tokens = trainer, groups, max_tokens
        self.with_reference = with_reference
        self.old: dict[int, torch.Tensor] = {}
        self.dp_group = trainer.dp_group

    def measure_old_log_probs(self, wanted: Sequence[int]) -> None:
        """Log-probs under the policy as it is, each group on one data-parallel rank, known to all afterwards."""
        mine = wanted[self.dp_group.rank() :: self.dp_group.size()]
        found = {}
        at_once = self.trainer.pp_group.size()  # enough to keep all stages busy
        with progress_bar("old log-probs", len(mine), unit="tokens") as advance:
            for some in (mine[first : first + at_once] for first in range(0, len(mine), at_once)):
                packs = {i: pack_and_split([self.groups[i]], max_tokens_per_pack=self.max_tokens) for i in some}
                results = iter(self.trainer.log_probs_of([pack for each in packs.values() for pack in each]))
                for i, each in packs.items():
                    found[i] = torch.cat([next(results) for _ in each])
                    advance(units=sum(pack.layout.num_rows for pack in each))
        for part in all_gather_object(found, self.dp_group):
            self.old |= part

    def share(self, batch: Sequence[int]) -> list[int]:
        """This data-parallel rank's groups of a batch."""
        return [batch[n] for n in self.trainer.share_of([self.groups[i] for i in batch])]

    def packs(self, share: Sequence[int]) -> list[Pack]:
        """The micro-batches of these groups."""
        return pack_and_split([self.groups[i] for i in share], max_tokens_per_pack=self.max_tokens)

    def step(self, batch: Sequence[int]) -> dict[str, float]:
        """One optimizer step on the groups of ``batch``; metrics of the global batch."""
        share = self.share(batch)
        order = split_first(plan_splits([self.groups[i] for i in share], max_tokens_per_pack=self.max_tokens))
        old = torch.cat([self.old[share[n]] for n in order])
        inputs = []
        for pack in self.packs(share):
            count = pack.response_rows.numel()
            inputs.append(StepInput(pack, old[:count], old[:count] if self.with_reference else None))
            old = old[count:]
        metrics = self.trainer.step(inputs)
        rewards = [reward for i in batch for reward in self.groups[i].rewards]
        layouts = [RolloutTree.from_group(self.groups[i]).layout for i in batch]
        return metrics | {
            "reward": sum(rewards) / len(rewards),
            "tokens": sum(layout.num_rows for layout in layouts),
            "tokens_repeated": sum(layout.repeated().num_rows for layout in layouts),
        }


def _batch(num_groups: int, groups_per_step: int, step: int, seed: int) -> list[int]:
    """Groups of a step. Each epoch is a new seeded order, cut into whole steps; what is left over sits it out."""
    size = min(groups_per_step, num_groups)
    epoch, index = divmod(step, num_groups // size)
    order = list(range(num_groups))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return sorted(order[index * size : (index + 1) * size])


_START_ANEW = "start anew with the checkpoint as --model and another --save"


def _check_resume(checkpoint: Path, config: ModelConfig, state: Mapping[str, Any], rollouts: Path) -> dict[str, Any]:
    """The saved state to go on from. Other groups, another order of them, another kind of optimizer cannot go on."""
    saved = load_state(checkpoint, config=config)
    missing = sorted({"step", "model", "model_fingerprint", "rollouts", *state} - saved.keys())
    if missing:
        raise ValueError(
            f"--resume: {checkpoint} was not saved by this version of `train`, its state has no {missing[0]}; "
            f"{_START_ANEW}"
        )
    if saved["rollouts_sha256"] != state["rollouts_sha256"]:
        raise ValueError(
            f"--resume: {checkpoint} was trained on {saved['rollouts']}, which had other contents than {rollouts} has; "
            f"give that file, or {_START_ANEW}"
        )
    for name, value in state.items():
        if saved[name] != value:
            raise ValueError(
                f"--resume: {checkpoint} was saved with {name} {saved[name]}, this run has {name} {value}; use the "
                f"same, or {_START_ANEW}"
            )
    return saved


def _check_model(checkpoint: Path, saved: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Old log-probs are those of the model that the run began with, which must be the same."""
    if saved["model_fingerprint"] != state["model_fingerprint"]:
        raise ValueError(
            f"--resume: {checkpoint} began with --model {saved['model']}, and --model {state['model']} has other "
            "weights, so that old log-probs would be others; give the model that the run began with, or "
            f"{_START_ANEW}"
        )


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


def _compare(
    trainer: PolicyTrainer,
    config: ModelConfig,
    flags: ModelFlags,
    parallel: ParallelFlags,
    groups: Sequence[RolloutGroup],
    max_tokens: int | None,
) -> StepComparison:
    plain_model = flags.build_plain(config, parallel, trainer.model)
    log_probs = partial(repeated_log_probs, temperature=trainer.settings.temperature)
    plain = PolicyTrainer(plain_model, trainer.settings, trainer.loss, log_probs=log_probs)
    with progress_bar("repeated vs grouped", 5, unit="tokens") as advance:
        return compare_step(trainer, plain, trainer.shard(groups), max_tokens, advance)


def show_comparison(comparison: StepComparison) -> dict[str, Any]:
    """Print the table "repeated prefixes vs grouped"; returns its numbers."""
    old, new, found = comparison.repeated, comparison.grouped, comparison.found
    rows = [
        ("tokens executed", f"{old.rows:,}", f"{new.rows:,}", f"{old.rows / new.rows:.2f}x"),
        ("attention area (pairs)", f"{old.area:,}", f"{new.area:,}", f"{old.area / new.area:.2f}x"),
        ("step time (s)", f"{old.seconds:.2f}", f"{new.seconds:.2f}", f"{old.seconds / new.seconds:.2f}x"),
        (
            "peak memory (MiB)",
            f"{old.peak_bytes / 2**20:,.0f}",
            f"{new.peak_bytes / 2**20:,.0f}",
            f"{old.peak_bytes / max(new.peak_bytes, 1):.2f}x",
        ),
        ("max |difference| of log-probs", "", f"{found.max_log_prob_diff:.1e}", ""),
        (
            "relative gradient difference (worst)",
            "",
            f"{found.max_grad_rel_diff:.1e}" if found.gradients else "sharded: see verify",
            "",
        ),
    ]
    print_table("repeated prefixes vs grouped", ("one GRPO step", "repeated", "grouped", "ratio"), rows)
    return {
        "rows_repeated": old.rows,
        "rows_grouped": new.rows,
        "area_repeated": old.area,
        "area_grouped": new.area,
        "seconds_repeated": old.seconds,
        "seconds_grouped": new.seconds,
        "peak_bytes_repeated": old.peak_bytes,
        "peak_bytes_grouped": new.peak_bytes,
        "max_log_prob_diff": found.max_log_prob_diff,
        "max_grad_rel_diff": found.max_grad_rel_diff,
    }
