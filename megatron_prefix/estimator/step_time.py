"""Seconds of a training step, part by part.

Compute is `CostModel.of_device`: FLOPs of the matrix products over half of the data sheet's speed, merging, launches.
A pipeline of p stages loses the time in which it fills and drains, (p - 1) / v micro-batches, here the largest ones,
with v model chunks a stage (arXiv 2104.04473, section 2.2; for equal micro-batches `pipeline_plan.even_bubble`), and
the time in which other stages wait for the last one, which has the output layer. Communication counts where nothing
hides it: a ring of context parallelism beside attention, gradients beside the last backward.
Nothing here was measured on a GPU. Not in it: slower products of small shapes, stragglers, uneven experts, the sampler,
and the forward passes for old and reference log-probs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_prefix.cost_model import CostModel
from megatron_prefix.estimator.cluster import Cluster
from megatron_prefix.estimator.communication import Moved
from megatron_prefix.estimator.loads import RankLoad
from megatron_prefix.estimator.memory import Parameters
from megatron_prefix.estimator.model import PlannedModel
from megatron_prefix.estimator.saved_tensors import FP32
from megatron_prefix.estimator.sizes import RunSettings, Sizes
from megatron_prefix.hardware import Device
from megatron_prefix.workload import Workload

FORWARD_SHARE = 1 / 3
"""Of a step's compute: the forward; backward does twice its work."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the data-parallel rank with the most work. All but ``bubble`` are of the mean stage.

    Attributes:
        compute: forward and backward.
        recompute: forward again: of layers, attention or logits.
        bubble: waiting for other pipeline stages.
        tensor, context, pipeline, expert, gradients: communication that nothing hides.
        optimizer: its memory traffic.
    """

    compute: float
    recompute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    expert: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.recompute + self.bubble + self.communication + self.optimizer

    @property
    def communication(self) -> float:
        """All communication that nothing hides."""
        return self.tensor + self.context + self.pipeline + self.expert + self.gradients

    def to_dict(self) -> dict[str, Any]:
        """Seconds by part, and ``total``."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class _StageTime:
    """Seconds of work on one stage that holds an even share of the layers, and on the last one's output layer."""

    layers: float
    attention: float
    head: float

    @classmethod
    def of(cls, cost: CostModel, work: Workload, microbatches: int, stages: int) -> _StageTime:
        overhead = microbatches * (cost.microbatch + cost.level * work.levels)
        rows = cost.cost(replace(work, target_rows=0, levels=0))
        return cls((rows + overhead) / stages, cost.pair * work.pairs / stages, cost.target_row * work.target_rows)


def estimate_step(
    model: PlannedModel,
    sizes: Sizes,
    cluster: Cluster,
    load: RankLoad,
    settings: RunSettings,
    recompute: str,
    moved: dict[str, Moved],
) -> StepTime:
    """The modelled step of one choice.

    Args:
        model: to be trained.
        sizes: parallel sizes.
        cluster: to train on.
        load: micro-batches of the data-parallel rank with the most work.
        settings: dtype, optimizer, chunk_rows.
        recompute: "none", "selective" or "full".
        moved: `Communication.by_kind` of the same.
    """
    cost = device_cost(model, cluster.device, sizes.row_ranks)
    speed = settings.element / 2  # fp32 has half the tensor-core speed of bf16 (TF32)
    all_work = _StageTime.of(cost, load.work, load.microbatches, sizes.pp)
    largest = _StageTime.of(cost, load.largest, 1, sizes.pp)
    compute = all_work.layers + all_work.head / sizes.pp
    again = _recomputed(all_work, load, settings, recompute, sizes)
    factor = (compute + again) / compute
    # The last stage has the output layer beside its layers, and the others wait for it.
    waiting = all_work.head * (1 - 1 / sizes.pp)
    filling = (sizes.pp - 1) / sizes.vpp * (largest.layers + largest.head / sizes.pp) * factor
    last_backward = (1 - FORWARD_SHARE) * (largest.layers + largest.head / sizes.pp) * speed
    reduced = moved["gradients"].seconds
    # The reduction is what may overlap; weights are gathered when it, and the optimizer, are done.
    hidden = min(last_backward, reduced * _reduced_share(settings))
    return StepTime(
        compute=compute * speed,
        recompute=again * speed,
        bubble=(waiting + filling) * speed,
        tensor=moved["tensor"].seconds,
        context=max(0.0, moved["context"].seconds - all_work.attention * speed),
        pipeline=moved["pipeline"].seconds if sizes.vpp == 1 else 0.0,
        expert=moved["expert"].seconds,
        gradients=reduced - hidden,
        optimizer=_optimizer_seconds(model, sizes, cluster, settings),
    )


@lru_cache(maxsize=256)
def device_cost(model: PlannedModel, device: Device, ranks: int = 1) -> CostModel:
    """`CostModel.of_device` of a whole model on ``ranks`` tensor- and context-parallel ranks."""
    return CostModel.of_device(model.active_config, device, model_ranks=ranks)


def bubble_share(step: StepTime) -> float:
    """The share of the pipeline's own time in which a stage waits."""
    busy = step.compute + step.recompute
    return step.bubble / (busy + step.bubble)


def _recomputed(work: _StageTime, load: RankLoad, settings: RunSettings, recompute: str, sizes: Sizes) -> float:
    """Seconds of forward work that runs a second time, of the mean stage."""
    again = {"none": 0.0, "selective": work.attention, "full": work.layers}[recompute]
    if load.most_targets / sizes.cp > settings.chunk_rows:
        again += work.head / sizes.pp
    return again * FORWARD_SHARE


def _reduced_share(settings: RunSettings) -> float:
    """Of the traffic of gradients and weights: what is done while backward still runs."""
    return FP32 / (FP32 + settings.element) if settings.distributed_optimizer else 1.0


def _optimizer_seconds(model: PlannedModel, sizes: Sizes, cluster: Cluster, settings: RunSettings) -> float:
    """Reading gradients, weights and two moments, writing all but gradients: limited by memory bandwidth."""
    held = Parameters.of(model, sizes, True, sizes.pp == 1)
    shards = (sizes.dp * sizes.cp, sizes.stage_gpus / sizes.ep) if settings.distributed_optimizer else (1, 1)
    parameters = held.dense / shards[0] + held.expert / shards[1]
    return parameters * (7 * FP32 + settings.element) / cluster.device.memory_bandwidth
