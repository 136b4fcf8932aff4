"""What the equivalence tests compare, and the functions that do it on every rank of run_distributed.

Kept apart from the test module so that the ranks import no pytest parametrization.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prefix import (
    LossConfig,
    Pack,
    RolloutGroup,
    RolloutTree,
    Trajectory,
    TreeNode,
    pack_groups,
    share_prefixes,
)
from megatron_prefix.cost_model import CostModel
from megatron_prefix.mcore.equivalence import (
    Differences,
    Evaluation,
    differences,
    evaluate,
    make_inputs,
)
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_hybrid_model, build_model, hybrid_stack_spec, transformer_config
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.stages import copy_parameters
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.packing import NO_TARGET
from tests.mcore_helpers import start, tiny_config

Batch = list[RolloutGroup | RolloutTree]
STEPS = 5
COSTS = {1: 1.0, 2: 1.7, 4: 2.7}  # how gladly a case runs on so many ranks
VOCAB_SIZE = 64
MAX_TOKENS = 30  # less than the batch, so that a rank has several packs
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.8, "mscale_all_dim": 0.3}
POSITIONS: dict[str, dict[str, Any]] = {
    "rope": {"position_embedding": "rope"},
    "llama3": {"position_embedding": "rope", "rope_scaling": {"factor": 8.0}},
    "yarn": {"position_embedding": "yarn", "rope_scaling": YARN},
    "learned": {"position_embedding": "learned_absolute", "norm": "layernorm", "activation": "gelu"},
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("gpt", "hybrid") if find_spec("megatron.core.models.hybrid") else ("gpt",),
    "position": tuple(POSITIONS),
    "optimizer": ("plain", "overlap", "distributed", "distributed overlap"),
    "recompute": ("none", "selective", "full"),
    "tp": (1, 2),
    "sequence_parallel": (False, True),
    "dp": (1, 2),
    "tied": (False, True),
    "kv_heads": (2, 4),
    "qk_layernorm": (False, True),
    "qkv_bias": (False, True),
    "several_packs": (False, True),
    "trees": (False, True),
    "dtype": ("float64", "float32"),
}


@dataclass(frozen=True)
class Case:
    """One model and one way to run it; a value of every factor."""

    model: str = "gpt"
    position: str = "rope"
    optimizer: str = "plain"
    recompute: str = "none"
    tp: int = 1
    sequence_parallel: bool = False
    dp: int = 1
    tied: bool = False
    kv_heads: int = 2
    qk_layernorm: bool = False
    qkv_bias: bool = False
    several_packs: bool = True
    trees: bool = False
    dtype: str = "float64"
    chunk_rows: int = 5
    impl: str = "auto"

    @property
    def name(self) -> str:
        shown = {key: value for key, value in asdict(self).items() if key in FACTORS}
        words = [key if value is True else f"{key}={value}" if isinstance(value, int) else value
                 for key, value in shown.items() if value is not False]  # fmt: skip
        return "-".join(words).replace(" ", "_")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def allowed(values: dict[str, Any]) -> bool:
    """Whether megatron-core can run these (possibly not all) factor values together."""
    return not (
        (values.get("sequence_parallel") and values.get("tp") == 1)
        or (values.get("model") == "hybrid" and values.get("position") == "llama3")
        # its distributed optimizer knows no fp64
        or (values.get("dtype") == "float64" and "distributed" in values.get("optimizer", ""))
        # without rotary embeddings the gradient of a key's bias is 0, and Adam makes full steps of its fp32 noise
        or (
            values.get("dtype") == "float32"
            and values.get("position") == "learned"
            and (values.get("qkv_bias") or values.get("qk_layernorm"))
        )
    )


def pairs_of_values(values: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(sorted(values.items(), key=lambda item: list(FACTORS).index(item[0])), 2))


def all_pairs() -> set[tuple[tuple[str, Any], ...]]:
    """Every pair of factor values that can stand together."""
    pairs = set()
    for one, other in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[one], FACTORS[other]):
            if allowed({one: a, other: b}):
                pairs.add(((one, a), (other, b)))
    return pairs


def covering_cases() -> list[Case]:
    """Few cheap cases with every pair of values together somewhere: the best of some random ones, again and again."""
    draw = random.Random(0)
    missing = all_pairs()
    cases = []
    while missing:
        candidates = []
        for _ in range(60):
            values = dict(draw.choice(sorted(missing, key=repr)))
            for factor in draw.sample(list(FACTORS), len(FACTORS)):
                if factor not in values:
                    choices = [v for v in FACTORS[factor] if allowed(values | {factor: v})]
                    values[factor] = draw.choice(choices) if choices else None
            if None not in values.values():
                candidates.append(values)
        best = max(candidates, key=lambda v: len(pairs_of_values(v) & missing) / COSTS[v["tp"] * v["dp"]])
        missing -= pairs_of_values(best)
        cases.append(Case(**best))
    return cases


def ragged_batch(trees: bool = False, seed: int = 0) -> Batch:
    """Groups of unequal sizes with one-token prompts and responses, and a multi-turn tree where asked for."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(count)]

    def group(prompt: int, *responses: int) -> RolloutGroup:
        rewards = [draw.random() for _ in responses]
        masks = [[t % 3 != 1 for t in range(n)] for n in responses]
        return RolloutGroup(ids(prompt), [ids(n) for n in responses], rewards, loss_masks=masks)

    groups: Batch = [group(7, 3, 1, 5), group(1, 4, 2), group(9, 6)]
    if not trees:
        return [*groups, group(5, 2, 2)]
    nodes = (
        TreeNode(ids(6), -1),
        TreeNode(ids(3), 0, (0, 1)),  # a turn that two rollouts share and both train
        TreeNode(ids(2), 1),
        TreeNode(ids(4), 2, (0,)),
        TreeNode(ids(2), 2, (1,), loss_mask=(False, True)),
        TreeNode(ids(3), 0, (2,)),
        TreeNode(ids(1), 5),
        TreeNode(ids(5), 6, (2, 3)),
        TreeNode(ids(2), 7, (3,)),
    )
    return [groups[0], RolloutTree(nodes, (1.0, 0.0, 0.3, 0.6)), groups[1]]


