"""What runs on the ranks of the DeepSpeed tests: the same steps by megatron-core's engine and by DeepSpeed's."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix import LossConfig, RolloutGroup
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.stages import whole_model_parameters
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.splitting import pack_and_split
from tests.cli_runs import groups
from tests.mcore_helpers import start, tiny_config

STEPS = 5
PRECISION = 1e-5
WHOLE, SPLIT = 30, 14  # most rows of a micro-batch: every group fits, and some are split
# Small buckets: several a step, and gradients that are larger than one. ZeRO-3 shards these small parameters, too, and
# gathers them for each use, as it does with large ones.
ZERO = {
    "reduce_bucket_size": 3000,
    "allgather_bucket_size": 3000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
LOSS = LossConfig(kl_coef=0.1)


@dataclass(frozen=True)
class Case:
    """A model at parallel sizes, and how it is trained."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    tied: bool = False
    dtype: torch.dtype = torch.float32
    max_tokens: int = WHOLE
    clip_grad: float = 0.1  # below most norms

    @property
    def settings(self) -> TrainSettings:
        return TrainSettings(learning_rate=1e-3, weight_decay=0.1, clip_grad=self.clip_grad, chunk_rows=3)


def start_deepspeed(rank: int, **sizes: int) -> None:
    """Of a rank of run_distributed, also a second time at other sizes."""
    os.environ["LOCAL_RANK"] = str(rank)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from deepspeed.utils import logger

    from megatron_prefix.deepspeed.cpu import use_plain_gloo

    logger.setLevel(logging.ERROR)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    start(**sizes)
    use_plain_gloo()


def build(case: Case, layer_spec: Callable[..., Any] = prefix_gpt_layer_spec) -> Any:
    config = tiny_config(qk_layernorm=True, tied_embeddings=case.tied)
    how: dict[str, Any] = {"dtype": case.dtype, "sequence_parallel": case.sequence_parallel}
    return build_model(config, layer_spec=layer_spec(transformer_config(config, **how)), seed=3, **how)


def batch() -> list[RolloutGroup]:
    """Five ragged groups: no two ranks of two or four have as many tokens, or all of them as many micro-batches."""
    return groups(5, seed=4)


def inputs_of(trainer: PackTrainer, case: Case) -> list[StepInput]:
    """This rank's micro-batches, measured against a policy that differs a little."""
    packs = pack_and_split(trainer.shard(batch()), max_tokens_per_pack=case.max_tokens)
    old = trainer.log_probs_of(packs)
    return [StepInput(pack, found - 0.05, found + 0.02) for pack, found in zip(packs, old, strict=True)]


def train(trainer: PackTrainer, case: Case) -> list[dict[str, float]]:
    """The metrics of every step."""
    inputs = inputs_of(trainer, case)
    return [trainer.step(inputs) for _ in range(STEPS)]


def parameters_of(trainer: PackTrainer) -> dict[str, Tensor]:
    """Copies, whole also under ZeRO-3."""
    import deepspeed

    found = whole_model_parameters(trainer.model)
    sharded = any(hasattr(parameter, "ds_id") for parameter in found.values())
    with deepspeed.zero.GatheredParameters(list(found.values()), enabled=sharded):
        return {name: parameter.detach().double().clone() for name, parameter in found.items()}


def by_deepspeed(
    case: Case, stage: int, layer_spec: Callable[..., Any] = prefix_gpt_layer_spec, **config: Any
) -> PackTrainer:
    from megatron_prefix.deepspeed.training import DeepSpeedTrainer

    zero = {"stage": stage, **ZERO, **config.pop("zero", {})}
    return DeepSpeedTrainer(build(case, layer_spec), case.settings, LOSS, {"zero_optimization": zero, **config})


def differences(case: Case, runs: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, float]]:
    """The worst relative difference of a parameter or a metric after the steps, by run: where it is, and how large.

    Args:
        runs: a name, and the arguments of `by_deepspeed`.
    """
    oracle = PolicyTrainer(build(case), case.settings, LOSS)
    metrics, expected = train(oracle, case), parameters_of(oracle)
    before = whole_model_parameters(build(case))
    assert all((value - before[name]).norm() > 100 * PRECISION * value.norm() for name, value in expected.items())
    assert max(each["grad_norm"] for each in metrics) > case.clip_grad
    found = {}
    for run, arguments in runs:
        trainer = by_deepspeed(case, **arguments)
        errors = {}
        for step, (a, b) in enumerate(zip(train(trainer, case), metrics, strict=True)):
            assert a.keys() == b.keys()
            errors |= {f"{name} of step {step}": abs(a[name] - b[name]) / max(abs(b[name]), 1e-2) for name in b}
        values = parameters_of(trainer)
        errors |= {name: float((values[name] - x).norm() / x.norm()) for name, x in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        found[run] = (worst, errors[worst])
    return found


def nonfinite_step(case: Case, stage: int) -> tuple[dict[str, float], bool, dict[str, float]]:
    """A step whose loss is infinite on one rank, whether it changed a parameter, and the step after it."""
    trainer = by_deepspeed(case, stage)
    inputs = inputs_of(trainer, case)
    trainer.step(inputs)
    before = parameters_of(trainer)
    broken = inputs
    if trainer.dp_group.rank() == 0:
        nowhere = torch.full_like(inputs[0].old_log_probs, -torch.inf)  # the loss is infinite, its gradient is not
        broken = [replace(inputs[0], ref_log_probs=nowhere), *inputs[1:]]
    metrics = trainer.step(broken)
    after = parameters_of(trainer)
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    return metrics, same, trainer.step(inputs)
