"""`megatron-prefix verify`: your model and rollouts both ways, and how far apart the results are."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from megatron.core import parallel_state

from megatron_prefix.cli.console import print_json, print_table, progress_bar
from megatron_prefix.cli.options import (
    ModelFlags,
    ParallelFlags,
    check_groups,
    cp_placement_option,
    model_options,
    parallel_options,
    prefix_activations_option,
)
from megatron_prefix.cli.pipeline_options import max_tokens_option
from megatron_prefix.cli.rollout_input import RolloutInput, rollout_input_options
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.equivalence import (
    TOLERANCE,
    Differences,
    Evaluation,
    differences,
    evaluate,
    make_inputs,
)
from megatron_prefix.mcore.parallel import ParallelSizes, destroy
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.stages import Model
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree

TINY_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=128,
    max_position_embeddings=256,
    tied_embeddings=False,
)
SHOWN_PARAMETERS = 8
_JUDGES = {"bf16": "fp32", "fp32": "fp64"}


@click.command("verify")
@rollout_input_options(
    click.option(
        "--rollouts", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File of rollouts."
    )
)
@click.option("--tiny", is_flag=True, help="A small random model and random ragged groups: no files needed.")
@click.option("--max-groups", type=click.IntRange(1), help="Use the first groups of the file only.")
@max_tokens_option
@click.option(
    "--steps", type=click.IntRange(0), default=0, help="Also compare parameters after so many optimizer steps."
)
@click.option("--tolerance", type=float, help="Largest relative difference; default 1e-10 (fp64), 1e-5 (fp32).")
@cp_placement_option
@prefix_activations_option
@click.option("--seed", type=int, default=0, help="Of random weights, groups and the made-up old policy.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@model_options
@parallel_options
def verify_command(
    rollouts: RolloutInput,
    tiny: bool,
    max_groups: int | None,
    max_tokens_per_microbatch: int | None,
    steps: int,
    tolerance: float | None,
    cp_placement: str,
    prefix_activations: str,
    seed: int,
    as_json: bool,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Run one GRPO step both ways and compare: repeated prefixes on plain megatron-core, and prefix groups.

    Compares the log-probs of every response token, the loss, every parameter's gradient and, with --steps, the
    parameters after optimizer steps. Exits with 1 when a relative difference is over the tolerance.

    Rounding alone can be over it: in bf16, and in fp32 in deep models. Both paths are then measured against plain
    megatron-core in fp32 (fp64 for fp32), and the grouped path may be off by at most twice what the plain path is.

    \b
    megatron-prefix verify --tiny
    torchrun --nproc-per-node 2 -m megatron_prefix verify --tiny --tp 2 --sequence-parallel
    torchrun --nproc-per-node 2 -m megatron_prefix verify --tiny --pp 2 --max-tokens-per-microbatch 16
    megatron-prefix verify --model smollm2 --rollouts rollouts.jsonl --max-groups 2 --tolerance 1e-4
    """
    if tiny == (rollouts.path is not None):
        raise ValueError("give either --tiny, or --rollouts and --model")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"--tolerance must be above 0, got {tolerance}")
    if flags.dtype == "bf16" and (steps or tolerance is not None):
        raise ValueError("bf16 is judged against the plain path's own error: leave out --steps and --tolerance")
    config = TINY_MODEL if tiny and flags.model is None else flags.config()
    groups: Sequence[RolloutGroup | RolloutTree] = tiny_groups(config.vocab_size, seed)
    if rollouts.path:
        groups = rollouts.read(config.vocab_size)[:max_groups]
    splits = check_groups(groups, config, max_tokens_per_microbatch)
    flags.check_impl(config, parallel.cp, bool(splits))
    sizes = parallel.start(seed)
    started = time.perf_counter()
    settings = TrainSettings(
        learning_rate=1e-3, clip_grad=0.0, cp_placement=cp_placement, prefix_activations=prefix_activations
    )
    with progress_bar("verify", 2, unit="rows") as advance:
        grouped = PolicyTrainer(flags.build(config, parallel, seed=seed), settings, LossConfig())
        plain = _plain(config, flags, parallel, settings, grouped.model)
        inputs = make_inputs(grouped, grouped.shard(groups), max_tokens_per_microbatch, seed)
        result = evaluate(grouped, inputs.grouped, steps, inputs.order)
        rows_grouped = _total(sum(batch.pack.layout.num_rows for batch in inputs.grouped))
        advance(units=rows_grouped, note="prefix groups")
        reference = evaluate(plain, inputs.repeated, steps)
        rows_repeated = _total(sum(batch.pack.layout.num_rows for batch in inputs.repeated))
        advance(units=rows_repeated, note="repeated prefixes")
    found = differences(result, reference)
    limits = Limits.uniform(TOLERANCE.get(flags.torch_dtype, 0.0) if tolerance is None else tolerance)
    judge = _JUDGES.get(flags.dtype)
    against = "repeated prefixes"
    if judge and tolerance is None and not steps and not limits.hold(found):
        against = f"repeated prefixes in {judge}"
        with progress_bar(f"rounding is over the limit: {against}", 1, unit="rows") as advance:
            exact_flags = replace(flags, dtype=judge)
            exact = evaluate(_plain(config, exact_flags, parallel, settings, plain.model), inputs.repeated)
            advance(units=rows_repeated)
        found, own = differences(result, exact), differences(reference, exact)
        limits = Limits.twice(own, limits.gradient)
    report = _report(found, limits, config, sizes, result)
    report |= {
        "rows_repeated": rows_repeated,
        "rows_grouped": rows_grouped,
        "parts": sum(len(split.parts) for split in splits),
        "dtype": flags.dtype,
        "against": against,
        "seconds": round(time.perf_counter() - started, 3),
    }
    _show(report, found, limits)
    if as_json:
        print_json(report)
    destroy()
    raise SystemExit(0 if report["ok"] else 1)


