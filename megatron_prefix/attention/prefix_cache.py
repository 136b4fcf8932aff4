"""The keys and values of a prefix whose responses are in other micro-batches, and the way back of their gradients.

While the prefix is encoded, each layer's K and V leave through `PrefixCache.export`. Response micro-batches read them
and add to the sums of dK and dV (`CachedKeys`); nothing of their graphs touches the prefix's. When all have run, the
prefix's own backward passes the exports again, which add the sums to the gradients that come from the prefix itself.
That also holds under activation recompute, where K and V inside a checkpointed layer belong to no outer graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.grouped import CachedKeys, fit_kernel
from megatron_prefix.attention.kernels import Kernel

PREFIX_GRAD_DTYPES = ("fp32", "param")
"""Settings of `PrefixCache`: fp32 (fp64 for fp64 keys), or the dtype of the keys, which is that of the parameters."""


class PrefixCache:
    """Keys of one prefix pack on one pipeline stage, by layer number. Lives for one step.

    Args:
        num_rows: rows of the prefix pack.
        grad_dtype: in which the gradients of all parts add up, one of `PREFIX_GRAD_DTYPES`. "param" takes half the
            memory in half precision, and rounds once more for every part.
    """

    def __init__(self, num_rows: int, grad_dtype: str = "fp32") -> None:
        self.num_rows = num_rows
        self.grad_dtype = grad_dtype
        self._layers: dict[int, CachedKeys] = {}

    def export(self, layer: int, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Keep k [C, Hkv, D] and v [C, Hkv, Dv] of ``layer``; returns the same with the gradient sums in their graph.

        A recomputed forward leaves the cache as it is.

        Raises:
            ValueError: tensors that the kernel cannot take.
        """
        self._keep(layer, k, v, kernel)
        return _Export.apply(k, v, self._layers[layer])

    def export_only(self, layer: int, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        """As `export` for a layer that nothing follows: an empty tensor [0] that carries the backward."""
        self._keep(layer, k, v, kernel)
        return _ExportOnly.apply(k, v, self._layers[layer])

    def keys(self, layer: int) -> CachedKeys:
        """What ``layer`` exported.

        Raises:
            ValueError: it exported nothing in this step.
        """
        if layer not in self._layers:
            raise ValueError(
                f"layer {layer} has no keys of this prefix: its prefix pack must run before its responses in a step"
            )
        return self._layers[layer]

    def release(self, layers: Iterable[int]) -> None:
        """Free what these layers exported: all that read it are done."""
        for layer in layers:
            self._layers.pop(layer, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and gradient sums."""
        tensors = [x for keys in self._layers.values() for x in (keys.k, keys.v, *(keys.sums or ()))]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _keep(self, layer: int, k: Tensor, v: Tensor, kernel: Kernel) -> None:
        if layer not in self._layers:
            _, key, value = fit_kernel(k, k.detach(), v.detach(), kernel)
            # A copy: what the layer returns may be freed, or overwritten by an in-place rotary embedding.
            sums = k.dtype if self.grad_dtype == "param" else torch.promote_types(k.dtype, torch.float32)
            self._layers[layer] = CachedKeys(key.clone(), value.clone(), sums)


@dataclass(frozen=True)
class SplitLayer:
    """One layer's part in a micro-batch of a split group.

    Attributes:
        cache: of the group's prefix.
        number: of the layer.
        reads: whether the micro-batch is a part, which reads keys; else it is the prefix, whose keys leave.
        keys_only: whether the prefix needs nothing of this layer but its keys.
    """

    cache: PrefixCache
    number: int
    reads: bool
    keys_only: bool = False

    def export(self, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """See `PrefixCache.export`."""
        return self.cache.export(self.number, k, v, kernel)

    def export_only(self, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        """See `PrefixCache.export_only`."""
        return self.cache.export_only(self.number, k, v, kernel)

    def keys(self) -> CachedKeys:
        """See `PrefixCache.keys`."""
        return self.cache.keys(self.number)


class _Export(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, keys: CachedKeys) -> tuple[Tensor, Tensor]:
        ctx.keys = keys
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.keys.gradients()
        return (*(_add(grad, total) for grad, total in zip((dk, dv), sums, strict=True)), None)


class _ExportOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, keys: CachedKeys) -> Tensor:
        ctx.keys, ctx.like = keys, (k.dtype, k.shape[-1], v.shape[-1])
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        dtype, width, width_v = ctx.like
        dk, dv = ctx.keys.gradients()
        return dk[..., :width].to(dtype), dv[..., :width_v].to(dtype), None


def _add(grad: Tensor, total: Tensor) -> Tensor:
    """grad [C, H, D] plus the sums, which may have padding columns; added in the wider dtype of the two."""
    return (total[..., : grad.shape[-1]] + grad).to(grad.dtype)
