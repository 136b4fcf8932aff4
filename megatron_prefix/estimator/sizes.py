"""What is chosen between: parallel sizes, activation recompute and the rows of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"bf16": 2, "fp32": 4}
"""Of one element, by the dtype of parameters and activations."""

MODULES = ("te", "local")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes, as megatron-core names them. Sequence parallelism is on wherever ``tp`` is above 1.

    Ranks are numbered as megatron-core's default order "tp-cp-ep-dp-pp" does: tensor-parallel ranks are neighbours,
    pipeline stages are furthest apart. Experts are not cut by tensor parallelism (expert tensor-parallel size 1):
    ``ep`` ranks, neighbours among the tp x cp x dp of a stage, hold all experts of a layer.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the job."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def stage_gpus(self) -> int:
        """GPUs of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def row_ranks(self) -> int:
        """GPUs that share the rows between layers: context parallelism, and sequence parallelism's tp."""
        return self.tp * self.cp


@dataclass(frozen=True)
class RunSettings:
    """What all choices have in common.

    Attributes:
        dtype: of parameters and activations, see `BYTES`.
        modules: whose linear layers and norms: Transformer Engine's ("te"), or megatron-core's own ("local", with
            torch's norms).
        distributed_optimizer: optimizer state sharded over data- and context-parallel ranks.
        chunk_rows: see `mcore.log_probs.response_log_probs`.

    Raises:
        ValueError: an unknown dtype or modules, or chunk_rows below 1.
    """

    dtype: str = "bf16"
    modules: str = "te"
    distributed_optimizer: bool = True
    chunk_rows: int = 4096

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")
        if self.modules not in MODULES:
            raise ValueError(f"modules must be one of {', '.join(MODULES)}, got {self.modules!r}")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {self.chunk_rows}")

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return BYTES[self.dtype]
