"""Prefix-grouped attention: shared prefixes are attended to once, without a copy of their keys.

Shapes: T rows of a pack, Hq query heads, Hkv key-value heads, D and Dv head dims.
"""

from megatron_prefix.attention.grouped import grouped_attention, layout_attention, prefix_grouped_attention
from megatron_prefix.attention.kernels import (
    IMPLS,
    KERNELS,
    WHOLE_LAYOUT,
    check_impl,
    kernel_named,
    known_impl,
    resolve_impl,
)
from megatron_prefix.attention.merge import merge_attention
from megatron_prefix.attention.reference import dense_mask, reference_attention

__all__ = [
    "IMPLS",
    "KERNELS",
    "WHOLE_LAYOUT",
    "check_impl",
    "dense_mask",
    "grouped_attention",
    "kernel_named",
    "known_impl",
    "layout_attention",
    "merge_attention",
    "prefix_grouped_attention",
    "reference_attention",
    "resolve_impl",
]
