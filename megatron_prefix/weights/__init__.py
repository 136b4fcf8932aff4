"""Weights from other formats, as megatron-core names and shapes. Nothing here imports megatron-core."""

from megatron_prefix.weights.names import WeightSource, check_names, converted, converted_count, padded_config
from megatron_prefix.weights.sources import open_source

__all__ = ["WeightSource", "check_names", "converted", "converted_count", "open_source", "padded_config"]
