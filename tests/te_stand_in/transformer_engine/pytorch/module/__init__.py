"""Linear and norm modules for one rank."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import base

__all__ = ["GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "base"]


class _Module(torch.nn.Module):
    """Has FP8 state in its state dict, as every module of Transformer Engine; here it is empty."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class _Norm(_Module):
    """What LayerNorm and RMSNorm share."""

    has_bias: bool

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None) and not sequence_parallel
        size = hidden_size if normalized_shape is None else normalized_shape
        assert size is not None
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(size, dtype=params_dtype, device=device))
        if self.has_bias:
            self.bias = torch.nn.Parameter(torch.zeros(size, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(x, self.weight, self.bias if self.has_bias else None, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    """Mean 0 and variance 1 over the last dimension, then weight and bias."""

    has_bias = True


class RMSNorm(_Norm):
    """Mean square 1 over the last dimension, then weight."""

    has_bias = False


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """LayerNorm with a bias, RMSNorm without; x [..., hidden]."""
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + zero_centered) + (
        0 if bias is None else bias
    )


class Linear(_Module):
    """y = x W^T + b, with the weight [out_features, in_features]."""

    def __init__(  # noqa: PLR0913 - the real one's parameters
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not sequence_parallel and not fuse_wgrad_accumulation
        assert parallel_mode in (None, "column", "row")
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.tp_size = bias, return_bias, tp_size
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        with torch.no_grad():
            init_method(self.weight)
        # The real one keeps an empty tensor, no parameter, in place of a bias that it does not have.
        made = torch.zeros(out_features, dtype=params_dtype, device=device) if bias else torch.Tensor()
        self.bias = torch.nn.Parameter(made) if bias else made

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = F.linear(inp, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    """The norm of x [..., in_features], then Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **linear: Any,
    ) -> None:
        assert "rng_tracker_name" not in linear  # Linear's alone
        super().__init__(in_features, out_features, **linear)
        assert normalization in ("LayerNorm", "RMSNorm") and not return_layernorm_output
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = torch.zeros if zero_centered_gamma else torch.ones
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, **like))
        has_bias = normalization == "LayerNorm"
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **like)) if has_bias else None

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = _normalized(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)
        return super().forward(x, is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """Experts: megatron-core derives from it; never made."""
