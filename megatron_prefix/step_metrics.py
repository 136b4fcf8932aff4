"""What a step cost and what it was worth: rewards, tokens with and without shared prefixes, utilisation (MFU)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import psutil
import torch

from megatron_prefix.balanced_plan import Group
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.workload import Workload


@dataclass(frozen=True)
class StepMeter:
    """Measures global batches of one model on some devices.

    Attributes:
        size: of the model.
        ranks: processes that work on a step, each with a device.
        peak_flops: FLOP/s that a device can reach; None leaves the utilisation out.
    """

    size: ModelSize
    ranks: int
    peak_flops: float | None = None

    def measure(self, groups: Sequence[Group], seconds: float) -> dict[str, float]:
        """Metrics of a step on ``groups`` that took ``seconds``.

        ``tokens`` are rows computed, ``tokens_repeated`` those of the same rollouts each with its own prefix, and
        ``saving`` the share of these that sharing saves. ``mfu`` counts the FLOPs computed, ``mfu_repeated`` those that
        repeated prefixes would have taken: it may exceed 1. ``memory_bytes`` is the peak of this process's GPU, or what
        the process has in memory where there is none. ``no_advantage`` is the share of groups with equal rewards.
        """
        rewards = [reward for group in groups for reward in group.rewards]
        shared = reduce(add, map(Workload.of_group, groups))
        repeated = reduce(add, map(Workload.repeated, groups))
        found = {
            "reward": statistics.fmean(rewards),
            "reward_std": statistics.pstdev(rewards),
            "no_advantage": sum(len(set(group.rewards)) == 1 for group in groups) / len(groups),
            "tokens": shared.rows,
            "tokens_repeated": repeated.rows,
            "saving": 1 - shared.rows / repeated.rows,
            "tokens_per_second": shared.rows / seconds,
            "memory_bytes": _memory(),
        }
        if self.peak_flops is not None:
            available = self.peak_flops * self.ranks * seconds
            found["mfu"] = self.size.step_flops(shared) / available
            found["mfu_repeated"] = self.size.step_flops(repeated) / available
        return found


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
