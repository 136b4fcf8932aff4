"""The estimate of memory against tracked allocations of real training steps on the CPU."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_prefix.estimator.loads import RankLoad, Sequences
from megatron_prefix.estimator.memory import estimate_memory, live_prefixes
from megatron_prefix.estimator.model import Experts, PlannedModel
from megatron_prefix.estimator.saved_tensors import layer_tensors, row_bytes
from megatron_prefix.estimator.sizes import RunSettings, Sizes
from megatron_prefix.loss import LossConfig
from megatron_prefix.measure import track_memory
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack, pack_groups
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split
from tests.distributed import run_distributed
from tests.mcore_helpers import start

pytestmark = pytest.mark.ci_oldest

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 192,
    "ffn_hidden_size": 480,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "head_dim": 48,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
}
WITHIN = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One training step. ``limit`` is the most rows of a micro-batch, None puts the group into one."""

    dtype: str = "fp32"
    recompute: str = "none"
    repeated: bool = False
    chunk_rows: int = 4096
    limit: int | None = None
    distributed_optimizer: bool = False
    tp: int = 1
    prompt: int = 201
    responses: tuple[int, ...] = (60, 50, 70, 60)
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**(SHAPE | self.shape))

    @property
    def group(self) -> RolloutGroup:
        rewards = [float(i % 2) for i in range(len(self.responses))]
        return RolloutGroup([1] * self.prompt, [[2] * n for n in self.responses], rewards)

    @property
    def packs(self) -> list[Pack]:
        if self.limit is None:
            return pack_groups([self.group], repeated=self.repeated)
        return pack_and_split([self.group], max_tokens_per_pack=self.limit)

    @property
    def load(self) -> RankLoad:
        sequences = Sequences.each(self.group) if self.repeated else [Sequences.grouped(self.group)]
        return RankLoad.of(sequences, self.limit or 10**9, lambda work: work.rows)

    @property
    def settings(self) -> RunSettings:
        return RunSettings(self.dtype, "local", self.distributed_optimizer, self.chunk_rows)


CASES = [
    *[Case("fp32", recompute) for recompute in ("none", "selective", "full")],
    *[Case("bf16", recompute) for recompute in ("none", "full")],
    Case("bf16", repeated=True),
    *[Case(*how, limit=220, prompt=201, responses=(50,) * 8) for how in (("fp32", "full"), ("bf16", "none"))],
    Case("bf16", shape={"vocab_size": 8000}),
    Case("bf16", chunk_rows=64, shape={"vocab_size": 4000}),
    Case("fp32", shape={"qk_layernorm": True, "num_query_groups": 6, "ffn_hidden_size": 128, "vocab_size": 100}),
    Case("bf16", shape={"qk_layernorm": True, "num_layers": 4, "vocab_size": 100}),
    Case("fp32", shape={"norm": "layernorm", "activation": "gelu", "tied_embeddings": True}),
    # Mostly weights.
    Case("fp32", prompt=33, responses=(16, 16), shape={"hidden_size": 384, "ffn_hidden_size": 1400}),
    Case("bf16", distributed_optimizer=True, prompt=33, responses=(16, 16)),
]  # fmt: skip


def _measured(case: Case) -> tuple[int, int]:
    """(bytes at rest after a step, the peak of the next one)."""
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
    from megatron_prefix.mcore.model import build_model, transformer_config
    from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings

    settings = TrainSettings(chunk_rows=case.chunk_rows, distributed_optimizer=case.distributed_optimizer)
    how: dict[str, Any] = {"dtype": DTYPES[case.dtype], "sequence_parallel": case.tp > 1}
    inputs = [StepInput(pack, torch.zeros(len(pack.response_rows))) for pack in case.packs]
    with track_memory() as memory:
        spec = prefix_gpt_layer_spec(transformer_config(case.config, **how))
        model = build_model(case.config, layer_spec=spec, recompute=case.recompute, seed=1, **how)
        trainer = PolicyTrainer(model, settings, LossConfig())
        trainer.step(inputs)
        memory.lap("first")
        at_rest = memory.current_bytes
        trainer.step(inputs)
        memory.lap("second")
    return at_rest, memory.phase_peaks["second"]


def _measure_all(rank: int, world_size: int, cases: list[Case]) -> list[tuple[int, int]]:
    start(tp=cases[0].tp)
    return [_measured(case) for case in cases]


def _check(case: Case, at_rest: int, peak: int) -> None:
    sizes = Sizes(tp=case.tp)
    estimate = estimate_memory(PlannedModel("t", case.config), sizes, case.load, case.settings, case.recompute)
    # megatron-core keeps the buffer into which sequence parallelism gathers rows.
    gathered = case.load.most_rows * case.config.hidden_size * case.settings.element if case.tp > 1 else 0
    assert estimate.at_rest + gathered == pytest.approx(at_rest, rel=0.02), case
    assert estimate.total == pytest.approx(peak, rel=WITHIN), case
    # Weights must not hide a wrong count of activations.
    if case.responses != (16, 16):
        assert estimate.total - estimate.at_rest == pytest.approx(peak - at_rest, rel=WITHIN), case


def test_memory_is_within_ten_percent_of_tracked_allocations() -> None:
    (found,) = run_distributed(_measure_all, 1, CASES)
    for case, (at_rest, peak) in zip(CASES, found, strict=True):
        _check(case, at_rest, peak)


