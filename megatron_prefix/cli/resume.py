"""What a resumed run must have in common with the run that it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prefix.mcore.checkpoint import load_state
from megatron_prefix.model_config import ModelConfig

_START_ANEW = "start anew with the checkpoint as --model and another --save"


def check_resume(checkpoint: Path, config: ModelConfig, state: Mapping[str, Any], rollouts: str) -> dict[str, Any]:
    """The saved state to go on from. Other groups, another order of them, another kind of optimizer cannot go on.

    Args:
        checkpoint: the folder.
        config: of this run's model.
        state: what this run would save of itself, as far as it must be the same.
        rollouts: this run's file, or what its prompts are.

    Raises:
        ValueError: what differs.
    """
    saved = load_state(checkpoint, config=config)
    missing = sorted({"step", "source", "model", "model_fingerprint", "rollouts", *state} - saved.keys())
    if missing:
        raise ValueError(
            f"--resume: {checkpoint} was not saved by this version of `train`, its state has no {missing[0]}; "
            f"{_START_ANEW}"
        )
    if saved["rollouts_sha256"] != state["rollouts_sha256"]:
        raise ValueError(
            f"--resume: {checkpoint} was trained on {saved['rollouts']}, which had other contents than {rollouts} has; "
            f"give that file, or {_START_ANEW}"
        )
    for name, value in state.items():
        if saved[name] != value:
            raise ValueError(
                f"--resume: {checkpoint} was saved with {name} {saved[name]}, this run has {name} {value}; use the "
                f"same, or {_START_ANEW}"
            )
    return saved


def check_same_model(checkpoint: Path, saved: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Old log-probs are those of the model that the run began with, which must be the same.

    Raises:
        ValueError: it is another one.
    """
    if saved["model_fingerprint"] != state["model_fingerprint"]:
        raise ValueError(
            f"--resume: {checkpoint} began with --model {saved['model']}, and --model {state['model']} has other "
            "weights, so that old log-probs would be others; give the model that the run began with, or "
            f"{_START_ANEW}"
        )
