"""A policy in training by megatron-core: its DDP, optimizer and schedules around grouped packs and the GRPO loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_prefix.collectives import any_rank
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import PendingSave, load_checkpoint, start_save
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.pack_trainer import PackTrainer, StepInput, TrainSettings
from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
from megatron_prefix.mcore.stages import whole_model_parameters
from megatron_prefix.model_config import ModelConfig

__all__ = ["PolicyTrainer", "StepInput", "TrainSettings"]


class PolicyTrainer(PackTrainer):
    """Takes optimizer steps on packs by megatron-core; every data-parallel rank gives at least one.

    See `PackTrainer` for the arguments. After `gradients` those of the global batch are in every ``param.main_grad``.
    """

    def __init__(
        self, model: Any, settings: TrainSettings, loss: LossConfig, *, log_probs: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(model, settings, loss, log_probs=log_probs)
        chunks = model if isinstance(model, list) else [model]
        self.dtype = self.config.params_dtype
        _refuse_fp64(self.dtype, settings)
        self.chunks = [_data_parallel(chunk, i, settings) for i, chunk in enumerate(chunks)]
        for chunk in self.chunks:
            chunk.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=settings.optimizer,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                clip_grad=settings.clip_grad,
                bf16=self.config.bf16,
                params_dtype=self.dtype,
                use_distributed_optimizer=settings.distributed_optimizer,
                sgd_momentum=0.0,
            ),
            self.chunks,
        )
        for group in self.optimizer.param_groups:
            # The scheduler has its own; 0.19 would find a checkpoint's groups by them, at these rates only.
            group.pop("max_lr", None)
            group.pop("min_lr", None)
        self.scheduler = settings.schedule.build(self.optimizer, settings.learning_rate, settings.weight_decay)
        self.config.finalize_model_grads_func = _finalize
        self.config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def implementations(self) -> str:
        """See `PackTrainer`."""
        return describe_implementations(self.optimizer, self.chunks)

    def step(self, inputs: Sequence[StepInput]) -> dict[str, float]:
        """See `PackTrainer`."""
        metrics = self.gradients(inputs)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm() or 0.0)
        finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
        metrics |= {"grad_norm": grad_norm, "lr": self.scheduler.get_lr({}), "updated": 0.0}
        if any_rank(not finite, dist.group.WORLD):
            return metrics
        self.scheduler.step(0)  # a loaded checkpoint brought the rates that it was saved with
        updated, _, _ = self.optimizer.step()
        self.scheduler.step(1)
        return metrics | {"updated": float(updated)}

    @contextmanager
    def start_save(self, path: Path, config: ModelConfig, **options: Any) -> Iterator[PendingSave]:
        """See `PackTrainer`."""
        yield start_save(path, self.model, config, optimizer=self.optimizer, **options)

    def load_checkpoint(self, path: Path, config: ModelConfig) -> None:
        """See `PackTrainer`."""
        load_checkpoint(path, self.model, config=config, optimizer=self.optimizer)

    def named_gradients(self) -> dict[str, Tensor]:
        """Gradients after `gradients`, of this rank's stages, by the parameter's name in the whole model.

        Not available with the distributed optimizer, which leaves each rank a shard of the sums.
        """
        return {name: parameter.main_grad for name, parameter in whole_model_parameters(self.chunks).items()}

    def _zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _schedule(self, inputs: Sequence[Any], forward_step: Callable[..., Any], **settings: Any) -> list[Any]:
        """See `PackTrainer`."""
        if not inputs:
            return []
        iterators = [iter(inputs) for _ in self.chunks]
        return forward_backward_prefix_groups(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(inputs),
            seq_length=1,  # shapes come from the packs
            micro_batch_size=1,
            prefix_activations=self.settings.prefix_activations,
            prefix_grad_dtype=self.settings.prefix_grad_dtype,
            max_live_prefixes=self.settings.max_live_prefixes,
            # A model without stages may be in a job that has some. With stages megatron-core finds the groups itself.
            pg_collection=self.groups if self.pp_group.size() == 1 else None,
            **settings,
        )


def _refuse_fp64(dtype: torch.dtype, settings: TrainSettings) -> None:
    if dtype is torch.float64 and settings.clip_grad > 0:
        raise ValueError(
            f"clip_grad={settings.clip_grad}: megatron-core clips fp32 gradients only; set it to 0 for fp64"
        )
    if dtype is torch.float64 and settings.distributed_optimizer:
        raise ValueError(
            "distributed_optimizer=True: megatron-core's takes no fp64 model; set distributed_optimizer=False"
        )


def _data_parallel(chunk: Any, index: int, settings: TrainSettings) -> DistributedDataParallel:
    """One model chunk in megatron-core's wrappers."""
    if chunk.config.bf16:
        chunk = Float16Module(chunk.config, chunk)
    return DistributedDataParallel(
        config=chunk.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=chunk.config.bf16,
            overlap_grad_reduce=settings.overlap_grad_reduce,
            use_distributed_optimizer=settings.distributed_optimizer,
        ),
        module=chunk,
        # As Megatron-LM: later chunks' gradients are ready first, there is nothing to overlap them with in buckets.
        disable_bucketing=index > 0,
    )


def _finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """megatron-core's gradient reductions, without its division by a token count: the loss is normalised already."""
    finalize_model_grads(model, None, *args, **kwargs)
