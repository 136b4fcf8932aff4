"""How the learning rate changes over a run: megatron-core's OptimizerParamScheduler, checked and built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


@dataclass(frozen=True)
class LrSchedule:
    """A schedule in optimizer updates. As in Megatron-LM, the first update of a warm-up has rate 0.

    Attributes:
        lr_decay_style: after the warm-up; "WSD" is constant until its decay at the end, which is linear.
        lr_warmup_steps: updates in which the rate rises linearly to the learning rate.
        lr_decay_steps: updates until the rate is ``min_lr``, warm-up included; "constant" needs none.
        lr_wsd_decay_steps: how many of them the decay of "WSD" takes.
        min_lr: the rate that it falls to.
    """

    lr_decay_style: str = "constant"
    lr_warmup_steps: int = 0
    lr_decay_steps: int | None = None
    lr_wsd_decay_steps: int | None = None
    min_lr: float = 0.0

    def check(self, learning_rate: float) -> None:
        """Raises ValueError when the settings do not fit together, or not the learning rate."""
        if self.lr_decay_style not in DECAY_STYLES:
            raise ValueError(f"lr_decay_style must be one of {', '.join(DECAY_STYLES)}, got {self.lr_decay_style!r}")
        if self.lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps must be at least 0, got {self.lr_warmup_steps}")
        if not 0 <= self.min_lr <= learning_rate:
            raise ValueError(f"min_lr must be between 0 and the learning rate {learning_rate}, got {self.min_lr}")
        if (self.lr_wsd_decay_steps is not None) != (self.lr_decay_style == "WSD"):
            raise ValueError(
                "lr_wsd_decay_steps is the length of the decay of lr_decay_style 'WSD': give both or neither"
            )
        if self.lr_decay_style == "constant":
            return
        if self.lr_decay_steps is None:
            raise ValueError(f"lr_decay_style {self.lr_decay_style!r} needs lr_decay_steps, the length of the schedule")
        if self.lr_decay_steps <= self.lr_warmup_steps:
            raise ValueError(
                f"lr_decay_steps must be more than the {self.lr_warmup_steps} of lr_warmup_steps, got "
                f"{self.lr_decay_steps}"
            )
        if self.lr_wsd_decay_steps is not None:
            most = self.lr_decay_steps - self.lr_warmup_steps
            if not 0 < self.lr_wsd_decay_steps <= most:
                raise ValueError(f"lr_wsd_decay_steps must be between 1 and {most}, got {self.lr_wsd_decay_steps}")

    def build(self, optimizer: Any, learning_rate: float, weight_decay: float) -> OptimizerParamScheduler:
        """The scheduler of a megatron-core optimizer, at its start. Weight decay is constant."""
        constant = self.lr_decay_style == "constant"
        return OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=learning_rate,
            min_lr=self.min_lr,
            lr_warmup_steps=self.lr_warmup_steps,
            lr_decay_steps=self.lr_warmup_steps + 1 if constant else self.lr_decay_steps,
            lr_decay_style=self.lr_decay_style,
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=self.lr_wsd_decay_steps,
            lr_wsd_decay_style="linear",
        )
