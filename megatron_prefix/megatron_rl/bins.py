"""Megatron-RL's bins as packs of prefix groups.

Upstream keeps per-token values of a bin in slots: slot t holds what belongs to the token at t + 1. Here a slot is a row
of the bin's pack, so response token j of a sequence has the slot of the row that predicts it, and no other row's.

Shapes: n sequences of L tokens (padded), B bins, S slots a bin (bin_size), R_i response tokens of sequence i.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.sequence_packs import SequencePack, pack_sequences, plan_micro_batches


@dataclass(frozen=True)
class Sequences:
    """What the policy said and after which prompt. Sequences without a generated token (upstream's padding) are none.

    Attributes:
        numbers: of each sequence, its row in upstream's tensors.
        prompts: int64 tokens before the first generated one.
        responses: int64 [R_i], from the first generated token to the last.
        masks: bool [R_i], which of them were generated (others are a tool's, say).
    """

    numbers: list[int]
    prompts: list[Tensor]
    responses: list[Tensor]
    masks: list[Tensor]

    @classmethod
    def of(cls, tokens: Tensor, generated: Tensor) -> Sequences:
        """tokens int64 [n, L], generated bool [n, L].

        Raises:
            ValueError: a sequence whose first token is generated, which has no prompt, or none with a generated token.
        """
        tokens, generated = tokens.cpu(), generated.cpu().bool()
        found = cls([], [], [], [])
        for number, (ids, mask) in enumerate(zip(tokens, generated, strict=True)):
            at = mask.nonzero().flatten()
            if not len(at):
                continue
            first, end = int(at[0]), int(at[-1]) + 1
            if first == 0:
                raise ValueError(f"trajectory {number} has no prompt: its first token is generated")
            found.numbers.append(number)
            found.prompts.append(ids[:first])
            found.responses.append(ids[first:end])
            found.masks.append(mask[first:end])
        if not found.numbers:
            raise ValueError(f"none of {len(tokens)} trajectories has a generated token")
        return found

    def plan(self, max_rows: int, ranks: int) -> list[list[int]]:
        """Sequences of each bin, groups together; a multiple of ``ranks`` bins where there are sequences enough."""
        lengths = [len(response) for response in self.responses]
        plan = plan_micro_batches(self.prompts, lengths, max_rows)
        count = -(-len(plan) // ranks) * ranks
        if len(plan) < count <= len(lengths):
            plan = plan_micro_batches(self.prompts, lengths, max_rows, at_least=count)
        return plan


@dataclass(frozen=True)
class Bin:
    """One bin. It travels as upstream's ``packed_seq_params``.

    Attributes:
        sequences: of the bin, as a pack.
        numbers: of each of them, its row in upstream's tensors; none in a bin that only evens out the ranks.
        num_slots: S.
    """

    sequences: SequencePack
    numbers: tuple[int, ...]
    num_slots: int

    @classmethod
    def empty(cls, pad_token: int, num_slots: int) -> Bin:
        """One token after another, in a slot that upstream's loss mask leaves out: the model must run all the same."""
        return cls(pack_sequences([[pad_token]], [[pad_token]]), (), num_slots)

    @property
    def starts(self) -> list[int]:
        """The first slot of each sequence."""
        return [int(slots[0]) for slots in self.sequences.split(self.sequences.pack.response_rows)]


def make_bins(found: Sequences, num_slots: int, ranks: int) -> list[Bin]:
    """All bins of a step, the same on every rank.

    Raises:
        ValueError: a sequence longer than a bin.
    """
    bins = []
    for indices in found.plan(num_slots - 1, ranks):  # upstream's values have one slot less than the bin has tokens
        sequences = pack_sequences([found.prompts[i] for i in indices], [found.responses[i] for i in indices])
        bins.append(Bin(sequences, tuple(found.numbers[i] for i in indices), num_slots))
    return bins


def bin_log_probs(model: torch.nn.Module, packed_seq_params: Bin, *, no_grad: bool) -> Tensor:
    """What upstream's `get_logprobs` returns, of a bin: fp32 [1, S - 1] (fp64 for an fp64 model), 0 in slots of no
    response token. A pipeline stage before the last returns its hidden states.

    Raises:
        ValueError: as `response_log_probs`.
    """
    pack = packed_seq_params.sequences.pack
    with torch.no_grad() if no_grad else nullcontext():
        log_probs = response_log_probs(model, pack)
        assert isinstance(log_probs, Tensor)
        if not unwrap(model).post_process:
            return log_probs
        slots = pack.response_rows.to(log_probs.device, non_blocking=True)
        return log_probs.new_zeros(packed_seq_params.num_slots - 1).index_copy(0, slots, log_probs).unsqueeze(0)
