"""A micro-batch of ms-swift as a pack, and per-token values in the shape that its loss reads.

ms-swift collates B sequences to [1, width] one after another (``padding_free``) or to [B, width] with padding on the
right: its frame. Tokens of the policy have a label other than -100, and the log-prob of a token stands where the token
before it is, since ms-swift rolls labels by one. Frame of one sequence "p1 p2 r1 r2" (labels -100 -100 r1 r2):

    [0, log p(r1), log p(r2), 0]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megatron_prefix.sequence_packs import SequencePack, pack_sequences

NO_LABEL = -100

_TEXT_KEYS = {
    *("input_ids", "labels", "position_ids", "text_position_ids", "attention_mask", "attention_mask_2d"),
    *("loss_scale", "seq_lens", "num_samples", "channel", "grpo_batch"),
}
"""What the collator makes of text. Lengths and masks follow from the labels; images and the like are refused."""


@dataclass(frozen=True)
class PackedMicroBatch:
    """The sequences of one micro-batch that have a token of the policy, as a pack.

    Attributes:
        sequences: the pack and its way back.
        shape: of the frame.
        places: int64 [N], where in the flattened frame the value of each response row of the pack belongs.
        labelled: bool [N], rows whose token has a label; others are outputs of tools between the policy's turns.
    """

    sequences: SequencePack
    shape: tuple[int, int]
    places: Tensor
    labelled: Tensor

    @classmethod
    def build(cls, inputs: Mapping[str, Any]) -> Self:
        """From what ms-swift's collator returns for one micro-batch: the same on every rank that holds it.

        A sequence without a label takes no part: its values are 0, and ms-swift's loss masks them. Tokens behind a
        sequence's last label (padding of context or sequence parallelism) are left out.

        Raises:
            ValueError: inputs other than text, no labels, no token with a label, or a label on the first token of a
                sequence, which nothing predicts.
        """
        unknown = sorted(set(inputs) - _TEXT_KEYS)
        if unknown:
            raise ValueError(
                f"the micro-batch has {unknown[0]!r}, and prefix groups are made of token ids only; train multimodal "
                "prompts without the prefix-sharing plugin"
            )
        if inputs.get("labels") is None:
            raise ValueError(
                "the micro-batch has no labels, which tell responses from prompts; set task_type='causal_lm'"
            )
        ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
        prompts, responses, places = [], [], []
        for row, start, end in _spans(inputs, ids):
            marked = torch.nonzero(labels[row, start:end] != NO_LABEL).flatten()
            if not len(marked):
                continue
            first, last = start + int(marked[0]), start + int(marked[-1])
            if first == start:
                raise ValueError(
                    f"the sequence at row {row}, token {start} has a label on its first token, which nothing predicts; "
                    "give it a prompt"
                )
            prompts.append(ids[row, start:first])
            responses.append(ids[row, first : last + 1])
            places.append(row * ids.shape[1] + torch.arange(first - 1, last))
        if not prompts:
            raise ValueError("no token of the micro-batch has a label, so nothing can be learnt from it; drop it")
        sequences = pack_sequences(prompts, responses)
        gathered = sequences.gather(places)
        return cls(sequences, (ids.shape[0], ids.shape[1]), gathered, labels.flatten()[gathered + 1] != NO_LABEL)

    def to_frame(self, values: Tensor) -> Tensor:
        """[N] in the order of the pack's response rows -> the frame, 0 where no label is. Differentiable."""
        labelled = self.labelled.to(values.device)
        frame = values.new_zeros(self.shape[0] * self.shape[1])
        return frame.index_put((self.places.to(values.device)[labelled],), values[labelled]).view(self.shape)


def _spans(inputs: Mapping[str, Any], ids: Tensor) -> Iterator[tuple[int, int, int]]:
    """Row, first token and end of each sequence of the frame; also of padding, which has no label."""
    positions = inputs.get("text_position_ids")
    if positions is None:
        positions = inputs["position_ids"]
    rows, width = ids.shape
    for row in range(rows):
        starts = torch.nonzero(positions[row].cpu() == 0).flatten().tolist() if rows == 1 else [0]
        yield from ((row, start, end) for start, end in zip(starts, [*starts[1:], width], strict=True))
