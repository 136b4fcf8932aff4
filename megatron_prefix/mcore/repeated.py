"""The end-to-end oracle: plain megatron-core on repeated prefixes, with its own attention and its own logits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.mcore.log_probs import check_token_ids, unwrap
from megatron_prefix.packing import NO_TARGET, Pack


def repeated_log_probs(model: torch.nn.Module, pack: Pack, *, temperature: float = 1.0) -> Tensor:
    """Response log-probs of a pack of repeated sequences under a model with megatron-core's plain layer spec.

    Each sequence is one forward pass [1, length] with a causal mask, and the log-probs are torch's log-softmax of the
    model's own gathered logits. (The model's cross-entropy would do, but it lowers fp64 to fp32.) Nothing of this
    package's attention or log-prob code takes part.

    Args:
        model: the whole model (no pipeline stages), wrapped or not.
        pack: from ``pack_groups(..., repeated=True)``.
        temperature: logits are divided by it.

    Returns:
        fp32 [N] (fp64 for an fp64 model), in the order of ``pack.response_rows``.

    Raises:
        ValueError: a pack whose prefixes are shared, or a token id outside the vocabulary.
    """
    if any(parent != -1 for parent in pack.layout.parents):
        raise ValueError("plain megatron-core cannot share prefixes; build the pack with repeated=True")
    inner = unwrap(model)
    check_token_ids(pack, inner.vocab_size)
    device = next(inner.parameters()).device
    multiple = inner.config.tensor_model_parallel_size if inner.config.sequence_parallel else 1
    parts = []
    for start, end in zip(pack.layout.starts, pack.layout.starts[1:], strict=False):
        length = -(-(end - start) // multiple) * multiple
        tokens = torch.zeros(length, dtype=torch.long)
        tokens[: end - start] = pack.tokens[start:end]
        # Padding stands behind every real row, so the causal mask hides it.
        logits = model(
            input_ids=tokens.to(device).unsqueeze(0),
            position_ids=torch.arange(length, device=device).unsqueeze(0),
            attention_mask=None,
            runtime_gather_output=True,
        )
        targets = pack.targets[start:end].to(device)
        wanted = torch.nonzero(targets != NO_TARGET).flatten()
        rows = logits[0].index_select(0, wanted)
        log_probs = (rows.to(torch.promote_types(rows.dtype, torch.float32)) / temperature).log_softmax(-1)
        parts.append(log_probs.gather(1, targets[wanted].unsqueeze(1)).squeeze(1))
    return torch.cat(parts)
