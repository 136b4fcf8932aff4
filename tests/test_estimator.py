"""The estimator's parts: models, lengths, micro-batches, communication, step time."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape, layer_traffic, untrimmed_traffic
from megatron_prefix.cost_model import CostModel
from megatron_prefix.estimator.cluster import Cluster, Link
from megatron_prefix.estimator.communication import Communication
from megatron_prefix.estimator.lengths import Lengths, draw_groups
from megatron_prefix.estimator.loads import RankLoad, Sequences, busiest_rank, smallest_limit
from megatron_prefix.estimator.model import PRESETS, Experts, PlannedModel, read_model
from megatron_prefix.estimator.sizes import RunSettings, Sizes
from megatron_prefix.estimator.step_time import bubble_share, estimate_step
from megatron_prefix.hardware import DEVICES
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.pipeline_plan import even_bubble
from megatron_prefix.rollout_group import RolloutGroup, TokenCount
from megatron_prefix.splitting import pack_and_split
from megatron_prefix.workload import Workload

pytestmark = pytest.mark.ci_newest

H100 = Cluster(DEVICES["H100"], 64)
SMALL = ModelConfig(
    num_layers=8, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
DENSE = PlannedModel("dense", SMALL)
MIXED = PlannedModel("mixed", SMALL, Experts(4, 2))


def cost(work: Workload) -> float:
    return float(work.rows)


def group(prefix: int, *responses: int) -> RolloutGroup:
    return RolloutGroup(TokenCount(prefix + 1), [TokenCount(n) for n in responses], [0.0] * len(responses))


@pytest.mark.parametrize(
    ("name", "total"),
    # Sums of the tensors of the safetensors files.
    [
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, total: int) -> None:
    assert PRESETS[name].size.parameters == total
    assert read_model(name.upper()) == PRESETS[name]


def test_experts_compute_what_their_router_chooses() -> None:
    model = PRESETS["qwen3-30b-a3b"]
    assert model.active_size.parameters == pytest.approx(3.3e9, rel=0.02)
    # By hand: 48 layers of 128 experts with three matrices.
    assert model.config.num_layers * model.expert_parameters == 48 * 128 * 3 * 2048 * 768
    dense = PRESETS["qwen3-8b"]
    work = Workload(rows=10, target_rows=3, pairs=40)
    assert dense.active_size.step_flops(work) == ModelSize.of(dense.config).step_flops(work)
    per_row = MIXED.active_size.step_flops(Workload(rows=1)) - DENSE.active_size.step_flops(Workload(rows=1))
    assert per_row == 6 * SMALL.num_layers * 64 * (3 * 96 + 4)  # one more expert, and the router


HF_QWEN3_MOE = {
    "model_type": "qwen3_moe", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 999,
    "moe_intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_models_are_read_from_folders_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_QWEN3_MOE))
    found = read_model(str(folder))
    assert (found.name, found.experts, found.config.ffn_hidden_size) == ("moe", Experts(4, 2), 96)
    mixtral = HF_QWEN3_MOE | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(mixtral))
    found = read_model(str(folder / "config.json"))
    assert found.experts == Experts(4, 2) and found.config.ffn_hidden_size == 999 and not found.config.qk_layernorm
    (folder / "config.json").write_text(json.dumps(HF_QWEN3_MOE | {"model_type": "qwen3"}))
    assert read_model(str(folder)).experts is None
    SMALL.to_json(folder / "model.json")
    assert read_model(str(folder)).config == SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read a model's shape"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "missing keys"),
        (json.dumps(HF_QWEN3_MOE | {"decoder_sparse_step": 2}), "only experts in every layer"),
        (json.dumps(HF_QWEN3_MOE | {"num_experts_per_tok": 5}), "experts_per_token 5 is more than num_experts 4"),
        (json.dumps({**HF_QWEN3_MOE, "num_experts": None}), "num_experts must be a whole number"),
        (json.dumps(HF_QWEN3_MOE | {"model_type": "rwkv"}), "model_type 'rwkv' is not supported"),
    ],
)
def test_unreadable_models_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


def test_an_unknown_model_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file or folder nor one of qwen3-8b"):
        read_model("gpt-5")
    with pytest.raises(ValueError, match=r"neither model\.json .* nor config\.json"):
        read_model(str(tmp_path))


def test_lengths_are_drawn_from_what_is_asked() -> None:
    generator = random.Random(1)
    assert {Lengths.parse("7").draw(generator) for _ in range(5)} == {7}
    drawn = [Lengths.parse("uniform:10:12").draw(generator) for _ in range(200)]
    assert set(drawn) == {10, 11, 12}
    normal = sorted(Lengths.parse("lognormal:1000:0.5").draw(generator) for _ in range(2001))
    assert normal[1000] == pytest.approx(1000, rel=0.1) and normal[0] < 500 and normal[-1] > 2000
    assert max(Lengths.parse("lognormal:1000:2:1500").draw(generator) for _ in range(200)) == 1500
    groups = draw_groups(
        Lengths.parse("uniform:5:50"), Lengths.parse("uniform:1:9"), group_size=3, num_groups=4, seed=2
    )
    again = draw_groups(Lengths.parse("uniform:5:50"), Lengths.parse("uniform:1:9"), group_size=3, num_groups=4, seed=2)
    assert groups == again and len(groups) == 4 and all(len(each) == 3 for each in groups)
    with pytest.raises(ValueError, match="num_groups must be at least 1"):
        draw_groups(Lengths.parse("5"), Lengths.parse("5"), group_size=1, num_groups=0)


@pytest.mark.parametrize(
    "text", ["", "x", "uniform:1", "uniform:5:4", "lognormal:0:1", "lognormal:9:nan", "0", "normal:1:2"]
)
def test_lengths_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lengths '"):
        Lengths.parse(text)


GROUPS = st.lists(
    st.builds(lambda p, r: group(p, *r), st.integers(0, 20), st.lists(st.integers(1, 12), min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(GROUPS, st.integers(20, 90))
def test_microbatches_hold_the_work_of_the_step(groups: list[RolloutGroup], limit: int) -> None:
    grouped = [Sequences.grouped(each) for each in groups]
    load = RankLoad.of(grouped, limit, cost)
    expected = sum((Workload.of_group(each) for each in groups), Workload())
    assert replace(load.work, levels=expected.levels) == expected
    assert load.most_rows <= limit and smallest_limit(grouped) <= limit
    # As `pack_and_split` cuts them.
    packs = pack_and_split(groups, max_tokens_per_pack=limit)
    prefixes = [pack.layout.num_rows for pack in packs if pack.is_prefix]
    assert (len(prefixes), max(prefixes, default=0)) == (
        load.split_groups,
        load.split_prefix,
    )
    assert load.microbatches <= len(packs)
    repeated = RankLoad.of([each for g in groups for each in Sequences.each(g)], limit, cost)
    sequences = sum((Workload.repeated(each) for each in groups), Workload())
    assert repeated.work == sequences and repeated.split_groups == 0


@given(st.lists(st.floats(0.1, 9), min_size=4, max_size=20), st.integers(1, 4))
def test_the_busiest_rank_has_at_least_the_mean(costs: list[float], ranks: int) -> None:
    share = busiest_rank(costs, ranks)
    assert sum(costs[i] for i in share) >= sum(costs) / ranks - 1e-9
    # Longest first is within 4/3 of the best (Graham 1969), which is at least the mean and the longest.
    assert sum(costs[i] for i in share) <= (4 / 3) * max(sum(costs) / ranks, max(costs)) + max(costs) / 3 + 1e-9
    with pytest.raises(ValueError, match="give each at least one"):
        busiest_rank(costs[:1], 2)


def traffic(load: RankLoad, sizes: Sizes, model: PlannedModel = DENSE, recompute: str = "none") -> dict[str, Any]:
    return Communication(model, sizes, H100, RunSettings(), load, recompute).by_kind()


@pytest.mark.parametrize(("cp", "responses"), [(2, (64,) * 8), (4, (64,) * 8), (8, (64,) * 16)])
def test_context_parallel_bytes_are_those_of_the_plan(cp: int, responses: tuple[int, ...]) -> None:
    layout = PrefixLayout([1024, *responses], [-1] + [0] * len(responses))
    shape = AttentionShape(8, 4, 8)
    found = traffic(RankLoad.of([Sequences(1024, responses)], 10**6, cost), Sizes(cp=cp))["context"]
    plan = CpPlan.build(layout, cp, "branch")
    assert "branch" in PLACEMENTS
    busiest = max(each.total.received for each in layer_traffic(plan, shape, "p2p"))
    assert found.num_bytes == pytest.approx(SMALL.num_layers * busiest, rel=0.02)
    repeated = RankLoad.of([Sequences(0, (1024 + n,), 1024) for n in responses], 10**6, cost)
    plain = untrimmed_traffic(layout.repeated(), cp, shape, "p2p").total.received
    cut = traffic(repeated, Sizes(cp=cp))["context"].num_bytes
    # A sequence that one rank holds whole need not travel; plain Megatron cuts all of them.
    assert cut <= SMALL.num_layers * plain * 1.02
    one = RankLoad.of([Sequences(0, (4096,), 1024)], 10**6, cost)
    whole = untrimmed_traffic(PrefixLayout([4096], [-1]), cp, shape, "p2p").total.received
    assert traffic(one, Sizes(cp=cp))["context"].num_bytes == SMALL.num_layers * whole


def test_bytes_of_every_kind_by_hand() -> None:
    load = RankLoad.of([Sequences(100, (30, 30))] * 4, 160, cost)
    rows, targets, width, layers = 4 * 160, 4 * 60, 64 * 2, 8
    tensor = traffic(load, Sizes(tp=4))["tensor"]
    # Forward 4 and backward 4 + 2 (inputs again) collectives a layer; around the output layer 3. Each moves 3/4.
    assert tensor.num_bytes == 0.75 * width * (10 * layers * rows + 3 * targets)
    full = traffic(load, Sizes(tp=4), recompute="full")["tensor"]
    assert full.num_bytes == 0.75 * width * (14 * layers * rows + 3 * targets)
    pipeline = traffic(load, Sizes(pp=2))["pipeline"]
    assert pipeline.num_bytes == 2 * rows * width
    assert traffic(load, Sizes(pp=2, vpp=2, cp=2))["pipeline"].num_bytes == 2 * rows * width
    gradients = traffic(load, Sizes(dp=8))["gradients"]
    assert gradients.num_bytes == 7 / 8 * DENSE.size.parameters * (4 + 2)
    expert = traffic(load, Sizes(dp=4, ep=4), MIXED)["expert"]
    assert expert.num_bytes == 0.75 * 2 * rows * width * 4 * layers
    assert all(moved.num_bytes == moved.seconds == 0 for moved in traffic(load, Sizes()).values())


def test_links_follow_the_nodes() -> None:
    device = H100.device
    assert H100.link(8).bandwidth == 0.8 * device.link_bandwidth and H100.link(16).bandwidth == 0.8 * 50e9
    # A ring over nodes uses the network of all its ranks in a node.
    assert H100.ring(64, 8).bandwidth == 0.8 * 50e9
    assert H100.ring(64, 1).bandwidth == pytest.approx(0.8 * 400e9)
    link = Link(1.0, 10.0)
    assert link.gather(100, 5) == 4 * (1 + 2) and link.gather(100, 1) == 0
    for wrong in ({"num_gpus": 12}, {"memory_share": 1.5}, {"network_bandwidth": 0.0}):
        with pytest.raises(ValueError, match=r"whole nodes|memory_share|network_bandwidth"):
            replace(H100, **wrong)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))
def test_bubbles_are_those_of_megatron_core_on_even_microbatches(count: int, pp: int, vpp: int) -> None:
    if pp == 1 or (vpp > 1 and count % pp):
        return
    model = PlannedModel("t", replace(SMALL, num_layers=16, vocab_size=1))
    load = RankLoad.of([Sequences(0, (4000,), 3999)] * count, 4000, cost)
    sizes = Sizes(pp=pp, vpp=vpp)
    moved = Communication(model, sizes, H100, RunSettings(), load, "none").by_kind()
    step = estimate_step(model, sizes, H100, load, RunSettings(), "none", moved)
    assert bubble_share(step) == pytest.approx(even_bubble(count, pp, vpp if vpp > 1 else None), abs=0.005)


def test_compute_is_the_cost_model_and_recompute_adds_a_forward() -> None:
    load = RankLoad.of([Sequences(1000, (300,) * 8)], 10**6, cost)
    model = PRESETS["qwen3-8b"]

    def step(recompute: str, **sizes: int) -> Any:
        chosen = Sizes(**sizes)
        moved = Communication(model, chosen, H100, RunSettings(), load, recompute).by_kind()
        return estimate_step(model, chosen, H100, load, RunSettings(), recompute, moved)

    base = CostModel.of_device(model.config, H100.device)
    assert step("none").compute == pytest.approx(base.cost(load.work) + base.microbatch)
    assert step("none").recompute == 0 < step("selective").recompute < step("full").recompute
    head = base.target_row * load.work.target_rows
    assert step("full").recompute == pytest.approx((step("none").compute - head) / 3)
    assert step("none", tp=2).compute < 0.6 * step("none").compute
    assert step("none", dp=2).gradients > 0 == step("none").gradients
    total = step("none", tp=2, cp=2, pp=2)
    assert total.total == pytest.approx(sum(v for k, v in total.to_dict().items() if k != "total"))
