"""Flash attention libraries on the CPU: the packages' own Python sources over stand-ins for their compiled functions.

The stand-ins compute what the compiled functions are documented to compute, slowly and in fp32, and insist on what
those need: int32 offsets that end at the last row, the longest range, unit strides.
"""

import ast
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prefix.attention import flash
from megatron_prefix.attention.flash import AtenFlash
from megatron_prefix.attention.flash_packages import FLASH2, FLASH3, FLASH4, FlashPackage, PackagedFlash
from tests.downloads import downloaded

Given = dict[str, Any]

# ---- what the compiled functions compute


def ranges_of(cu_seqlens: Tensor, rows: int, longest: int) -> list[slice]:
    """The ranges between offsets, which must cover ``rows`` rows, none empty and one of the length ``longest``."""
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    ranges = [slice(*pair) for pair in itertools.pairwise(cu_seqlens.tolist())]
    assert ranges[0].start == 0 and ranges[-1].stop == rows and type(longest) is int
    assert min(each.stop - each.start for each in ranges) > 0
    assert max(each.stop - each.start for each in ranges) == longest
    return ranges


def varlen_ranges(given: Given) -> list[tuple[slice, slice]]:
    q, k = (
        ranges_of(given[f"cu_seqlens_{name}"], len(given[name]), given[f"max_seqlen_{name}"]) for name in ("q", "k")
    )
    return list(zip(q, k, strict=True))