def test_memory_under_tensor_and_sequence_parallelism() -> None:
    cases = [Case("bf16", tp=2), Case("fp32", "full", tp=2)]
    for found in run_distributed(_measure_all, 2, cases):
        for case, (at_rest, peak) in zip(cases, found, strict=True):
            _check(case, at_rest, peak)


def _keep(storages: dict[int, torch.UntypedStorage], tensor: torch.Tensor) -> torch.Tensor:
    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    return tensor.detach()


def _saved(rank: int, world_size: int, cases: list[Case], overrides: dict[str, Any]) -> list[int]:
    """Bytes that autograd saves for one more layer, weights left out: the difference of two depths."""
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
    from megatron_prefix.mcore.log_probs import response_log_probs
    from megatron_prefix.mcore.model import build_model, transformer_config

    start()
    found = []
    for case in cases:
        by_depth = []
        for depth in (1, 2):
            config, dtype = replace(case.config, num_layers=depth), DTYPES[case.dtype]
            spec = prefix_gpt_layer_spec(transformer_config(config, dtype=dtype, overrides=overrides))
            how: dict[str, Any] = {"dtype": dtype, "recompute": case.recompute, "overrides": overrides}
            model = build_model(config, layer_spec=spec, seed=1, **how)
            storages: dict[int, torch.UntypedStorage] = {}
            with torch.autograd.graph.saved_tensors_hooks(partial(_keep, storages), lambda saved: saved):
                response_log_probs(model, case.packs[0])
            weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            by_depth.append(sum(x.nbytes() for address, x in storages.items() if address not in weights))
        found.append(by_depth[1] - by_depth[0])
    return found


def test_the_list_of_saved_tensors_is_exact() -> None:
    cases = [
        *[Case(dtype, shape={"qk_layernorm": qk}) for dtype in DTYPES for qk in (False, True)],
        Case("bf16", shape={"norm": "layernorm", "activation": "gelu", "qk_layernorm": True}),
        Case("fp32", shape={"norm": "layernorm", "activation": "gelu", "position_embedding": "none"}),
        Case("bf16", "full"),
    ]
    (found,) = run_distributed(_saved, 1, cases, {})
    for case, saved in zip(cases, found, strict=True):
        per_row = row_bytes(PlannedModel("t", case.config), case.settings, 1, case.recompute)
        assert saved == per_row * case.packs[0].layout.num_rows, case


def _saved_with_experts(rank: int, world_size: int, cases: list[Case], overrides: dict[str, Any]) -> list[int]:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 does not define it without Transformer Engine
        moe_utils.te_general_gemm = None
    torch.use_deterministic_algorithms(False)  # megatron-core then adds rows up in a way that keeps them
    return _saved(rank, world_size, cases, overrides)


def test_the_list_of_saved_tensors_of_experts() -> None:
    experts = {
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 96,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }
    cases = [Case(dtype, shape={"ffn_hidden_size": 96}) for dtype in DTYPES]
    (found,) = run_distributed(_saved_with_experts, 1, cases, experts)
    for case, saved in zip(cases, found, strict=True):
        model = PlannedModel("t", case.config, Experts(8, 2))
        expected = row_bytes(model, case.settings, 1, "none") * case.packs[0].layout.num_rows
        assert saved == pytest.approx(expected, rel=0.005), case


def test_stages_experts_and_shards_divide_memory() -> None:
    model = PlannedModel("t", Case().config)
    load, settings = Case().load, RunSettings("bf16", "te", True)

    def estimate(sizes: Sizes, recompute: str = "none") -> Any:
        return estimate_memory(model, sizes, load, settings, recompute)

    one = estimate(Sizes())
    parameters = model.size.parameters
    assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert estimate(Sizes(dp=3, cp=2)).optimizer == pytest.approx(2 * parameters)
    assert estimate(Sizes(pp=2)).weights < one.weights
    assert estimate(Sizes(tp=2)).activations < 0.6 * one.activations
    assert estimate(Sizes(), "full").activations < estimate(Sizes(), "selective").activations < one.activations
    assert live_prefixes(load, Sizes(pp=4)) == 0


def test_a_pipeline_holds_as_many_microbatches_as_it_is_deep() -> None:
    model = PlannedModel("t", replace(Case().config, num_layers=8, vocab_size=8))
    # Equal micro-batches with next to no output layer: stage 0 holds pp of them, each an even share of the layers.
    many = RankLoad.of([Sequences(0, (100,), 99)] * 64, 100, lambda work: work.rows)
    one_layer = 100 * row_bytes(model, RunSettings(), 1, "none")

    def layers(**sizes: int) -> float:
        return estimate_memory(model, Sizes(**sizes), many, RunSettings(), "none").activations / one_layer

    assert math.isclose(layers(pp=2), 8, rel_tol=0.01) and math.isclose(layers(pp=4), 8, rel_tol=0.01)
    assert math.isclose(layers(pp=4, vpp=2), 8 * (1 + 3 / 8), rel_tol=0.01)
    few = RankLoad.of([Sequences(0, (100,), 99)] * 2, 100, lambda work: work.rows)
    held = estimate_memory(model, Sizes(pp=4), few, RunSettings(), "none").activations / one_layer
    assert math.isclose(held, 4, rel_tol=0.01)


def test_transformer_engine_keeps_less() -> None:
    model = PlannedModel("t", Case("bf16").config)
    te, local = (sum(t.row_bytes for t in layer_tensors(model, RunSettings("bf16", kind))) for kind in ("te", "local"))
    # Two norms in fp32 (twice their rows) against one copy of their input.
    assert local - te == 2 * 192 * (4 + 4 - 2)
