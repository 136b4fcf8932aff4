"""Upstream's packing context, with bins of prefix groups in it. Needs the Megatron-LM tree that the patch is for."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix.megatron_rl.bins import Bin, Sequences, make_bins


def pack_prefix_groups(
    packer: Any,
    trajectories: Tensor,
    generation_masks: Tensor,
    inference_log_probs: Tensor | None,
    advantages: Tensor,
    packing_algo: str,
) -> Any:
    """`pack_all_trajectories` of megatron/rl/sequence_packing_utils.py, from where it has gathered its inputs.

    Args:
        packer: upstream's `SequencePacker`, for its bin size and pad token. Its limit of sequences in a bin is one of
            cu_seqlens buffers, which there are none of here.
        trajectories: int64 [n, L] of all data-parallel ranks.
        generation_masks: bool [n, L].
        inference_log_probs: fp32 [n, L] of the generated tokens from the first one on, or None.
        advantages: [n].
        packing_algo: how bins go to ranks, upstream's `--rl-sequence-packing-algo`.

    Returns:
        upstream's `PackingContext`. In it a sequence is what has slots: the row before its first response token and
        its response, so `seq_lengths` are R_i + 1 and `original_generation_masks` begin there.

    Raises:
        ValueError: as `Sequences.of` and `make_bins`.
    """
    from megatron.rl import sequence_packing_utils as upstream

    device, slots = trajectories.device, packer.bin_size
    found = Sequences.of(trajectories, generation_masks)
    bins = make_bins(found, slots, parallel_state.get_data_parallel_world_size())
    masks = torch.zeros(len(trajectories), slots, dtype=torch.bool)
    lengths = [0] * len(trajectories)
    for number, mask in zip(found.numbers, found.masks, strict=True):
        masks[number, 1 : 1 + len(mask)] = mask
        lengths[number] = 1 + len(mask)
    in_bin: list[int | None] = [None] * len(trajectories)
    for index, each in enumerate(bins):
        for number in each.numbers:
            in_bin[number] = index
    tokens, positions, loss_mask = _tensors(bins, masks, lengths, packer.pad_token)
    info = upstream.PackingInfo(
        bin_seq_indices=[list(each.numbers) for each in bins],
        seq_starts={i: [*each.starts, each.sequences.pack.layout.num_rows] for i, each in enumerate(bins)},
        seq_lengths=lengths,
        seq_to_bin_idx=in_bin,
        packing_algo=packing_algo,
    )
    tokens, positions, loss_mask, info = upstream.distribute_packed_bins(
        tokens.to(device), positions.to(device), loss_mask.to(device), info
    )
    of_numbers = {each.numbers: each for each in bins} | {(): Bin.empty(packer.pad_token, slots)}
    context = upstream.PackingContext(
        bin_size=slots,
        packer=packer,
        packing_info=info,
        original_generation_masks=masks.to(device),
        original_trajs=trajectories,
        packed_trajs=tokens,
        packed_position_ids=positions,
        packed_loss_mask=loss_mask,
        original_inference_logprobs=inference_log_probs,
        bin_advantages=[advantages[numbers] for numbers in info.bin_seq_indices],
        cached_packed_seq_params=[of_numbers[tuple(numbers)] for numbers in info.bin_seq_indices],
    )
    upstream.log_packing_efficiency(context)
    return context


def _tensors(bins: list[Bin], masks: Tensor, lengths: list[int], pad_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions of the rows, and the loss mask, each [B, S]. The mask of slot t stands at t + 1."""
    slots = bins[0].num_slots
    tokens = torch.full((len(bins), slots), pad_token, dtype=torch.long)
    positions = torch.zeros(len(bins), slots, dtype=torch.long)
    loss_mask = torch.zeros(len(bins), slots)
    for i, each in enumerate(bins):
        pack = each.sequences.pack
        tokens[i, : len(pack.tokens)] = pack.tokens
        positions[i, : len(pack.positions)] = pack.positions
        for number, start in zip(each.numbers, each.starts, strict=True):
            length = lengths[number]
            loss_mask[i, start + 1 : start + length] = masks[number, 1:length].float()
    return tokens, positions, loss_mask
