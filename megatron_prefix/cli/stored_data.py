"""What `train --rollouts` trains on: the groups of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_prefix.balanced_plan import Group, as_tree
from megatron_prefix.cli.console import progress_bar, stderr_console
from megatron_prefix.cli.options import check_groups
from megatron_prefix.cli.rollout_input import RolloutInput
from megatron_prefix.context_parallel.choice import CpLayers, choose_plan
from megatron_prefix.cost_model import CostModel
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.core_attention import attention_layers
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.parallel import ParallelSizes
from megatron_prefix.mcore.step_plan import plan_step, step_planner
from megatron_prefix.mcore.step_source import StepSource, StoredRollouts
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import has_log_probs
from megatron_prefix.sampler import PrefixGroupSampler
from megatron_prefix.sharing import share_where_it_pays, summary


class StepData(Protocol):
    """What a run trains on, known before its model is built."""

    @property
    def name(self) -> str:
        """Where it comes from, for messages."""

    @property
    def sha256(self) -> str:
        """Of all that a resumed run must find again."""

    @property
    def batch_groups(self) -> int:
        """Groups of a step's global batch."""

    @property
    def may_split(self) -> bool:
        """Whether a group may be cut into several micro-batches."""

    def source(
        self, trainer: PackTrainer, cost: CostModel, steps: range, saved: Mapping[str, Any] | None
    ) -> StepSource:
        """For the steps, counted from 0, that are left; the policy is that of the run's start.

        Args:
            trainer: of the policy.
            cost: what packing balances, and what decides where sharing pays.
            steps: that are left.
            saved: ``state_dict`` of the source of the run that this one goes on with.
        """

    def describe(self, source: Any, steps: range, sizes: ParallelSizes) -> Iterator[str]:
        """Lines for the user on what ``source``, of these steps, gives."""


@dataclass(frozen=True)
class StoredData:
    """`StepData` of a rollouts file.

    Attributes:
        path: the file.
        groups: in it.
        groups_per_step, max_tokens, seed: as in `StoredRollouts`.
        with_reference: whether the loss has a reference policy.
        keep_ids: every rank keeps all token ids, to run a whole model on them later.
        num_parts: of each group that is split.
    """

    path: Path
    groups: Sequence[Group]
    groups_per_step: int
    max_tokens: int | None
    seed: int
    with_reference: bool
    keep_ids: bool
    num_parts: Sequence[int]

    @classmethod
    def read(
        cls,
        rollouts: RolloutInput,
        config: ModelConfig,
        loss: LossConfig,
        *,
        groups_per_step: int,
        max_tokens: int | None,
        seed: int,
        keep_ids: bool,
    ) -> StoredData:
        """The file's groups, checked against model and loss.

        Raises:
            ValueError: what cannot be used.
        """
        groups, path = rollouts.read(config.vocab_size), rollouts.path
        assert path is not None  # read has refused that
        parts = [len(split.parts) for split in check_groups(groups, config, max_tokens)]
        if loss.importance_cap is not None and not has_log_probs(groups[0]):
            raise ValueError(
                f"--importance-cap {loss.importance_cap} needs the sampler's log_probs, {path} has none; leave it out"
            )
        return cls(path, groups, groups_per_step, max_tokens, seed, loss.kl_coef > 0, keep_ids, parts)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def batch_groups(self) -> int:
        return min(self.groups_per_step, len(self.groups))

    @property
    def may_split(self) -> bool:
        return bool(self.num_parts)

    def source(
        self, trainer: PackTrainer, cost: CostModel, steps: range, saved: Mapping[str, Any] | None
    ) -> StoredRollouts:
        """See `StepData`; measures the old log-probs of all groups that are left."""
        groups, results = share_where_it_pays(self.groups, cost)
        stderr_console().print(summary(results), markup=False)
        if not self.keep_ids:
            groups = groups_on_this_rank(groups, trainer.model)
        planner = step_planner(trainer.config, trainer.dp_group.size(), cost, self.max_tokens)
        sampler = PrefixGroupSampler(groups, planner, groups_per_step=self.groups_per_step, seed=self.seed)
        source = StoredRollouts(trainer, sampler, with_reference=self.with_reference)
        if saved is not None:
            source.load_state_dict(saved)
        with progress_bar("old log-probs", len(source.groups_to_measure(len(steps))), unit="tokens") as advance:
            source.measure_old_log_probs(len(steps), advance)
        return source

    def describe(self, source: StoredRollouts, steps: range, sizes: ParallelSizes) -> Iterator[str]:
        """See `StepData`."""
        trainer, count = source.trainer, len(self.groups)
        yield f"{count} groups, steps {steps.start} to {steps.stop}"
        if self.num_parts:
            parts = f"{len(self.num_parts)} of {count} groups are split, into {sum(self.num_parts)} parts"
            yield f"{parts}; their prefixes run once"
        settings, sampler = trainer.settings, source.sampler
        if steps:
            plan = sampler.plan(sampler.upcoming(1)[0])
            yield f"first step: {plan.describe()}"
            if sizes.pp > 1:
                packs = plan.packs(sampler.groups, trainer.dp_group.rank())
                yield plan_step(packs, trainer.config, max_live_prefixes=settings.max_live_prefixes).describe()
        if sizes.cp > 1:
            layers = attention_layers(trainer.config, sizes.cp_a2a)
            yield _placement(self.groups[0], sizes.cp, settings.cp_placement, layers)


def _placement(group: Group, cp_size: int, placement: str, layers: CpLayers) -> str:
    """Where context parallelism puts the rows of a group, which "auto" decides for every pack anew."""
    plan = choose_plan(as_tree(group).layout, cp_size, placement, layers)
    comm_types = ", ".join(sorted(set(layers.comm_types)))
    shares = "/".join(str(layout.num_rows) for layout in plan.local_layouts)
    return f"cp {cp_size}, {comm_types}, placement {placement}: the first group's rows go {shares} by {plan.name}"
