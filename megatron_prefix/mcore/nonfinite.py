"""A step whose loss or gradient was not finite: what is kept of it for a replay."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prefix.balanced_plan import as_tree
from megatron_prefix.mcore.step_source import StepBatch
from megatron_prefix.rollout_group import TokenCount
from megatron_prefix.rollouts import write_rollouts


class NonFiniteError(ArithmeticError):
    """A run stops at a step whose loss or gradient is not finite. The parameters are those before the step."""


def save_offending(folder: Path, step: int, batch: StepBatch, metrics: Mapping[str, float]) -> Path | None:
    """Write what one data-parallel rank had in a step, for a replay. Every rank calls it, those with token ids write.

    ``step_NNNNNN_rankR.jsonl`` holds the groups, which `train --rollouts` and `verify` take; the ``.json`` beside it
    the metrics and each micro-batch's old log-probs. Numbers that are not finite are strings in it.

    Returns:
        The rollouts file, on the ranks that write one.

    Raises:
        OSError: it cannot be written.
    """
    if not batch.mine or any(isinstance(as_tree(group).nodes[0].tokens, TokenCount) for group in batch.mine):
        return None
    rank = dist.get_rank()
    path = folder / f"step_{step:06d}_rank{rank}.jsonl"
    record = {
        "step": step,
        "rank": rank,
        "metrics": {name: _written(value) for name, value in metrics.items()},
        "old_log_probs": [[_written(x) for x in each.old_log_probs.tolist()] for each in batch.inputs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_rollouts(path, batch.mine)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _written(value: float) -> Any:
    return value if math.isfinite(value) else str(value)
