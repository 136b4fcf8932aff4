"""What the pipeline and split-group tests run on every rank of run_distributed.

The oracle is plain megatron-core on repeated prefixes, one process and one stage. It leaves three checkpoints: its
weights at the start, its gradients (stored as if they were weights), and its weights after some optimizer steps.
Checkpoints load at any parallel sizes, so every rank compares its own shards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix import LossConfig, Pack, RolloutGroup, RolloutTree, TreeNode
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.checkpoint import load_checkpoint, save_checkpoint
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.repeated import build_plain_model, repeated_log_probs
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import repeated_packs
from megatron_prefix.splitting import pack_and_split
from tests.mcore_helpers import start, tiny_config

STEPS = 5
WHOLE = 1000  # a limit that no group reaches


@dataclass(frozen=True)
class Case:
    """Parallel sizes and settings of one run."""

    layers: int = 4
    pp: int = 1
    vpp: int | None = None
    tp: int = 1
    sequence_parallel: bool = False
    dp: int = 1
    recompute: str = "none"
    limit: int = 16
    prefix_activations: str = "keep"
    tied: bool = False
    overlap: bool = False
    distributed_optimizer: bool = False
    dtype: str = "float64"

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp

    @property
    def name(self) -> str:
        values = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return "-".join(k if v is True else f"{k}{v}" for k, v in values.items()) or "default"


def batch() -> list[RolloutGroup | RolloutTree]:
    """Groups to be split into 2 to 4 parts of unequal size (limit 16), a tree split at two levels, and small ones."""
    draw = random.Random(7)

    def ids(count: int) -> list[int]:
        return [draw.randrange(64) for _ in range(count)]

    def group(prompt: int, *responses: int) -> RolloutGroup:
        return RolloutGroup(ids(prompt), [ids(n) for n in responses], [draw.random() for _ in responses])

    tree = RolloutTree(
        (
            TreeNode(ids(5), -1),
            TreeNode(ids(4), 0),  # a turn of the user, shared by three rollouts
            TreeNode(ids(9), 1, (0,)),
            TreeNode(ids(3), 1, (1,)),
            TreeNode(ids(8), 1, (2,)),
            TreeNode(ids(3), 0, (3, 4, 5)),  # trained by three rollouts, one of which ends here
            TreeNode(ids(2), 5),  # a tool's output
            TreeNode(ids(7), 6, (3,)),
            TreeNode(ids(8), 6, (4,)),
        ),
        (1.0, 0.0, 0.5, 0.2, 0.9, 0.4),
    )
    return [group(11, 3, 5, 1, 2, 7, 6, 4), group(3, 2, 2), tree, group(9, 8, 8, 1, 1, 3), group(1, 9, 9), group(4, 3)]


def old_log_probs(pack: Pack) -> Tensor:
    """Some old policy's, by the row's target and position alone, however the batch is packed."""
    seeds = pack.targets[pack.response_rows] * 7 + pack.positions[pack.response_rows] * 3
    return -4.1 + 0.2 * torch.sin(seeds.double())


def inputs_of(packs: Sequence[Pack]) -> list[StepInput]:
    return [StepInput(pack, old_log_probs(pack)) for pack in packs]


def settings_of(case: Case) -> TrainSettings:
    return TrainSettings(
        learning_rate=5e-5,
        clip_grad=0.0,
        chunk_rows=7,
        overlap_grad_reduce=case.overlap,
        distributed_optimizer=case.distributed_optimizer,
        prefix_activations=case.prefix_activations,
    )


def config_of(case: Case) -> ModelConfig:
    return tiny_config(num_layers=case.layers, tied_embeddings=case.tied, qk_layernorm=True, qkv_bias=True)


def write_oracle(rank: int, world_size: int, case: Case, folder: Path) -> float:
    """The three checkpoints of the oracle for a case's model; returns the loss."""
    start()
    config, dtype = config_of(case), getattr(torch, case.dtype)
    model = build_plain_model(config, dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases away from 0 and norm weights away from 1
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    save_checkpoint(folder / "start", model, config)
    trainer = PolicyTrainer(model, settings_of(Case()), LossConfig(), log_probs=repeated_log_probs)
    inputs = inputs_of(repeated_packs(batch()))
    loss = trainer.gradients(inputs)["loss"]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = trainer.named_gradients()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients[name])
        save_checkpoint(folder / "gradients", model, config)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    for _ in range(STEPS):
        trainer.step(inputs)
    save_checkpoint(folder / "end", model, config)
    return loss


def build(case: Case) -> list[Any]:
    """The model chunks of this rank."""
    config = config_of(case)
    settings = {"dtype": getattr(torch, case.dtype), "sequence_parallel": case.sequence_parallel}
    spec = prefix_gpt_layer_spec(transformer_config(config, **settings))
    stages = range(case.vpp) if case.vpp else (None,)
    return [
        build_model(config, layer_spec=spec, seed=1, recompute=case.recompute, vp_stage=stage, **settings)
        for stage in stages
    ]


def compare(rank: int, world_size: int, case: Case, folder: Path) -> dict[str, float]:
    """This rank's loss, and its largest differences from the oracle's gradients and weights."""
    start(pp=case.pp, tp=case.tp, **({"vpp": case.vpp} if case.vpp else {}))
    config = config_of(case)
    chunks, expected = build(case), build(case)
    load_checkpoint(folder / "start", chunks, config=config)
    trainer = PolicyTrainer(chunks, settings_of(case), LossConfig())
    packs = pack_and_split(trainer.shard(batch()), max_tokens_per_pack=case.limit)
    inputs = inputs_of(packs)
    log_probs = trainer.log_probs_of(packs)
    loss = trainer.gradients(inputs)["loss"]
    found = {"loss": loss, "packs": float(len(packs)), "prefixes": float(sum(pack.is_prefix for pack in packs))}
    found["log_probs"] = sum(float(x.double().sum()) for x in log_probs)
    if not case.distributed_optimizer:
        load_checkpoint(folder / "gradients", expected, config=config)
        found["gradients"] = _worst(
            [p.main_grad for chunk in trainer.chunks for p in chunk.parameters()],
            [p for chunk in expected for p in chunk.parameters()],
        )
    for _ in range(STEPS):
        trainer.step(inputs)
    load_checkpoint(folder / "end", expected, config=config)
    found["parameters"] = _worst(
        [p for chunk in trainer.chunks for p in chunk.parameters()],
        [p for chunk in expected for p in chunk.parameters()],
    )
    assert all(pack.prefix is None or pack.prefix.cache is None for pack in packs)
    return found


def _worst(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of a tensor's norm; one below a thousandth of all counts as that."""
    group = parallel_state.get_model_parallel_group()
    whole = sum(all_gather_object(sum(float(x.double().square().sum()) for x in theirs), group)) ** 0.5
    return max(
        float((a.detach().double() - b.detach().double()).norm() / max(float(b.detach().double().norm()), 1e-3 * whole))
        for a, b in zip(mine, theirs, strict=True)
    )
