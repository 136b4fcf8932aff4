"""Loading the state of megatron-core's optimizers, with what torch's Adam needs besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _torch_adams(optimizer: Any) -> Iterator[tuple[Any, torch.optim.Adam]]:
    """(DistributedOptimizer, its torch Adam): what runs where neither Transformer Engine nor apex is installed."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.Adam):
            yield part, inner


def make_adam_state(optimizer: Any) -> None:
    """Give a fresh torch Adam its state tensors: DistributedOptimizer reads their step before it loads into them."""
    for _, inner in _torch_adams(optimizer):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_optimizer(optimizer: Any, state: Any) -> None:
    """Load, with two corrections for torch Adam in DistributedOptimizer.

    It sets Adam's step first and then looks for it among the loaded tensors, where it is not; and it sets one step
    tensor for all parameters, which each of them would then advance.
    """
    name = "_set_main_param_and_optimizer_states"
    adams = list(_torch_adams(optimizer))
    for part, inner in adams:

        def with_step(model_param: Any, tensors: dict[str, Any], part: Any = part, inner: Any = inner) -> None:
            group, order = part.model_param_group_index_map[model_param]
            main_param = inner.param_groups[group]["params"][order]
            getattr(type(part), name)(part, model_param, tensors | {"step": inner.state[main_param]["step"]})

        setattr(part, name, with_step)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part, _ in adams:
            delattr(part, name)
    for _, inner in adams:
        for values in inner.state.values():
            values["step"] = values["step"].clone()
