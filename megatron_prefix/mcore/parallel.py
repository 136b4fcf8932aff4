"""Process groups for megatron-core: sizes, start and end.

Nothing here reads the environment: rank and world size come as arguments (the CLI takes them from torchrun), or from a
process group that already runs.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_prefix.collectives import group_of_this_rank


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of the parallel dimensions: tensor, pipeline, context, virtual pipeline stages per rank, data.

    `dp=None` means "what is left"; `resolve` fills it in. `cp_a2a` is the size of the inner groups of cp_comm_type
    "a2a+p2p", None without them.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    dp: int | None = None
    cp_a2a: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "vpp", "dp", "cp_a2a"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.vpp is not None and self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp > 1; got pp=1: leave vpp out or raise pp")
        if self.cp_a2a is not None and self.cp % self.cp_a2a:
            raise ValueError(f"cp_a2a={self.cp_a2a} must divide cp={self.cp}: choose a divisor or leave it out")

    @property
    def cp_levels(self) -> list[int] | None:
        """megatron-core's hierarchical_context_parallel_sizes: [a2a size, p2p size], None without cp_a2a."""
        return None if self.cp_a2a is None else [self.cp_a2a, self.cp // self.cp_a2a]

    def resolve(self, world_size: int) -> "ParallelSizes":
        """These sizes with `dp` filled in for `world_size` processes.

        Raises ValueError when tp * pp * cp (* dp, where given) does not divide (is not) the world size.
        """
        model = self.tp * self.pp * self.cp
        shown = f"tp={self.tp} * pp={self.pp} * cp={self.cp} = {model}"
        if world_size < 1 or world_size % model:
            raise ValueError(
                f"{shown} does not divide the world size {world_size}: start a multiple of {model} processes "
                "or change the sizes"
            )
        dp = world_size // model
        if self.dp is not None and self.dp != dp:
            raise ValueError(
                f"{shown} with dp={self.dp} needs {model * self.dp} processes, but the world size is {world_size}: "
                f"start {model * self.dp} processes, or set dp={dp}"
            )
        return replace(self, dp=dp)


def initialize(
    sizes: ParallelSizes,
    *,
    seed: int = 1234,
    timeout_s: float = 600,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
    init_method: str | None = None,
) -> ParallelSizes:
    """Start torch.distributed (where it does not run yet), megatron-core's groups and its seeds; return resolved sizes.

    rank, world_size: this process in the job; both None means a single process, or the process group that already runs.
    local_rank: the GPU of this process (default: rank modulo the number of GPUs); unused on the CPU, with gloo.
    init_method: a torch.distributed init URL; default "env://" (torchrun's rendezvous) for more than one process, and
        an in-memory store for one.
    seed: as in Megatron-LM, pipeline stage p draws from seed + 100 * p; tensor-parallel ranks draw alike outside and
        differently inside model-parallel regions.
    timeout_s: seconds after which a collective that hangs fails.

    Raises ValueError for sizes that do not fit the world size, before any group is made; RuntimeError when
    megatron-core is already initialized.
    """
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("megatron-core's process groups already exist: call destroy() before initialize()")
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size or neither, got rank={rank} and world_size={world_size}")
    running = dist.is_initialized()
    if running:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    elif rank is None or world_size is None:
        rank, world_size = 0, 1
    resolved = sizes.resolve(world_size)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count() if local_rank is None else local_rank)
    if not running:
        _start_process_group("nccl" if on_gpu else "gloo", rank, world_size, timeout_s, init_method)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=resolved.tp,
        pipeline_model_parallel_size=resolved.pp,
        virtual_pipeline_model_parallel_size=resolved.vpp,
        context_parallel_size=resolved.cp,
        hierarchical_context_parallel_sizes=resolved.cp_levels,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    seed_everything(seed)
    return resolved


def _start_process_group(comm: str, rank: int, world_size: int, timeout_s: float, init_method: str | None) -> None:
    timeout = timedelta(seconds=timeout_s)
    if world_size == 1 and init_method is None:
        # Needs neither a free port nor MASTER_ADDR.
        dist.init_process_group(comm, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(
            comm, init_method=init_method or "env://", rank=rank, world_size=world_size, timeout=timeout
        )


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's model-parallel generators; stage p of the pipeline draws from seed + 100 * p."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def current_sizes() -> ParallelSizes:
    """The sizes megatron-core runs with. Raises RuntimeError before `initialize`."""
    if not parallel_state.model_parallel_is_initialized():
        raise RuntimeError(
            "megatron-core has no process groups yet: call megatron_prefix.mcore.parallel.initialize first"
        )
    return ParallelSizes(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
        vpp=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        dp=parallel_state.get_data_parallel_world_size(),
    )


def whole_on_every_rank() -> dict[str, Any]:
    """Arguments of `build_model` for a model that has all layers and whole packs on every rank, whatever cp and pp are.

    Every process calls it: it makes groups.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = groups.pp = groups.embd = groups.pos_embd = group_of_this_rank()
    sizes = {
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
    }
    return {"pg_collection": groups, "overrides": sizes}


def destroy() -> None:
    """End megatron-core's groups and torch.distributed; does nothing where they do not run."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
