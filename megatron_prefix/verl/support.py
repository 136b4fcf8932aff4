"""What verl can switch on that prefix groups cannot do, refused by name."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode

from megatron_prefix.mcore.support import refuse_unsupported


def refuse_worker_settings(model_config: Any, engine_config: Any) -> None:
    """Check the configurations of a worker (`HFModelConfig`, `McoreEngineConfig`) before anything is built.

    Raises:
        ValueError: a setting that is not implemented. The message names it, its value and the remedy.
    """
    for path, allowed, why in _WORKER:
        root, *names = path.split(".")
        value = model_config if root == "model" else engine_config
        for name in names:
            value = getattr(value, name, None)
        # A version of verl that lacks a setting has it switched off.
        if value is not None and value != allowed:
            raise ValueError(
                f"{path}={value!r} is not supported with use_prefix_grouper: {why}; set {path}={allowed!r}, or "
                "use_prefix_grouper=False"
            )
    if hasattr(model_config.hf_config, "vision_config"):
        raise ValueError(
            "use_prefix_grouper: images are not part of a prefix's tokens, and this model takes some (vision_config); "
            "set use_prefix_grouper=False"
        )


def refuse_model_settings(config: Any) -> None:
    """Check megatron-core's configuration, as verl and its bridge have made it, before the model is built.

    Raises:
        ValueError: as `mcore.support.refuse_unsupported`, or fp8, or stages that expect packs of one length.
    """
    refuse_unsupported(config)
    if config.fp8:
        raise ValueError(f"fp8={config.fp8!r}: the rows of a pack are not padded for fp8 kernels; set fp8=None")
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        raise ValueError("variable_seq_lengths=False: packs differ in rows between stages; set it to True")


def refuse_batch_settings(batch: TensorDict) -> None:
    """Check what verl's trainer asks for with a batch.

    Raises:
        ValueError: an output or an input that is not implemented, by name.
    """
    for name in ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only", "enable_routing_replay"):
        if tu.get_non_tensor_data(batch, key=name, default=False):
            raise ValueError(f"{name}=True is not supported with use_prefix_grouper; switch one of them off")
    if tu.get_non_tensor_data(batch, key="pad_mode", default=DatasetPadMode.NO_PADDING) != DatasetPadMode.NO_PADDING:
        raise ValueError("use_prefix_grouper needs pad_mode=NO_PADDING")
    for name in ("multi_modal_inputs", "routed_experts"):
        if name in batch:
            raise ValueError(f"the batch has {name}, which prefix groups do not take; set use_prefix_grouper=False")
    for name in ("prompts", "responses"):
        if name not in batch:
            raise ValueError(f"the batch has no {name}: use_prefix_grouper is for the actor and reference of RL")
    if not batch["input_ids"].is_nested:
        raise ValueError("the batch is padded: use_prefix_grouper needs verl's left_right_2_no_padding first")


# (setting, the only value that is fine, reason)
_WORKER: tuple[tuple[str, object, str], ...] = (
    ("model.model_type", "language_model", "a value head has no grouped form"),
    ("model.mtp.enable", False, "multi-token prediction rolls labels across sequences"),
    ("megatron.use_remove_padding", True, "padded sequences have no rows to share"),
    ("megatron.use_fused_kernels", False, "verl's fused output layer takes whole sequences"),
    ("megatron.dynamic_context_parallel", False, "it spreads whole sequences over ranks"),
    ("megatron.pad_to_length", False, "the rows of a pack are not padded to buckets"),
    ("megatron.use_megatron_fsdp", False, "Megatron-FSDP has not been tried"),
    ("megatron.router_replay.mode", "disabled", "routes are recorded for every row of whole sequences"),
    ("megatron.qat.enable", False, "quantization-aware layer specs have not been tried"),
)
