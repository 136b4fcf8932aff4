"""megatron-core's process groups as the ``mpu`` that `deepspeed.initialize` takes.

DeepSpeed asks an mpu by method names, and by which of them exist. The obvious adapter is wrong under context
parallelism (deepspeed 0.19.8): with ``get_sequence_parallel_*`` ZeRO-1 and 2 sum over context-parallel ranks where they
should take the mean, and ZeRO-3 shards over ``get_data_parallel_group`` and ignores those ranks, whose parameters then
differ. Here the group that gradients are reduced and states are sharded over is DP x CP under every name that is asked
for it, and no ``get_sequence_parallel_*`` exists. Sizes and ranks that only tell batch sizes stay those of DP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

Group = dist.ProcessGroup


@dataclass(frozen=True)
class MegatronMpu:
    """Without pipeline stages, so that model parallel is tensor parallel.

    Args:
        tp: tensor-parallel ranks.
        pp: pipeline stages; of size 1.
        dp: data-parallel ranks.
        dp_cp: data- and context-parallel ranks.
    """

    tp: Group
    pp: Group
    dp: Group
    dp_cp: Group

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> MegatronMpu:
        """Of a model's process groups.

        Raises:
            ValueError: there are pipeline stages.
        """
        if groups.pp.size() > 1:
            raise ValueError(
                f"DeepSpeed with pp={groups.pp.size()}: its ZeRO-2 and 3 know no pipeline, and its own PipelineModule "
                "passes no layouts of packs between stages; use pp=1 with DeepSpeed, or megatron-core's engine"
            )
        return cls(groups.tp, groups.pp, groups.dp, groups.dp_cp)

    def get_model_parallel_group(self) -> Group:
        return self.tp

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size()

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank()

    def get_tensor_model_parallel_group(self) -> Group:
        return self.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp.rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self.tp, 0)

    def get_pipeline_model_parallel_group(self) -> Group:
        return self.pp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pp.size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pp.rank()

    def get_data_parallel_group(self) -> Group:
        """DP x CP: ZeRO-3 shards over it."""
        return self.dp_cp

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.dp_cp)

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size()

    def get_data_parallel_rank(self) -> int:
        return self.dp.rank()

    def get_sequence_data_parallel_group(self) -> Group:
        return self.dp_cp

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.dp_cp.size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self.dp_cp.rank()
