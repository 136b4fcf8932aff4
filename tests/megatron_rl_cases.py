"""Megatron-LM's own RL functions on the CPU: run with a patched tree first on the path, maybe under torchrun.

    python -m tests.megatron_rl_cases FOLDER WAY [Megatron-LM arguments]

WAY is "plain" (the flag is off, micro-batches of one whole sequence) or "share" (`--rl-share-prefix`). Real are
parsing, `prepare_data_for_update`, the bins, `forward_step`, the loss, the schedule and the final scaling of gradients.
The rollouts are made up, and what Megatron-LM's start-up would set is set here. Writes FOLDER/WAY-RANK.pt; the first
run also writes the weights that every other one starts from.
"""

import os
import random
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_prefix.mcore.cpu import run_on_cpu

ARGUMENTS = shlex.split("""
--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 48 --max-position-embeddings 48 --position-embedding-type rope
--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
--hidden-dropout 0 --transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion --tokenizer-type NullTokenizer --vocab-size 63
--make-vocab-size-divisible-by 1 --distributed-backend gloo --micro-batch-size 1 --global-batch-size 12 --train-iters 1
--lr 1e-3 --perform-rl-step --grpo-prompts-per-step 4 --grpo-group-size 3 --grpo-iterations 1
--grpo-clamp-eps-lower 0.1 --grpo-clamp-eps-upper 0.2 --grpo-kl-beta 0.05 --grpo-entropy-term-weight 0.02
--rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef 1.1 --calculate-per-token-loss
--langrl-env-config none
""")
SHARE = shlex.split("--rl-use-sequence-packing --rl-share-prefix --spec megatron_prefix.specs local_rmsnorm")
PAD, EOD = 61, 62


class Tokenizer:
    """What `prepare_data_for_update` asks a tokenizer for."""

    library, pad, eod, bos, vocab_size = "made up", PAD, EOD, None, 63

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def rollouts() -> list[list[Any]]:
    """Four groups of three; two have the same length of prompt, one response is cut by a tool's output."""
    from megatron.rl.agent.api import TokenRollout

    draw = random.Random(0)
    groups = []
    for problem, prompt_length in enumerate((9, 14, 9, 5)):
        prompt = [draw.randrange(60) for _ in range(prompt_length)]
        group = []
        for length in (draw.randint(2, 9) for _ in range(3)):
            response = [draw.randrange(60) for _ in range(length)] + [EOD]
            generated = [True] * len(response)
            if length > 5:
                generated[2] = False
            group.append(
                TokenRollout(
                    trajectory=[prompt + response],
                    reward=draw.random(),
                    generation_mask=[[False] * prompt_length + generated],
                    logprobs=[[-4.0 - 0.1 * (t % 3) for t in range(len(response))]],
                    env_id="made up",
                    problem_id=str(problem),
                    policy_epoch=[[(0, 0)]],
                    kv_cache_epoch=[[(0, 0)]],
                    num_evictions=[0],
                )
            )
        groups.append(group)
    return groups


