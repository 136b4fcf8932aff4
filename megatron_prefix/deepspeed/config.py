"""DeepSpeed's JSON configuration: read, checked before any work, and completed with what the run's settings say."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum

from megatron_prefix.mcore.pack_trainer import TrainSettings

AUTO = "auto"
"""Stands in a configuration for a value that the run's settings have."""

KNOWN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "zero_optimization", "zero_force_ds_cpu_optimizer", "bf16", "data_types", "aio"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "comms_logger"),
    *("flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"),
}
REFUSED = {
    "fp16": "there are no fp16 models here; use bf16",
    "amp": "NVIDIA apex's amp changes the model; use bf16",
    "torch_autocast": "it casts inside the layers; use bf16",
    "scheduler": "the learning rate follows the run's schedule (--lr-decay-style, --lr-warmup-steps, --min-lr)",
    "pipeline": "pipeline stages do not go with this engine; use pp=1, or megatron-core's engine",
    "tensor_parallel": "layers are megatron-core's, split already; use --tp",
    "sequence_parallel_size": "context parallelism is the model's; use --cp",
    "expert_parallel": "there are no experts here",
    "activation_checkpointing": "layers are megatron-core's; use --recompute",
    "gradient_allreduce_op": "the loss counts on the mean over ranks",
    "managed_gradient_accumulation": "the trainer tells where a step ends",
    "sparse_gradients": "gradients are dense here",
    "compile": "layouts of packs differ from micro-batch to micro-batch",
    "checkpoint": "checkpoints are the run's; use --save, --save-every and --keep",
    "elasticity": "batches are the run's; restart with --resume",
    "autotuning": "it runs its own jobs; use `megatron-prefix plan`",
    "curriculum_learning": "the order of groups is the run's",
    "data_efficiency": "the order of groups is the run's",
    "compression_training": "it replaces layers",
    "zero_allow_untested_optimizer": "Adam and AdamW are the optimizers here",
}
ADAM_PARAMS = {
    *("lr", "weight_decay", "betas", "eps", "torch_adam", "adam_w_mode", "bias_correction", "amsgrad"),
    *("foreach", "fp32_optimizer_states"),
}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a JSON file.

    Raises:
        ValueError: it is not there or no JSON object, or has a key twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a DeepSpeed configuration") from error
    except ValueError as error:
        raise ValueError(f"{path} is no DeepSpeed configuration: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no DeepSpeed configuration: a JSON object is wanted, got {type(found).__name__}")
    return found


def engine_config(
    config: Mapping[str, Any], settings: TrainSettings, dtype: torch.dtype, groups_per_step: int | None = None
) -> dict[str, Any]:
    """The configuration to start the engine with: ``config`` checked, and with the run's own values filled in.

    The learning rate, weight decay, gradient clipping and dtype are the run's: ``config`` leaves them out, says "auto",
    or says the same. Micro-batches are packs, whose number differs from step to step, so the batch sizes are the
    trainer's; a ``train_batch_size`` counts the prefix groups of a step.

    Args:
        config: as in the JSON file.
        settings: of the run.
        dtype: of the model.
        groups_per_step: prefix groups of the global batch; None where nothing is known of it.

    Raises:
        ValueError: an unknown key, a value that differs from the run's, or something that this engine or this machine
            cannot do.
    """
    values = copy.deepcopy(dict(config))
    _check_keys(values)
    _check_settings(settings, dtype)
    _same(values, "train_batch_size", groups_per_step, "--groups-per-step")
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        _same(values, name, 1, "this engine, whose micro-batches are packs")
        values[name] = 1
    values.pop("train_batch_size", None)
    _same(values, "gradient_clipping", settings.clip_grad, "--clip-grad")
    values["gradient_clipping"] = settings.clip_grad
    is_bf16 = dtype is torch.bfloat16
    precision = _section(values, "bf16")
    _same(precision, "enabled", is_bf16, "--dtype", name="bf16.enabled")
    precision |= {"enabled": is_bf16} | ({"check_grad_overflow": True} if is_bf16 else {})
    if "optimizer" in values:
        _complete_optimizer(values["optimizer"], settings)
    _check_device(values)
    values.setdefault("steps_per_print", None)
    try:
        DeepSpeedConfig(values)
    except (AssertionError, TypeError, ValueError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"DeepSpeed refuses this configuration: {reason}") from error
    return values


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a checked configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def grad_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """In which gradients add up over micro-batches, by a checked configuration for a model in ``dtype``."""
    named = config.get("data_types", {}).get("grad_accum_dtype")
    return dtype if named is None else DtypeEnum(named).value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} comes twice")
        found[key] = value
    return found


