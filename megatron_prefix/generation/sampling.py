"""Sampling groups of responses from a model with prefix-grouped attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.collectives import Group, all_reduce_max
from megatron_prefix.mcore.decode import PrefixDecoder
from megatron_prefix.mcore.stages import unwrap


@dataclass
class SampledResponse:
    """One response.

    Attributes:
        tokens: token ids; the end-of-sequence token, where one was sampled, is the last.
        log_probs: per token, under the distribution it was drawn from (natural log).
        truncated: no end-of-sequence token came within the limit.
    """

    tokens: list[int]
    log_probs: list[float]
    truncated: bool = True


def sample_responses(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_ids: Collection[int] = (),
    seed: int = 0,
    first_prompt: int = 0,
    prompts_per_batch: int = 8,
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[SampledResponse]]:
    """Sample ``group_size`` responses to each prompt; every prompt is encoded once and its responses read its keys.

    Every prompt has its own stream of random numbers, made from ``seed`` and its index, so the responses do not depend
    on how prompts are batched (but for rounding, where a token stands on the edge of two). Tensor-parallel ranks call
    with the same arguments and get the same responses.

    Args:
        model: with a prefix-grouped layer spec, in one pipeline stage.
        prompts: token ids, at least one each.
        group_size: responses per prompt.
        max_new_tokens: a response without an end-of-sequence token stops here and is marked ``truncated``.
        temperature: logits are divided by it; 0 takes the likeliest token, with log-probs at temperature 1.
        eos_token_ids: tokens that end a response.
        seed: of the random streams.
        first_prompt: index of the first prompt, where these are a part of the prompts of a job.
        prompts_per_batch: prompts decoded at a time.
        on_step: called after each step with the tokens sampled and the responses finished in it.

    Returns:
        For each prompt its responses. The log-probs are those of `response_log_probs` at the same temperature.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a sequence longer than the model's positions, a
            number that is out of range, or a model cut into pipeline stages.
    """
    _check_numbers(
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        prompts_per_batch=prompts_per_batch,
        temperature=temperature,
    )
    inner = unwrap(model)
    _check_prompts(inner, prompts, max_new_tokens, eos_token_ids)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [
                group
                for first in range(0, len(prompts), prompts_per_batch)
                for group in _Batch(
                    inner,
                    prompts[first : first + prompts_per_batch],
                    first_prompt + first,
                    group_size,
                    max_new_tokens,
                    seed,
                ).run(temperature, frozenset(eos_token_ids), on_step)
            ]
    finally:
        model.train(was_training)


class _Batch:
    """Some prompts decoded together until every response has ended."""

    def __init__(
        self,
        inner: Any,
        prompts: Sequence[Sequence[int]],
        first: int,
        group_size: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.prompts, self.group_size, self.max_new_tokens = prompts, group_size, max_new_tokens
        self.tp_group: Group = inner.pg_collection.tp
        self.decoder = PrefixDecoder(inner, prompts, group_size=group_size, max_new_tokens=max_new_tokens)
        self.streams = [_stream(seed, first + i) for i in range(len(prompts))]
        self.responses = [SampledResponse([], []) for _ in range(len(prompts) * group_size)]

    def run(
        self, temperature: float, eos_token_ids: frozenset[int], on_step: Callable[[int, int], None] | None
    ) -> list[list[SampledResponse]]:
        active = list(range(len(self.responses)))
        tokens = [self.prompts[i // self.group_size][-1] for i in active]
        for step in range(self.max_new_tokens):
            logits = self.decoder.step(tokens)
            draws = self._draws()[torch.tensor(active)]
            sampled, log_probs = _sample(logits, draws.to(logits.device), temperature, self.tp_group)
            tokens = sampled.tolist()
            for i, token, log_prob in zip(active, tokens, log_probs.tolist(), strict=True):
                self.responses[i].tokens.append(token)
                self.responses[i].log_probs.append(log_prob)
                self.responses[i].truncated = token not in eos_token_ids
            going = [row for row, token in enumerate(tokens) if token not in eos_token_ids]
            last = step + 1 == self.max_new_tokens or not going
            if on_step is not None:
                on_step(len(tokens), len(tokens) if last else len(tokens) - len(going))
            if last:
                break
            if len(going) < len(active):
                self.decoder.keep(going)
                active, tokens = [active[row] for row in going], [tokens[row] for row in going]
        return [self.responses[i : i + self.group_size] for i in range(0, len(self.responses), self.group_size)]

    def _draws(self) -> Tensor:
        """Uniform numbers for every response, ended ones too: what one response draws depends on no other."""
        return torch.cat([torch.rand(self.group_size, generator=g, dtype=torch.float64) for g in self.streams])


def _sample(logits: Tensor, draws: Tensor, temperature: float, tp_group: Group) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probs [B] (fp32, fp64 for fp64) from logits [B, V] and uniform draws [B] in [0, 1)."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
    log_probs = scaled.log_softmax(-1)
    if temperature == 0:
        tokens = log_probs.argmax(-1)
    else:
        # The token at which the cumulative distribution, in fp64 and up to its own sum, passes the draw.
        cumulative = log_probs.double().exp().cumsum(-1)
        wanted = (draws * cumulative[:, -1]).unsqueeze(-1)
        tokens = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    # On a GPU the sums may differ in the last bit between ranks; all must go on with one token.
    tokens = all_reduce_max(tokens, tp_group)
    return tokens, log_probs.gather(1, tokens.unsqueeze(-1)).squeeze(-1)


def _stream(seed: int, prompt: int) -> torch.Generator:
    """The random numbers of one prompt, on the CPU: the same on every device and rank."""
    return torch.Generator().manual_seed((seed * 1_000_003 + prompt) % 2**63)


def _check_numbers(*, temperature: float, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a number of 0 (greedy) or more, got {temperature}")


def _check_prompts(
    inner: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids: Collection[int]
) -> None:
    if not (inner.pre_process and inner.post_process):
        raise ValueError("sampling needs the whole model in one pipeline stage; use pp=1")
    cp_size = inner.config.context_parallel_size
    if cp_size > 1:
        raise ValueError(
            f"sampling does not cut a sequence over ranks, context_parallel_size is {cp_size}; "
            "use cp=1 (more data-parallel ranks share the prompts)"
        )
    for token in eos_token_ids:
        if not 0 <= token < inner.vocab_size:
            raise ValueError(f"eos token id {token} is outside the model's vocabulary of {inner.vocab_size}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        for token in prompt:
            if not 0 <= token < inner.vocab_size:
                raise ValueError(
                    f"prompt {i}: token id {token} is outside the model's vocabulary of {inner.vocab_size}; "
                    "was it made with another tokenizer?"
                )
        if len(prompt) + max_new_tokens > inner.max_sequence_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, with {max_new_tokens} new ones it passes the model's "
                f"{inner.max_sequence_length} positions; shorten it or lower max_new_tokens"
            )