def start(words: list[str]) -> Any:
    """Arguments as Megatron-LM parses and checks them, and the globals that its start-up sets."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.timers import Timers
    from megatron.training import arguments, global_vars

    sys.argv = [sys.argv[0], *ARGUMENTS, *words]
    args = arguments.parse_args()
    with patch.object(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9)):
        arguments.validate_args(args)
    args.padded_vocab_size = 64
    args.curr_iteration = 0
    global_vars.set_args(args)
    global_vars._GLOBAL_TOKENIZER = Tokenizer()
    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    dist.init_process_group("gloo", store=dist.HashStore() if args.world_size == 1 else None,
                            rank=args.rank, world_size=args.world_size)  # fmt: skip
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    model_parallel_cuda_manual_seed(0)
    init_num_microbatches_calculator(args.rank, None, args.global_batch_size, 1, args.data_parallel_size, False)
    return args


def build(args: Any, way: str, weights: Path) -> Any:
    """The model as `train_rl.py` builds it, in DDP, with the weights of the first run."""
    import train_rl
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_prefix.mcore.stages import whole_model_parameters

    model = train_rl._gpt_builder(
        args, parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    )
    if way == "plain":
        # megatron-core's own attention takes no packed_seq_params; here they always say: one whole sequence. And
        # upstream gives every model an argument of Float16Module.
        forward = model.forward
        model.forward = lambda *a, packed_seq_params, fp32_output, **k: forward(*a, **k)
    named = whole_model_parameters([model])
    if not weights.exists():
        torch.manual_seed(1)
        torch.save({name: torch.randn_like(p) * 0.2 for name, p in named.items()}, weights)
    stored = torch.load(weights)
    for name, parameter in named.items():
        value = stored[name]
        if value.shape != parameter.shape:
            size, rank = args.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
            value = value.chunk(size, parameter.partition_dim)[rank]
        parameter.data.copy_(value)
    model.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def one_step(args: Any, model: Any) -> dict[str, Any]:
    """Old and reference log-probs of the data, then the update's losses and gradients."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.rl import rl_utils

    from megatron_prefix.mcore.stages import whole_model_parameters

    parameters = whole_model_parameters([model])
    state_dict = model.state_dict
    # Upstream keeps the policy with `.cpu()` while it loads the reference, which here is no copy.
    model.state_dict = lambda: {name: value if value is None else value.clone() for name, value in state_dict().items()}
    held = model.state_dict()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(0.97)
    reference = model.state_dict()
    model.load_state_dict(held)
    iterator, _, _ = rl_utils.prepare_data_for_update(
        model=[model],
        ref_state_dict=reference,
        rollouts=rollouts(),
        tokenizer=rl_utils.get_tokenizer(),
        sequence_packing=args.rl_use_sequence_packing,
        is_correction=args.rl_inference_logprobs_is_correction,
    )
    found = log_probs(rl_utils.get_rl_runtime_state().packing_context, iterator, get_num_microbatches())
    first = schedule(args, model, iterator, forward_only=True)
    with torch.no_grad():  # another policy than the one that the old log-probs are of: ratios that clip
        for parameter in parameters.values():
            parameter.mul_(1.3)
    model.zero_grad_buffer()
    return {
        "log_probs": found,
        "first": first,
        "losses": schedule(args, model, iterator, forward_only=False),
        "micro_batches": get_num_microbatches(),
        "gradients": {name: p.main_grad.clone() for name, p in parameters.items()},
    }


def schedule(args: Any, model: Any, iterator: Any, *, forward_only: bool) -> dict[str, torch.Tensor]:
    """All micro-batches once, by Megatron-LM's schedule; the sums that it logs (none on a stage before the last)."""
    import train_rl
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func

    losses = get_forward_backward_func()(
        forward_step_func=train_rl.forward_step,
        data_iterator=iterator,
        model=[model],
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=forward_only,
    )
    return {key: sum(each[key] for each in losses) for key in losses[0]} if losses else {}


def log_probs(context: Any, iterator: Any, count: int) -> dict[tuple[int, ...], torch.Tensor]:
    """By trajectory: [old; ref; inference] log-probs of its generated tokens."""
    found = {}
    if context is None:
        for tokens, _, old, mask, _, ref, inference in (
            next(iterator) for _ in range(count)
        ):  # all, then it starts again
            kept = mask[0, 1:].bool()
            found[tuple(tokens[0].tolist())] = torch.stack([old[0][kept], ref[0][kept], inference[0][kept]])
        return found
    for index, each in enumerate(context.cached_packed_seq_params):
        for number, start in zip(each.numbers, each.starts, strict=True):
            end = start + context.packing_info.seq_lengths[number] - 1
            kept = context.packed_loss_mask[index, start + 1 : end + 1].bool()
            values = (context.old_logprobs, context.ref_logprobs, context.packed_inference_logprobs)
            found[tuple(context.original_trajs[number].tolist())] = torch.stack(
                [value[index, start:end][kept] for value in values]
            )
    return found


def main(folder: Path, way: str, words: list[str]) -> None:
    run_on_cpu()
    args = start([*words, *(SHARE if way == "share" else ())])
    model = build(args, way, folder / "weights.pt")
    torch.save(one_step(args, model), folder / f"{way}-{os.environ.get('RANK', '0')}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
