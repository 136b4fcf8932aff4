"""What several megatron-core tests share: a tiny model, plain training steps on it, full logits."""

import multiprocessing
import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.parallel import ParallelSizes, initialize
from megatron_prefix.model_config import ModelConfig

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
OPTIMIZERS = ("plain", "distributed", "distributed_overlap")


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters."""
    return ModelConfig(**(SIZES | changes))


def start(**sizes: int) -> None:
    """Patch for the CPU and start megatron-core's groups inside a rank of run_distributed."""
    warnings.filterwarnings("ignore", module="megatron")
    # megatron-core's checkpoint writer starts a helper process, which Python refuses to daemonic ranks.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    run_on_cpu()
    initialize(ParallelSizes(**sizes))


def tokens(rows: int = 2, length: int = 24, seed: int = 0, vocab_size: int = 64) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def full_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocabulary], gathered over tensor parallel ranks."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return gather_from_tensor_model_parallel_region(model(ids, positions, None))


class Trainer:
    """A model in megatron-core's DDP with an optimizer, trained by next-token loss on random tokens."""

    def __init__(self, model: torch.nn.Module, kind: str) -> None:
        distributed, overlap = kind != "plain", kind == "distributed_overlap"
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=overlap,
                                          overlap_param_gather=overlap),
            model,
        )  # fmt: skip
        self.ddp.broadcast_params()
        dtype = next(model.parameters()).dtype
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.0,
                clip_grad=1.0,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=distributed,
                overlap_param_gather=overlap,
            ),
            [self.ddp],
        )

    def step(self, ids: torch.Tensor) -> float:
        """One optimizer step; returns the loss."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        logits = full_logits(self.ddp, ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
        loss.backward()
        finalize_model_grads([self.ddp])
        updated, _, _ = self.optimizer.step()
        assert updated
        return loss.item()
