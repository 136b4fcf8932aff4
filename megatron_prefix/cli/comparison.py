"""`train --compare`: one step both ways, with repeated prefixes and grouped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_prefix.balanced_plan import Group
from megatron_prefix.cli.console import print_table, progress_bar
from megatron_prefix.cli.options import ModelFlags, ParallelFlags
from megatron_prefix.mcore.compare import StepComparison, compare_step
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.training import PolicyTrainer
from megatron_prefix.model_config import ModelConfig


def compare_with_repeated(
    trainer: PolicyTrainer,
    config: ModelConfig,
    flags: ModelFlags,
    parallel: ParallelFlags,
    groups: Sequence[Group],
    max_tokens: int | None,
) -> StepComparison:
    """A step on these groups (each data-parallel rank takes its share) by the trainer and by plain megatron-core."""
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
