"""A policy in training by DeepSpeed: ZeRO's engine around the passes that megatron-core's engine runs as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import clip_grad_norm_

from megatron_prefix.collectives import all_gather_ints
from megatron_prefix.deepspeed.config import engine_config
from megatron_prefix.deepspeed.mpu import MegatronMpu
from megatron_prefix.deepspeed.shared_gradients import sum_shared_gradients
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import PendingSave, start_save
from megatron_prefix.mcore.fused import describe_implementations
from megatron_prefix.mcore.pack_trainer import PackTrainer, StepInput, TrainSettings
from megatron_prefix.mcore.schedule import PrefixSettings, run_split_groups
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack, pack_groups
from megatron_prefix.rollouts import RolloutGroup

STATE_FOLDER = "deepspeed"
_TAG = "state"


class DeepSpeedTrainer(PackTrainer):
    """Takes optimizer steps on packs by `deepspeed.initialize`'s engine, at ZeRO stage 0 to 3.

    Loss, metrics and gradient clipping are those of `PolicyTrainer`, whose parameters it has after each step as well,
    up to rounding. With ZeRO-2 and 3 DeepSpeed reduces gradients (and gathers parameters) within every micro-batch, so
    a rank with fewer of them runs one-token ones without weight beside the others'. With ZeRO-0 and 1, and ZeRO-2 on a
    step with split groups, whose ranks run different kinds of micro-batches, gradients are reduced once a step.

    Args:
        model: one megatron-core model with a prefix-grouped layer spec, without wrappers or pipeline stages.
        settings, loss: see `PackTrainer`.
        ds_config: DeepSpeed's JSON configuration, see `engine_config`.

    Raises:
        ValueError: what DeepSpeed cannot do.
    """

    def __init__(self, model: Any, settings: TrainSettings, loss: LossConfig, ds_config: Mapping[str, Any]) -> None:
        (module,) = model if isinstance(model, list) else [model]
        values = engine_config(ds_config, settings, module.config.params_dtype)
        mpu = MegatronMpu.of(module.pg_collection)
        super().__init__(module, settings, loss)
        policy = _Policy(module, self.log_probs_fn)
        self.log_probs_fn = _through_engine
        self.share *= self.groups.dp_cp.size()  # DeepSpeed takes the mean over these ranks
        sum_shared_gradients(module)
        parameters = _parameter_groups(module, settings.weight_decay)
        client = None if "optimizer" in values else _adam(parameters, settings)
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=client,
            model_parameters=None if client else parameters,
            mpu=mpu,
            config=values,
            dist_init_required=False,
        )
        self.mpu, self.stage = mpu, int(self.engine.zero_optimization_stage())
        self.chunks = [self.engine]
        self.scheduler = settings.schedule.build(self.engine.optimizer, settings.learning_rate, settings.weight_decay)
        if self.stage == 3:
            _gather_head_once(policy, module)

    @property
    def implementations(self) -> str:
        """See `PackTrainer`."""
        found = describe_implementations(self.engine, self.chunks)
        return f"DeepSpeed {deepspeed.__version__}, ZeRO-{self.stage}; {found}"

    def step(self, inputs: Sequence[StepInput]) -> dict[str, float]:
        """See `PackTrainer`."""
        metrics = self.gradients(inputs)
        metrics |= {"lr": self.scheduler.get_lr({})}
        self.scheduler.step(0)
        grad_norm = self._update()
        updated = math.isfinite(grad_norm)
        if updated:
            self.scheduler.step(1)
        return metrics | {"grad_norm": grad_norm, "updated": float(updated)}

    @contextmanager
    def start_save(self, path: Path, config: ModelConfig, **options: Any) -> Iterator[PendingSave]:
        """See `PackTrainer`. Weights are in megatron-core's format, so that every command reads them, whole within the
        context also under ZeRO-3; DeepSpeed's own files, for a resumed run at the same sizes, are beside them."""
        parameters = list(self.engine.module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield start_save(path, self.engine, config, write_more=self._save_engine, **options)

    def load_checkpoint(self, path: Path, config: ModelConfig) -> None:
        """See `PackTrainer`.

        Raises:
            ValueError: another engine wrote it.
        """
        folder = path / STATE_FOLDER
        if not folder.is_dir():
            raise ValueError(f"checkpoint {path} holds no state of DeepSpeed: another engine wrote it")
        self.engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)

    def _save_engine(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder / STATE_FOLDER), tag=_TAG, save_latest=False)

    def _zero_grad(self) -> None:
        """A step leaves none."""

    def _update(self) -> float:
        """Clip and step; returns the gradients' norm, which is infinite where nothing was updated."""
        if self.engine.optimizer is self.engine.basic_optimizer:  # ZeRO-0 in fp32 looks at no norm before it steps
            norm = float(clip_grad_norm_(self.engine.module.parameters(), math.inf, mpu=self.mpu))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return math.inf
            self.engine.step()
            return norm
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def _schedule(self, inputs: Sequence[Any], forward_step: Callable[..., Any], **settings: Any) -> list[Any]:
        """See `PackTrainer`.

        Raises:
            ValueError: split groups that the stage cannot take.
        """
        forward_only = settings.get("forward_only", False)
        packs = [x if isinstance(x, Pack) else x.pack for x in inputs]
        mine = (len(packs), any(pack.prefix is not None for pack in packs))
        counts, splits = zip(*all_gather_ints(mine, self.dp_group), strict=True)
        self._refuse_split(any(splits))
        within_each = self.stage == 3 or (self.stage == 2 and not any(splits) and not forward_only)
        missing = max(counts) - len(inputs) if within_each else 0
        padded = [*inputs, *[_idle_pack() if forward_only else _idle_input()] * missing]
        if not padded:
            return []
        results = run_split_groups(
            partial(self._run, within_each),
            self.pp_group,
            PrefixSettings(
                self.settings.prefix_activations, self.settings.prefix_grad_dtype, self.settings.max_live_prefixes
            ),
            forward_step_func=forward_step,
            data_iterator=iter(padded),
            model=self.engine,
            num_microbatches=len(padded),
            **settings,
        )
        return results[: len(results) - missing]

    def _refuse_split(self, has_parts: bool) -> None:
        if has_parts:
            check_split_groups(self.stage, self.config.params_dtype, self.engine.get_data_types()[1])

    def _run(
        self,
        within_each: bool,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[Any],
        model: Any,
        num_microbatches: int,
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """The schedule: micro-batches one by one, each backward by the engine."""
        results = []
        with nullcontext() if forward_only else self._accumulating(within_each):
            for left in reversed(range(num_microbatches)):
                if within_each and not forward_only:
                    self.engine.set_gradient_accumulation_boundary(left == 0)
                output, loss_func = forward_step_func(data_iterator, model)
                if collect_non_loss_data:
                    results.append(loss_func(output, non_loss_data=True))
                    continue
                loss, _, result = loss_func(output)
                results.append(result)
                # A loss that is not finite makes its gradients so, and DeepSpeed then leaves the step out.
                self.engine.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)
        return results

    def _accumulating(self, within_each: bool) -> AbstractContextManager[Any]:
        """Around the backward passes of a step: when their gradients are reduced."""
        if within_each:
            return nullcontext()
        if self.stage == 0 or isinstance(self.engine.optimizer, BF16_Optimizer):
            return self._reducing_behind()
        return self.engine.coalesce_grad_reduction()

    @contextmanager
    def _reducing_behind(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()


class _Policy(torch.nn.Module):
    """The model with log-probs for outputs, so that all of a micro-batch's forward runs inside the engine's."""

    def __init__(self, module: torch.nn.Module, log_probs: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.log_probs = module, log_probs

    def forward(self, pack: Pack, **options: Any) -> Any:
        return self.log_probs(self.module, pack, **options)


def _through_engine(engine: Any, pack: Pack, **options: Any) -> Any:
    return engine(pack, **options)


def check_split_groups(stage: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Refuse split groups where the ZeRO stage cannot take them.

    Raises:
        ValueError: why.
    """
    remedy = "raise --max-tokens-per-microbatch until every group fits a micro-batch, or use ZeRO-1"
    if stage == 3:
        raise ValueError(
            "ZeRO-3 with split groups: it gathers parameters in every micro-batch, and a rank with parts runs others "
            f"than a rank without; {remedy}"
        )
    if stage == 2 and grad_dtype != dtype:
        raise ValueError(
            f"ZeRO-2 with split groups adds gradients up in {dtype}, data_types.grad_accum_dtype is {grad_dtype}; "
            f"{remedy}"
        )


def _idle_pack() -> Pack:
    """One token after one token."""
    (pack,) = pack_groups([RolloutGroup([0], [[0]], [0.0], log_probs=[[0.0]])])
    return pack


def _idle_input() -> StepInput:
    return StepInput(_idle_pack(), torch.zeros(1), torch.zeros(1), weight=0.0)


def _gather_head_once(policy: _Policy, module: Any) -> None:
    """ZeRO-3 wants the same modules called in the same order on all ranks, and a head's chunks differ in number.

    So its weight is gathered around all of the forward, and the output layer itself is none of ZeRO's modules.
    """
    head, tied = module.output_layer, module.share_embeddings_and_output_weights
    weight = module.shared_embedding_or_output_weight() if tied else head.weight
    deepspeed.zero.register_external_parameter(policy, weight)
    head._forward_pre_hooks.clear()
    head._forward_hooks.clear()


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As in Megatron-LM, norm weights and biases do not decay; ``wd_mult`` tells the scheduler."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    flat = {name for name, parameter in named if name.endswith(".bias") or parameter.ndim == 1}
    return [
        {"params": [p for name, p in named if name not in flat], "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": [p for name, p in named if name in flat], "weight_decay": 0.0, "wd_mult": 0.0},
    ]


def _adam(parameters: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=torch.cuda.is_available())
