"""Run DeepSpeed on the CPU without compiling anything, for tests and small experiments."""

from __future__ import annotations

import deepspeed.ops
import torch

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def use_plain_gloo() -> str:
    """Turn off DeepSpeed's own CPU collectives, C++ that a new machine compiles for minutes; one-way, as `run_on_cpu`.

    Returns:
        what was done, for the user.

    Raises:
        RuntimeError: there is a GPU, where nothing of this is needed.
    """
    if torch.cuda.is_available():
        raise RuntimeError("use_plain_gloo() is for machines without a GPU; DeepSpeed runs on this one's as it is")
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    return f"DeepSpeed on the CPU: collectives by gloo, its own ({SHARED_MEMORY_OP}) would have to be compiled"
