"""The `prefix-grouper` package from PyPI (arXiv 2506.05433) as a peer, fed as its README says.

The package splits q, k and v of a group into a prefix and padded responses, calls an attention function of the user's
twice and puts the outputs together; the second call gets a copy of the prefix's keys and values for every response.
The attention function here is torch's CPU flash kernel, the same that impl="sdpa" calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_prefix.bench.group import GroupSizes
from megatron_prefix.measure import package_version

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefix_grouper_status(device: torch.device) -> str:
    """ "compared", or why the package is not."""
    if package_version("prefix-grouper") is None:
        return "not installed"
    if device.type != "cpu":
        return f"compared on the CPU only, this is {device.type}"
    return "compared"


def prefix_grouper_attention(sizes: GroupSizes, dtype: torch.dtype) -> Attend:
    """Attention of q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D] by `PrefixGrouper.forward`.

    Indices and masks are made here, once per micro-batch, as the package does.

    Raises:
        ImportError: the package is not installed.
    """
    from prefix_grouper import PrefixGrouper

    p, r, g = sizes.prefix_len, sizes.response_len, sizes.group_size
    grouper = PrefixGrouper([[p] + [r] * g], device="cpu", padding_mode="right")
    # With equal lengths there is no padding. torch's causal flag starts at the first key, so the response's rows, which
    # start at key P, need their mask spelled out; as an additive one it reaches the kernel without a conversion.
    later = ~torch.ones(r, p + r, dtype=torch.bool).tril(p)
    response_mask = torch.zeros(r, p + r, dtype=dtype).masked_fill_(later, -torch.inf)[None, None]

    def attention_function(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor) -> Tensor:
        """q, k, v [batch, heads, seq, D] -> [batch, seq, heads, D]."""
        square = q.shape[2] == k.shape[2]
        how: dict[str, Any] = {"is_causal": True} if square else {"attn_mask": response_mask}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True, **how).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return grouper.forward(attention_function, *heads_first).squeeze(0)

    return attend


def prefix_grouper_area(sizes: GroupSizes) -> int:
    """(query, key) pairs that the two calls compute: the second is a full rectangle under its mask."""
    p, r, g = sizes.prefix_len, sizes.response_len, sizes.group_size
    return p * (p + 1) // 2 + g * r * (p + r)
