"""Megatron-LM's `pretrain`, fed with prefix groups: supervised fine-tuning on several answers to each question.

Run it as Megatron-LM's own pretrain_gpt.py (of core 0.19), in a checkout, with the same arguments. All that Megatron-LM
does around a step stays: its parallel sizes, optimizer, checkpoints and logs.
The same on one process of a CPU runs in the tests.

    PYTHONPATH=$MEGATRON_LM torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_groups.py ...  # GPU only

and in the place of the dots pretrain_gpt.py's arguments with --rollouts answers.jsonl, --spec megatron_prefix.specs te,
--calculate-per-token-loss and --micro-batch-size 1.

--rollouts is a file of `megatron_prefix.rollouts` (`megatron-prefix inspect` says what is in one); every response
counts, whatever its reward. A micro-batch is one pack of at most --seq-length rows, --global-batch-size counts packs,
and the loss is the mean of -log p over the response tokens of a global batch.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from torch import Tensor

from megatron_prefix import Pack, pack_groups, response_log_probs
from megatron_prefix.megatron_rl import exchange_rows_of_packs
from megatron_prefix.rollouts import read_rollouts


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument_group("prefix groups").add_argument("--rollouts", type=Path, required=True)
    return parser


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Megatron-LM's GPT model with the layers of --spec."""
    args = get_args()
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def data_iterators(num_samples: Any) -> tuple[Iterator[Pack], None, None]:
    """The packs of this data-parallel rank, again and again; the same on all ranks of a model."""
    args = get_args()
    packs = pack_groups(read_rollouts(args.rollouts), max_tokens_per_pack=args.seq_length)
    ranks = parallel_state.get_data_parallel_world_size()
    if len(packs) < ranks:
        raise ValueError(f"{args.rollouts} fills {len(packs)} packs of {args.seq_length} rows, for {ranks} ranks")
    return itertools.cycle(packs[parallel_state.get_data_parallel_rank() :: ranks]), None, None


data_iterators.is_distributed = True  # type: ignore[attr-defined]  # Megatron-LM: every rank reads its own


def forward_step(packs: Iterator[Pack], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Hidden states on the stages before the last, there the log-probs."""
    log_probs = response_log_probs(model, next(packs))
    assert isinstance(log_probs, Tensor)
    return log_probs, loss_func


def loss_func(log_probs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum that Megatron-LM divides by the tokens of the global batch, these tokens, and what it logs.

    Every context-parallel rank has all log-probs and the gradient of its own; Megatron-LM counts the tokens of each.
    """
    loss, tokens = -log_probs.sum(), log_probs.new_tensor(len(log_probs))
    share = parallel_state.get_context_parallel_world_size()
    return loss * share, tokens.int(), {"lm loss": torch.stack([loss.detach(), tokens])}


def main() -> None:
    args = parse_and_validate_args(
        extra_args_provider=add_arguments,
        args_defaults={"dataloader_type": "external", "tokenizer_type": "NullTokenizer"},  # packs, not token files
    )
    for name, needed in (("calculate_per_token_loss", True), ("micro_batch_size", 1)):
        if getattr(args, name) != needed:
            raise ValueError(f"packs need {name}={needed}, got {getattr(args, name)}; set --{name.replace('_', '-')}")
    exchange_rows_of_packs(args)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        data_iterators,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=build_model,
    )


if __name__ == "__main__":
    main()
