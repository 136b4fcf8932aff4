"""The real ``fused_attn.py`` of Transformer Engine's wheels, over a stand-in for its compiled functions only.

The stand-in computes with torch's CPU flash kernel and follows the contract of ``tex.fused_attn_fwd`` and
``tex.fused_attn_bwd`` (their C++ signatures in ``pytorch/csrc/extensions/attention.cpp``, and the docstrings of
``fused_attn.py``): arguments by position, one list per version; strides are not looked at; without both padded offsets
ranges stand together; what belongs to no range is not written; the log-sum-exp is [T, H, 1] or [B, H, S, 1].
"""

import contextlib
import enum
import importlib
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_prefix.attention.te import TeKernel
from megatron_prefix.attention.te_library import FusedAttention, TeSupport
from tests.downloads import downloaded

VERSIONS = ("2.8.0", "2.10.0", "2.12.0", "2.15.0", "2.18.0", "2.20.2")
PACKED, DENSE = (10, 0), (12, 0)
"""Compute capabilities with a log-sum-exp per row, and with a dense one."""

_ENDS = ("cu_q", "cu_kv", "q", "k", "v")
_FORWARD = ["max_q", "max_kv", "is_training", "scale", "dropout", "zero_fill", "layout", "bias", "mask", "softmax"]
_FORWARD += ["window", *_ENDS, "dtype", "cu_q_padded", "cu_kv_padded", "page_k", "page_v", "s_quantizer"]
_FORWARD += ["o_quantizer", "attn_bias", "softmax_offset", "generator", "rng_elements"]
_BACKWARD = ["max_q", "max_kv", "scale", "dropout", "zero_fill", "layout", "bias", "mask", "softmax", "window"]
_BACKWARD += ["deterministic", *_ENDS, "o", "do", "dtype", "dqkv_dtype", "aux", "cu_q_padded", "cu_kv_padded"]
_BACKWARD += ["s_quantizer", "dp_quantizer", "dqkv_quantizer"]


def _argument_names(version: tuple[int, int]) -> tuple[list[str], list[str]]:
    """Names of the positional arguments of ``tex.fused_attn_fwd`` and ``tex.fused_attn_bwd``."""
    forward, backward = list(_FORWARD), list(_BACKWARD)
    if version >= (2, 10):
        forward += ["return_max_logit", "cuda_graph"]
        backward += ["cuda_graph"]
    if version >= (2, 12):
        for names in (forward, backward):
            names.insert(names.index("window") + 1, "bottom_right")
    if version >= (2, 15):
        backward.remove("dqkv_dtype")
        forward[7:7] = ["o_format", "scale_inv_format"]
        backward[6:6] = ["o_format", "do_format", "dqkv_layout", "scale_inv_format", "do_scale_inv_format"]
    return forward, backward


class CompiledFunctions:
    """``tex.fused_attn_fwd`` and ``tex.fused_attn_bwd`` of one version on the CPU."""

    def __init__(self, version: tuple[int, int], packed_stats: bool) -> None:
        self.version, self.packed_stats = version, packed_stats
        self.forward_names, self.backward_names = _argument_names(version)
        self.launches: list[dict[str, Any]] = []

    def fused_attn_fwd(self, *values: Any) -> list[Tensor]:
        given = self._checked(dict(zip(self.forward_names, values, strict=True)))
        assert given["is_training"] and given["page_k"] is None and given["generator"] is None
        q, k, v = given["q"], given["k"], given["v"]
        out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=q.dtype)
        stats = torch.full((len(q), q.shape[1]), torch.nan)
        dense = torch.full((len(given["cu_q"]) - 1, q.shape[1], given["max_q"], 1), torch.nan)
        for i, (rows, keys) in enumerate(_ranges(given)):
            result, lse = _flash_forward(q[rows], k[keys], v[keys], given)
            out[rows], stats[rows] = result, lse.T
            dense[i, :, : lse.shape[1], 0] = lse
        return [out, stats.unsqueeze(-1) if self.packed_stats else dense, torch.zeros(2, dtype=torch.int64)]

    def fused_attn_bwd(self, *values: Any) -> list[Tensor | None]:
        given = self._checked(dict(zip(self.backward_names, values, strict=True)))
        q, k, v, out, dout = (given[name] for name in ("q", "k", "v", "o", "do"))
        stats, rng_state = given["aux"]
        assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
        dense = (len(given["cu_q"]) - 1, q.shape[1], given["max_q"], 1)
        assert stats.shape == ((len(q), q.shape[1], 1) if self.packed_stats else dense), stats.shape
        assert stats.is_contiguous() and stats.dtype == torch.float32
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for i, (rows, keys) in enumerate(_ranges(given)):
            lse = stats[rows, :, 0].T if self.packed_stats else stats[i, :, : rows.stop - rows.start, 0]
            parts = _flash_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse, given)
            dq[rows], dk[keys], dv[keys] = parts
        return [dq, dk, dv, None, None]

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        self.launches.append(given)
        names = {name: str(given[name]) for name in ("layout", "o_format", "do_format", "dqkv_layout") if name in given}
        expected = {"layout": "NVTE_THD_THD_THD", "dqkv_layout": "NVTE_THD_THD_THD"}
        wrong = {name: value for name, value in names.items() if value != expected.get(name, "NVTE_THD")}
        if wrong:
            raise ValueError(f"tensors of three dimensions are not {wrong}")
        assert str(given["bias"]) == "NVTE_NO_BIAS" and str(given["softmax"]) == "NVTE_VANILLA_SOFTMAX"
        assert (str(given["mask"]), given["window"]) in (
            ("NVTE_PADDING_CAUSAL_MASK", (-1, 0)),
            ("NVTE_PADDING_MASK", (-1, -1)),
        )
        assert given["dropout"] == 0.0 and not given.get("bottom_right", False)
        assert given["dtype"] == given["q"].dtype
        for name in ("cu_q", "cu_kv", "cu_q_padded", "cu_kv_padded"):
            assert given[name] is None or (given[name].dtype == torch.int32 and given[name].is_contiguous()), name
        for name in ("q", "k", "v", "o", "do"):
            if name in given:  # memory is read as if it were contiguous
                x = given[name]
                strides = torch.empty(x.shape, device="meta").stride()
                given[name] = x.as_strided(x.shape, strides, x.storage_offset())
        return given


