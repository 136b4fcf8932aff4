"""Counts of work equal those of the built packs; costs follow them; parameters equal those of the built model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.cost_model import CostModel
from megatron_prefix.hardware import DEVICES, find_device
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.packing import pack_groups
from megatron_prefix.rollout_tree import RolloutTree, num_rows
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split, packs_of_split, plan_splits
from megatron_prefix.workload import Workload
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config
from tests.strategies import rollout_groups, rollout_trees


@given(rollout_groups())
def test_counts_of_a_group_are_those_of_its_pack(group: RolloutGroup) -> None:
    for repeated in (False, True):
        (pack,) = pack_groups([group], repeated=repeated)
        counted = Workload.repeated(group) if repeated else Workload.of_group(group)
        assert counted == Workload.of_layout(pack.layout, len(pack.response_rows))
        assert counted.pairs == pack.layout.area
    assert Workload.of_group(group) == Workload.of_group(RolloutTree.from_group(group))
    assert Workload.repeated(group) == Workload.repeated(RolloutTree.from_group(group))


@given(rollout_trees())
def test_counts_of_a_tree_are_those_of_its_pack(tree: RolloutTree) -> None:
    for repeated in (False, True):
        (pack,) = pack_groups([tree], repeated=repeated)
        counted = Workload.repeated(tree) if repeated else Workload.of_group(tree)
        assert counted == Workload.of_layout(pack.layout, len(pack.response_rows))


@given(rollout_groups(), rollout_trees())
def test_counts_of_groups_in_one_pack_add(group: RolloutGroup, tree: RolloutTree) -> None:
    (first,) = pack_groups([group.lengths_only()])
    (second,) = pack_groups([tree.lengths_only()])
    (both,) = pack_groups([group.lengths_only(), tree.lengths_only()])
    works = [Workload.of_layout(pack.layout, len(pack.response_rows)) for pack in (first, second, both)]
    total = works[0] + works[1]
    # A one-token root has no keys, so its tree's calls may be at other levels.
    assert total.levels <= works[2].levels <= works[0].levels + works[1].levels
    assert replace(total, levels=works[2].levels) == works[2]


def test_counts_of_parts_include_cached_keys() -> None:
    group = RolloutGroup([1] * 11, [[2] * 4] * 6, [0.0] * 6)
    packs = pack_and_split([group], max_tokens_per_pack=16)
    works = [Workload.of_layout(pack.layout, len(pack.response_rows)) for pack in packs]
    assert len(works) > 2 and [work.merged_rows for work in works] == [0, *(work.rows for work in works[1:])]
    assert sum(work.pairs for work in works) == Workload.of_group(group).pairs


def _parameters(rank: int, world_size: int, changes: list[dict[str, object]]) -> list[int]:
    from megatron_prefix.mcore.model import build_model

    start()
    return [sum(p.numel() for p in build_model(tiny_config(**each)).parameters()) for each in changes]


def test_parameters_are_those_of_the_built_model() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"tied_embeddings": True, "qk_layernorm": True, "qkv_bias": True},
        {"norm": "layernorm", "activation": "gelu", "position_embedding": "learned_absolute"},
    ]
    (built,) = run_distributed(_parameters, 1, changes)
    assert built == [ModelSize.of(tiny_config(**each)).parameters for each in changes]  # type: ignore[arg-type]


SHAPE = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=100, max_position_embeddings=64
)


def test_flops_are_those_of_the_matrix_products() -> None:
    size = ModelSize.of(SHAPE)
    rows, targets, pairs = torch.rand(3), torch.rand(2), 5
    layer = 2 * (64 * 64 * 4 + 3 * 64 * 128)
    assert size.forward_flops(Workload(rows=1)) == 2 * layer
    assert size.forward_flops(Workload(target_rows=len(targets))) == 2 * 64 * 100 * 2
    assert size.forward_flops(Workload(pairs=pairs)) == 2 * 4 * 64 * pairs
    assert size.step_flops(Workload(len(rows), 1, 5)) == 3 * size.forward_flops(Workload(len(rows), 1, 5))


def test_a_long_prefix_pays_and_a_short_one_does_not() -> None:
    cost = CostModel.of_device(SHAPE, DEVICES["H100"])
    long = RolloutGroup([1] * 20000, [[2] * 50] * 8, [0.0] * 8)
    short = RolloutGroup([1] * 2, [[2] * 50] * 8, [0.0] * 8)
    alone = RolloutGroup([1] * 20000, [[2] * 50], [0.0])
    assert cost.saving(long) > 0 > cost.saving(short)
    assert cost.saving(alone) < 0
    assert CostModel.of_model(SHAPE).saving(alone) == 0


def test_rows_that_travel_cost_more() -> None:
    device = DEVICES["H100"]
    cost = CostModel.of_device(SHAPE, device, model_ranks=4)
    assert cost.with_communication(SHAPE, device, tp=1, cp=1) == cost
    # Two layers: ten times half of 64 channels in bf16; thrice half of the keys and values of 4 heads of 16 channels.
    for sizes, num_bytes in (({"tp": 2, "cp": 1}, 2 * 10 * 32 * 2), ({"tp": 1, "cp": 2}, 2 * 3 * 64 * 2)):
        more = cost.with_communication(SHAPE, device, **sizes).row - cost.row
        assert more == pytest.approx(num_bytes / device.link_bandwidth)


def test_a_cost_model_is_written_and_read(tmp_path: Path) -> None:
    cost = CostModel.of_device(SHAPE, DEVICES["B200"], model_ranks=4)
    cost.to_json(tmp_path / "cost.json")
    assert CostModel.from_json(tmp_path / "cost.json") == cost
    values = json.loads((tmp_path / "cost.json").read_text())
    for broken in ("{", "[]", json.dumps(values | {"more": 1}), json.dumps({"row": 1})):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"broken\.json: "):
            CostModel.from_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="row must be a finite number"):
        CostModel(row=-1.0)
    with pytest.raises(ValueError, match="all 0"):
        CostModel(row=0.0)


@pytest.mark.parametrize(
    ("name", "found"),
    [("h100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("GB200", "GB200")],
)
def test_devices_are_found_by_their_names(name: str, found: str) -> None:
    assert find_device(name).name == found


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="'TPU' is not known; known are A100-80GB, H20, H100"):
        find_device("TPU")


@given(rollout_trees(), st.integers(4, 12))
def test_counts_of_a_split_tree_are_those_of_its_packs(tree: RolloutTree, limit: int) -> None:
    if num_rows(tree) <= limit:
        return
    try:
        (split,) = plan_splits([tree], max_tokens_per_pack=limit)
    except ValueError:
        return
    assert split is not None
    packs = packs_of_split(split)
    nodes = [split.prefix, *split.parts][-len(packs) :]
    built = [Workload.of_layout(pack.layout, len(pack.response_rows)) for pack in packs]
    assert Workload.of_nodes(tree, [split.prefix, *split.parts])[-len(nodes) :] == built


@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_responses_cost_what_their_counts_do(prefix: int, lengths: list[int]) -> None:
    cost = CostModel(row=1.0, target_row=0.7, pair=0.3, merged_row=0.2, level=5.0, microbatch=9.0)
    group = RolloutGroup([1] * (prefix + 1), [[2] * n for n in lengths], [0.0] * len(lengths))
    works = Workload.of_nodes(RolloutTree.from_group(group), [[0], *([i + 1] for i in range(len(lengths)))])[1:]
    assert cost.responses(prefix, lengths) == pytest.approx([cost.without_levels(work) for work in works])
