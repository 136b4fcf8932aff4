"""--cost-model: what packing balances, and what decides where sharing a prefix pays."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from megatron_prefix.cost_model import CostModel
from megatron_prefix.hardware import DEVICES, find_device
from megatron_prefix.model_config import ModelConfig

cost_model_option = click.option(
    "--cost-model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="From `bench calibrate`; default: the GPU's data sheet, or FLOPs alone.",
)


def find_cost_model(path: Path | None, config: ModelConfig, *, tp: int, cp: int) -> tuple[CostModel, str]:
    """The cost model, and where it comes from.

    Args:
        path: --cost-model.
        config: of the model.
        tp, cp: tensor and context parallel sizes.

    Raises:
        ValueError: the file is no cost model.
    """
    if path is not None:
        return CostModel.from_json(path), str(path)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        try:
            device = find_device(name)
        except ValueError:
            known = ", ".join(DEVICES)
            return CostModel.of_model(config), f"FLOPs ({name} is none of {known}: `bench calibrate` measures it)"
        cost = CostModel.of_device(config, device, model_ranks=tp * cp)
        return cost.with_communication(config, device, tp=tp, cp=cp), f"{device.name}'s data sheet"
    return CostModel.of_model(config), "FLOPs"
