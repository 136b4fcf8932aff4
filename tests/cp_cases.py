"""What the context-parallel model tests run, and the functions that do it on every rank of run_distributed."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_prefix import LossConfig, RolloutGroup, pack_groups, prefix_gpt_layer_spec, response_log_probs
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.mcore.equivalence import differences, evaluate, make_inputs
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.repeated import build_plain_model, repeated_log_probs
from megatron_prefix.mcore.stages import copy_parameters, unwrap
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from tests.equivalence_cases import VOCAB_SIZE, Batch, ragged_batch
from tests.mcore_helpers import start, tiny_config

MAX_TOKENS = 45  # less than the ragged batch, so that a rank has several packs
LOSSES = {
    "grpo": LossConfig(aggregation="sequence"),
    "gspo": LossConfig(clip_low=0.01, clip_high=0.02, ratio="sequence", aggregation="sequence"),
    "entropy": LossConfig(kl_coef=0.3, entropy_coef=0.1),
}


@dataclass(frozen=True)
class World:
    """Parallel sizes of one start of processes."""

    tp: int = 1
    cp: int = 2
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True)
class Case:
    """One model, batch and loss, and how context parallelism runs it."""

    comm_type: str | list[str]
    placement: str
    recompute: str = "none"
    batch: str = "ragged"
    loss: str = "grpo"
    dtype: str = "float64"
    kv_heads: int = 4
    steps: int = 0
    distributed_optimizer: bool = False
    chunk_rows: int = 4


def batch_of(name: str) -> Batch:
    """Groups of unequal sizes, trees, or so few tokens that ranks stay without a response row, or without any row."""
    if name == "trees":
        return ragged_batch(trees=True)
    draw = random.Random(0)

    def group(prompt: int, *responses: int) -> RolloutGroup:
        tokens = [[draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in (prompt, *responses)]
        return RolloutGroup(tokens[0], tokens[1:], [draw.random() for _ in responses])

    if name == "tiny":
        return [group(2, 1, 1)]
    return [group(7, 3, 1, 5), group(1, 4, 2), group(9, 1, 1), group(25, 6, 2, 2, 9), group(4, 3)]


def start_world(world: World) -> dict[str, Any]:
    """Groups of megatron-core; returns the model overrides that go with them. Four ranks get two levels of groups."""
    levels = {"cp_a2a": 2} if world.cp == 4 else {}
    start(tp=world.tp, cp=world.cp, **levels)
    return {"hierarchical_context_parallel_sizes": [2, 2]} if levels else {}


def models_of(case: Case, world: World, overrides: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights with prefix groups under context parallelism, and as plain megatron-core."""
    # 12 query heads divide by 2, 3 and 4 ranks, and by 2 x 2 and 2 x 3.
    config = tiny_config(num_attention_heads=12, num_query_groups=case.kv_heads, head_dim=8, tied_embeddings=False)
    settings: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "sequence_parallel": world.sequence_parallel}
    overrides = overrides | {"cp_comm_type": case.comm_type}
    spec = prefix_gpt_layer_spec(transformer_config(config, overrides=overrides, **settings))
    grouped = build_model(config, layer_spec=spec, seed=1, recompute=case.recompute, overrides=overrides, **settings)
    return grouped, build_plain_model(config, seed=1, **settings)


def trainers_of(case: Case, world: World, overrides: dict[str, Any]) -> tuple[PolicyTrainer, PolicyTrainer]:
    grouped, plain = models_of(case, world, overrides)
    settings = TrainSettings(
        learning_rate=3e-4, clip_grad=0.0, chunk_rows=case.chunk_rows, cp_placement=case.placement,
        distributed_optimizer=case.distributed_optimizer,
    )  # fmt: skip
    loss = LOSSES[case.loss]
    return PolicyTrainer(grouped, settings, loss), PolicyTrainer(plain, settings, loss, log_probs=repeated_log_probs)


