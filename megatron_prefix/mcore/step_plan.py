"""What a step of packs will do in the pipeline of a megatron-core config: order, bubble, live prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prefix.balanced_plan import PipelineShape
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.packing import Pack
from megatron_prefix.pipeline_order import Turn, in_turns, order_jobs
from megatron_prefix.pipeline_plan import (
    PipelineJob,
    PipelineRun,
    num_idle_jobs,
    pipeline_jobs,
    plan_pipeline,
)


def step_planner(config: Any, dp_size: int, cost: CostModel, max_tokens: int | None) -> StepPlanner:
    """What packs the steps of a model with megatron-core's ``config``; ``max_tokens`` is most rows of a micro-batch."""
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    pipeline = PipelineShape(stages, chunks, config.microbatch_group_size_per_vp_stage if chunks else None)
    return StepPlanner(cost, dp_size, max_tokens, pipeline)


def plan_step(packs: Sequence[Pack], config: Any, *, max_live_prefixes: int | None = None) -> PipelineRun:
    """The step of these packs, forward and backward, in ``config``'s pipeline, with modelled times.

    Args:
        packs: as the data iterator would yield them.
        config: megatron-core's, of the model.
        max_live_prefixes: see `mcore.schedule.forward_backward_prefix_groups`.
    """
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    jobs = [job for _, job in ordered_jobs(packs, config, stages, max_live_prefixes)]
    return plan_pipeline(jobs, stages, num_chunks=chunks, chunk_group=config.microbatch_group_size_per_vp_stage)


def ordered_jobs(
    packs: Sequence[Pack], config: Any, num_stages: int, max_live: int | None, forward_only: bool = False
) -> list[tuple[Turn, PipelineJob]]:
    """The order of a step's micro-batches, idle ones behind: the jobs of each as they come, and its work."""
    jobs = pipeline_jobs(packs, pair_cost=1 / (6 * config.hidden_size), forward_only=forward_only)
    chunks, group = config.virtual_pipeline_model_parallel_size, config.microbatch_group_size_per_vp_stage
    turns = [(n, n) for n in range(len(jobs))]
    if not forward_only:
        turns = order_jobs(jobs, num_stages, num_chunks=chunks, chunk_group=group, max_live_prefixes=max_live)
    idle = [PipelineJob("idle", 0.0)] * num_idle_jobs(len(turns), num_stages, chunks, group)
    turns_of_idle = [(n, n) for n in range(len(jobs), len(jobs) + len(idle))]
    return [*zip(turns, in_turns(jobs, turns), strict=True), *zip(turns_of_idle, idle, strict=True)]
