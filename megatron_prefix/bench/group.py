"""The prefix groups that a benchmark runs, and the most that sharing their prefixes can gain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prefix.layout import PrefixLayout

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GroupSizes:
    """One prefix of P rows and G responses of R rows.

    Raises:
        ValueError: a size below 1.
    """

    prefix_len: int
    response_len: int
    group_size: int

    def __post_init__(self) -> None:
        for name in ("prefix_len", "response_len", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def rho(self) -> float:
        """G (P + R) / (P + G R): what is saved where the work goes with the rows."""
        p, r, g = self.prefix_len, self.response_len, self.group_size
        return g * (p + r) / (p + g * r)

    @property
    def alpha(self) -> float:
        """[G (P + R)^2 / 2] / [P^2 / 2 + G (P R + R^2 / 2)]: what is saved of the attention mask's area."""
        p, r, g = self.prefix_len, self.response_len, self.group_size
        return (g * (p + r) ** 2 / 2) / (p**2 / 2 + g * (p * r + r**2 / 2))

    def layout(self) -> PrefixLayout:
        """The group as a pack of 1 + G segments."""
        return PrefixLayout([self.prefix_len] + [self.response_len] * self.group_size, [-1] + [0] * self.group_size)

    def repeated_rows(self) -> torch.Tensor:
        """int64 [G (P + R)]: the row of the group that each row of repeated-prefix training is a copy of."""
        p, r = self.prefix_len, self.response_len
        prefix = torch.arange(p)
        return torch.cat(
            [torch.cat([prefix, torch.arange(p + i * r, p + (i + 1) * r)]) for i in range(self.group_size)]
        )


@dataclass(frozen=True)
class PipelineSizes:
    """Stages, model chunks of each stage (interleaved above 1), and groups of a step."""

    pp: int = 1
    vpp: int = 1
    groups: int = 1


def ratios(grouped: PrefixLayout, repeated: PrefixLayout) -> dict[str, float]:
    """The exact ratios of two layouts: rows, and area of the attention mask."""
    return {"rows": repeated.num_rows / grouped.num_rows, "area": repeated.area / grouped.area}
