"""Log-probs of response tokens: only response rows reach the output layer, in chunks, over a sharded vocabulary.

Shapes: T rows of the pack (padding included), N response rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.parallel_state import get_hierarchical_context_parallel_groups
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_prefix.collectives import (
    Group,
    Traffic,
    all_gather_uneven,
    all_reduce_max,
    all_reduce_sum,
    group_rank,
    group_size,
)
from megatron_prefix.context_parallel.attention import CpShare
from megatron_prefix.mcore.core_attention import PrefixCoreAttention, attention_layers
from megatron_prefix.mcore.packed import ContextParallel, PrefixPackedSeqParams
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.tokens import StageIds, ids_on_this_rank
from megatron_prefix.packing import NO_TARGET, Pack

OTHER_MIXERS = ("MambaMixer", "GatedDeltaNet")
"""Layers of hybrid models, beside attention, in which a row reads the rows before it."""


def response_log_probs(
    model: torch.nn.Module,
    pack: Pack,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int = 4096,
    cp_placement: str = "auto",
    cp_traffic: Traffic | None = None,
    full: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of a pack's response tokens under a model with prefix-grouped attention.

    Works for `GPTModel` and `HybridModel`, wrapped or not (DDP, Float16Module). The vocabulary stays sharded over
    tensor-parallel ranks. Logits exist for at most ``chunk_rows`` rows at a time: with more response rows than that,
    each chunk's logits are computed again in backward.

    Args:
        model: the model, or this pipeline stage of it.
        pack: from `pack_groups`. Token ids are read on the first and the last stage, where tensor-parallel rank 0 gives
            them to the others: every other rank's pack can be without, see `mcore.tokens`.
        temperature: logits are divided by it, as in sampling.
        with_entropy: also return the entropy of each row's distribution.
        chunk_rows: most rows whose logits exist at once.
        cp_placement: where rows go under context parallelism: "dual_chunk_swap", "branch", or "auto" by predicted cost.
        cp_traffic: counts what attention moves between context-parallel ranks.
        full: under context parallelism, give every rank the whole vector (N numbers travel, no hidden state and no
            logit does); else only the rank's own rows, in order. In backward each rank takes the gradient of its own
            rows, so gradients of parameters must be summed over context-parallel ranks, as megatron-core's DDP does.

    Returns:
        fp32 [N] (fp64 for an fp64 model), ordered by group, response, token, equal on all tensor-parallel ranks; with
        ``with_entropy`` a pair of such tensors, in nats. A stage before the last returns its hidden states instead.

    Raises:
        ValueError: a temperature or chunk size that is not positive, a token id outside the vocabulary or none where
            they are read, an unknown placement, context-parallel ranks with different packs, or a model with layers
            that would ignore the layout.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    inner = unwrap(model)
    device = next(inner.parameters()).device
    _check(inner, pack)
    ids = ids_on_this_rank(pack, inner)
    packed = _packed_params(inner, pack, ids, device, cp_placement, cp_traffic)
    hidden = _hidden_states(inner, ids, packed, device)
    if not inner.post_process:
        return hidden
    assert ids.targets is not None
    targets = packed.take(ids.targets)
    local = torch.nonzero(targets != NO_TARGET).flatten()
    count = len(local)
    if not count:  # a rank without a response row still takes part in the output layer's collectives and gradients
        local, targets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    rows = _response_hidden_states(inner, hidden, local.to(device, non_blocking=True))
    targets = targets[local].to(device, non_blocking=True)
    head = _OutputHead(inner, temperature, with_entropy)
    chunks = list(zip(rows.split(chunk_rows), targets.split(chunk_rows), strict=True))
    recompute = len(chunks) > 1 and torch.is_grad_enabled()
    parts = [checkpoint(head, *chunk, use_reentrant=False) if recompute else head(*chunk) for chunk in chunks]
    results = [torch.cat(column)[:count] for column in zip(*parts, strict=True)]
    if full and packed.share is not None:
        numbers = _response_numbers(pack, packed.share)
        results = [_GatherResponses.apply(x, numbers, packed.share) for x in results[: 1 + with_entropy]]
    return (results[0], results[1]) if with_entropy else results[0]


def prefix_hidden_states(model: torch.nn.Module, pack: Pack) -> Tensor:
    """Run the prefix of a split group through this stage: every layer's keys go to ``pack.prefix.cache``.

    Returns:
        the stage's hidden states [T, 1, hidden]. On the last stage, where the last layer computes keys and values only,
        an empty tensor [0, 1, hidden]; its graph is that of the keys.

    Raises:
        ValueError: as `response_log_probs`.
    """
    inner = unwrap(model)
    device = next(inner.parameters()).device
    _check(inner, pack)
    ids = ids_on_this_rank(pack, inner, with_targets=False)
    packed = _packed_params(inner, pack, ids, device, "dual_chunk_swap", None)
    if inner.post_process:
        packed.keys_only_layer = max(attention_layer_numbers(inner))
    return _hidden_states(inner, ids, packed, device)


def attention_layer_numbers(model: torch.nn.Module) -> list[int]:
    """Numbers of the layers with prefix-grouped attention in this model chunk."""
    return [module.layer_number for module in model.modules() if isinstance(module, PrefixCoreAttention)]


def _check(inner: Any, pack: Pack) -> None:
    """Raises ValueError for what comes to light before any work."""
    require_prefix_attention(inner)
    if pack.prefix is not None and pack.prefix.cache is None:
        raise ValueError(
            "this pack is part of a split group, whose prefix has no keys here; run the step's packs by "
            "forward_backward_prefix_groups"
        )


def _packed_params(
    inner: Any, pack: Pack, ids: StageIds, device: torch.device, cp_placement: str, cp_traffic: Traffic | None
) -> PrefixPackedSeqParams:
    """The layout of a pack for every layer."""
    packed = PrefixPackedSeqParams.build(
        pack.layout,
        device,
        multiple_of=inner.config.tensor_model_parallel_size if inner.config.sequence_parallel else 1,
        # Every part expects the prefix in dual chunks, which both placements cut a segment with children into.
        cp=_context_parallel(inner, "dual_chunk_swap" if pack.is_prefix else cp_placement, cp_traffic),
        content=ids.checksum,
    )
    packed.prefix_cache = None if pack.prefix is None else pack.prefix.cache
    return packed


def _context_parallel(inner: Any, placement: str, traffic: Traffic | None) -> ContextParallel | None:
    """None on one rank."""
    if group_size(inner.pg_collection.cp) == 1:
        return None
    groups = get_hierarchical_context_parallel_groups(check_initialized=False) or [None, None]
    layers = attention_layers(inner.config, group_size(groups[0]) if groups[0] is not None else None)
    return ContextParallel(inner.pg_collection.cp, layers, placement, groups[0], groups[1], traffic)


def _response_numbers(pack: Pack, share: CpShare) -> list[Tensor]:
    """For each context-parallel rank the numbers (0 to N - 1) of the response rows that it owns, in its order."""
    response = torch.zeros(pack.layout.num_rows, dtype=torch.bool)
    response[pack.response_rows] = True
    number = response.cumsum(0) - 1
    owned = [torch.tensor(share.plan.rows(rank), dtype=torch.long) for rank in range(share.plan.cp_size)]
    return [number[rows][response[rows]].to(share.device) for rows in owned]


class _GatherResponses(torch.autograd.Function):
    """[rows of this rank] -> [N] on every rank; backward takes the gradient of the rank's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: list[Tensor], share: CpShare) -> Tensor:
        ctx.mine = numbers[share.rank]
        parts = all_gather_uneven(x, [len(each) for each in numbers], share.group)
        whole = x.new_empty(sum(len(each) for each in numbers))
        for each, part in zip(numbers, parts, strict=True):
            whole[each] = part
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.mine], None, None


