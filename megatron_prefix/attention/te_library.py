"""Transformer Engine's fused attention behind one signature, for the versions 2.8 to 2.20.

Source: ``transformer_engine.pytorch.cpp_extensions.fused_attn``: ``fused_attn_fwd`` and ``fused_attn_bwd``, with thd
tensors. What changed over the versions: 2.15 added ``o_format``, ``do_format`` and ``dqkv_layout`` (their defaults are
sbhd) and dropped ``dqkv_dtype``; the log-sum-exp is one row per query from cuDNN 9.6 on, and dense before that and on
sm120. Which support rules hold is `TeSupport`'s to say.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.attention.calls import Rows, VarlenCall

SUPPORTED = "2.8 to 2.20"
_FIRST, _BEHIND_LAST = (2, 8), (2, 21)
_OPTIONAL = {"o_format", "do_format", "dqkv_layout", "dqkv_dtype"}
"""Settings that some of the supported versions do not have."""

_SHARED = {
    *("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"),
    *("q", "k", "v", "fake_dtype", "fused_attention_backend", "attn_scale", "dropout"),
    *("qkv_layout", "o_format", "attn_bias_type", "attn_mask_type", "window_size"),
}
_FORWARD = {*_SHARED, "is_training"}
_BACKWARD = {*_SHARED, "o", "d_o", "aux_ctx_tensors", "do_format", "dqkv_layout", "dqkv_dtype", "deterministic"}


@dataclass(frozen=True)
class TeSupport:
    """What decides whether Transformer Engine has a thd kernel for training.

    Attributes:
        te: version of Transformer Engine, (major, minor).
        cudnn: version of the cuDNN that it runs with, (major, minor, patch).
        arch: compute capability of the GPU, (major, minor).
    """

    te: tuple[int, int]
    cudnn: tuple[int, int, int]
    arch: tuple[int, int]

    @property
    def packed_stats(self) -> bool:
        """Whether the log-sum-exp is [T, H, 1], row by row as q; else [B, H, longest range, 1]."""
        return self.cudnn >= (9, 6, 0) and self.arch[0] != 12

    def refusal(self, dtype: torch.dtype, head_dim: int, head_dim_v: int, deterministic: bool) -> str | None:
        """What is missing for such tensors, with the remedy, or None.

        Sources: ``nvte_get_fused_attn_backend`` (TE 2.20) for training with thd tensors, a padding mask, no bias and no
        dropout, and the release notes of cuDNN.
        """
        sm, cudnn = f"sm{self.arch[0]}{self.arch[1]}", ".".join(map(str, self.cudnn))
        remedy = "use impl='flash'"
        if self.arch < (9, 0):
            return f"impl='te' needs Hopper or newer for packed sequences, this GPU is {sm}; {remedy}"
        if self.cudnn < (9, 6, 0) or self.cudnn in ((9, 10, 0), (9, 10, 1)):
            return (
                f"impl='te' needs cuDNN 9.6 or newer for packed sequences, and not 9.10.0 or 9.10.1 (wrong results), "
                f"this is {cudnn}; upgrade nvidia-cudnn, or {remedy}"
            )
        if self.te >= (2, 20) and self.cudnn < (9, 12, 0):
            return f"Transformer Engine 2.20 needs cuDNN 9.12 or newer, this is {cudnn}; upgrade it, or {remedy}"
        if self.arch >= (10, 0) and self.cudnn < (9, 7, 0):
            return f"impl='te' needs cuDNN 9.7 or newer on {sm}, this is {cudnn}; upgrade nvidia-cudnn, or {remedy}"
        if self.arch >= (12, 0) and not (self.te >= (2, 15) and self.cudnn >= (9, 18, 1)):
            return (
                f"impl='te' needs Transformer Engine 2.15 and cuDNN 9.18.1 or newer for packed sequences on {sm}, "
                f"these are {self.te[0]}.{self.te[1]} and {cudnn}; upgrade them, or {remedy}"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            return f"impl='te' takes bf16 or fp16, got {dtype}; use impl='reference' or cast"
        if not self._takes(head_dim, head_dim_v):
            return (
                f"impl='te' on {sm} with cuDNN {cudnn} trains with {self._head_dims}, got {head_dim} for q and k and "
                f"{head_dim_v} for v; {remedy}"
            )
        if deterministic and self.arch >= (10, 0) and (self.arch >= (12, 0) or self.cudnn < (9, 18, 1)):
            return (
                f"impl='te' has a deterministic backward on sm90, and on sm100 and sm103 with cuDNN 9.18.1 or newer, "
                f"this is {sm} with cuDNN {cudnn}; {remedy}, or torch.use_deterministic_algorithms(False)"
            )
        return None

    def _takes(self, head_dim: int, head_dim_v: int) -> bool:
        if head_dim % 8 or head_dim_v % 8:
            return False
        if max(head_dim, head_dim_v) <= 128:
            return head_dim == head_dim_v or self.arch < (12, 0)
        if self.arch < (10, 0):
            # cuDNN 9.11 and newer: wrong for two wide head dims that differ, but for those of DeepSeek's MLA.
            differ = head_dim != head_dim_v and min(head_dim, head_dim_v) >= 128
            return max(head_dim, head_dim_v) <= 256 and (not differ or (head_dim, head_dim_v) == (192, 128))
        return (head_dim, head_dim_v) == (192, 128) and self.arch < (12, 0) and self.cudnn >= (9, 11, 0)

    @property
    def _head_dims(self) -> str:
        if self.arch < (10, 0):
            return "head dims up to 256 that are multiples of 8 (equal ones, or 192 and 128, above 128)"
        if self.arch < (12, 0):
            return "head dims up to 128 that are multiples of 8, or 192 and 128"
        return "equal head dims up to 128 that are multiples of 8"


class FusedAttention:
    """``fused_attn_fwd`` and ``fused_attn_bwd`` of one version, over the ranges of a `VarlenCall`.

    Ranges are read and written in place: a launch gets the rows from the first range to the last, with the ranges'
    offsets, and steps over the gaps.

    Args:
        module: ``transformer_engine.pytorch.cpp_extensions.fused_attn``, or what stands for it.
        version: of Transformer Engine, for messages.
        packed_stats: see `TeSupport`.
        te_dtypes: Transformer Engine's dtype of each torch dtype (``constants.TE_DType``).

    Raises:
        ImportError: the functions lack an argument that is needed, or need one that is not known.
    """

    def __init__(self, module: Any, version: str, packed_stats: bool, te_dtypes: Mapping[torch.dtype, Any]) -> None:
        self._forward, self._backward = module.fused_attn_fwd, module.fused_attn_bwd
        self._backend = module.FusedAttnBackend["F16_arbitrary_seqlen"]
        self._packed_stats, self._te_dtypes = packed_stats, te_dtypes
        self._forward_takes = _accepted(self._forward, _FORWARD, version)
        self._backward_takes = _accepted(self._backward, _BACKWARD, version)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """out [Tq, Hq, Dv] and lse [Tq, Hq] of the rows of ``call.q``; see `Kernel.forward`."""
        settings = self._settings(q, k, v, call, softmax_scale) | {"is_training": True}  # else there is no lse
        out, aux = self._forward(**_only(settings, self._forward_takes))
        return call.q.of_span(out), self._lse(aux[0], call.q)

    def backward(
        self,
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq of the rows of ``call.q``, dk and dv of those of ``call.kv``; arguments as those of `Kernel.backward`."""
        q, k, v = qkv
        # Without dropout no random number is drawn: the generator's state is only a placeholder.
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        settings = self._settings(q, k, v, call, softmax_scale) | {
            "o": call.q.span(out),
            "d_o": call.q.span(dout),
            "aux_ctx_tensors": [self._stats(lse, call.q), rng_state],
            "do_format": "thd",
            "dqkv_layout": "thd_thd_thd",
            "dqkv_dtype": self._te_dtypes[q.dtype],
            "deterministic": deterministic,
        }
        dq, dk, dv, *_ = self._backward(**_only(settings, self._backward_takes))
        return call.q.of_span(dq), call.kv.of_span(dk), call.kv.of_span(dv)

    def _settings(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> dict[str, Any]:
        return {
            "q": call.q.span(q),
            "k": call.kv.span(k),
            "v": call.kv.span(v),
            "fake_dtype": q.dtype,
            "fused_attention_backend": self._backend,
            "cu_seqlens_q": call.q.cu_seqlens,
            "cu_seqlens_kv": call.kv.cu_seqlens,
            # Without both of them Transformer Engine takes the ranges to stand together.
            "cu_seqlens_q_padded": call.q.offsets,
            "cu_seqlens_kv_padded": call.kv.offsets,
            "max_seqlen_q": call.q.max_seqlen,
            "max_seqlen_kv": call.kv.max_seqlen,
            "attn_scale": softmax_scale,
            "dropout": 0.0,
            "qkv_layout": "thd_thd_thd",
            "o_format": "thd",
            "attn_bias_type": "no_bias",
            "attn_mask_type": "padding_causal" if call.causal else "padding",
            "window_size": (-1, 0) if call.causal else (-1, -1),
        }

    def _lse(self, stats: Tensor, rows: Rows) -> Tensor:
        """Log-sum-exp [Tq, Hq] from what the forward returns; entries of gaps and padding, which are garbage, are
        left out."""
        if (stats.ndim == 3) != self._packed_stats:
            raise RuntimeError(
                f"Transformer Engine returned the log-sum-exp as {tuple(stats.shape)}, expected "
                f"{'[T, H, 1]' if self._packed_stats else '[B, H, S, 1]'} for this GPU and cuDNN; report this"
            )
        if stats.ndim == 3:
            return rows.of_span(stats.squeeze(-1))
        return stats.squeeze(-1).transpose(1, 2)[_places(rows)]

    def _stats(self, lse: Tensor, rows: Rows) -> Tensor:
        """The merged log-sum-exp [T, H] of all rows, as the backward takes it."""
        if self._packed_stats:
            return rows.span(lse).unsqueeze(-1)
        stats = lse.new_zeros(len(rows.ranges), rows.max_seqlen, lse.shape[1])
        stats[_places(rows)] = rows.take(lse)
        return stats.transpose(1, 2).unsqueeze(-1).contiguous()


def installed_version() -> tuple[int, int] | str:
    """(major, minor) of the Transformer Engine that can be imported, or why there is none that is supported."""
    try:
        version: str = importlib.import_module("transformer_engine").__version__
        importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # OSError: a library that does not load
        return (
            f"impl='te' needs Transformer Engine {SUPPORTED} with its PyTorch extension, which cannot be imported "
            f"({str(error).splitlines()[0]}): pip install 'megatron-prefix[te]', or use impl='flash'"
        )
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _FIRST <= (major, minor) < _BEHIND_LAST:
        return f"impl='te' supports Transformer Engine {SUPPORTED}, {version} is installed; or use impl='flash'"
    return major, minor


def load(support: TeSupport) -> FusedAttention:
    """The installed Transformer Engine's fused attention.

    Raises:
        ImportError: its functions are not those that are known.
    """
    module = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    te_dtypes = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
    version = ".".join(map(str, support.te))
    return FusedAttention(module, version, support.packed_stats, te_dtypes)


def cudnn_version() -> tuple[int, int, int]:
    """(major, minor, patch) of the cuDNN that Transformer Engine runs with."""
    version: tuple[int, int, int] = importlib.import_module("transformer_engine.pytorch.utils").get_cudnn_version()
    return version


def _accepted(function: Callable[..., Any], given: set[str], version: str) -> frozenset[str]:
    """Which of our arguments ``function`` has."""
    parameters = inspect.signature(function).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    missing, unknown = given - _OPTIONAL - parameters.keys(), needed - given
    if missing or unknown:
        name = getattr(function, "__name__", repr(function))
        raise ImportError(
            f"{name} of Transformer Engine {version} has other arguments than those of {SUPPORTED}: it lacks "
            f"{', '.join(sorted(missing)) or 'none'} and needs {', '.join(sorted(unknown)) or 'none'} beside ours; "
            "install a supported version, or use impl='flash'"
        )
    return frozenset(given & parameters.keys())


def _only(settings: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}


def _places(rows: Rows) -> tuple[Tensor, Tensor]:
    """(range, position in it) of every row, int64 [rows], without a value read back to the host."""
    starts = rows.cu_seqlens[:-1].long()
    number = torch.arange(len(rows.ranges), device=starts.device)
    of_range = torch.repeat_interleave(number, rows.cu_seqlens.diff(), output_size=rows.num_rows)
    return of_range, torch.arange(rows.num_rows, device=starts.device) - starts[of_range]
