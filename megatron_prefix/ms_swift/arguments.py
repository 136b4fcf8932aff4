"""What of ms-swift's arguments prefix groups cannot be combined with, refused by name before a model is built."""

from __future__ import annotations

from typing import Any


def refuse_arguments(args: Any) -> None:
    """Check ms-swift's arguments; what its model configuration holds is checked when the model is built.

    Raises:
        ValueError: a setting that prefix groups cannot be combined with; names it, its value and the remedy.
    """
    for name, allowed, why in _RULES:
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported with prefix groups: {why}; set {name}={allowed[0]!r}")
    if args.tuner_type != "full" and args.lora_dropout:
        raise ValueError(
            f"lora_dropout={args.lora_dropout!r} is not supported with prefix groups: dropout draws one mask for a "
            "prefix that repeated prefixes draw G times; set lora_dropout=0.0"
        )
    size, generations = args.micro_batch_size, args.num_generations
    if size % generations and generations % size:
        raise ValueError(
            f"micro_batch_size {size} and num_generations {generations}: groups would be cut at different places in "
            "every micro-batch; set micro_batch_size to a multiple of num_generations (each prompt is then encoded "
            "once), or to a divisor of it (once in each micro-batch)"
        )


# (argument of ms-swift, values that are fine with the remedy first, reason)
_RULES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("task_type", ("causal_lm",), "only log-probs of tokens are computed"),
    ("bridge_backend", ("mcore-bridge",), "megatron-bridge builds its model without mcore-bridge's loaders"),
    ("router_replay_mode", ("disabled",), "routes are recorded for the rows of repeated prompts"),
    ("virtual_pipeline_model_parallel_size", (None, 1), "ms-swift's GRPO does not run virtual stages"),
    ("fp8_format", (None,), "packs are not padded to the block sizes of FP8"),
    ("fp4_format", (None,), "packs are not padded to the block sizes of FP4"),
    ("mlp_padding_free", (False,), "packs have no padding to take out"),
)
