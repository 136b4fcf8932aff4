"""Weights of another format into a checkpoint folder."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_prefix.mcore.checkpoint import save_checkpoint
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.parallel import current_sizes
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights import WeightSource, converted


def import_weights(
    source: WeightSource,
    out: str | Path,
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    tokenizer: bool = True,
    advance: Callable[[str], None] = lambda note: None,
) -> bool:
    """Write `source` as a checkpoint folder at `out`, in `dtype`; True when a tokenizer was written with it.

    config: the source's, or `weights.padded_config` of it.
    advance: called after every tensor, with a word on what comes next.
    Runs in one process: a checkpoint is cut for tensor parallelism when it is loaded.
    Raises ValueError as `save_checkpoint`, and for a tokenizer that cannot be written exactly; nothing is written then.
    """
    sizes = current_sizes()
    if (sizes.tp, sizes.pp, sizes.dp) != (1, 1, 1):
        raise ValueError(f"weights are imported by one process, not under {sizes}")
    with tempfile.TemporaryDirectory() as folder:
        with_tokenizer = tokenizer and source.write_tokenizer(Path(folder))
        model = build_model(config, dtype=dtype, overrides={"perform_initialization": False})
        weights = dict(model.named_parameters())
        for name, tensor in converted(source, config):
            weights.pop(name).data.copy_(tensor)
            advance("" if weights else "saving")
        assert not weights, f"{sorted(weights)} not filled"
        save_checkpoint(out, model, config, tokenizer_from=folder)
    return with_tokenizer