def compare(case: Case, world: World, overrides: dict[str, Any]) -> dict[str, Any]:
    trainer, oracle = trainers_of(case, world, overrides)
    before = {name: value.detach().clone() for name, value in unwrap(oracle.model).named_parameters()}
    both = make_inputs(trainer, trainer.shard(batch_of(case.batch)), MAX_TOKENS)
    result, reference = evaluate(trainer, both.grouped, case.steps), evaluate(oracle, both.repeated, case.steps)
    found = differences(result, reference)
    moved = [(before[name] - value).abs().max().item() for name, value in reference.parameters.items()]
    return {
        **asdict(found),
        "worst": found.worst,
        "loss": reference.loss,
        "packs": len(both.grouped),
        "moved": max(moved, default=0.0),
    }


def compare_all(rank: int, world_size: int, world: World, cases: Sequence[Case]) -> list[dict[str, Any]]:
    overrides = start_world(world)
    found = []
    for case in cases:
        try:
            found.append(compare(case, world, overrides))
        except Exception as error:
            error.add_note(f"in {case}, {world}")
            raise
    return found


# ---- half precision


def bf16_errors(rank: int, world_size: int, world: World, case: Case) -> dict[str, tuple[float, float]]:
    """(context parallel, plain) errors in bf16 against plain fp32 with the same weights."""
    overrides = start_world(world)
    trainer, oracle = trainers_of(case, world, overrides)
    _, exact = trainers_of(replace(case, dtype="float32"), world, overrides)
    copy_parameters(oracle.model, exact.model)
    both = make_inputs(trainer, batch_of(case.batch), MAX_TOKENS)
    evaluations = [evaluate(trainer, both.grouped), evaluate(oracle, both.repeated), evaluate(exact, both.repeated)]
    log_probs = [(e.log_probs - evaluations[2].log_probs).norm().item() for e in evaluations[:2]]
    gradients = [
        sum((e.gradients[name] - g).square().sum().item() for name, g in evaluations[2].gradients.items()) ** 0.5
        for e in evaluations[:2]
    ]
    return {"log_probs": (log_probs[0], log_probs[1]), "gradients": (gradients[0], gradients[1])}


# ---- own rows


def own_rows(rank: int, world_size: int, world: World, placement: str) -> list[dict[str, Any]]:
    """Per pack: this rank's own log-probs and entropies, the full vectors, and whether its gradients agree."""
    overrides = start_world(world)
    model, _ = models_of(Case("p2p", placement), world, overrides)
    cp_rank = parallel_state.get_context_parallel_rank()
    results = []
    for pack in [*pack_groups(batch_of("ragged"), max_tokens_per_pack=MAX_TOKENS), *pack_groups(batch_of("tiny"))]:
        options: dict[str, Any] = {"cp_placement": placement, "with_entropy": True}
        full = response_log_probs(model, pack, **options)
        own = response_log_probs(model, pack, full=False, **options)
        rows = torch.tensor(CpPlan.build(pack.layout, world.cp, placement).rows(cp_rank), dtype=torch.long)
        number = {row: n for n, row in enumerate(pack.response_rows.tolist())}
        mine = torch.tensor([number[row] for row in rows.tolist() if row in number], dtype=torch.long)
        weights = torch.linspace(0.5, 2, len(full[0]), dtype=full[0].dtype)
        gradients = []
        for output, weight in ((full, weights), (own, weights[mine])):
            model.zero_grad()
            ((output[0] * weight).sum() + (output[1] * weight).sum()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        results.append(
            {
                "mine": mine.tolist(), "full": full[0].detach(), "full_entropy": full[1].detach(),
                "own": own[0].detach(), "own_entropy": own[1].detach(),
                "gradient_difference": (gradients[0] - gradients[1]).abs().max().item(),
            }
        )  # fmt: skip
    return results


def full_on_one_rank(rank: int, world_size: int) -> list[torch.Tensor]:
    start()
    model, _ = models_of(Case("p2p", "auto"), World(cp=1), {})
    packs = [*pack_groups(batch_of("ragged"), max_tokens_per_pack=MAX_TOKENS), *pack_groups(batch_of("tiny"))]
    return [response_log_probs(model, pack).detach() for pack in packs]
