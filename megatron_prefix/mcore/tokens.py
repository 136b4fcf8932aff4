"""Token ids where they are read: a pack's input tokens on the first pipeline stage, its targets on the last.

On those stages tensor-parallel rank 0 gives them to the others, as Megatron-LM's get_batch_on_this_tp_rank does: only
rank 0 needs packs with token ids. All other ranks, and middle stages as a whole, can have packs of lengths
(`RolloutGroup.lengths_only`), which have the same layouts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.balanced_plan import Group
from megatron_prefix.collectives import broadcast, device_of, group_rank
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.packing import Pack

_UNKNOWN = -1


def groups_on_this_rank(groups: Sequence[Group], model: Any) -> list[Group]:
    """The groups with what this rank of a pipeline reads of them; packs of them are the same on all ranks otherwise.

    Token ids stay on tensor-parallel rank 0 of the first and the last stage. All other ranks get the lengths, rewards
    and masks, and on the last stage, where the loss is, the sampler's log-probs.

    Args:
        groups: with token ids, on every rank.
        model: this rank's model, or the list of its virtual pipeline chunks; wrapped or not.
    """
    chunks = [unwrap(chunk) for chunk in (model if isinstance(model, list) else [model])]
    at_an_end = any(chunk.pre_process or chunk.post_process for chunk in chunks)
    if at_an_end and group_rank(chunks[0].pg_collection.tp) == 0:
        return list(groups)
    has_loss = any(chunk.post_process for chunk in chunks)
    return [group.lengths_only(keep_log_probs=has_loss) for group in groups]


@dataclass(frozen=True)
class StageIds:
    """What one stage reads of a pack of T rows: int64 [T] on the CPU, None where it reads none."""

    tokens: Tensor | None
    targets: Tensor | None

    @property
    def checksum(self) -> int:
        """CRC-32 of the ids."""
        checksum = 0
        for ids in (self.tokens, self.targets):
            if ids is not None:
                checksum = zlib.crc32(ids.numpy().tobytes(), checksum)
        return checksum


def ids_on_this_rank(pack: Pack, inner: Any, *, with_targets: bool = True) -> StageIds:
    """The token ids that this stage reads. All tensor-parallel ranks of the first and the last stage call it together.

    A rank whose pack has token ids keeps its own; others read back to the host what rank 0 sends.

    Args:
        pack: with token ids on tensor-parallel rank 0, lengths suffice elsewhere.
        inner: the model chunk, unwrapped.
        with_targets: whether the last stage reads targets.

    Raises:
        ValueError: a token id outside the vocabulary, or none where they are needed.
    """
    found = _from_rank_0(pack, inner, with_targets)
    # Not before: rank 0 alone with an error would leave the others waiting for what it sends.
    whole = found if pack.ids is None else pack.ids
    check_token_ids(whole.tokens, whole.targets, inner.vocab_size)
    return found


def _from_rank_0(pack: Pack, inner: Any, with_targets: bool) -> StageIds:
    reads = {"tokens": inner.pre_process, "targets": inner.post_process and with_targets}
    names = [name for name, needed in reads.items() if needed]
    if not names:
        return StageIds(None, None)
    if pack.ids is None:
        ids = torch.full((len(names), pack.layout.num_rows), _UNKNOWN)
    else:
        ids = torch.stack([getattr(pack.ids, name) for name in names])
    group = inner.pg_collection.tp
    sent = broadcast(ids.to(device_of(group), copy=True), 0, group)
    if pack.ids is None:
        ids = sent.cpu()
        if (ids == _UNKNOWN).any():
            raise ValueError(
                f"the {' and '.join(names)} of a pack of {pack.layout.num_rows} rows are read on this stage, and "
                "tensor-parallel rank 0 of it has lengths only; give it packs of groups with token ids"
            )
    found = dict(zip(names, ids, strict=True))
    return StageIds(found.get("tokens"), found.get("targets"))


def check_token_ids(tokens: Tensor | None, targets: Tensor | None, vocab_size: int) -> None:
    """Raises ValueError when an id, int64 [T], lies outside the vocabulary; names the row, the id and the limit."""
    for name, ids in (("token", tokens), ("target", targets)):
        outside = torch.zeros(0) if ids is None else torch.nonzero(ids >= vocab_size)
        if ids is not None and outside.numel():
            row = int(outside[0])
            raise ValueError(
                f"row {row}: {name} id {int(ids[row])} is outside the model's vocabulary of {vocab_size}; "
                "were the rollouts made with another tokenizer?"
            )