def _ranges(given: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """Rows of q and of k of every sequence."""
    padded = given["cu_q_padded"] is not None and given["cu_kv_padded"] is not None
    sides = []
    for side in ("q", "kv"):
        lengths = given[f"cu_{side}"].diff().tolist()
        starts = given[f"cu_{side}_padded" if padded else f"cu_{side}"].tolist()
        assert max(lengths) <= given[f"max_{side}"]
        assert all(n <= end - start for n, (start, end) in zip(lengths, itertools.pairwise(starts), strict=True))
        sides.append([slice(start, start + n) for start, n in zip(starts, lengths, strict=False)])
    for rows, keys in zip(*sides, strict=True):
        assert rows.start == rows.stop or keys.start < keys.stop, "queries without keys"
        yield rows, keys


def _bhsd(x: Tensor, width: int) -> Tensor:
    return pad(x, (0, width - x.shape[-1])).transpose(0, 1).unsqueeze(0)


def _is_causal(given: dict[str, Any]) -> bool:
    return str(given["mask"]) == "NVTE_PADDING_CAUSAL_MASK"


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out [n, H, Dv] and lse [H, n] of one sequence."""
    width = max(q.shape[2], v.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_bhsd(x, width) for x in (q, k, v)), 0.0, _is_causal(given), scale=given["scale"]
    )
    return out[0].transpose(0, 1)[..., : v.shape[2]], lse[0]


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, given: dict[str, Any]
) -> list[Tensor]:
    width = max(q.shape[2], v.shape[2])
    wide = [_bhsd(x, width) for x in (dout, q, k, v, out)]
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, lse.unsqueeze(0).contiguous(), 0.0, _is_causal(given), scale=given["scale"]
    )
    return [part[0].transpose(0, 1)[..., : x.shape[2]] for part, x in zip(parts, (q, k, v), strict=True)]


# ---- the module that Transformer Engine's Python files import


class _Names(type):
    """A class whose members are made as they are asked for; each knows its name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = cls()
        member.name = name
        setattr(cls, name, member)
        return member


class _Member:
    name: str

    def __str__(self) -> str:
        return self.name

    def __int__(self) -> int:
        return sum(self.name.encode())


_DTYPES = ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
_BACKENDS = ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8")


class _Compiled(ModuleType):
    """``transformer_engine_torch``."""

    def __init__(self, functions: CompiledFunctions) -> None:
        super().__init__("transformer_engine_torch")
        backends = _BACKENDS if functions.version >= (2, 18) else (*_BACKENDS, "NVTE_F16_max512_seqlen")
        self.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
        self.DType = enum.IntEnum("DType", _DTYPES)
        self.fused_attn_fwd, self.fused_attn_bwd = functions.fused_attn_fwd, functions.fused_attn_bwd

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (_Member,), {})
        setattr(self, name, made)
        return made


@contextlib.contextmanager
def importable(folder: Path, functions: CompiledFunctions) -> Iterator[None]:
    """Inside, modules of the unpacked wheel can be imported; their packages' own ``__init__`` is left out."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("transformer_engine")}
    sys.modules["transformer_engine_torch"] = _Compiled(functions)
    for name in ("", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.tensor"):
        package = ModuleType(f"transformer_engine{name}")
        package.__path__ = [str(folder.joinpath("transformer_engine", *name.split(".")[1:]))]
        sys.modules[package.__name__] = package
    for name in ("tensor.quantized_tensor", "quantized_tensor"):
        quantized: Any = ModuleType(f"transformer_engine.pytorch.{name}")
        quantized.Quantizer = object
        sys.modules[quantized.__name__] = quantized
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update(hidden)


@cache
def te_module(version: str, packed_stats: bool) -> tuple[ModuleType, Any, CompiledFunctions]:
    """(``fused_attn`` of this version, its ``TE_DType``, the compiled functions that it calls)."""
    functions = CompiledFunctions(te_version(version), packed_stats)
    with importable(downloaded(f"transformer-engine=={version}"), functions):
        module = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
        dtypes = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
    return module, dtypes, functions


def te_version(version: str) -> tuple[int, int]:
    major, minor, _ = version.split(".")
    return int(major), int(minor)


class TeOnCpu(TeKernel):
    """The kernel's class over the real Python sources of one version: its offsets, layouts and sums are real."""

    def __init__(self, version: str, arch: tuple[int, int] = PACKED) -> None:
        self.facts = TeSupport(te_version(version), (9, 20, 0), arch)
        module, dtypes, self.compiled = te_module(version, self.facts.packed_stats)
        self._library = FusedAttention(module, version, self.facts.packed_stats, dtypes)

    def refusal(self, *args: Any) -> str | None:
        return None

    def support(self, device: torch.device) -> TeSupport:
        return self.facts
