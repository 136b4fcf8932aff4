"""The `prefix-grouper` package from PyPI (arXiv 2506.05433) as a peer, fed as its README says.

The package splits q, k and v of a group into a prefix and padded responses, calls an attention function of the user's
twice and puts the outputs together; the second call gets a copy of the prefix's keys and values for every response.
The attention function here is torch's CPU flash kernel, the same that impl="sdpa" calls, in two forms: one that honours
the padding masks that the package passes, with a causal mask over both calls as transformers' sdpa attention makes it,
and one tuned to this benchmark by hand, which knows that there is no padding.
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


def prefix_grouper_attention(sizes: GroupSizes, dtype: torch.dtype, *, tuned: bool) -> Attend:
    """Attention of q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D] by `PrefixGrouper.forward`.

    Args:
        tuned: make no mask for the prefix, and that of the responses once, instead of both from the padding masks.

    Raises:
        ImportError: the package is not installed.
    """
    from prefix_grouper import PrefixGrouper

    p, r, g = sizes.prefix_len, sizes.response_len, sizes.group_size
    grouper = PrefixGrouper([[p] + [r] * g], device="cpu", padding_mode="right")
    # torch's causal flag starts at the first key, so the response's rows, which start at key P, need their mask spelled
    # out; as an additive one it reaches the kernel without a conversion.
    later = ~torch.ones(r, p + r, dtype=torch.bool).tril(p)
    response_mask = torch.zeros(r, p + r, dtype=dtype).masked_fill_(later, -torch.inf)[None, None]

    def attention_function(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor) -> Tensor:
        """q, k, v [batch, heads, seq, D], padding_mask [batch, keys] -> [batch, seq, heads, D]."""
        queries, keys = q.shape[2], k.shape[2]
        how: dict[str, Any]
        if tuned:
            how = {"is_causal": True} if queries == keys else {"attn_mask": response_mask}
        else:
            causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            how = {"attn_mask": causal & padding_mask.bool()[:, None, None, :]}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True, **how).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return grouper.forward(attention_function, *heads_first).squeeze(0)

    return attend


def prefix_grouper_area(sizes: GroupSizes, *, tuned: bool) -> int:
    """(query, key) pairs that the two calls compute: a call with a mask is a full rectangle under it."""
    p, r, g = sizes.prefix_len, sizes.response_len, sizes.group_size
    return (p * (p + 1) // 2 if tuned else p * p) + g * r * (p + r)