@dataclass(frozen=True)
class Limits:
    """What each difference may be."""

    log_prob: float
    loss: float
    gradient: float
    parameter: float

    @classmethod
    def uniform(cls, tolerance: float) -> Limits:
        """One relative tolerance for all."""
        return cls(tolerance, tolerance, tolerance, tolerance)

    @classmethod
    def twice(cls, own: Differences, floor: float) -> Limits:
        """Twice the plain path's own error, and at least ``floor``."""
        errors = (
            own.max_log_prob_rel_diff,
            own.loss_rel_diff,
            own.max_grad_rel_diff,
            max(own.parameters.values(), default=0.0),
        )
        return cls(*(max(2 * error, floor) for error in errors))

    def hold(self, found: Differences) -> bool:
        """Whether every difference is within its limit."""
        pairs = [
            (found.max_log_prob_rel_diff, self.log_prob),
            (found.loss_rel_diff, self.loss),
            *((value, self.gradient) for value in found.gradients.values()),
            *((value, self.parameter) for value in found.parameters.values()),
        ]
        return all(_within(value, limit) for value, limit in pairs)


def _within(value: float, limit: float) -> bool:
    """NaN and infinity never are, even where the plain path's own error is as large."""
    return math.isfinite(value) and value <= limit


def _plain(
    config: ModelConfig, flags: ModelFlags, parallel: ParallelFlags, settings: TrainSettings, weights: Model
) -> PolicyTrainer:
    """Plain megatron-core with the same weights."""
    model = flags.build_plain(config, parallel, weights)
    return PolicyTrainer(model, settings, LossConfig(), log_probs=repeated_log_probs)


def tiny_groups(vocab_size: int, seed: int) -> list[RolloutGroup]:
    """Random ragged groups: a one-token prompt, one-token responses, a group of one, and unequal lengths."""
    rng = random.Random(seed)
    shapes = [(12, [3, 1, 7]), (1, [4, 2]), (9, [5]), (17, [1, 1]), (6, [2, 8, 3, 4])]
    shapes += [(rng.randint(1, 24), [rng.randint(1, 9) for _ in range(rng.randint(1, 5))]) for _ in range(3)]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    return [
        RolloutGroup(
            prompt=tokens(prompt), responses=[tokens(n) for n in responses], rewards=[rng.random() for _ in responses]
        )
        for prompt, responses in shapes
    ]


def _total(count: int) -> int:
    """The counts of all data-parallel ranks."""
    return sum(all_gather_object(count, parallel_state.get_data_parallel_group()))


def _report(
    found: Differences, limits: Limits, config: ModelConfig, sizes: ParallelSizes, result: Evaluation
) -> dict[str, Any]:
    worst = max(found.gradients, key=lambda name: found.gradients[name])
    return {
        "ok": limits.hold(found),
        "max_log_prob_diff": found.max_log_prob_diff,
        "max_log_prob_rel_diff": found.max_log_prob_rel_diff,
        "loss": result.loss,
        "loss_rel_diff": found.loss_rel_diff,
        "max_grad_rel_diff": found.max_grad_rel_diff,
        "worst_parameter": worst,
        "max_param_rel_diff": max(found.parameters.values(), default=None),
        "tolerance": limits.gradient,
        "tp": sizes.tp,
        "pp": sizes.pp,
        "vpp": sizes.vpp or 1,
        "cp": sizes.cp,
        "dp": sizes.dp,
        "layers": config.num_layers,
    }


def _show(report: dict[str, Any], found: Differences, limits: Limits) -> None:
    def row(what: str, value: float, limit: float) -> tuple[str, str, str, str]:
        return what, f"{value:.2e}", f"{limit:.2e}", "ok" if _within(value, limit) else "OVER"

    worst = sorted(found.gradients, key=lambda name: -found.gradients[name])[:SHOWN_PARAMETERS]
    rows = [
        row("log-probs (relative)", found.max_log_prob_rel_diff, limits.log_prob),
        row("loss", found.loss_rel_diff, limits.loss),
        *(row(f"grad {name}", found.gradients[name], limits.gradient) for name in worst),
    ]
    if found.parameters:
        rows.append(row("parameters after steps", max(found.parameters.values()), limits.parameter))
    print_table(
        f"prefix groups ({report['rows_grouped']} rows) vs {report['against']} ({report['rows_repeated']} rows), "
        f"{report['dtype']}: {'equal' if report['ok'] else 'NOT EQUAL'}",
        ("worst differences", "value", "limit", ""),
        rows,
    )
