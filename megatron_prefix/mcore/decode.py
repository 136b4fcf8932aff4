"""Prefix-grouped decoding: a prompt is encoded once, its responses are decoded together and read its keys in place.

The rows are those of a pack (see `packing`): the prompt without its last token is encoded as one causal segment, and
every response begins with the prompt's last token. A decoding step feeds one row per response. The row attends to the
prompt's keys (one unmasked call for all responses of a prompt, no copy per response) and to its own response's keys
(a dense cache, all responses have the same length), merged by log-sum-exp.

Shapes: P rows of all prompts, B responses being decoded, t rows of each response so far, Hq and Hkv heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from megatron_prefix.attention import KERNELS, merge_attention
from megatron_prefix.attention.calls import Rows, VarlenCall
from megatron_prefix.attention.grouped import as_read
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.mcore.packed import LayerSettings, PrefixPackedSeqParams
from megatron_prefix.mcore.stages import unwrap


class PrefixDecoder:
    """Decodes ``group_size`` responses to each of some prompts, one token per step, on one pipeline stage.

    Args:
        model: with a prefix-grouped layer spec; `GPTModel` or `HybridModel`, wrapped or not. Tensor-parallel ranks call
            with the same arguments.
        prompts: token ids, at least one each.
        group_size: responses per prompt.
        max_new_tokens: most steps.

    The caller switches the model to evaluation and gradients off. Rows are ordered by prompt, response; `keep` drops
    rows. Nothing is stored in the model.
    """

    def __init__(
        self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], *, group_size: int, max_new_tokens: int
    ) -> None:
        self.inner = unwrap(model)
        self.device = next(self.inner.parameters()).device
        self.multiple = self.inner.config.tensor_model_parallel_size if self.inner.config.sequence_parallel else 1
        self.cache: dict[int, _LayerCache] = {}
        self.prompt_lengths = [len(prompt) - 1 for prompt in prompts]
        self.owners = [i for i in range(len(prompts)) for _ in range(group_size)]
        self.max_length = max(self.prompt_lengths) + max_new_tokens
        self.length = 0
        self.call = self._prompt_call()
        self._encode([token for prompt in prompts for token in prompt[:-1]])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token per row (at first the last token of its prompt); returns the next token's logits.

        Returns:
            [B, V], the whole vocabulary on every tensor-parallel rank, in the model's dtype.
        """
        assert len(tokens) == len(self.owners)
        positions = [self.prompt_lengths[owner] + self.length for owner in self.owners]
        self.length += 1
        padded = -(-len(tokens) // self.multiple) * self.multiple
        packed = _DecodePackedSeqParams(
            qkv_format="thd",
            max_seqlen_q=self.max_length,  # the same for all steps: megatron-core then reuses its rotary table
            max_seqlen_kv=self.max_length,
            row_positions=_padded(positions, padded).to(self.device),
            cache=self.cache,
            length=self.length,
            num_responses=len(tokens),
            call=self.call,
        )
        logits = self._forward(_padded(tokens, padded), packed)
        return logits[0, : len(tokens)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order (ascending)."""
        self.owners = [self.owners[row] for row in rows]
        self.call = self._prompt_call()
        index = torch.tensor(rows, dtype=torch.long).to(self.device)
        for layer in self.cache.values():
            layer.select(index, self.length)

    def _prompt_call(self) -> VarlenCall | None:
        """The responses of each prompt against its keys; None when no prompt has a shared row."""
        starts = list(accumulate(self.prompt_lengths, initial=0))
        queries, keys = [], []
        row = 0
        for owner, members in groupby(self.owners):
            end = row + len(list(members))
            if self.prompt_lengths[owner]:
                queries.append((row, end))
                keys.append((starts[owner], starts[owner + 1]))
            row = end
        if not queries:
            return None
        return VarlenCall(Rows.build(queries, self.device), Rows.build(keys, self.device), causal=False)

    def _encode(self, tokens: list[int]) -> None:
        """Fill the cache with the keys and values of all prompts. No logits are computed."""
        if not tokens:
            return
        lengths = [length for length in self.prompt_lengths if length]
        packed = _EncodePackedSeqParams.build(
            PrefixLayout(lengths, [-1] * len(lengths)), self.device, multiple_of=self.multiple
        )
        packed.cache = self.cache
        with_head, self.inner.post_process = self.inner.post_process, False
        try:
            self._forward(_padded(tokens, packed.num_padded_rows), packed)
        finally:
            self.inner.post_process = with_head

    def _forward(self, tokens: Tensor, packed: PrefixPackedSeqParams) -> Tensor:
        return self.inner(
            input_ids=tokens.to(self.device).unsqueeze(0),
            position_ids=packed.row_positions.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed,
            runtime_gather_output=True,
        )


@dataclass
class _LayerCache:
    """Keys and values of one layer.

    Attributes:
        prompt: k and v of all prompts, each [P, Hkv, D]; None when no prompt has a shared row.
        own: k and v of the responses, each [B, capacity, Hkv, D].
    """

    prompt: tuple[Tensor, Tensor] | None = None
    own: tuple[Tensor, ...] = ()

    def append(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, ...]:
        """Add a row (each [B, Hkv, D]) as row ``length - 1``; returns k and v so far, each [B, length, Hkv, D]."""
        if not self.own:
            self.own = tuple(x.new_empty(x.shape[0], _FIRST_CAPACITY, *x.shape[1:]) for x in (k, v))
        elif length > self.own[0].shape[1]:
            self.own = tuple(torch.cat([x, torch.empty_like(x)], dim=1) for x in self.own)
        for cached, new in zip(self.own, (k, v), strict=True):
            cached[:, length - 1] = new
        return tuple(x[:, :length] for x in self.own)

    def select(self, index: Tensor, length: int) -> None:
        """Keep the responses ``index``."""
        for_rows = []
        for x in self.own:
            kept = x.new_empty(index.numel(), *x.shape[1:])
            kept[:, :length] = x[:, :length].index_select(0, index)
            for_rows.append(kept)
        self.own = tuple(for_rows)


_FIRST_CAPACITY = 64  # rows per response; doubled when they are full


@dataclass
class _EncodePackedSeqParams(PrefixPackedSeqParams):
    """Attends as ever, and keeps each layer's keys and values."""

    cache: dict[int, _LayerCache] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSettings) -> Tensor:
        # Copies: k and v are views of the layer's whole qkv projection, which would stay in memory with them.
        self.cache[layer.number] = _LayerCache(prompt=(k.clone(), v.clone()))
        return super().attend(q, k, v, layer)


@dataclass
class _DecodePackedSeqParams(PrefixPackedSeqParams):
    """One row per response: attends to its prompt's cached keys and to its own response's."""

    cache: dict[int, _LayerCache] = field(default_factory=dict)
    length: int = 0
    num_responses: int = 0
    call: VarlenCall | None = None

    @property
    def num_rows(self) -> int:
        return self.num_responses

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSettings) -> Tensor:
        cache = self.cache.setdefault(layer.number, _LayerCache())
        keys, values = cache.append(k, v, self.length)
        out, lse = (x.flatten(0, 1) for x in _dense_attention(q.unsqueeze(1), keys, values, layer.softmax_scale))
        if self.call is None:
            return out
        assert cache.prompt is not None
        part = _prompt_attention(q, *cache.prompt, self.call, layer.softmax_scale, layer.impl)
        rows = self.call.q
        rows.put(out, merge_attention(rows.take(out), rows.take(lse), *part)[0])
        return out