Build = Callable[..., torch.nn.Module]


def models_of(case: Case, dtype: torch.dtype | None = None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights with prefix-grouped attention, and as plain megatron-core (no recompute)."""
    config = tiny_config(
        num_query_groups=case.kv_heads,
        qk_layernorm=case.qk_layernorm,
        qkv_bias=case.qkv_bias,
        tied_embeddings=case.tied,
        vocab_size=VOCAB_SIZE,
        head_dim=12,  # not hidden_size / heads
        **POSITIONS[case.position],
    )
    settings = {"dtype": dtype or case.torch_dtype, "sequence_parallel": case.sequence_parallel}
    spec = prefix_gpt_layer_spec(transformer_config(config, **settings), impl=case.impl)
    if case.model == "hybrid":
        grouped = build_hybrid_model(config, hybrid_stack_spec(spec), seed=1, recompute=case.recompute, **settings)
        plain = build_hybrid_model(config, seed=1, **settings)
    else:
        grouped = build_model(config, layer_spec=spec, seed=1, recompute=case.recompute, **settings)
        plain = build_model(config, seed=1, **settings)
    for model in (grouped, plain):
        _unsettle(model)
    return grouped, plain


def _unsettle(model: torch.nn.Module) -> None:
    """Biases away from 0 and norm weights away from 1, as in trained models; the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def settings_of(case: Case) -> TrainSettings:
    return TrainSettings(
        learning_rate=5e-5,  # Adam turns rounding of the smallest gradients into steps of this size
        clip_grad=0.0 if case.dtype == "float64" else 0.5,
        distributed_optimizer="distributed" in case.optimizer,
        overlap_grad_reduce="overlap" in case.optimizer,
        chunk_rows=case.chunk_rows,
    )


def compare(case: Case) -> dict[str, Any]:
    """Both ways on this rank's share of the batch: all differences, and how far the parameters moved."""
    grouped, plain = models_of(case)
    settings = settings_of(case)
    trainer = PolicyTrainer(grouped, settings, LossConfig())
    oracle = PolicyTrainer(plain, settings, LossConfig(), log_probs=repeated_log_probs)
    before = {name: value.detach().clone() for name, value in plain.named_parameters()}
    both = make_inputs(trainer, trainer.shard(ragged_batch(case.trees)), MAX_TOKENS if case.several_packs else None)
    result, reference = evaluate(trainer, both.grouped, STEPS), evaluate(oracle, both.repeated, STEPS)
    found = differences(result, reference)
    moved = differences(replace(reference, parameters=before), reference)
    return {
        **asdict(found),
        "worst": found.worst,
        "packs": len(both.grouped),
        "loss": reference.loss,
        "moved": statistics.median(moved.parameters.values()),
    }


def in_groups(tp: int, dp: int, function: Callable[..., Any], *args: Any) -> Any:
    """``function`` inside fresh megatron-core groups, which are destroyed after it."""
    start(tp=tp, dp=dp)
    result = function(*args)
    parallel_state.destroy_model_parallel()
    return result


def compare_all(rank: int, world_size: int, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        try:
            found[case.name] = in_groups(case.tp, case.dp, compare, case)
        except Exception as error:
            error.add_note(f"in case {case}")
            raise
    return found


# ---- half precision


def compare_bf16(case: Case) -> dict[str, tuple[float, float]]:
    """(grouped, plain) relative errors in bf16 against plain fp32 with the same weights."""
    grouped, plain = models_of(case, torch.bfloat16)
    _, exact = models_of(case, torch.float32)
    copy_parameters(plain, exact)
    settings = replace(settings_of(case), clip_grad=0.0)
    trainers = [PolicyTrainer(grouped, settings, LossConfig())]
    trainers += [PolicyTrainer(m, settings, LossConfig(), log_probs=repeated_log_probs) for m in (plain, exact)]
    both = make_inputs(trainers[0], trainers[0].shard(ragged_batch(case.trees)), MAX_TOKENS)
    batches = (both.grouped, both.repeated, both.repeated)
    evaluations = [evaluate(t, batch) for t, batch in zip(trainers, batches, strict=True)]
    mine, theirs = (differences(e, evaluations[2]) for e in evaluations[:2])
    # Errors of single numbers scatter: what counts is the norm over all log-probs, and over all gradients.
    log_probs = [(e.log_probs - evaluations[2].log_probs).norm().item() for e in evaluations[:2]]
    gradients = [math.hypot(*d.gradients.values()) for d in (mine, theirs)]
    return {"log_probs": (log_probs[0], log_probs[1]), "gradients": (gradients[0], gradients[1]),
            "loss": (mine.loss_rel_diff, theirs.loss_rel_diff)}  # fmt: skip


# ---- every loss setting, with an oracle that has an entropy


def plain_log_probs(model: Any, pack: Pack, *, with_entropy: bool = False) -> Any:
    """`repeated_log_probs` written again for the test, with entropies: torch's log-softmax of the model's logits."""
    log_probs, entropies = [], []
    for start_, end in itertools.pairwise(pack.layout.starts):
        ids = pack.tokens[start_:end].unsqueeze(0)
        positions = torch.arange(end - start_).unsqueeze(0)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=None, runtime_gather_output=True)[0]
        targets = pack.targets[start_:end]
        everything = logits[targets != NO_TARGET].log_softmax(-1)
        log_probs.append(everything.gather(1, targets[targets != NO_TARGET].unsqueeze(1)).squeeze(1))
        entropies.append(torch.distributions.Categorical(logits=everything).entropy())
    return (torch.cat(log_probs), torch.cat(entropies)) if with_entropy else torch.cat(log_probs)


LOSSES = {
    "gspo": LossConfig(clip_low=0.01, clip_high=0.02, ratio="sequence", aggregation="sequence"),
    "kl and entropy": LossConfig(kl_coef=0.3, entropy_coef=0.1, clip_high=0.3),
    "k2, truncated importance": LossConfig(kl_coef=0.2, kl_estimator="k2", importance_cap=1.05, aggregation="sequence"),
    "dr. grpo, k1": LossConfig(aggregation="constant", constant_length=8, kl_coef=0.1, kl_estimator="k1"),
}


def made_up(pack: Pack, base: Tensor, kind: int) -> Tensor:
    """Other log-probs near ``base`` that depend on the row's token and position alone, however the batch is packed."""
    seeds = pack.targets[pack.response_rows] * 7 + pack.positions[pack.response_rows] * 3 + 5 * kind
    return base + 0.15 * torch.sin(seeds.to(base.dtype))


def with_sampler(groups: Sequence[RolloutGroup | RolloutTree]) -> Batch:
    """The plain groups of a batch with log-probs of a sampler near a uniform policy's."""
    result: Batch = []
    for group in groups:
        assert isinstance(group, RolloutGroup)
        sampled = [[-math.log(VOCAB_SIZE) + 0.2 * math.sin(t) for t in tokens] for tokens in group.responses]
        result.append(RolloutGroup(group.prompt, group.responses, group.rewards, None, sampled, group.loss_masks))
    return result


def step_inputs(trainer: PolicyTrainer, packs: Sequence[Pack]) -> list[StepInput]:
    inputs = []
    for pack in packs:
        base = trainer.log_probs(pack)
        inputs.append(StepInput(pack, made_up(pack, base, 1), made_up(pack, base, 2)))
    return inputs


def loss_and_gradients(
    case: Case, loss: LossConfig, *, plain: bool = False, max_tokens_per_pack: int | None = None
) -> Evaluation:
    """One evaluation of this rank's share of a batch of plain groups, by either path."""
    grouped, oracle = models_of(case)
    model, log_probs = (oracle, plain_log_probs) if plain else (grouped, None)
    trainer = PolicyTrainer(model, settings_of(case), loss, log_probs=log_probs)
    share = trainer.shard(with_sampler(ragged_batch()))
    packs = pack_groups(share, max_tokens_per_pack=max_tokens_per_pack, repeated=plain)
    return evaluate(trainer, step_inputs(trainer, packs))


def compare_losses(case: Case) -> dict[str, Differences]:
    found = {}
    for name, loss in LOSSES.items():
        settings = replace(case, chunk_rows=7)
        found[name] = differences(loss_and_gradients(settings, loss, max_tokens_per_pack=MAX_TOKENS),
                                  loss_and_gradients(settings, loss, plain=True))  # fmt: skip
    return found


def self_ratio(case: Case) -> dict[str, float]:
    """Metrics of a step whose old log-probs are the policy's own, by the same path without gradients."""
    trainer = PolicyTrainer(models_of(case)[0], settings_of(case), LossConfig())
    packs = pack_groups(trainer.shard(ragged_batch(case.trees)), max_tokens_per_pack=MAX_TOKENS)
    return trainer.gradients([StepInput(pack, trainer.log_probs(pack)) for pack in packs])


# ---- trees found in trajectories


def multi_turn_batch(declined: bool = False) -> Batch:
    """A plain group, and what `share_prefixes` makes of three agents' trajectories with a sampler's log-probs.

    Their turns branch in the middle, two of them share tokens that both generated, and one rewrites its context.
    """
    draw = random.Random(3)

    def ids(count: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(count)]

    def call(reward: float, name: str, *parts: tuple[list[int], int]) -> Trajectory:
        tokens = [token for part, _ in parts for token in part]
        generated = [own for part, own in parts for _ in part]
        sampled = [-math.log(VOCAB_SIZE) + draw.uniform(-0.3, 0.3) for _ in tokens]
        return Trajectory(tokens, generated, reward, "agents", sampled, name)

    prompt, turn, tool = (ids(7), 0), (ids(4), 1), (ids(3), 0)
    trajectories = [
        call(1.0, "a", prompt, turn),
        call(1.0, "a", prompt, turn, tool, (ids(5), 1)),
        call(1.0, "a", (ids(6), 0), (ids(2), 1)),
        call(0.0, "b", prompt, turn, tool, (ids(3), 1), (ids(2), 0), (ids(4), 1)),
        call(0.4, "c", prompt, (turn[0][:2], 1), (ids(5), 1)),
    ]
    cost = CostModel(row=1.0, merged_row=0.3, level=2.0) if declined else None
    return [with_sampler(ragged_batch())[0], *share_prefixes(trajectories, cost)]


def compare_multi_turn(case: Case) -> dict[str, tuple[int, float, float]]:
    """Of both trees, whole and split: prefixes, the loss, and the worst difference from repeated sequences."""
    found = {}
    loss = LossConfig(importance_cap=1.05, clip_high=0.3, aggregation="sequence")
    for name, declined, limit in (("shared", False, None), ("split", False, 20), ("declined", True, None)):
        grouped, plain = models_of(case)
        trainer = PolicyTrainer(grouped, settings_of(case), loss)
        oracle = PolicyTrainer(plain, settings_of(case), loss, log_probs=repeated_log_probs)
        both = make_inputs(trainer, multi_turn_batch(declined), limit)
        reference = evaluate(oracle, both.repeated)
        result = differences(evaluate(trainer, both.grouped, order=both.order), reference)
        shared = sum(batch.pack.layout.num_rows for batch in both.grouped)
        found[name] = (shared, reference.loss, result.worst)
    return found