def _check_keys(values: Mapping[str, Any]) -> None:
    for key in values:
        if key in REFUSED:
            raise ValueError(f"DeepSpeed configuration: {key!r} cannot be used here: {REFUSED[key]}")
        if key not in KNOWN:
            close = get_close_matches(key, KNOWN, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
            raise ValueError(f"DeepSpeed configuration: unknown key {key!r}{hint}")


def _check_settings(settings: TrainSettings, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"DeepSpeed trains in fp32 or bf16, the model is in {dtype}: choose another --dtype")
    if settings.optimizer != "adam":
        raise ValueError(f"--optimizer {settings.optimizer} with DeepSpeed: ZeRO knows Adam here; use adam")
    for name in ("distributed_optimizer", "overlap_grad_reduce"):
        if getattr(settings, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is of megatron-core's engine; with DeepSpeed zero_optimization says it "
                "(stage, overlap_comm): leave it out"
            )


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"DeepSpeed configuration: {name!r} must be an object, got {section!r}")
    return section


def _same(section: Mapping[str, Any], key: str, wanted: Any, source: str, name: str | None = None) -> None:
    """A value that the run has, too, must be absent, "auto" or equal."""
    found = section.get(key, AUTO)
    if found != AUTO and wanted is not None and found != wanted:
        raise ValueError(
            f"DeepSpeed configuration: {name or key} is {found}, but {wanted} by {source}; leave it out, say "
            f'"{AUTO}", or make them the same'
        )


def _complete_optimizer(optimizer: Any, settings: TrainSettings) -> None:
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if kind not in ("Adam", "AdamW"):
        raise ValueError(f"DeepSpeed configuration: optimizer.type must be Adam or AdamW, got {kind!r}")
    unknown = sorted(optimizer.keys() - {"type", "params"})
    if unknown:
        raise ValueError(f"DeepSpeed configuration: unknown key 'optimizer.{unknown[0]}'; leave it out")
    params = _section(optimizer, "params")
    for key in params:
        if key not in ADAM_PARAMS:
            close = get_close_matches(key, ADAM_PARAMS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
            raise ValueError(f"DeepSpeed configuration: unknown key 'optimizer.params.{key}'{hint}")
    for key, wanted, source in (
        ("lr", settings.learning_rate, "--lr"),
        ("weight_decay", settings.weight_decay, "--weight-decay"),
    ):
        _same(params, key, wanted, source, name=f"optimizer.params.{key}")
        params[key] = wanted


def _check_device(values: Mapping[str, Any]) -> None:
    """What would compile C++, or need a GPU, on this machine."""
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}) if isinstance(zero, dict) else {}
    offloads = offload.get("device", "none") != "none"
    by_torch = values.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    if offloads and (by_torch or "optimizer" not in values) and values.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "DeepSpeed configuration: offload_optimizer with torch's Adam is slow, and DeepSpeed wants its own: give "
            '"optimizer": {"type": "AdamW"} without torch_adam, or, to have it all the same, '
            '"zero_force_ds_cpu_optimizer": false'
        )
    if torch.cuda.is_available():
        return
    if "optimizer" in values and not by_torch:
        raise ValueError(
            f"DeepSpeed configuration: optimizer {values['optimizer']['type']} compiles C++ for minutes on a machine "
            'without a GPU; say "torch_adam": true in its params, or leave "optimizer" out'
        )
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and zero.get(name, {}).get("device") == "nvme":
            raise ValueError(
                f"DeepSpeed configuration: {name} to nvme compiles C++ and needs a GPU beside it; offload to cpu"
            )
