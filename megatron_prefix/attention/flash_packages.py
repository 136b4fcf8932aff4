"""`impl="flash2"`, `"flash3"` and `"flash4"`: the flash attention packages, imported when first used.

    flash2  flash-attn 2.7, 2.8  flash_attn.flash_attn_interface: _flash_attn_varlen_forward and ..._backward
    flash3  flash_attn_3         flash_attn_interface (upstream's hopper/): _flash_attn_forward and ..._backward
    flash4  flash-attn-4         flash_attn.cute.interface: _flash_attn_fwd and _flash_attn_bwd

All take packed rows with cu_seqlens, write dq, dk and dv into tensors that they are given, and lay the log-sum-exp out
as [heads, rows]. Their arguments differ between packages and versions: `Launch` binds them by name, once, and says what
is missing before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall
from megatron_prefix.attention.flash import FlashLimits

_RANGES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = ("q", "k", "v", *_RANGES, "softmax_scale", "causal")
_BACKWARD = (*_FORWARD, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
_RENAMED = {"causal": "is_causal", "softmax_lse": "lse"}


@dataclass(frozen=True)
class FlashPackage:
    """Where a package has its launches, and what it asks for.

    Attributes:
        limits: hardware and shapes.
        distribution: its name for pip.
        module: imported on first use.
        forward, backward: functions of the module.
        mixed_head_dims: see `megatron_prefix.attention.kernels.Kernel`.
        marks: arguments of ``forward`` by which a version shows that it returns (out, lse, ...), with their values.
        asked: values of what some version asks for and that never varies here.
    """

    limits: FlashLimits
    distribution: str
    module: str
    forward: str
    backward: str
    mixed_head_dims: bool = False
    marks: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)


class Launch:
    """A function of a package, called with the names that its installed version has for the arguments.

    Args:
        package: to find it, and to name it in errors.
        name: of the function.
        arguments: names that every call gives.
        marks: what it must take beside them.

    Raises:
        ImportError: the package is not installed or cannot be imported, or its version has not this function, lacks
            an argument, or asks for one that is not known here. Names the package, its version and what is missing.
    """

    def __init__(self, package: FlashPackage, name: str, arguments: Sequence[str], marks: Mapping[str, Any]) -> None:
        what = f"{package.distribution} {_version(package.distribution)}"
        try:
            module = import_module(package.module)
        except ImportError as error:
            raise ImportError(f"{what}: {package.module} cannot be imported ({error})") from error
        self.function: Any = getattr(module, name, None)
        if self.function is None:
            raise ImportError(f"{what}: {package.module} has no {name}")
        # A custom operator is callable with anything; the names are those of the function that it was made from.
        parameters = inspect.signature(getattr(self.function, "_init_fn", self.function)).parameters
        self.names = {each: each if each in parameters else _RENAMED.get(each, each) for each in arguments}
        given = {*self.names.values(), *marks}
        asked = {each for each, parameter in parameters.items() if parameter.default is parameter.empty} - given
        problems = {"lacks": given - set(parameters), "asks for": asked - set(package.asked)}
        found = [f"{verb} {', '.join(sorted(names))}" for verb, names in problems.items() if names]
        if found:
            raise ImportError(f"{what}: {name} {' and '.join(found)}")
        self.fixed = {each: value for each, value in package.asked.items() if each in asked} | dict(marks)

    def __call__(self, **arguments: Any) -> Any:
        return self.function(**{self.names[each]: value for each, value in arguments.items()}, **self.fixed)


class PackagedFlash:
    """The launches of a package. See `megatron_prefix.attention.flash.FlashLibrary`."""

    def __init__(self, package: FlashPackage) -> None:
        self.package = package
        self.mixed_head_dims = package.mixed_head_dims

    @cached_property
    def launches(self) -> tuple[Launch, Launch]:
        """Forward and backward of the installed version; the package is imported here.

        Raises:
            ImportError: see `Launch`.
        """
        package = self.package
        forward = Launch(package, package.forward, _FORWARD, package.marks)
        return forward, Launch(package, package.backward, _BACKWARD, {})

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """CUDA tensors of bf16 or fp16, with the GPUs and head dims of the package, where its version is usable."""
        limits = self.package.limits
        if not self.mixed_head_dims:
            head_dim = head_dim_v = max(head_dim, head_dim_v)  # the narrower one is padded
        refusal = limits.refusal(device, dtype, head_dim, head_dim_v)
        if refusal is None:
            try:
                _ = self.launches
            except ImportError as error:
                return f"impl={limits.impl!r} has no usable package: {error}; install one or use impl='flash'"
        return refusal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """See `FlashLibrary`."""
        out, lse, *_ = self.launches[0](**_arguments((q, k, v), call, softmax_scale))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashLibrary`; deterministic where torch's algorithms have to be."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv)
        self.launches[1](
            **_arguments(qkv, call, softmax_scale),
            dout=dout,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _arguments(qkv: tuple[Tensor, Tensor, Tensor], call: VarlenCall, softmax_scale: float) -> dict[str, Any]:
    """What forward and backward have in common."""
    ranges = (call.q.cu_seqlens, call.kv.cu_seqlens, call.q.max_seqlen, call.kv.max_seqlen)
    return dict(zip(_FORWARD, (*qkv, *ranges, softmax_scale, call.causal), strict=True))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _flash3_head_dims(major: int | None, head_dim: int, head_dim_v: int) -> str | None:
    if head_dim > 192 and torch.are_deterministic_algorithms_enabled():
        return f"head dims up to 192 while torch's algorithms are deterministic, got {head_dim}"
    return None


def _flash4_head_dims(major: int | None, head_dim: int, head_dim_v: int) -> str | None:
    dims = (head_dim, head_dim_v)
    if major in (10, 11) and max(dims) > 128 and dims not in ((192, 128), (256, 256)):
        return f"head dims up to 128, (192, 128) or (256, 256) on sm{major}x, got {dims}"
    return None


FLASH2 = FlashPackage(
    FlashLimits("flash2", range(8, 100), "a GPU from sm80 on", "reference"),
    distribution="flash-attn",
    module="flash_attn.flash_attn_interface",
    forward="_flash_attn_varlen_forward",
    backward="_flash_attn_varlen_backward",
    # Before 2.7 it took a pair, and returned padded tensors before the log-sum-exp.
    marks={"window_size_left": -1, "window_size_right": -1},
    asked={"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None},
)

FLASH3 = FlashPackage(
    FlashLimits("flash3", (9,), "an sm90 GPU", "flash", head_dims=_flash3_head_dims),
    distribution="flash_attn_3",
    module="flash_attn_interface",
    forward="_flash_attn_forward",
    backward="_flash_attn_backward",
    # Up to 3.0.0.b1 the tensors of decoding, paging and fp8 have no default; the last two are spelled so.
    asked=dict.fromkeys(
        (
            *("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table"),
            *("kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"),
            *("q_descale", "k_descale", "v_descale", "sequed_q", "sequed_k"),
        )
    ),
)

FLASH4 = FlashPackage(
    # Its backward also has sm120, which has no deterministic one.
    FlashLimits("flash4", (9, 10, 11), "an sm90, sm100 or sm110 GPU", "flash", head_dims=_flash4_head_dims),
    distribution="flash-attn-4",
    module="flash_attn.cute.interface",
    forward="_flash_attn_fwd",
    backward="_flash_attn_bwd",
    mixed_head_dims=True,
    marks={"return_lse": True},
)
