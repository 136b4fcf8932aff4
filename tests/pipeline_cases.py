"""What the pipeline and split-group tests run on every rank of run_distributed.

The oracle is plain megatron-core on repeated prefixes, one process and one stage. It leaves a file with its weights at
the start, its gradients, and its weights after some optimizer steps, by the names and offsets that megatron-core gives
to shards in checkpoints: every rank of a run at other parallel sizes finds its own shards and compares them.
"""

import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from megatron_prefix import LossConfig, Pack, RolloutGroup, RolloutTree, TreeNode
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_hybrid_model, build_model, hybrid_stack_spec, transformer_config
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import repeated_packs
from megatron_prefix.splitting import pack_and_split
from tests.mcore_helpers import start, tiny_config

STEPS = 5
WHOLE = 1000  # a limit that no group reaches
UNCLIPPED = LossConfig(clip_low=0.99, clip_high=100.0)  # rounding in bf16 would move tokens over the bound
NO_CLIPPING = 1e9  # of gradients: makes megatron-core compute the gradient norm, which it does with clipping only
Whole = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Parallel sizes and settings of one run."""

    layers: int = 4
    pp: int = 1
    vpp: int | None = None
    tp: int = 1
    sequence_parallel: bool = False
    dp: int = 1
    cp: int = 1
    cp_comm_type: str = "p2p"
    cp_placement: str = "branch"
    recompute: str = "none"
    limit: int = 16
    prefix_activations: str = "keep"
    tied: bool = False
    overlap: bool = False
    distributed_optimizer: bool = False
    dtype: str = "float64"
    hybrid: bool = False
    lengths_only: bool = False
    steps: int = STEPS

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp * self.cp

    @property
    def name(self) -> str:
        values = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return "-".join(k if v is True else f"{k}{v}" for k, v in values.items()) or "default"

    @property
    def model(self) -> "Case":
        """The case of its oracle."""
        return Case(layers=self.layers, tied=self.tied, dtype=self.dtype, hybrid=self.hybrid, steps=self.steps)


def batch() -> list[RolloutGroup | RolloutTree]:
    """With limit 16: groups in 2 to 5 parts of unequal size, a tree split at several levels and below trained tokens,
    a prompt of one token, and groups that fit."""
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
    return [
        group(11, 7, 9, 10, 4),
        group(3, 2, 2),
        tree,
        group(1, 9, 8),
        group(7, 12, 11, 6, 14, 9),
    ]


def old_log_probs(pack: Pack) -> Tensor:
    """Some old policy's, by the row's target and position alone, however the batch is packed."""
    seeds = pack.targets[pack.response_rows] * 7 + pack.positions[pack.response_rows] * 3
    return -4.1 + 0.2 * torch.sin(seeds.double())


def inputs_of(packs: Sequence[Pack], with_tokens: Sequence[Pack] | None = None) -> list[StepInput]:
    """Of packs that may have lengths only, ``with_tokens`` are the same with token ids."""
    pairs = zip(packs, with_tokens or packs, strict=True)
    return [StepInput(pack, old_log_probs(full)) for pack, full in pairs]


def settings_of(case: Case) -> TrainSettings:
    return TrainSettings(
        learning_rate=5e-5,
        clip_grad=0.0 if case.dtype == "float64" else NO_CLIPPING,
        chunk_rows=7,
        overlap_grad_reduce=case.overlap,
        distributed_optimizer=case.distributed_optimizer,
        prefix_activations=case.prefix_activations,
        cp_placement=case.cp_placement,
    )


def config_of(case: Case) -> ModelConfig:
    return tiny_config(num_layers=case.layers, tied_embeddings=case.tied, qk_layernorm=True, qkv_bias=True)


def build(case: Case, *, plain: bool = False) -> list[Any]:
    """The model chunks of this rank: with prefix-grouped attention, or as megatron-core has them."""
    config = config_of(case)
    settings: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "sequence_parallel": case.sequence_parallel}
    if case.cp > 1:
        settings["overrides"] = {"cp_comm_type": case.cp_comm_type}
    spec = None if plain else prefix_gpt_layer_spec(transformer_config(config, **settings))
    stages = range(case.vpp) if case.vpp else (None,)
    settings |= {"seed": 1, "recompute": case.recompute}
    if case.hybrid:
        stack = None if spec is None else hybrid_stack_spec(spec)
        return [build_hybrid_model(config, stack, vp_stage=stage, **settings) for stage in stages]
    return [build_model(config, layer_spec=spec, vp_stage=stage, **settings) for stage in stages]


# ---- tensors of a whole model, and this rank's shards of them


def _shards(chunks: Sequence[Any]) -> Iterator[ShardedTensor]:
    """Views of the parameters."""
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)  # the two halves of a gated MLP's first layer
        yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def whole_of(model: Any) -> Whole:
    """A copy of the weights of a model that is on one rank."""
    whole: Whole = {}
    for shard in _shards([model]):
        tensor = whole.setdefault(shard.key, torch.full(shard.global_shape, torch.nan, dtype=shard.data.dtype))
        tensor[shard.global_slice()] = shard.data.detach()
    return whole


def set_weights(chunks: Sequence[Any], whole: Whole) -> None:
    """Write this rank's shards into its chunks."""
    reached = 0
    for shard in _shards(chunks):
        shard.data.detach().copy_(whole[shard.key][shard.global_slice()])
        reached += shard.data.numel()
    assert reached >= sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


