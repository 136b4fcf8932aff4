"""Weights of other formats, from and to megatron-core names and shapes. Nothing here imports megatron-core."""

from megatron_prefix.weights.hf_writer import check_exportable, write_hf_folder
from megatron_prefix.weights.names import (
    WeightSource,
    check_names,
    converted,
    converted_count,
    exported,
    padded_config,
)
from megatron_prefix.weights.sources import open_source

__all__ = [
    "WeightSource",
    "check_exportable",
    "check_names",
    "converted",
    "converted_count",
    "exported",
    "open_source",
    "padded_config",
    "write_hf_folder",
]
