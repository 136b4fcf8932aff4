"""A megatron-core model as a Hugging Face folder: the inverse of `import_weights`, from any parallel sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix.collectives import Group, all_gather, all_gather_object, barrier, broadcast, group_size
from megatron_prefix.mcore.stages import Model, unwrap, whole_model_parameters
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights import check_exportable, exported, write_hf_folder
from megatron_prefix.weights.names import FC1


def export_weights(
    model: Model, config: ModelConfig, out: str | Path, *, tokenizer_from: str | Path | None = None
) -> None:
    """Write the model as it is to a Hugging Face folder, in its own dtype; see `write_hf_folder`.

    Every rank calls this. One replica's ranks bring each weight together in turn, and the first rank writes it: beside
    the model there is one whole weight on a device, and one shard of the files on the first rank's host.

    Args:
        model: one module or the list of virtual pipeline chunks, wrapped in DDP or not.
        config: of the model.
        out: the folder to make, which rank 0 sees.
        tokenizer_from: a folder whose tokenizer files are copied, where it has them.

    Raises:
        ValueError: ``out`` exists and holds something (on rank 0), or a model that no Hugging Face family is.
    """
    check_exportable(config)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        weights = whole_weights(model)
        if dist.get_rank() == 0:
            dtype = next(iter(whole_model_parameters(model).values())).dtype
            named = (pair for name, weight in weights for pair in exported(name, weight, config).items())
            write_hf_folder(out, named, config, dtype=dtype, tokenizer_from=tokenizer_from)
        else:
            for _ in weights:
                pass
    barrier(dist.group.WORLD)


@torch.no_grad()
def whole_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in the whole model, put together from tensor-parallel ranks and pipeline stages.

    All ranks of a model-parallel group go through it together and get the same, one weight at a time.
    """
    parameters = whole_model_parameters(model)
    groups = unwrap(model if isinstance(model, torch.nn.Module) else model[0]).pg_collection
    like = next(iter(parameters.values()))
    shapes = {name: _whole_shape(parameter, groups.tp) for name, parameter in parameters.items()}
    done: set[str] = set()
    for stage, theirs in enumerate(all_gather_object(shapes, groups.pp)):
        for name, shape in theirs.items():
            if name in done:  # of tied embeddings, the first stage's
                continue
            done.add(name)
            mine = stage == groups.pp.rank()
            whole = _gathered(name, parameters[name], groups.tp) if mine else like.new_empty(shape)
            yield name, broadcast(whole.contiguous(), stage, groups.pp)


def _partition_dim(parameter: Any) -> int | None:
    """The dimension that tensor-parallel ranks share; None where each has the whole."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _whole_shape(parameter: Tensor, tp_group: Group) -> tuple[int, ...]:
    shape, dim = list(parameter.shape), _partition_dim(parameter)
    if dim is not None:
        shape[dim] *= group_size(tp_group)
    return tuple(shape)


def _gathered(name: str, parameter: Tensor, tp_group: Group) -> Tensor:
    dim = _partition_dim(parameter)
    if dim is None or group_size(tp_group) == 1:
        return parameter.detach()
    parts = all_gather(parameter.detach(), tp_group)
    if not name.endswith(FC1):
        return torch.cat(parts, dim)
    # Every rank has its rows of the gate above its rows of the up projection.
    gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
    return torch.cat([*gates, *ups])