def require_prefix_attention(inner: Any) -> None:
    """Raises ValueError when a layer mixes rows without knowing the layout: it would read across responses."""
    for name, module in inner.named_modules():
        if isinstance(module, Attention):
            mixes = not isinstance(module.core_attention, PrefixCoreAttention)
        else:
            mixes = type(module).__name__ in OTHER_MIXERS
        if mixes:
            raise ValueError(
                f"{name} ({type(module).__name__}) does not know the layout of a pack; build the model with "
                "prefix_gpt_layer_spec, or give its spec to with_prefix_attention"
            )


def _fit_received(inner: Any, packed: PrefixPackedSeqParams) -> None:
    """Hold what the stage before sent to the pack's rows.

    For a split group's prefix there may be more: those behind belong to the backward of another one (`mcore.schedule`).

    Raises:
        ValueError: another number of rows.
    """
    ranks = inner.config.tensor_model_parallel_size if inner.config.sequence_parallel else 1
    rows = packed.num_padded_rows // ranks
    received = inner.decoder.input_tensor
    if packed.is_prefix and len(received) > rows:
        inner.set_input_tensor(received[:rows])
    elif len(received) != rows:
        raise ValueError(
            f"this pipeline stage received {len(received)} rows, its pack has {rows}: stages run different "
            "micro-batches; build the same packs in the same order on every stage"
        )


