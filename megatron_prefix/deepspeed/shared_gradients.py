"""Gradients that megatron-core sums over tensor-parallel ranks after backward, which DeepSpeed does not know of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_prefix.collectives import all_reduce_sum


def sum_shared_gradients(model: Any) -> list[str]:
    """Complete the gradients of weights that every tensor-parallel rank holds whole and uses on a part of the input.

    Norms under sequence parallelism see a share of the rows, norms of queries and keys a share of the heads. The hook
    runs before a gradient is added to ``.grad``, and so before ZeRO-2 and 3 reduce it, for every micro-batch; sums are
    in fp32 at least. Ranks differentiate the same layers in the same order, which keeps their sums together.

    Args:
        model: megatron-core's, without wrappers.

    Returns:
        names of the parameters.

    Raises:
        ValueError: a parameter whose gradient megatron-core would average (``average_gradients_across_tp_domain``).
    """
    group = model.pg_collection.tp
    if group.size() == 1:
        return []
    found = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            raise ValueError(f"{name}: DeepSpeed would not average its gradient over tensor-parallel ranks; use tp=1")
        if not _is_shared(name, parameter, model.config):
            continue

        def whole(gradient: Tensor) -> Tensor:
            total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            return all_reduce_sum(total, group).to(gradient.dtype)

        parameter.register_hook(whole)
        found.append(name)
    return found


def _is_shared(name: str, parameter: Any, config: Any) -> bool:
    """megatron-core's own rule (distributed/finalize_model_grads.py)."""
    rows = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    return bool(rows or heads)
