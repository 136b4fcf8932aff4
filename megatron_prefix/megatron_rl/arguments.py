"""Megatron-LM's command line under `--rl-share-prefix`: what it cannot be combined with, and what it implies."""

from typing import Any

# (argument, values that are fine, reason and remedy)
_RULES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("rl_use_sequence_packing", (True,), "groups are packed into its bins; add --rl-use-sequence-packing"),
    (
        "calculate_per_token_loss",
        (True,),
        "the loss would be a mean over bins, which depends on what shares a bin; add --calculate-per-token-loss",
    ),
    ("rl_training_cuda_graphs", (False,), "bins have different numbers of rows; drop --rl-training-cuda-graphs"),
    ("rl_verify_model_weights_swap", (False,), "it runs the model without a layout; drop it"),
    (
        "virtual_pipeline_model_parallel_size",
        (None,),
        "megatron/rl runs the first chunk of a model only; drop the virtual pipeline",
    ),
)


def configure(args: Any) -> None:
    """Check Megatron-LM's parsed arguments, and set what `--rl-share-prefix` implies. Called by `validate_args`.

    Raises:
        ValueError: a combination that prefix groups cannot serve, or no layer spec.
    """
    for name, fine, reason in _RULES:
        value = getattr(args, name)
        if value not in fine:
            raise ValueError(f"--rl-share-prefix with {name}={value}: {reason}")
    if args.cuda_graph_impl == "full_iteration":
        raise ValueError("--rl-share-prefix with cuda_graph_impl=full_iteration: bins have different numbers of rows")
    if args.spec is None:
        raise ValueError(
            "--rl-share-prefix needs layers that know about prefix groups: add --spec megatron_prefix.specs te "
            "(or another name of that module, or a spec of your own made by with_prefix_attention)"
        )
    exchange_rows_of_packs(args)


def exchange_rows_of_packs(args: Any) -> None:
    """Let pipeline stages exchange as many rows as a pack has, instead of --seq-length."""
    if args.pipeline_model_parallel_size > 1:
        args.variable_seq_lengths = True
        if args.num_experts is None:  # megatron-core wants it with variable lengths, and then does not use it
            args.moe_token_dispatcher_type = "alltoall"
