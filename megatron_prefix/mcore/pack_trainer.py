"""What every trainer of a policy does with packs, whichever engine reduces its gradients and updates its parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix.balanced_plan import Group
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.cost_model import CostModel
from megatron_prefix.loss import BatchTotals, LossConfig, add_metrics, grpo_loss_terms, summarize
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.lr_schedule import LrSchedule
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack


@dataclass(frozen=True)
class TrainSettings:
    """How parameters are updated.

    Attributes:
        learning_rate, weight_decay, clip_grad: of megatron-core's Adam; ``clip_grad`` 0 turns clipping off. As in
            Megatron-LM, norm weights and biases do not decay.
        optimizer: "adam" or "sgd".
        distributed_optimizer: shard optimizer state over data-parallel ranks (reduce-scatter of gradients).
        overlap_grad_reduce: reduce gradients while backward still runs.
        schedule: how the learning rate changes.
        temperature: of the log-probs, as in sampling.
        log_entropy: measure the policy's entropy where the loss does not need it, too.
        chunk_rows, cp_placement: see `response_log_probs`.
        prefix_activations, prefix_grad_dtype, max_live_prefixes: of split groups, see `forward_backward_prefix_groups`.
    """

    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    optimizer: str = "adam"
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    schedule: LrSchedule = field(default_factory=LrSchedule)
    temperature: float = 1.0
    log_entropy: bool = False
    chunk_rows: int = 4096
    cp_placement: str = "auto"
    prefix_activations: str = "keep"
    prefix_grad_dtype: str = "fp32"
    max_live_prefixes: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("learning_rate", 0), ("weight_decay", 0), ("clip_grad", 0), ("chunk_rows", 1)):
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        self.schedule.check(self.learning_rate)
        if self.max_live_prefixes is not None and self.max_live_prefixes < 1:
            raise ValueError(f"max_live_prefixes must be at least 1, got {self.max_live_prefixes}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be 'adam' or 'sgd', got {self.optimizer!r}")
        if self.distributed_optimizer and self.optimizer != "adam":
            raise ValueError(
                f"optimizer={self.optimizer!r}: megatron-core's distributed optimizer knows Adam only; use 'adam', or "
                "distributed_optimizer=False"
            )


@dataclass(frozen=True)
class StepInput:
    """One micro-batch of a step: a pack and the log-probs that its loss is measured against, each [N] on the CPU.

    ``weight`` scales the gradient; with 0 the micro-batch only runs beside those of other ranks.
    """

    pack: Pack
    old_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    weight: float = 1.0


class PackTrainer(ABC):
    """A policy in training: forward and backward over packs with the GRPO loss. Engines add the rest.

    What drives a run (`TrainingLoop`, `RunCheckpoints`, every `StepSource`) knows this class only. Every data-parallel
    rank calls a trainer with its own packs.

    Args:
        model: from `build_model` with a prefix-grouped layer spec (or the repeated-prefix baseline of the same spec);
            the list of its virtual pipeline chunks with an interleaved pipeline.
        settings: optimizer and data-parallel settings.
        loss: what to optimize.
        log_probs: how log-probs are computed from (model, pack); `response_log_probs` unless a test or the plain
            megatron-core oracle stands in.

    Attributes:
        config: megatron-core's, of the model.
        dp_group, pp_group: of data-parallel ranks and pipeline stages.
        chunks: the wrapped model, as virtual pipeline chunks.
        scheduler: megatron-core's, of the learning rate.
    """

    chunks: list[Any]
    scheduler: Any

    def __init__(
        self, model: Any, settings: TrainSettings, loss: LossConfig, *, log_probs: Callable[..., Any] | None = None
    ) -> None:
        chunks = model if isinstance(model, list) else [model]
        self.config = chunks[0].config
        self.settings, self.loss = settings, loss
        self.log_probs_fn: Callable[..., Any] = log_probs or partial(
            response_log_probs,
            temperature=settings.temperature,
            chunk_rows=settings.chunk_rows,
            cp_placement=settings.cp_placement,
        )
        self.dp_group = parallel_state.get_data_parallel_group()
        self.groups = chunks[0].pg_collection
        self.pp_group = self.groups.pp
        # Gradients are summed over context-parallel ranks. A model that computes whole sequences on each (the plain
        # oracle) counts as a share.
        self.share = self.config.context_parallel_size / parallel_state.get_context_parallel_world_size()
        # With this setting megatron-core sums gradients over ranks and micro-batches and scales nothing: the loss is
        # already this micro-batch's share of the mean over the global batch.
        for chunk in chunks:
            chunk.config.calculate_per_token_loss = True

    @property
    def model(self) -> Any:
        """The wrapped model, or the list of its virtual pipeline chunks."""
        return self.chunks if len(self.chunks) > 1 else self.chunks[0]

    @property
    @abstractmethod
    def implementations(self) -> str:
        """What runs the optimizer and the model's parts, in one line."""

    @abstractmethod
    def step(self, inputs: Sequence[StepInput]) -> dict[str, float]:
        """Forward and backward over this rank's micro-batches and one optimizer step.

        A loss or gradient that is not finite, on any rank, updates nothing: parameters, optimizer and learning-rate
        schedule are as if there had been no step.

        Returns the metrics of the global batch (see `grpo_loss`), with the gradient norm as ``grad_norm``, the learning
        rate as ``lr`` and whether the update was made as ``updated``.

        Raises:
            ValueError: no micro-batch on this rank.
        """

    @abstractmethod
    def start_save(self, path: Path, config: ModelConfig, **options: Any) -> AbstractContextManager[Any]:
        """A context around the writing of a checkpoint that gives `checkpoint.start_save`'s `PendingSave`.

        Args:
            path: of the checkpoint.
            config: of the model.
            options: further ones of `checkpoint.start_save`.
        """

    @abstractmethod
    def load_checkpoint(self, path: Path, config: ModelConfig) -> None:
        """Take up weights and optimizer of a checkpoint of this engine; raises as `checkpoint.load_checkpoint`."""

    @abstractmethod
    def _zero_grad(self) -> None:
        """Forget the gradients of the step before."""

    @abstractmethod
    def _schedule(self, inputs: Sequence[Any], forward_step: Callable[..., Any], **settings: Any) -> list[Any]:
        """Run micro-batches forward (and backward) through all stages; results of the last stage, else none."""

    def log_probs(self, pack: Pack) -> Tensor:
        """Response log-probs of the policy as it is, on the CPU: old (or, before any step, reference) log-probs."""
        return self.log_probs_of([pack])[0]

    @torch.no_grad()
    def log_probs_of(self, packs: Sequence[Pack]) -> list[Tensor]:
        """`log_probs` of each pack, those of split groups included (a group's prefix has none: an empty tensor)."""
        for chunk in self.chunks:
            chunk.eval()
        found = self._schedule(packs, self._forward_log_probs, forward_only=True, collect_non_loss_data=True)
        for chunk in self.chunks:
            chunk.train()
        # The last stage has them.
        found = all_gather_object([x.cpu() for x in found], self.pp_group)[-1]
        results = iter(found)
        return [next(results) if pack.response_rows.numel() else torch.zeros(0) for pack in packs]

    def state_dict(self) -> dict[str, Any]:
        """JSON values that the optimizer's own state does not have."""
        return {"schedule_steps": self.scheduler.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up `state_dict`: the schedule goes on where it was, with the settings of this run."""
        self.scheduler.num_steps = state["schedule_steps"]

    def gradients(self, inputs: Sequence[StepInput]) -> dict[str, float]:
        """The forward and backward part of `step`: the engine holds the gradients of the global batch."""
        return self.gradients_and_terms(inputs)[0]

    def gradients_and_terms(self, inputs: Sequence[StepInput]) -> tuple[dict[str, float], Tensor]:
        """`gradients`, and the weighted terms (see `grpo_loss_terms`) of this rank's pairs, packs in order."""
        if not inputs:
            raise ValueError(
                "this data-parallel rank has no micro-batch; give every rank at least one group, or use fewer ranks"
            )
        totals = self._global_totals(inputs)
        for chunk in self.chunks:
            chunk.train()
        self._zero_grad()
        outputs = self._schedule(inputs, partial(self._forward_step, totals))
        mine = [({name: x.cpu() for name, x in metrics.items()}, terms.cpu()) for metrics, terms in outputs]
        outputs = all_gather_object(mine, self.pp_group)[-1]  # only the last stage has a loss
        metrics, terms = zip(*outputs, strict=True)
        return self._summarize(metrics), torch.cat(terms)

    def shard(self, groups: Sequence[Group]) -> list[Group]:
        """This data-parallel rank's share of the global batch, balanced by `StepPlanner`."""
        cost = CostModel(row=1.0, pair=1 / (6 * self.config.hidden_size))  # see `pipeline_plan.pipeline_jobs`
        plan = StepPlanner(cost, self.dp_group.size()).plan(groups)
        return [groups[i] for i in plan.ranks[self.dp_group.rank()].groups]

    def _forward_log_probs(self, iterator: Iterator[Pack], model: Any) -> tuple[Tensor, Any]:
        return self.log_probs_fn(model, next(iterator)), lambda output, non_loss_data: output

    def _forward_step(self, totals: BatchTotals, iterator: Iterator[StepInput], model: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        with_entropy = self.loss.entropy_coef > 0 or self.settings.log_entropy
        output = self.log_probs_fn(model, batch.pack, **({"with_entropy": True} if with_entropy else {}))
        # Stages before the last return their hidden states alone.
        log_probs, entropy = output if isinstance(output, tuple) else (output, None)
        return log_probs, partial(self._loss, totals, batch, entropy)

    def _loss(
        self, totals: BatchTotals, batch: StepInput, entropy: Tensor | None, log_probs: Tensor
    ) -> tuple[Tensor, Tensor, tuple[dict[str, Tensor], Tensor]]:
        pack, device = batch.pack, log_probs.device

        def upload(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        terms, metrics = grpo_loss_terms(
            log_probs,
            batch.old_log_probs.to(device, non_blocking=True),
            pack.advantages.to(device, non_blocking=True),
            pack.pairs.to(device),
            totals,
            ref_log_probs=upload(batch.ref_log_probs),
            sampler_log_probs=upload(pack.sampler_log_probs),
            entropy=entropy,
            config=self.loss,
        )
        loss = terms.sum() * (self.share * batch.weight)
        return loss, torch.ones((), dtype=torch.int, device=device), (metrics, terms.detach())

    def _global_totals(self, inputs: Sequence[StepInput]) -> BatchTotals:
        mine = BatchTotals(0, 0)
        for batch in inputs:
            mine = mine + batch.pack.totals
        shares = all_gather_object(dataclasses.astuple(mine), self.dp_group)
        return BatchTotals(*(sum(column) for column in zip(*shares, strict=True)))

    def _summarize(self, per_pack: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        return summarize(_add_all(all_gather_object(_add_all(per_pack), self.dp_group)))


def _add_all(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    total = dict(metrics[0])
    for more in metrics[1:]:
        total = add_metrics(total, more)
    return total
