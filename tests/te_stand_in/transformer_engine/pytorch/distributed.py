"""Activation recompute and random states, as far as megatron-core imports them."""

from contextlib import AbstractContextManager, nullcontext


class CudaRNGStatesTracker:
    """megatron-core derives from it; its own tracker is used."""


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Marks FP8 state: nothing to mark."""
    return nullcontext()