# ---- the oracle


def write_oracles(rank: int, world_size: int, cases: Sequence[Case], folder: Path) -> None:
    """The oracles of the models of some cases, a file each."""
    start()
    for case in cases:
        torch.save(_bf16_oracle(case) if case.dtype == "bfloat16" else _oracle(case), oracle_file(folder, case))


def oracle_file(folder: Path, case: Case) -> Path:
    return folder / f"{replace(case.model, steps=STEPS).name}.pt"


def _oracle(case: Case) -> dict[str, Any]:
    (model,) = build(case.model, plain=True)
    _unsettle(model)
    found: dict[str, Any] = {"start": whole_of(model)}
    trainer = PolicyTrainer(model, settings_of(case.model), LossConfig(), log_probs=repeated_log_probs)
    inputs = inputs_of(repeated_packs(batch()))
    found["log_probs"] = _sum_of_log_probs(trainer, [x.pack for x in inputs])
    found["loss"] = trainer.gradients(inputs)["loss"]
    found["gradients"] = _whole_gradients(trainer, model)
    norms = [trainer.step(inputs)["grad_norm"] for _ in range(case.steps)]
    return found | {"end": whole_of(model), "grad_norms": norms}


def _bf16_oracle(case: Case) -> dict[str, Any]:
    """The gradients in fp32 of weights that bf16 holds, and how far from them the plain path in bf16 is."""
    (plain,) = build(case.model, plain=True)
    _unsettle(plain)
    found: dict[str, Any] = {"start": whole_of(plain)}
    (exact,) = build(replace(case.model, dtype="float32"), plain=True)
    set_weights([exact], found["start"])
    inputs = inputs_of(repeated_packs(batch()))
    gradients = []
    for model in (exact, plain):
        trainer = PolicyTrainer(model, settings_of(case.model), UNCLIPPED, log_probs=repeated_log_probs)
        trainer.gradients(inputs)
        gradients.append(_whole_gradients(trainer, model))
    found["gradients"] = gradients[0]
    found["error"] = (
        sum(float((b - a).square().sum()) for a, b in zip(*map(dict.values, gradients), strict=True)) ** 0.5
    )
    return found


