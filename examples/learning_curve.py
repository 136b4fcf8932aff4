"""Learn a small task on policy, once with repeated prefixes on plain megatron-core and once with prefix groups.

Each iteration samples responses from the policy, scores them and takes one GRPO step. Both runs start from the same
seed and draw the same random numbers, so as long as the two ways of training agree their reward curves are one curve.

    python examples/learning_curve.py --out learning_curve.png

The task: answer a prompt of random tokens with its last token, several times over. The reward is the share of right
tokens, 1 in the vocabulary's size by chance.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from megatron_prefix import LossConfig, pack_groups, prefix_gpt_layer_spec
from megatron_prefix.generation.generator import LocalGenerator, SamplingSettings
from megatron_prefix.generation.on_policy import Prompt, score_groups
from megatron_prefix.generation.tasks import Score
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.parallel import ParallelSizes, destroy, initialize
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.model_config import ModelConfig

VOCABULARY = 16
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    tied_embeddings=True,
)
DTYPE = torch.float64  # so that rounding cannot turn a sampled token over within a run


def learn(grouped: bool, iterations: int, prompts: int, group_size: int, seed: int) -> list[float]:
    """Train from ``seed``; the mean reward of every iteration's rollouts."""
    spec = prefix_gpt_layer_spec(transformer_config(MODEL, dtype=DTYPE))
    sampler = build_model(MODEL, layer_spec=spec, dtype=DTYPE, seed=seed)
    policy = sampler if grouped else build_model(MODEL, dtype=DTYPE, seed=seed)
    settings = TrainSettings(learning_rate=2e-3, clip_grad=0.0)
    trainer = PolicyTrainer(policy, settings, LossConfig(), log_probs=None if grouped else repeated_log_probs)
    sampling = SamplingSettings(group_size, max_new_tokens=4)
    generator = LocalGenerator(sampler, sampling, trainer.dp_group, policy=None if grouped else policy)
    rng = random.Random(seed)
    curve = []
    for iteration in track(range(iterations), description="prefix groups" if grouped else "repeated prefixes"):
        questions = [question(rng) for _ in range(prompts)]
        generator.update_weights(iteration)
        answers = generator.generate([each.tokens for each in questions], seed=seed + iteration)
        groups, _ = score_groups(questions, answers, trainer.dp_group)
        packs = pack_groups(groups, repeated=not grouped)
        trainer.step([StepInput(pack, trainer.log_probs(pack)) for pack in packs])
        curve.append(fmean(reward for group in groups for reward in group.rewards))
    return curve


def question(rng: random.Random) -> Prompt:
    """Random tokens; an answer scores the share of it that is the last of them."""
    tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(4, 12))]
    return Prompt("last token", tokens, lambda answer: Score(fmean(token == tokens[-1] for token in answer)))


def main() -> None:
    """Both runs, the picture, and how far apart their curves are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"), help="PNG to write")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=8, help="per iteration")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        run_on_cpu()
    initialize(ParallelSizes(), seed=args.seed)
    curves = {
        name: learn(grouped, args.iterations, args.prompts, args.group_size, args.seed)
        for name, grouped in (("repeated prefixes (plain megatron-core)", False), ("prefix groups", True))
    }
    destroy()
    repeated, grouped = curves.values()
    apart = max(abs(a - b) for a, b in zip(repeated, grouped, strict=True))
    last = sum(grouped[-10:]) / len(grouped[-10:])
    Console().print(f"mean reward of the last 10 iterations: {last:.3f}; the curves differ by at most {apart:.2e}")
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = ({"lw": 5, "color": "#b0b7c3"}, {"lw": 1.5, "color": "#3f7d00"})
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        axes.plot(range(1, len(curve) + 1), curve, label=name, **style)
    axes.set(xlabel="iteration", ylabel="mean reward", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
