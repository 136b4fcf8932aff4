"""What sharing saves on your model: one GRPO step on repeated prefixes and on prefix groups, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_prefix.balanced_plan import Group
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.equivalence import Differences, differences, evaluate, make_inputs
from megatron_prefix.mcore.training import PolicyTrainer, StepInput
from megatron_prefix.measure import track_memory
from megatron_prefix.packing import pack_groups
from megatron_prefix.splitting import plan_splits


@dataclass(frozen=True)
class StepCost:
    """What one forward and backward cost over all data-parallel ranks.

    Attributes:
        rows: rows that went through each layer of the model.
        area: (query, key) pairs of the attention masks, one head of one layer.
        seconds: wall time of forward and backward on the slowest rank.
        peak_bytes: most bytes of activations and temporaries on one rank, beyond weights, gradients and optimizer.
    """

    rows: int
    area: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class StepComparison:
    """Costs of both ways through the same kernels, and the differences from plain megatron-core."""

    repeated: StepCost
    grouped: StepCost
    found: Differences


def compare_step(
    trainer: PolicyTrainer,
    plain: PolicyTrainer,
    groups: Sequence[Group],
    max_tokens_per_pack: int | None,
    advance: Callable[..., None],
) -> StepComparison:
    """Measure one step on ``groups`` (this rank's) both ways. Weights do not change; gradients are overwritten.

    Time and memory of repeated prefixes are those of the same attention kernels on one sequence per response, so the
    ratio shows what sharing alone gives. Differences are against ``plain``: megatron-core's own attention.
    ``advance`` is called five times, with the rows done and a note.
    """
    both = make_inputs(trainer, groups, max_tokens_per_pack)
    repeated = _packed_together(groups, both.repeated, max_tokens_per_pack)
    rows = sum(batch.pack.layout.num_rows for batch in repeated)
    reference = evaluate(plain, both.repeated)
    advance(units=rows, note="plain megatron-core")
    repeated_cost = _cost(trainer, repeated)
    advance(2, units=2 * rows, note="repeated prefixes")
    grouped_cost = _cost(trainer, both.grouped)
    advance(units=2 * grouped_cost.rows, note="prefix groups")
    found = differences(evaluate(trainer, both.grouped, order=both.order), reference)
    advance(units=grouped_cost.rows, note="differences")
    return StepComparison(repeated_cost, grouped_cost, found)


def _packed_together(
    groups: Sequence[Group], single: Sequence[StepInput], max_tokens_per_pack: int | None
) -> list[StepInput]:
    """Repeated sequences of each group in one micro-batch, as varlen training packs them; of a split group one each."""
    together: list[StepInput] = []
    first = 0
    for group, split in zip(groups, plan_splits(groups, max_tokens_per_pack=max_tokens_per_pack), strict=True):
        members = single[first : first + len(group.rewards)]
        first += len(group.rewards)
        if split is not None:
            together += members
            continue
        (pack,) = pack_groups([group], repeated=True)
        old = torch.cat([batch.old_log_probs for batch in members])
        together.append(StepInput(pack, old, old))
    return together


def _cost(trainer: PolicyTrainer, inputs: Sequence[StepInput]) -> StepCost:
    with track_memory() as memory:  # in a run of its own: following allocations takes time
        trainer.gradients(inputs)
    started = time.perf_counter()
    trainer.gradients(inputs)
    mine = (
        sum(batch.pack.layout.num_rows for batch in inputs),
        sum(batch.pack.layout.area for batch in inputs),
        time.perf_counter() - started,
        memory.peak_bytes,
    )
    rows, areas, _, _ = zip(*all_gather_object(mine, parallel_state.get_data_parallel_group()), strict=True)
    _, _, seconds, peaks = zip(*all_gather_object(mine, torch.distributed.group.WORLD), strict=True)
    return StepCost(sum(rows), sum(areas), max(seconds), max(peaks))
