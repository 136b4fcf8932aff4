"""Whose tokens a pack's rows are, and how large the global batch is: what turns rows of log-probs into a mean.

    N  rows of log-probs (response rows of a pack)   R  rollouts of the pack   M  trained (row, rollout) pairs

In plain groups every trained row belongs to one rollout, so a pair is a row. In multi-turn trees several rollouts share
a row; it then stands in one pair per rollout, and each contributes with its own advantage and weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchTotals:
    """Size of the GLOBAL batch: all packs of the step on all data-parallel ranks. Add those of the packs with ``+``.

    Args:
        tokens: (row, rollout) pairs, the trained tokens of every rollout.
        rollouts: rollouts.
    """

    tokens: int
    rollouts: int

    def __post_init__(self) -> None:
        for name in ("tokens", "rollouts"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an int of 0 or more, got {value!r}")

    def __add__(self, other: BatchTotals) -> BatchTotals:
        return BatchTotals(self.tokens + other.tokens, self.rollouts + other.rollouts)


@dataclass(frozen=True, eq=False)
class RolloutPairs:
    """Which trained row of a pack belongs to which rollout. Build it on the host; ``to`` uploads it.

    A rollout is whole in its pack: all its trained rows are there, so ``lengths`` counts its pairs. Only in a split
    tree (see `splitting`) may others be in another pack of the step.

    Args:
        row: int64 [M], index of a row among the pack's N log-probs. Rows that are not trained stand in no pair.
        rollout: int64 [M], number of the rollout in the pack, from 0.
        num_rollouts: R.
        lengths: int64 [R], trained tokens of every rollout, at least 1.
        counted: how many of the rollouts this pack counts in the batch's totals, where some have trained rows in other
            packs too; None where all are whole, and counted.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; for CPU tensors also values (a rollout out of range, a
            negative row, a pair given twice, lengths that are not the pair counts). CUDA tensors are not read back.
    """

    row: Tensor
    rollout: Tensor
    num_rollouts: int
    lengths: Tensor
    counted: int | None = None

    def __post_init__(self) -> None:
        for name in ("row", "rollout", "lengths"):
            value = getattr(self, name)
            if value.dtype != torch.int64 or value.dim() != 1 or value.device != self.row.device:
                raise ValueError(
                    f"{name} must be an int64 vector on the device of row ({self.row.device}), "
                    f"got {value.dtype} {list(value.shape)} on {value.device}"
                )
        if self.row.shape != self.rollout.shape:
            raise ValueError(
                f"row and rollout must have one entry per pair, got {len(self.row)} and {len(self.rollout)} entries"
            )
        if len(self.lengths) != self.num_rollouts:
            raise ValueError(f"lengths must have num_rollouts = {self.num_rollouts} entries, got {len(self.lengths)}")
        if self.row.device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        if not len(self.row):
            if self.num_rollouts:
                raise ValueError("rollout 0 has no trained row; leave such rollouts out")
            return
        low, high = int(self.rollout.min()), int(self.rollout.max())
        if low < 0 or high >= self.num_rollouts:
            raise ValueError(f"rollout must be in [0, {self.num_rollouts}), got {low if low < 0 else high}")
        if int(self.row.min()) < 0:
            raise ValueError(f"row must be 0 or more, got {int(self.row.min())}")
        counts = torch.bincount(self.rollout, minlength=self.num_rollouts)
        unequal = counts != self.lengths if self.counted is None else counts > self.lengths
        wrong = torch.nonzero(unequal | (counts == 0)).flatten().tolist()
        if wrong:
            raise ValueError(
                f"rollout {wrong[0]} has {int(counts[wrong[0]])} pairs but length {int(self.lengths[wrong[0]])}; "
                "lengths counts the trained rows of a rollout, at least 1, and a rollout must be whole in its pack"
            )
        keys = self.rollout * (int(self.row.max()) + 1) + self.row
        if len(torch.unique(keys)) != len(keys):
            raise ValueError("a (row, rollout) pair is given twice; a rollout owns a row once")

    @classmethod
    def one_per_row(
        cls, response_lengths: Sequence[int], loss_masks: Sequence[Sequence[int | bool] | None] | None = None
    ) -> RolloutPairs:
        """Pairs of plain groups: responses one after another, N = sum(response_lengths), every row in one rollout.

        ``loss_masks`` has one mask, or None for "all trained", per response; rows with a 0 are left out of the pairs.
        """
        masks = [None] * len(response_lengths) if loss_masks is None else list(loss_masks)
        if len(masks) != len(response_lengths):
            raise ValueError(
                f"got {len(masks)} loss_masks for {len(response_lengths)} responses; give one (or None) each"
            )
        kept = []
        for i, (length, mask) in enumerate(zip(response_lengths, masks, strict=True)):
            if mask is not None and len(mask) != length:
                raise ValueError(
                    f"response {i} has {length} rows but a loss mask of {len(mask)}; give one value per row"
                )
            kept.append(torch.ones(length, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool))
        lengths = torch.tensor([int(mask.sum()) for mask in kept], dtype=torch.int64)
        rollout = torch.repeat_interleave(torch.arange(len(kept)), lengths)
        row = torch.nonzero(torch.cat(kept)).flatten() if kept else torch.empty(0, dtype=torch.int64)
        return cls(row, rollout, len(kept), lengths)

    @property
    def totals(self) -> BatchTotals:
        """This pack's part of the global batch's totals."""
        return BatchTotals(len(self.row), self.num_rollouts if self.counted is None else self.counted)

    def to(self, device: torch.device | str) -> RolloutPairs:
        """The same pairs on ``device``."""
        move = [tensor.to(device, non_blocking=True) for tensor in (self.row, self.rollout, self.lengths)]
        return RolloutPairs(move[0], move[1], self.num_rollouts, move[2], self.counted)