def _prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of ``call``; as `Kernel.forward`, dense where ``impl`` is no kernel."""
    if impl in KERNELS:
        kernel = KERNELS[impl]
        return kernel.forward(as_read(q, kernel), as_read(k, kernel), as_read(v, kernel), call, softmax_scale)
    parts = [
        _dense_attention(q[None, slice(*rows)], k[None, slice(*keys)], v[None, slice(*keys)], softmax_scale)
        for rows, keys in zip(call.q.ranges, call.kv.ranges, strict=True)
    ]
    out, lse = (torch.cat([x.squeeze(0) for x in column]) for column in zip(*parts, strict=True))
    return out, lse


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Unmasked attention q [b, n, Hq, D] over k, v [b, m, Hkv, D] -> out [b, n, Hq, D] in q's dtype, lse [b, n, Hq].

    For few queries, where fused kernels gain nothing. fp32 inside (fp64 for fp64); heads are not expanded.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    heads = k.shape[2]
    grouped = (q.to(compute) * softmax_scale).unflatten(2, (heads, -1))
    scores = torch.einsum("bnhgd,bmhd->bnhgm", grouped, k.to(compute))
    lse = scores.logsumexp(-1)
    out = torch.einsum("bnhgm,bmhd->bnhgd", (scores - lse.unsqueeze(-1)).exp_(), v.to(compute))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)


def _padded(values: Sequence[int], length: int) -> Tensor:
    """int64 [length] with zeros behind ``values``."""
    result = torch.zeros(length, dtype=torch.long)
    result[: len(values)] = torch.tensor(values, dtype=torch.long)
    return result
