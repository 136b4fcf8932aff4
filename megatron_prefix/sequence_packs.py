"""The sequences of another framework as packs: which of them share a micro-batch, and values there and back.

RL frameworks hold a batch as B sequences, each a prompt and a response, in an order of their own, and compute their
loss on per-token values in that order. Here sequences with the same prompt tokens become prefix groups of a `Pack`:

    indices = plan_micro_batches(prompts, [len(r) for r in responses], max_tokens_per_pack)
    packed = pack_sequences([prompts[i] for i in indices[0]], [responses[i] for i in indices[0]])
    log_probs = packed.padded(response_log_probs(model, packed.pack), width)  # [B, width], for its own loss

Tokens are compared: a name that a framework gives to its groups (``uid``) is never trusted. In a multi-turn sequence
the prompt is what stands before the first token of the policy; outputs of tools in the response get log-probs as well,
and the framework's own mask leaves them out.

Shapes: B sequences, R_i response tokens of sequence i, N = sum R_i response rows of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_prefix.packing import Pack, pack_groups
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.spreading import best_fit, spread

TokenIds: TypeAlias = Sequence[int] | Tensor
"""A list of token ids or an integer tensor [n]."""


@dataclass(frozen=True)
class SequencePack:
    """B sequences as one pack, and the way of per-token values between the two orders.

    Attributes:
        pack: prefix groups in the order of their first sequence; without rewards, advantages are 0.
        order: of each response in the pack, the index of its sequence.
        lengths: of each sequence, R_i.
    """

    pack: Pack
    order: tuple[int, ...]
    lengths: tuple[int, ...]

    def split(self, values: Tensor) -> list[Tensor]:
        """[N, ...] in the order of the pack's response rows -> of each sequence [R_i, ...]. Differentiable.

        Raises:
            ValueError: another number of rows than the pack's.
        """
        if len(values) != sum(self.lengths):
            raise ValueError(
                f"{len(values)} values for a pack of {sum(self.lengths)} response rows; give those of this pack, whole "
                "(response_log_probs with full=True under context parallelism)"
            )
        parts = values.split([self.lengths[i] for i in self.order])
        place = {sequence: at for at, sequence in enumerate(self.order)}
        return [parts[place[i]] for i in range(len(self.lengths))]

    def padded(self, values: Tensor, width: int, fill: float = 0.0) -> Tensor:
        """[N] in the order of the pack's response rows -> [B, width], padded on the right. Differentiable.

        Raises:
            ValueError: as `split`, or a response longer than ``width``.
        """
        if width < max(self.lengths):
            raise ValueError(f"width {width} is below the longest response, {max(self.lengths)} tokens")
        rows = [torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in self.split(values)]
        return torch.stack(rows)

    def gather(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """Of each sequence [>= R_i], padding on the right is left out -> [N] in the order of the pack's response rows.

        Raises:
            ValueError: another number of sequences, or fewer values than a response has tokens.
        """
        if len(per_sequence) != len(self.lengths):
            raise ValueError(f"values of {len(per_sequence)} sequences for a pack of {len(self.lengths)}")
        for i, (row, length) in enumerate(zip(per_sequence, self.lengths, strict=True)):
            if len(row) < length:
                raise ValueError(f"sequence {i} has {len(row)} values for {length} response tokens")
        return torch.cat([per_sequence[i][: self.lengths[i]] for i in self.order])


def pack_sequences(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> SequencePack:
    """One pack of B sequences, in any order. Those with equal prompt tokens share their prefix.

    Args:
        prompts: token ids of each sequence before its first response token, at least one.
        responses: token ids of each sequence that get a log-prob, at least one.

    Raises:
        ValueError: no sequences, unequal numbers of prompts and responses, or one of them empty.
    """
    prompt_ids, response_ids = [_ids(p) for p in prompts], [_ids(r) for r in responses]
    if len(prompt_ids) != len(response_ids):
        raise ValueError(f"{len(prompt_ids)} prompts for {len(response_ids)} responses; give one each")
    _check_lengths([len(ids) for ids in prompt_ids], [len(ids) for ids in response_ids])
    groups = _by_prompt(prompt_ids)
    pack = pack_groups([RolloutGroup(prompt_ids[g[0]], [response_ids[i] for i in g], [0.0] * len(g)) for g in groups])[
        0
    ]
    return SequencePack(pack, tuple(i for g in groups for i in g), tuple(len(ids) for ids in response_ids))


def plan_micro_batches(
    prompts: Sequence[TokenIds],
    response_lengths: Sequence[int],
    max_tokens_per_pack: int,
    *,
    count_multiple_of: int = 1,
    at_least: int = 1,
) -> list[list[int]]:
    """Which sequences share a micro-batch: whole prefix groups, few micro-batches, even in rows. Deterministic.

    A group with more rows than the limit is cut into parts of whole sequences, each of which encodes the prefix again.
    Every other group stays whole, unless ``at_least`` or ``count_multiple_of`` asks for more micro-batches than that
    makes: the largest are then cut. Data-parallel ranks that need the same number take the largest of theirs as
    ``at_least`` and plan again.

    Args:
        prompts: token ids of each sequence's prompt.
        response_lengths: response tokens of each sequence.
        max_tokens_per_pack: most rows of one micro-batch, prefixes counted once per group in it.
        count_multiple_of: the number of micro-batches is a multiple of it (interleaved pipeline schedules).
        at_least: fewest micro-batches.

    Returns:
        of each micro-batch the indices of its sequences, ascending.

    Raises:
        ValueError: no sequences, an empty prompt or response, a sequence with more rows than the limit, or fewer
            sequences than micro-batches are asked for.
    """
    prompt_ids = [_ids(p) for p in prompts]
    if len(prompt_ids) != len(response_lengths):
        raise ValueError(f"{len(prompt_ids)} prompts for {len(response_lengths)} responses; give one each")
    if count_multiple_of < 1 or at_least < 1:
        raise ValueError(f"count_multiple_of and at_least must be at least 1, got {count_multiple_of} and {at_least}")
    _check_lengths([len(ids) for ids in prompt_ids], response_lengths)
    for i, (ids, length) in enumerate(zip(prompt_ids, response_lengths, strict=True)):
        if len(ids) - 1 + length > max_tokens_per_pack:
            raise ValueError(
                f"sequence {i} needs {len(ids) - 1 + length} rows, max_tokens_per_pack is {max_tokens_per_pack}; raise "
                f"max_tokens_per_pack to at least {len(ids) - 1 + length}, or drop the sequence"
            )

    def rows(unit: Sequence[int]) -> int:
        return len(prompt_ids[unit[0]]) - 1 + sum(response_lengths[i] for i in unit)

    def cut(unit: Sequence[int], parts: int) -> list[list[int]]:
        lengths = [response_lengths[i] for i in unit]
        room = max_tokens_per_pack - (len(prompt_ids[unit[0]]) - 1)
        return [[unit[i] for i in part] for part in spread(lengths, parts, rows=lengths, limit=room)]

    units: list[list[int]] = []
    for group in _by_prompt(prompt_ids):
        room = max_tokens_per_pack - (len(prompt_ids[group[0]]) - 1)
        units += cut(group, len(best_fit([response_lengths[i] for i in group], room)))
    while True:  # a cut copies a prefix, so it may ask for one micro-batch more
        sizes = [rows(unit) for unit in units]
        count = max(at_least, len(best_fit(sizes, max_tokens_per_pack)))
        count = -(-count // count_multiple_of) * count_multiple_of
        if count > len(prompt_ids):
            raise ValueError(
                f"{len(prompt_ids)} sequences cannot fill {count} micro-batches (at_least={at_least}, "
                f"count_multiple_of={count_multiple_of}); give this rank more sequences"
            )
        if count <= len(units):
            break
        largest = max((unit for unit in units if len(unit) > 1), key=rows)
        units.remove(largest)
        units += cut(largest, 2)
    batches = spread(sizes, count, rows=sizes, limit=max_tokens_per_pack)
    return [sorted(i for unit in batch for i in units[unit]) for batch in batches]


def _ids(tokens: TokenIds) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


def _by_prompt(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the sequences with equal prompts, groups in the order of their first one."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(prompts):
        groups.setdefault(tuple(ids), []).append(i)
    return list(groups.values())


def _check_lengths(prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> None:
    if not prompt_lengths:
        raise ValueError("there is nothing to pack: no sequences were given")
    for name, lengths in (("prompt", prompt_lengths), ("response", response_lengths)):
        for i, length in enumerate(lengths):
            if length < 1:
                raise ValueError(
                    f"the {name} of sequence {i} has {length} tokens, at least 1 is needed; leave the sequence out"
                )
