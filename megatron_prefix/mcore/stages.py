"""Stages of a model without their wrappers, and their parameters by the names that they have in the whole model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prefix.collectives import all_gather_object, broadcast

Model = torch.nn.Module | Sequence[torch.nn.Module]

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(?=\.)")
_FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
"""Norms that Transformer Engine keeps in the linear layer behind them, and megatron-core's own layers before it."""


def whole_model_parameters(model: Model) -> dict[str, Any]:
    """Every parameter of this rank's model chunks by its name in the model without stages.

    Layers count from the first stage on. Where embeddings are tied, a last stage's copy has the name of the original.
    Norms inside Transformer Engine's linear layers have the names of megatron-core's own.

    Args:
        model: one module or the list of virtual pipeline chunks, wrapped in DDP or not.

    Returns:
        torch.nn.Parameter by name; with the attributes that megatron-core adds.
    """
    found: dict[str, Any] = {}
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        inner = unwrap(chunk)
        for name, parameter in inner.named_parameters():
            layer = _LAYER.match(name)
            if layer is not None:
                number = inner.decoder.layers[int(layer[2])].layer_number - 1
                name = f"{layer[1]}{number}{name[layer.end() :]}"
                for fused, own in _FUSED_NORMS.items():
                    name = name.replace(fused, own)
            if name == "output_layer.weight" and inner.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            found[name] = parameter
    return found


@torch.no_grad()
def copy_parameters(source: Model, target: Model) -> None:
    """Give ``target`` the values of ``source``, parameter by parameter, cast to its dtype.

    ``source`` may be stages of a pipeline, whose ranks then all call this; ``target`` may have parameters of any stage.

    Raises:
        ValueError: ``target`` has a parameter that ``source`` lacks.
    """
    values, targets = whole_model_parameters(source), whole_model_parameters(target)
    first = source if isinstance(source, torch.nn.Module) else source[0]
    group = unwrap(first).pg_collection.pp
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}
    like = next(iter(values.values()))
    done: set[str] = set()
    for stage, theirs in enumerate(all_gather_object(shapes, group)):
        for name, (shape, dtype) in theirs.items():
            if name in done:  # of tied embeddings, the first stage's
                continue
            done.add(name)
            held = values.get(name)
            value = like.new_empty(shape, dtype=dtype) if held is None else held.detach()
            value = broadcast(value, stage, group)
            if name in targets:
                targets[name].copy_(value)
    missing = sorted(targets.keys() - done)
    if missing:
        raise ValueError(f"the model to copy from has no parameter {missing[0]}; copy between models of one config")


def unwrap(model: torch.nn.Module) -> Any:
    """The innermost module of DDP, Float16Module and the like.

    Their hooks sit on submodules and parameters, so calling the inner model keeps them; their casts of outputs to fp32
    are not wanted between the hidden states and the output layer.
    """
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module  # type: ignore[assignment]
    return model
