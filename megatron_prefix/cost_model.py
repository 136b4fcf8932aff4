"""The modelled time of a micro-batch: what packing balances, and what decides whether sharing a prefix pays.

Linear in the counts of a `Workload`. The coefficients come from a device's data sheet (`CostModel.of_device`) or from
measurements on it (`mcore.calibration`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megatron_prefix.hardware import Device
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.workload import Workload

EFFICIENCY = 0.5
"""Share of a data sheet's FLOP/s that matrix products of a training step reach."""

LAUNCH_SECONDS = 2e-5
"""Of one varlen attention call, forward and backward, beside its work: launches and their gaps."""

ELEMENT_PASSES = 12
"""Times that merging reads or writes one element of the attention output, forward and backward: two outputs read and
one written, and two gradients of q read and one written, some of it in fp32."""


@dataclass(frozen=True)
class CostModel:
    """Modelled seconds of forward and backward of a micro-batch on one rank; any other unit serves to compare.

    Attributes:
        row: of one input row: all linear layers, norms, and communication that grows with rows.
        target_row: of one row through the output layer and the loss.
        pair: of one (query, key) pair in all layers.
        merged_row: of merging one row's attention with that of one tree level, in all layers.
        level: of one more varlen call in all layers, whatever its size.
        microbatch: of a micro-batch, whatever its size.

    Raises:
        ValueError: a coefficient that is negative or not finite, or all of row, target_row and pair are 0.
    """

    row: float
    target_row: float = 0.0
    pair: float = 0.0
    merged_row: float = 0.0
    level: float = 0.0
    microbatch: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"cost model: {field.name} must be a finite number of 0 or more, got {value!r}")
        if not (self.row or self.target_row or self.pair):
            raise ValueError("cost model: row, target_row and pair are all 0; one of them must cost something")

    @classmethod
    def of_model(cls, config: ModelConfig) -> CostModel:
        """In FLOPs: no launches, no memory traffic, the same on every device."""
        size = ModelSize.of(config)
        return cls(
            row=size.step_flops(Workload(rows=1)),
            target_row=size.step_flops(Workload(target_rows=1)),
            pair=size.step_flops(Workload(pairs=1)),
        )

    @classmethod
    def of_device(cls, config: ModelConfig, device: Device, *, model_ranks: int = 1) -> CostModel:
        """In seconds, from the device's data sheet; ``model_ranks`` (tensor x context parallel) share the work."""
        flops = cls.of_model(config)
        speed = device.flops * EFFICIENCY * model_ranks
        width = config.num_layers * config.num_attention_heads * config.channels
        return cls(
            row=flops.row / speed,
            target_row=flops.target_row / speed,
            pair=flops.pair / speed,
            merged_row=ELEMENT_PASSES * 2 * width / device.memory_bandwidth / model_ranks,
            level=LAUNCH_SECONDS * config.num_layers,
            microbatch=LAUNCH_SECONDS * config.num_layers,
        )

    def with_communication(self, config: ModelConfig, device: Device, *, tp: int, cp: int) -> CostModel:
        """With the seconds that a row's hidden states and keys travel between tensor- and context-parallel ranks.

        Under sequence parallelism each layer gathers and scatters hidden states twice forward, and backward twice each
        with two gathers more (arXiv 2205.05198, 4.2). Context parallelism sends keys and values, sends them again in
        backward, and their gradients. In bf16, nothing overlapped; what a placement of rows saves is left out.
        """
        element = 2
        tensor = 10 * config.hidden_size * (tp - 1) / tp / cp
        context = 3 * 2 * config.groups * config.channels * (cp - 1) / cp / tp
        return replace(self, row=self.row + config.num_layers * element * (tensor + context) / device.link_bandwidth)

    def cost(self, work: Workload) -> float:
        """Modelled time of a micro-batch, or of a group in it, without `microbatch`."""
        return (
            self.row * work.rows
            + self.target_row * work.target_rows
            + self.pair * work.pairs
            + self.merged_row * work.merged_rows
            + self.level * work.levels
        )

    def without_levels(self, work: Workload) -> float:
        """`cost` beside the varlen calls of levels, which groups in one micro-batch share."""
        return self.cost(work) - self.level * work.levels

    def responses(self, prefix: int, lengths: Sequence[int]) -> list[float]:
        """`without_levels` of each response of so many rows to a prefix of so many that is in another pack."""
        row = self.row + self.target_row + self.pair * prefix + (self.merged_row if prefix else 0.0)
        half = self.pair / 2
        return [length * (row + half * (length + 1)) for length in lengths]

    def saving(self, group: RolloutGroup | RolloutTree) -> float:
        """Modelled time that sharing a group's prefix saves; negative where it does not pay."""
        return self.cost(Workload.repeated(group)) - self.cost(Workload.of_group(group))

    def to_json(self, path: str | Path) -> None:
        """Write the coefficients."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> CostModel:
        """Read coefficients.

        Raises:
            ValueError: the file cannot be read or does not hold exactly the coefficients.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: cannot read a cost model: {error}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != known:
            raise ValueError(f"{path}: a cost model has the keys {', '.join(sorted(known))}; calibrate one")
        return cls(**values)
