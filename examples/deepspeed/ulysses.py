"""GRPO steps by DeepSpeed's engine with Ulysses context parallelism over all processes, as a library is used.

    torchrun --nproc-per-node 2 examples/deepspeed/ulysses.py
    deepspeed --num_gpus 2 --no_local_rank examples/deepspeed/ulysses.py

Runs on GPUs where there are some, else on the CPU with gloo. The model is small and random: what is shown is how the
parts go together.
"""

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console

from megatron_prefix import LossConfig, RolloutGroup, pack_groups
from megatron_prefix.deepspeed.config import read_config
from megatron_prefix.deepspeed.cpu import use_plain_gloo
from megatron_prefix.deepspeed.training import DeepSpeedTrainer
from megatron_prefix.deepspeed.ulysses import ulysses_layer_spec
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.parallel import ParallelSizes, destroy, initialize
from megatron_prefix.mcore.training import StepInput, TrainSettings
from megatron_prefix.model_config import ModelConfig

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=128,
    max_position_embeddings=256,
)
GROUP = RolloutGroup(list(range(1, 60)), [[7] * 20, [9] * 33, [11] * 12, [5] * 27], [1.0, 0.0, 0.5, 0.25])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ds-config", type=Path, default=Path(__file__).with_name("ulysses_zero1.json"))
    options = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not torch.cuda.is_available():
        run_on_cpu()
        use_plain_gloo()
    initialize(ParallelSizes(cp=world_size), rank=rank, world_size=world_size, local_rank=int(os.environ["LOCAL_RANK"]))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    spec = ulysses_layer_spec(transformer_config(MODEL, dtype=dtype))
    model = build_model(MODEL, layer_spec=spec, dtype=dtype, seed=1)
    settings = TrainSettings(learning_rate=1e-3)
    trainer = DeepSpeedTrainer(model, settings, LossConfig(), read_config(options.ds_config))
    (pack,) = pack_groups([GROUP])
    old = trainer.log_probs(pack)
    for step in range(1, options.steps + 1):
        metrics = trainer.step([StepInput(pack, old)])
        if rank == 0:
            Console().print(f"step {step}: loss {metrics['loss']:+.4f}, gradient norm {metrics['grad_norm']:.4f}")
    destroy()


if __name__ == "__main__":
    main()