def _hidden_states(inner: Any, ids: StageIds, packed: PrefixPackedSeqParams, device: torch.device) -> Tensor:
    """Hidden states after the final norm, [T, 1, hidden] (T / tp under sequence parallelism).

    Raises:
        ValueError: the stage before sent another number of rows than the pack has.
    """
    if not inner.pre_process:
        _fit_received(inner, packed)
    tokens = None if ids.tokens is None else packed.padded(ids.tokens).to(device, non_blocking=True).unsqueeze(0)
    with _attribute(inner, "post_process", False):
        return inner(
            input_ids=tokens,
            position_ids=packed.row_positions.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed,
        )


def _response_hidden_states(inner: Any, hidden: Tensor, response_rows: Tensor) -> Tensor:
    """The response rows of hidden states, [N, 1, hidden], on every tensor-parallel rank."""
    if inner.config.sequence_parallel:
        # The output layer below runs without sequence parallelism and all-reduces the gradient of its input itself, so
        # the backward of this gather must only split.
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=inner.pg_collection.tp
        )
    return hidden.index_select(0, response_rows)


class _OutputHead:
    """Output layer and log-probs of one chunk of rows; computes the same again under recompute."""

    def __init__(self, inner: Any, temperature: float, with_entropy: bool) -> None:
        self.inner, self.temperature, self.with_entropy = inner, temperature, with_entropy

    def __call__(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, 1, hidden], targets [n] -> log-probs [n], entropy [n] (zeros when not asked for)."""
        inner = self.inner
        weight = inner.shared_embedding_or_output_weight() if inner.share_embeddings_and_output_weights else None
        with _attribute(inner.output_layer, "sequence_parallel", False):
            logits, _ = inner.output_layer(hidden, weight=weight, runtime_gather_output=False)
        return vocab_parallel_log_probs(
            logits.squeeze(1),
            targets,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
            tp_group=inner.pg_collection.tp,
        )


@contextmanager
def _attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the time of a call."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    tp_group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` and entropies from logits whose vocabulary is sharded over ``tp_group``.

    Args:
        logits: [n, V / tp], this rank's share, any floating dtype; computed in fp32 (fp64 for fp64).
        targets: int64 [n], global ids.
        temperature: logits are divided by it.
        with_entropy: compute entropies too; zeros otherwise.
        tp_group: the ranks that hold the other shares.

    Returns:
        log-probs [n] and entropies [n], fp32 (fp64 for fp64), differentiable in ``logits``.
    """
    return _VocabParallelLogProbs.apply(logits, targets, temperature, with_entropy, tp_group)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool, tp_group: Group
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        size = scaled.shape[1]
        local = targets - size * group_rank(tp_group)
        mine = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1).unsqueeze(1)
        scaled -= all_reduce_max(scaled.amax(1, keepdim=True), tp_group)
        probs = scaled.exp()
        # One all-reduce for the three sums over the vocabulary.
        sums = torch.stack(
            [
                probs.sum(1),
                scaled.gather(1, local).squeeze(1) * mine,
                # A token that cannot be drawn (logit -inf) adds nothing; 0 * -inf would be NaN.
                (probs * scaled).nan_to_num(nan=0.0).sum(1) if with_entropy else torch.zeros_like(probs[:, 0]),
            ]
        )
        norm, target, weighted = all_reduce_sum(sums, tp_group)
        probs /= norm.unsqueeze(1)
        lse = norm.log()
        entropy = lse - weighted / norm if with_entropy else weighted
        ctx.save_for_backward(probs, entropy, local, mine)
        ctx.temperature, ctx.with_entropy, ctx.dtype = temperature, with_entropy, logits.dtype
        return target - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        # d log p(t) / dz_j = [j = t] - p_j;  dH / dz_j = -p_j (log p_j + H)
        probs, entropy, local, mine = ctx.saved_tensors
        grad = probs * -d_log_probs.unsqueeze(1)
        grad.scatter_add_(1, local, (d_log_probs * mine).unsqueeze(1))
        if ctx.with_entropy:
            grad -= (torch.xlogy(probs, probs) + probs * entropy.unsqueeze(1)) * d_entropy.unsqueeze(1)
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None, None
