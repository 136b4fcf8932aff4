"""The states of a rank's random generators in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_KEY = "rng_state"


def sharded_rng_state() -> ShardedObject:
    """This rank's torch generators and megatron-core's model-parallel ones, as its own entry of a checkpoint."""
    state = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return _entry(state)


def load_rng_state(weights: Path) -> bool:
    """Set the generators as they were saved; False, and nothing changed, where other parallel sizes saved them.

    Args:
        weights: folder of megatron-core's files in a checkpoint.
    """
    entry = _entry(None)
    if entry.unique_key not in load_sharded_metadata(str(weights)):
        return False
    state: dict[str, Any] = dist_checkpointing.load({_KEY: entry}, str(weights))[_KEY]
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    return True


def _entry(state: Any) -> ShardedObject:
    """Every rank has a place of its own: (pipeline stage, tensor-parallel rank, data- and context-parallel rank)."""
    groups = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    sizes, ranks = tuple(dist.get_world_size(g) for g in groups), tuple(dist.get_rank(g) for g in groups)
    return ShardedObject(_KEY, state, sizes, ranks, replica_id=0)
