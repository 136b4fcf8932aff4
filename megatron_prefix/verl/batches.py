"""verl's batches as sequences, and values of response rows back in the shape of verl's model output.

A batch is a `TensorDict` without padding: ``input_ids`` is a jagged nested tensor [B, j] of prompt and response;
``prompts`` and ``responses`` are nested, or padded with an ``attention_mask`` [B, prompt width + response width].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

from megatron_prefix.collectives import Group, group_rank, on_all_ranks
from megatron_prefix.sequence_packs import SequencePack, plan_micro_batches


def prompts_and_responses(batch: TensorDict) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of each sequence of a batch: int64 [P_i] and [R_i]."""
    prompts, responses = batch["prompts"], batch["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = batch["attention_mask"][:, prompts.shape[1] :].sum(dim=1)
    ids = batch["input_ids"].unbind()
    cuts = [len(row) - length for row, length in zip(ids, lengths.tolist(), strict=True)]
    pairs = list(zip(ids, cuts, strict=True))
    return [row[:cut] for row, cut in pairs], [row[cut:] for row, cut in pairs]


def as_model_output(packed: SequencePack, values: Tensor, input_ids: Tensor) -> Tensor:
    """Values of response rows [N] as verl's engines return them: jagged [B, j] as ``input_ids``. Differentiable.

    The value of a token stands one place before it, as that of the row that predicts it. Prompt rows have none and
    get 0; verl's losses, advantages and metrics read response tokens only.
    """
    offsets = input_ids.offsets()  # type: ignore[attr-defined]
    rows = []
    for row, length in zip(packed.split(values), offsets.diff().tolist(), strict=True):
        rows.append(torch.nn.functional.pad(row, (length - len(row) - 1, 1)))
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=offsets)


def micro_batches_of_all_ranks(
    batch: TensorDict, max_rows: int, dp_group: Group, count_multiple_of: int
) -> list[list[int]]:
    """Indices of the sequences of each of this data-parallel rank's micro-batches: whole groups, the same number of
    micro-batches on every rank of ``dp_group``.

    Args:
        max_rows: most rows of one micro-batch, prefixes counted once per group.
        count_multiple_of: the number of micro-batches is a multiple of it.

    Raises:
        ValueError: on all ranks, what `plan_micro_batches` of one refuses.
    """
    prompts, responses = prompts_and_responses(batch)
    lengths = [len(ids) for ids in responses]
    plan: Callable[..., list[list[int]]] = partial(
        plan_micro_batches, prompts, lengths, max_rows, count_multiple_of=count_multiple_of
    )
    count = 1
    while True:
        plans = on_all_ranks(partial(plan, at_least=count), dp_group, ValueError)
        count = max(len(each) for each in plans)
        if all(len(each) == count for each in plans):
            return plans[group_rank(dp_group)]
