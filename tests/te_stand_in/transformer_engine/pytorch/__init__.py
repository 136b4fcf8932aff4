"""The modules of a dense GPT layer."""

from . import attention, distributed, fp8, module, ops, router, tensor
from .attention import DotProductAttention
from .module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = ["DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm",
           "attention", "distributed", "fp8", "module", "ops", "router", "tensor"]  # fmt: skip
