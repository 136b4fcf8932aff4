"""The end-to-end oracle: plain megatron-core on repeated prefixes, with its own attention and its own logits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.parallel import whole_on_every_rank
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.tokens import check_token_ids
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import NO_TARGET, Pack

ROWS_PER_FORWARD = 1024
"""Rows of one batch of the oracle: its attention holds [heads, length, length] scores for every sequence."""


def build_plain_model(config: ModelConfig, **settings: Any) -> GPTModel:
    """`build_model` with megatron-core's local layer spec, to run repeated prefixes.

    Its local attention has no context parallelism, so under --cp every rank holds whole sequences and computes the same
    thing; `PolicyTrainer` then counts each rank's gradients as a share. Under --pp every rank holds all layers.
    """
    return build_model(config, **whole_on_every_rank(), **settings)


def repeated_log_probs(
    model: torch.nn.Module, pack: Pack, *, temperature: float = 1.0, with_entropy: bool = False
) -> Any:
    """Response log-probs of a pack of repeated sequences under a model with megatron-core's plain layer spec.

    Neighbouring sequences of one length are one batch [b, length] with a causal mask, and the log-probs are torch's
    log-softmax of the model's own gathered logits. (The model's cross-entropy would do, but it lowers fp64 to fp32.)
    Nothing of this package's attention or log-prob code takes part.

    Args:
        model: the whole model (no pipeline stages), wrapped or not.
        pack: from ``pack_groups(..., repeated=True)``.
        temperature: logits are divided by it.
        with_entropy: also return the entropy of every distribution.

    Returns:
        fp32 [N] (fp64 for an fp64 model), in the order of ``pack.response_rows``; with_entropy: (log_probs, entropy).

    Raises:
        ValueError: a pack whose prefixes are shared, or a token id outside the vocabulary.
    """
    if any(parent != -1 for parent in pack.layout.parents):
        raise ValueError("plain megatron-core cannot share prefixes; build the pack with repeated=True")
    inner = unwrap(model)
    check_token_ids(pack.tokens, pack.targets, inner.vocab_size)
    device = next(inner.parameters()).device
    multiple = inner.config.tensor_model_parallel_size if inner.config.sequence_parallel else 1
    parts, entropies = [], []
    for start, batch, length in _batches(pack):
        rows = slice(start, start + batch * length)
        padded = -(-length // multiple) * multiple
        # Padding stands behind every real row, so the causal mask hides it.
        tokens = torch.zeros(batch, padded, dtype=torch.long)
        tokens[:, :length] = pack.tokens[rows].view(batch, length)
        logits = model(
            input_ids=tokens.to(device),
            position_ids=torch.arange(padded, device=device).expand(batch, -1),
            attention_mask=None,
            runtime_gather_output=True,
        )
        targets = pack.targets[rows].to(device)
        wanted = torch.nonzero(targets != NO_TARGET).flatten()
        response = logits[:, :length].flatten(0, 1).index_select(0, wanted)
        scores = response.to(torch.promote_types(response.dtype, torch.float32)) / temperature
        distribution = scores.log_softmax(-1)
        parts.append(distribution.gather(1, targets[wanted].unsqueeze(1)).squeeze(1))
        if with_entropy:
            entropies.append(-(distribution.exp() * distribution).sum(-1))
    return (torch.cat(parts), torch.cat(entropies)) if with_entropy else torch.cat(parts)


def _batches(pack: Pack) -> Iterator[tuple[int, int, int]]:
    """(first row, sequences, length) of each forward pass: at most `ROWS_PER_FORWARD` rows, at least one sequence."""
    row = 0
    for length, group in groupby(pack.layout.lengths):
        left = len(list(group))
        while left:
            batch = min(left, max(1, ROWS_PER_FORWARD // length))
            yield row, batch, length
            row += batch * length
            left -= batch