def varlen_forward(given: Given) -> tuple[Tensor, Tensor]:
    """Out [Tq, Hq, Dv] in the dtype of q and log-sum-exp [Hq, Tq] in fp32."""
    assert all(given[name].stride(-1) == 1 for name in ("q", "k", "v"))
    q, k, v = (given[name].float() for name in ("q", "k", "v"))
    scale = given["softmax_scale"]
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0])
    for rows, keys in varlen_ranges(given):
        key, value = (x[keys].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[rows], key) * scale
        if given["causal"]:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        out[rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
        lse[:, rows] = scores.logsumexp(-1)
    return out.to(given["q"].dtype), lse


def varlen_backward(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) with P = exp(scores - lse) of the given log-sum-exp, and D = sum(dout * out)."""
    assert all(given[name].stride(-1) == 1 for name in ("q", "k", "v"))
    assert all(given[name].is_contiguous() for name in ("dout", "out", "lse")) and given["lse"].dtype == torch.float32
    q, k, v, dout, out = (given[name].float() for name in ("q", "k", "v", "dout", "out"))
    lse, scale = given["lse"], given["softmax_scale"]
    assert lse.shape == (q.shape[1], q.shape[0]) and out.shape == dout.shape == (*q.shape[:2], v.shape[2])
    repeat = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in varlen_ranges(given):
        key, value = (x[keys].repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[rows], key) * scale
        p = (scores - lse[:, rows].unsqueeze(-1)).exp()
        if given["causal"]:
            p = p.tril()
        delta = (dout[rows] * out[rows]).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("ihd,jhd->hij", dout[rows], value) - delta) * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", ds, key)
        for total, weights, x in ((dk, ds, q), (dv, p, dout)):
            total[keys] = torch.einsum("hij,ihd->jhd", weights, x[rows]).unflatten(1, (-1, repeat)).sum(2)
    return dq.to(given["q"].dtype), dk.to(given["q"].dtype), dv.to(given["q"].dtype)


# ---- as functions with the arguments of each library

SYNONYMS = {
    "is_causal": "causal",
    "softmax_lse": "lse",
    "scale": "softmax_scale",
    "max_q": "max_seqlen_q",
    "max_k": "max_seqlen_k",
}
USED = {
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"),
    *("dout", "out", "lse", "dq", "dk", "dv", "deterministic", "return_lse", "rng_state", "unused"),
}


def stand_in(parameters: str, compute: Callable[[Given], Any]) -> Callable[..., Any]:
    """``compute`` of the arguments by name, as a function with these parameters.

    What a stand-in does not compute must be left off: at its default, or None, 0 or False where it has none. The
    compiled functions have no defaults upstream: those below are the values that leave a feature off.
    """
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def launch(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            off = (None, 0) if default is inspect.Parameter.empty else (default,)
            assert SYNONYMS.get(name, name) in USED or value in off, f"{name}={value}"
        return compute({SYNONYMS.get(name, name): value for name, value in bound.arguments.items()})

    launch.__signature__ = signature  # type: ignore[attr-defined]
    return launch


def forward_and_empty(given: Given) -> tuple[Tensor, ...]:
    """Out, log-sum-exp and two tensors that nobody reads; for one head dim."""
    assert given["k"].shape == given["v"].shape
    return *varlen_forward(given), torch.empty(0), torch.empty(0)


def backward_into(given: Given) -> tuple[Tensor, ...]:
    """The gradients, in the tensors that are given for them, and what the libraries call softmax_d."""
    assert given["deterministic"] == torch.are_deterministic_algorithms_enabled()
    for name, gradient in zip(("dq", "dk", "dv"), varlen_backward(given), strict=True):
        assert given[name].shape == gradient.shape and given[name].is_contiguous()
        given[name].copy_(gradient)
    return given["dq"], given["dk"], given["dv"], torch.empty(0)


# torch 2.11 to 2.14: aten::_flash_attention_forward and ..._backward
ATEN_FORWARD = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale"
ATEN_BACKWARD = (
    "dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, "
    "*, scale"
)
# flash-attn 2.8.3: mha_varlen_fwd and mha_varlen_bwd of csrc/flash_attn/flash_api.cpp
FLASH2_FORWARD = (
    "q, k, v, out_, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q, "
    "max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left=-1, window_size_right=-1, "
    "softcap=0.0, return_softmax=False, gen=None"
)
FLASH2_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q, "
    "max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left=-1, window_size_right=-1, "
    "softcap=0.0, deterministic=False, gen=None, rng_state=None"
)
# flash_attn_3 3.0.0.b1: fwd and bwd of hopper/flash_api.cpp
FLASH3_FORWARD = (
    "q, k, v, k_new, v_new, q_v, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, "
    "max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, "
    "q_descale, k_descale, v_descale, softmax_scale, is_causal, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, is_rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
    "pack_gqa=None, sm_margin=0"
)
FLASH3_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, "
    "max_seqlen_k, softmax_scale, is_causal, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "deterministic=False, sm_margin=0"
)
# flash_attn_3 3.0.0, which is on no index: _flash_attn_forward and _flash_attn_backward of flash_attn_interface.py
FLASH3_NEW_FORWARD = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, "
    "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
    "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, "
    "v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, "
    "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
)
FLASH3_NEW_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, "
    "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0"
)


# ---- the libraries


class OnCpu(PackagedFlash):
    """A package's launches, bound to what was found at its construction, for CPU tensors."""

    def __init__(self, package: FlashPackage) -> None:
        super().__init__(package)
        _ = self.launches

    def refusal(self, *args: Any) -> str | None:
        return None


class AtenOnCpu(AtenFlash):
    """torch's launches for CPU tensors; needs `aten_stand_ins`."""

    def refusal(self, *args: Any) -> str | None:
        return None


def aten_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Put stand-ins in the place of torch's two CUDA operators."""
    patch.setattr(flash, "_forward", stand_in(ATEN_FORWARD, forward_and_empty))
    patch.setattr(flash, "_backward", stand_in(ATEN_BACKWARD, varlen_backward))


@contextmanager
def importable(folder: Path | None, modules: dict[str, Any]) -> Iterator[None]:
    """Imports find ``folder`` first, and ``modules``; nothing of them stays."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.syspath_prepend(str(folder))
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface"):
            del sys.modules[name]


def sources(package: str) -> Path:
    """Folder on which the package's modules lie, as pip has them."""
    if package == "flash-attn-4":
        return downloaded("flash-attn-4==4.0.0b36")
    return downloaded("flash-attn==2.8.3") / "flash_attn-2.8.3" / ("hopper" if package == "flash_attn_3" else "")


@cache
def flash2() -> OnCpu:
    """flash-attn 2.8.3: its Python is real, its custom operators too."""
    functions = SimpleNamespace(
        varlen_fwd=stand_in(FLASH2_FORWARD, forward_and_empty), varlen_bwd=stand_in(FLASH2_BACKWARD, backward_into)
    )
    with importable(sources("flash-attn"), {"flash_attn_2_cuda": functions}):
        module: Any = import_module("flash_attn.flash_attn_interface")
        for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
            operator = getattr(module, name)
            operator.register_kernel("cpu")(operator._init_fn)
        return OnCpu(FLASH2)


@cache
def flash3() -> OnCpu:
    """FlashAttention-3 3.0.0.b1, whose Python is in flash-attn's source archive."""
    parent = ModuleType("flash_attn_3")
    with importable(sources("flash_attn_3"), {"flash_attn_3": parent, "flash_attn_3._C": ModuleType("_C")}):
        module: Any = import_module("flash_attn_interface")
        module.flash_attn_3_cuda = SimpleNamespace(
            fwd=stand_in(FLASH3_FORWARD, forward_and_empty), bwd=stand_in(FLASH3_BACKWARD, backward_into)
        )
        return OnCpu(FLASH3)


@cache
def flash3_new() -> OnCpu:
    """FlashAttention-3 3.0.0 by its signatures: the backward returns softmax_d alone."""
    return by_signature(
        FLASH3,
        stand_in(FLASH3_NEW_FORWARD, forward_and_empty),
        stand_in(FLASH3_NEW_BACKWARD, lambda given: backward_into(given)[-1]),
    )


@cache
def flash4(version: str) -> OnCpu:
    """flash-attn-4 by the signatures in its wheel: its Python compiles kernels and cannot be imported without CUDA."""
    path = downloaded(f"flash-attn-4=={version}") / "flash_attn" / "cute" / "interface.py"

    def forward(given: Given) -> tuple[Tensor | None, ...]:
        out, lse = varlen_forward(given)
        return (out, lse if given["return_lse"] else None, None, None, None)

    return by_signature(
        FLASH4,
        stand_in(parameters_of(path, FLASH4.forward), forward),
        stand_in(parameters_of(path, FLASH4.backward), lambda given: backward_into(given)[:3]),
    )


def by_signature(package: FlashPackage, forward: Any, backward: Any) -> OnCpu:
    """A package that has nothing but these two functions."""
    module = SimpleNamespace(**{package.forward: forward, package.backward: backward})
    with importable(None, {package.module: module}):
        return OnCpu(package)


def parameters_of(path: Path, name: str) -> str:
    """The parameters of a function in a source file, without their types."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    (found,) = (node.args for node in functions if node.name == name)
    for each in (*found.args, *found.kwonlyargs):
        each.annotation = None
    return ast.unparse(found)
