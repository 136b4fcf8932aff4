"""Rotary embeddings with a table of angles."""

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotate t [s, b, h, d] by freqs, fp32 [at least s, 1, 1, at most d], as the fused kernel does: row i by freqs[i].

    Packed sequences ("thd") are refused: there the kernel begins again with freqs[0] at every sequence, which is wrong
    for responses that continue a prefix.
    """
    assert fused and tensor_format == "sbhd" and start_positions is None and cu_seqlens is None and cp_size == 1
    rows, width = t.shape[0], freqs.shape[-1]
    assert t.dim() == 4 and freqs.shape[0] >= rows and freqs.shape[1:3] == (1, 1) and not interleaved
    angles = freqs[:rows].float()
    cos, sin = angles.cos().to(t.dtype), angles.sin().to(t.dtype)
    rotated, rest = t[..., :width], t[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)