def _unsettle(model: Any) -> None:
    """Biases away from 0 and norm weights away from 1, as in trained models."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def _whole_gradients(trainer: PolicyTrainer, model: Any) -> Whole:
    """As `whole_of`, of the gradients: they stand in the place of fresh weights for it."""
    gradients = trainer.named_gradients()
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = gradients[name.removeprefix("module.")].clone()
    found = whole_of(model)
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    return found


# ---- a run, compared


def compare_all(rank: int, world_size: int, cases: Sequence[Case], folder: Path) -> list[dict[str, float]]:
    found = []
    for case in cases:
        start(pp=case.pp, tp=case.tp, cp=case.cp, **({"vpp": case.vpp} if case.vpp else {}))
        try:
            found.append(_compare_bf16(case, folder) if case.dtype == "bfloat16" else compare(case, folder))
        except Exception as error:
            error.add_note(f"in case {case}")
            raise
        parallel_state.destroy_model_parallel()
    return found


def compare(case: Case, folder: Path) -> dict[str, float]:
    """This rank's largest differences from the oracle."""
    oracle = torch.load(oracle_file(folder, case))
    trainer, packs = _trainer_and_packs(case, oracle["start"])
    found = {"packs": float(len(packs)), "prefixes": float(sum(pack.is_prefix for pack in packs))}
    shared = [(job.work, job.ends.work) for job in plan_step(packs, trainer.config).jobs if job.ends is not None]
    found["longer"], found["shorter"] = (float(sum(way(a, b) for a, b in shared)) for way in (operator.gt, operator.lt))
    found["with ids"] = float(sum(pack.ids is not None for pack in packs))
    total = sum(all_gather_object(_sum_of_log_probs(trainer, packs), trainer.dp_group))
    found["log_probs"] = abs(total / oracle["log_probs"] - 1)
    inputs = inputs_of(packs, packs_of_rank(trainer, replace(case, lengths_only=False)))
    found["loss"] = abs(trainer.gradients(inputs)["loss"] - oracle["loss"])
    expected = build(case)
    theirs = [parameter for chunk in expected for parameter in chunk.parameters()]
    if not case.distributed_optimizer:  # whose main_grad is a shard
        set_weights(expected, oracle["gradients"])
        found["gradients"] = _worst(_gradients(trainer), theirs)
    norms = [trainer.step(inputs)["grad_norm"] for _ in range(case.steps)]
    if case.dtype != "float64":
        found["grad_norm"] = max(abs(a / b - 1) for a, b in zip(norms, oracle["grad_norms"], strict=True))
    if case.steps:
        mine = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
        set_weights(expected, oracle["end"])
        found["parameters"] = _worst(mine, theirs)
        set_weights(expected, oracle["start"])
        found["moved"] = _worst(mine, theirs)
    assert all(pack.prefix is None or pack.prefix.cache is None for pack in packs)
    return found


def _compare_bf16(case: Case, folder: Path) -> dict[str, float]:
    """The norm of the gradients' errors against fp32, and the plain path's."""
    oracle = torch.load(oracle_file(folder, case))
    trainer, packs = _trainer_and_packs(case, oracle["start"], UNCLIPPED)
    trainer.gradients(inputs_of(packs))
    expected = build(replace(case, dtype="float32"))
    set_weights(expected, oracle["gradients"])
    theirs = [parameter.detach() for chunk in expected for parameter in chunk.parameters()]
    mine = sum(float((a - b).square().sum()) for a, b in zip(_gradients(trainer), theirs, strict=True))
    ranks = all_gather_object(mine, parallel_state.get_model_parallel_group())
    return {"error": sum(ranks) ** 0.5, "plain error": oracle["error"]}


def _sum_of_log_probs(trainer: PolicyTrainer, packs: Sequence[Pack]) -> float:
    """Over pairs: packs of repeated prefixes have a row for each."""
    found = zip(packs, trainer.log_probs_of(packs), strict=True)
    return sum(float(x.double()[pack.pairs.row].sum()) for pack, x in found)


def _trainer_and_packs(case: Case, weights: Whole, loss: LossConfig | None = None) -> tuple[PolicyTrainer, list[Pack]]:
    chunks = build(case)
    set_weights(chunks, weights)
    trainer = PolicyTrainer(chunks, settings_of(case), loss or LossConfig())
    return trainer, packs_of_rank(trainer, case)


def packs_of_rank(trainer: PolicyTrainer, case: Case) -> list[Pack]:
    """This rank's micro-batches, where so asked without what it does not read."""
    groups = batch()
    if case.lengths_only:
        groups = groups_on_this_rank(groups, trainer.model)
    return pack_and_split(trainer.shard(groups), max_tokens_per_pack=case.limit)


def _gradients(trainer: PolicyTrainer) -> list[Tensor]:
    return [parameter.main_grad for chunk in trainer.chunks for parameter in chunk.parameters()]


def _worst(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of a tensor's norm; one below a thousandth of all counts as that.

    NaN is infinite.
    """
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(mine, theirs, strict=True)]
    group = parallel_state.get_model_parallel_group()
    whole = sum(all_gather_object(sum(float(b.square().sum()) for _, b in pairs), group)) ** 0.5
    found = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-3 * whole) for a, b in pairs])
    return float(found.nan_to_num(nan=torch.inf).max())
