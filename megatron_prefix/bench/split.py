"""A training step of a prefix group that does not fit one micro-batch, next to the same step unsplit.

Every path is the forward and backward part of `PolicyTrainer`: megatron-core's schedule and DDP around one model, no
optimizer. The paths differ in their micro-batches only:

    unsplit        the whole group as one pack
    split_*        the prefix once, and the responses in parts; one path for each setting of prefix activations
    re_encoded     each part as a pack of its own, which encodes the prefix again
    repeated       every response as a sequence of its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.advantages import group_advantages
from megatron_prefix.attention import resolve_impl
from megatron_prefix.bench.group import DTYPES, GroupSizes
from megatron_prefix.bench.report import TOLERANCE, check_equal, new_report
from megatron_prefix.bench.scheduled_step import BenchTrainer, ScheduledStep
from megatron_prefix.bench.split_report import add_ratios
from megatron_prefix.bench.step import (
    StepSettings,
    check_positions,
    differences,
    exact_model,
    random_model,
    random_rollouts,
)
from megatron_prefix.mcore.schedule import PREFIX_ACTIVATIONS
from megatron_prefix.measure import interleaved_times
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack, pack_groups, repeated_packs
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split, plan_splits


@dataclass(frozen=True)
class SplitSettings:
    """What is compared.

    Attributes:
        num_parts: parts of the group.
        prefix_activations: the settings of `forward_backward_prefix_groups` to run, one path each.
        group_sizes: of the groups whose memory is compared, in parts of one size (see `rows_per_part`).
        repeated: also run repeated prefixes, one sequence a micro-batch.

    Raises:
        ValueError: an unknown setting, or none; a group size below 2.
    """

    num_parts: int = 4
    prefix_activations: tuple[str, ...] = ("keep", "recompute")
    group_sizes: tuple[int, ...] = (4, 8, 16, 32)
    repeated: bool = False

    def __post_init__(self) -> None:
        if not self.prefix_activations or not set(self.prefix_activations) <= set(PREFIX_ACTIVATIONS):
            raise ValueError(
                f"prefix_activations must be some of {', '.join(PREFIX_ACTIVATIONS)}, got {self.prefix_activations}"
            )
        if any(size < 2 for size in self.group_sizes):
            raise ValueError(f"group_sizes must be at least 2, for two parts or more, got {list(self.group_sizes)}")

    def check(self, group: GroupSizes) -> None:
        """Raises ValueError when the group has fewer responses than parts, or sizes do not come in equal parts."""
        if group.group_size < self.num_parts:
            raise ValueError(
                f"parts {self.num_parts} are more than the {group.group_size} responses of the group; ask for fewer"
            )
        each = self.responses_per_part(group)
        odd = [size for size in self.group_sizes if size % each]
        if odd:
            raise ValueError(
                f"group_sizes: {odd[0]} responses do not divide into parts of {each}, half of the smallest group or "
                "less; choose multiples of the smallest"
            )

    def responses_per_part(self, group: GroupSizes) -> int:
        """Responses of each part of the ``group_sizes``: at least two parts of the smallest, no larger than needed."""
        own = max(1, group.group_size // self.num_parts)
        return min([own, *(size // 2 for size in self.group_sizes)])


def bench_split(
    group: GroupSizes,
    config: ModelConfig,
    settings: StepSettings,
    split: SplitSettings,
    *,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare, then time, the paths on one random group of a model with random weights.

    Log-probs, loss terms and every parameter's gradient of each path are compared with those of the unsplit group (in
    half precision, all with the unsplit group in fp32). Memory is counted beside the parameters and their gradient
    buffers. megatron-core's process groups must exist (one process).

    Args:
        after_each: called with a note after each of `num_runs` runs.

    Returns:
        The report: JSON values, see `megatron_prefix.bench.report` and `split_report`.

    Raises:
        ResultsDifferError: log-probs, loss terms or a gradient differ.
        ValueError: sizes that cannot be split so, or a model that is too small for the group, or not supported.
    """
    check_positions(group, config)
    split.check(group)
    note = after_each or (lambda _: None)
    dtype = DTYPES[settings.dtype]
    model = random_model(config, dtype, settings.impl, seed)
    # Before the trainer: it wraps the model.
    exact = None if dtype in TOLERANCE else BenchTrainer(exact_model(model, config))
    trainer = BenchTrainer(model)
    rollouts = random_rollouts(group, config.vocab_size, seed)
    impl = resolve_impl(settings.impl, trainer.device, dtype, config.channels)
    sizes = asdict(group) | asdict(settings) | {"impl": impl}
    sizes |= {"parts": split.num_parts, "repeats": repeats}
    report = new_report("split", sizes, seed)
    report["model"] = asdict(config) | {"parameters": sum(param.numel() for param in model.parameters())}

    steps = split_steps(trainer, [rollouts], split, split.num_parts)
    results = _measured(report, steps, exact, dtype, note)
    each = split.responses_per_part(group)
    by_size = []
    for size in split.group_sizes:
        some = random_rollouts(replace(group, group_size=size), config.vocab_size, seed)
        memory_steps = split_steps(trainer, [some], replace(split, repeated=False), size // each)
        del memory_steps["re_encoded"]
        probe = report | {"sizes": sizes | {"group_size": size, "parts": size // each}}
        measured = _measured(probe, memory_steps, exact, dtype, lambda name, size=size: note(f"G={size}: {name}"))  # type: ignore[misc]
        by_size.append({"group_size": size, "parts": size // each, "results": measured})

    times = interleaved_times(
        {name: step.time for name, step in steps.items()},
        repeats=repeats,
        warmup=0,
        after_each=lambda name: note(f"timing {name}"),
    )
    for name, result in results.items():
        result["seconds"] = {phase: taken.as_dict() for phase, taken in times[name].items()}
    report["results"] = results
    report["by_group_size"] = by_size
    add_ratios(report)
    return report


def num_runs(split: SplitSettings, repeats: int, dtype: str) -> int:
    """How often `bench_split` calls ``after_each``."""
    splits, exact = len(split.prefix_activations), DTYPES[dtype] not in TOLERANCE
    paths = 2 + splits + split.repeated
    return paths * (1 + repeats) + exact + len(split.group_sizes) * (1 + splits + exact)


def split_steps(
    trainer: BenchTrainer, groups: Sequence[RolloutGroup], split: SplitSettings, num_parts: int
) -> dict[str, ScheduledStep]:
    """Of every path, on groups of one size; the unsplit one first."""
    whole = [pack for group in groups for pack in pack_groups([group])]
    limit = whole[0].layout.num_rows - 1  # one row too few
    steps = {"unsplit": ScheduledStep(trainer, whole)}
    for activations in split.prefix_activations:
        packs = pack_and_split(groups, max_tokens_per_pack=limit, num_parts=num_parts)
        steps[f"split_{activations}"] = ScheduledStep(trainer, packs, activations)
    re_encoded = [pack for group in groups for pack in _re_encoded(group, limit, num_parts)]
    steps["re_encoded"] = ScheduledStep(trainer, re_encoded)
    if split.repeated:
        steps["repeated"] = ScheduledStep(trainer, repeated_packs(groups))
    return steps


def _re_encoded(rollouts: RolloutGroup, limit: int, num_parts: int) -> list[Pack]:
    """The parts of `pack_and_split`, each with the whole prefix, and the advantages of the whole group."""
    (plan,) = plan_splits([rollouts], max_tokens_per_pack=limit, num_parts=num_parts)
    assert plan is not None
    advantages = torch.tensor(group_advantages(rollouts.rewards))
    packs = []
    for nodes in plan.parts:
        members = [node - 1 for node in nodes]  # node 0 is the prompt
        part = RolloutGroup(
            rollouts.prompt, [rollouts.responses[i] for i in members], [rollouts.rewards[i] for i in members]
        )
        packs += [replace(pack, advantages=advantages[members]) for pack in pack_groups([part])]
    return packs


def _measured(
    report: dict[str, Any],
    steps: dict[str, ScheduledStep],
    exact: BenchTrainer | None,
    dtype: torch.dtype,
    note: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """What was counted in one step of each path. Raises ResultsDifferError when results differ."""
    found, results = {}, {}
    for name, step in steps.items():
        found[name], results[name] = step.measure()
        note(f"checking {name}")

    def reference() -> dict[str, Tensor]:
        assert exact is not None
        values = ScheduledStep(exact, steps["unsplit"].packs).measure()[0]
        note("checking against fp32")
        return values

    check_equal(report, differences(found, "unsplit", reference, dtype), dtype, baseline="unsplit")
    return results
