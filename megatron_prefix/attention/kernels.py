"""The interface behind which attention kernels sit, and the choice of one by name.

To add a kernel: write a class with the methods of `Kernel` in a module of its own and list it in `KERNELS`. The tests
over `KERNELS` then hold it to the dense oracle, forward and backward. What is no varlen kernel but takes a layout as a
whole stands in `WHOLE_LAYOUT`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.attention.calls import AttentionCalls, VarlenCall
from megatron_prefix.attention.flash import AtenFlash, FlashKernel
from megatron_prefix.attention.flash_packages import FLASH2, FLASH3, FLASH4, PackagedFlash
from megatron_prefix.attention.flex import FlexAttention
from megatron_prefix.attention.reference import ReferenceAttention
from megatron_prefix.attention.sdpa import SdpaKernel
from megatron_prefix.attention.te import TeKernel


class Kernel(Protocol):
    """A varlen attention kernel with log-sum-exp in and out.

    Shapes: T rows, Hq and Hkv heads (Hkv divides Hq, keys are never expanded), D head dim. The last dimension of q, k,
    v and dout has stride 1, the others any.
    """

    mixed_head_dims: bool
    """Whether the head dim of v may differ from that of q and k."""

    contiguous: bool
    """Whether q, k, v, out and dout must be contiguous, because strides are not looked at."""

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """Why this kernel cannot run on such tensors, with the remedy, or None; asked before there are any."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Attention of one call over packed q [T, Hq, D], k and v [T, Hkv, D].

        Returns out [Tq, Hq, D] (dtype of q) and lse [Tq, Hq] (natural log, fp32, fp64 for fp64 input), with the
        Tq rows of ``call.q`` in order.
        """

    def backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> None:
        """Add the gradients of one call to ``grads`` = (dq, dk, dv), packed like q, k and v.

        ``dout`` and ``out`` [T, Hq, D] and ``lse`` [T, Hq] are those of the whole merged attention: with them the
        partial gradients of all calls add up to the exact ones (softmax over the union of the keys).
        """


class WholeLayout(Protocol):
    """Attention of a whole layout at once, with the backward of autograd: it gives no log-sum-exp to merge by, so it
    cannot be split over ranks or parts."""

    def refusal(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int, backward: bool
    ) -> str | None:
        """As `Kernel.refusal`; ``backward`` says whether gradients will be asked for."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, calls: AttentionCalls, softmax_scale: float) -> Tensor:
        """Attention over q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv] in the dtype of q."""


KERNELS: dict[str, Kernel] = {
    "sdpa": SdpaKernel(),
    "te": TeKernel(),
    "flash": FlashKernel(AtenFlash()),
    "flash2": FlashKernel(PackagedFlash(FLASH2)),
    "flash3": FlashKernel(PackagedFlash(FLASH3)),
    "flash4": FlashKernel(PackagedFlash(FLASH4)),
}
WHOLE_LAYOUT: dict[str, WholeLayout] = {"reference": ReferenceAttention(), "flex": FlexAttention()}
IMPLS = ("auto", *WHOLE_LAYOUT, *KERNELS)
AUTO = {"cpu": ("sdpa",), "cuda": ("te", "flash")}
"""What "auto" tries, the first choice first."""


def known_impl(impl: str) -> str:
    """``impl``.

    Raises:
        ValueError: an unknown name.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    return impl


def resolve_impl(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int | None = None
) -> str:
    """The implementation that ``impl`` names; "auto" is the first of `AUTO` for the device that takes such tensors.

    Args:
        device, dtype, head_dim: of q and k.
        head_dim_v: of v, where it differs.

    Raises:
        ValueError: an unknown name, or "auto" where no kernel takes such tensors (says why, of each).
    """
    if known_impl(impl) != "auto":
        return impl
    candidates = AUTO["cpu" if device.type == "cpu" else "cuda"]
    refusals = {name: KERNELS[name].refusal(device, dtype, head_dim, head_dim_v or head_dim) for name in candidates}
    for name, refusal in refusals.items():
        if refusal is None:
            return name
    raise ValueError("impl='auto' finds no kernel: " + "; ".join(str(why) for why in refusals.values()))


def kernel_named(impl: str) -> Kernel:
    """The kernel that a resolved ``impl`` names.

    Raises:
        ValueError: one of `WHOLE_LAYOUT`, which is none.
    """
    if impl in WHOLE_LAYOUT:
        raise ValueError(f"impl={impl!r} holds the whole mask and cannot be split over ranks or parts; use 'auto'")
    return KERNELS[impl]


def check_impl(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    cp_size: int = 1,
    has_parts: bool = False,
    backward: bool = True,
) -> str:
    """`resolve_impl` that also asks whether it can run there, before any tensor exists.

    Args:
        device, dtype, head_dim, head_dim_v: see `resolve_impl`.
        cp_size: context-parallel ranks.
        has_parts: whether groups are split over micro-batches.
        backward: whether gradients will be asked for.

    Raises:
        ValueError: an unknown name, or one that cannot run there; says why and what can.
    """
    name = resolve_impl(impl, device, dtype, head_dim, head_dim_v)
    tensors = (device, dtype, head_dim, head_dim_v or head_dim)
    if name in WHOLE_LAYOUT and cp_size == 1 and not has_parts:
        refusal = WHOLE_LAYOUT[name].refusal(*tensors, backward)
    else:
        refusal = kernel_named(name).refusal(*tensors)
    if refusal:
        raise ValueError(refusal)
    return name
