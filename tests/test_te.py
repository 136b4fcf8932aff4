"""`impl="te"` without a GPU: the real Python sources of Transformer Engine's releases over a CPU stand-in for their
compiled functions (see `tests/te_on_cpu`), against repeated prefixes."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix import PrefixLayout, RolloutTree
from megatron_prefix.attention import KERNELS, grouped_attention
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.te_library import FusedAttention
from megatron_prefix.context_parallel.attention import CpShare
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.gpu_check.cases import Inputs
from megatron_prefix.gpu_check.emulation import over_ranks
from megatron_prefix.mcore.equivalence import TOLERANCE as MODEL_TOLERANCE
from tests import cp_cases, pipeline_cases
from tests.attention_oracle import (
    DEEP,
    FLAT,
    TOLERANCE,
    TWO_GROUPS,
    assert_matches,
    errors,
    inputs,
    repeated_attention,
    run,
)
from tests.distributed import run_distributed
from tests.split_cases import limits, rows_in_tree, split_attention, split_or_skip
from tests.strategies import forests, rollout_groups, rollout_trees
from tests.te_on_cpu import DENSE, PACKED, VERSIONS, TeOnCpu
from tests.test_cp_attention import CPU, LAYOUTS, on_this_rank, two_levels, ways

pytestmark = pytest.mark.ci_oldest

OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]
TIMEOUT_S = 240
RAGGED = PrefixLayout([9, 4, 1, 6, 0, 2, 7, 3, 2], [-1, 0, 0, 2, -1, 4, 4, 6, -1])


def attention_by(kernel: TeOnCpu, layout: PrefixLayout) -> Any:
    calls = AttentionCalls.build(layout, CPU)
    return lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, kernel)


@pytest.mark.parametrize("arch", [PACKED, DENSE], ids=["packed lse", "dense lse"])
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15)
@given(
    layout=forests(max_segments=10),
    heads=st.sampled_from([(4, 2), (2, 2), (6, 1)]),
    dims=st.sampled_from([(8, 8), (24, 16), (8, 24)]),
)
def test_every_version_equals_the_oracle(
    version: str, arch: tuple[int, int], layout: PrefixLayout, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    """Every argument binds; forward and all gradients, grouped-query heads and head dims as in MLA among them."""
    assume(layout.num_rows)
    kernel = TeOnCpu(version, arch)
    assert_matches(attention_by(kernel, layout), layout, inputs(layout.num_rows, heads, dims, torch.float32), 0.3)


@pytest.mark.parametrize("arch", [PACKED, DENSE], ids=["packed lse", "dense lse"])
@settings(max_examples=15)
@given(tree=st.one_of(rollout_groups().map(RolloutTree.from_group), rollout_trees()), data=st.data())
def test_split_groups_equal_the_oracle(arch: tuple[int, int], tree: RolloutTree, data: st.DataObject) -> None:
    """Parts that read cached keys, and the sums of their gradients."""
    limit, num_parts = data.draw(limits([tree])), data.draw(st.integers(1, 4))
    packs = split_or_skip([tree], limit, num_parts)
    assume(len(packs) > 1)
    kernel = TeOnCpu(data.draw(st.sampled_from(VERSIONS)), arch)
    tensors = inputs(tree.layout.num_rows, (4, 2), (8, 16), torch.float32)
    result = run(split_attention(kernel, packs, rows_in_tree(tree, limit, num_parts)), *tensors)
    exact = [x.double() for x in tensors]
    expected = run(lambda q, k, v: repeated_attention(q, k, v, tree.layout), exact[0], exact[1], exact[2], exact[3])
    found = errors(result, expected)
    assert all(error <= TOLERANCE[torch.float32] for error in found.values()), found


# ---- context parallelism


@pytest.mark.parametrize("arch", [PACKED, DENSE], ids=["packed lse", "dense lse"])
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=8)
@given(layout=forests(max_segments=8), cp_size=st.integers(1, 4), placement=st.sampled_from(list(PLACEMENTS)))
def test_the_calls_of_context_parallel_ranks_equal_the_oracle(
    version: str, arch: tuple[int, int], layout: PrefixLayout, cp_size: int, placement: str
) -> None:
    """Of every rank in turn, keys handed over in this process; real ranks are below."""
    assume(layout.num_rows >= cp_size)
    q, k, v, dout = inputs(layout.num_rows, (4, 2), (8, 16), torch.float32)
    plan = CpPlan.build(layout, cp_size, placement)
    result = over_ranks(Inputs(q, k, v, dout, 0.3), plan, TeOnCpu(version, arch))
    exact = [x.double() for x in (q, k, v, dout)]
    expected = run(partial(repeated_attention, layout=layout, scale=0.3), exact[0], exact[1], exact[2], exact[3])
    found = errors(result, expected)
    assert all(error <= TOLERANCE[torch.float32] for error in found.values()), found


def cp_errors(rank: int, world_size: int, version: str, arch: tuple[int, int]) -> dict[tuple[str, str, str], float]:
    """Worst error of this rank's rows, by layout, cp_comm_type and placement."""
    inner, outer = two_levels(rank, world_size)
    kernel, found = TeOnCpu(version, arch), {}
    for name in ("ragged", "deep", "a response to cut", "a rank without rows"):
        layout = LAYOUTS[name]
        tensors = inputs(layout.num_rows, (12, 4), (8, 16), torch.float32)
        exact = [x.double() for x in tensors]
        expected = run(partial(repeated_attention, layout=layout), exact[0], exact[1], exact[2], exact[3])
        for comm_type, placement in ways(world_size):
            plan = CpPlan.build(layout, world_size, placement)
            result = on_this_rank(CpShare(plan, dist.group.WORLD, CPU, inner, outer), comm_type, tensors, kernel)
            rows = plan.rows(rank)
            worst = max(errors(result, {x: value[rows] for x, value in expected.items()}).values())
            found[name, comm_type, placement] = worst
    return found


@pytest.mark.parametrize(
    ("world_size", "version", "arch"), [(2, NEWEST, DENSE), (3, OLDEST, PACKED), (4, NEWEST, PACKED)]
)
def test_context_parallel_ranks_equal_the_oracle(world_size: int, version: str, arch: tuple[int, int]) -> None:
    """Every cp_comm_type and placement; received keys are slices of what travelled, and must be made contiguous."""
    TeOnCpu(version, arch)  # downloads once, or skips
    for found in run_distributed(cp_errors, world_size, version, arch, timeout_s=TIMEOUT_S):
        assert len(found) == 4 * len(ways(world_size)) and {placement for *_, placement in found} == set(PLACEMENTS)
        assert all(error <= TOLERANCE[torch.float32] for error in found.values()), found


# ---- whole models

SPLIT = pipeline_cases.Case(dtype="float32", recompute="selective", steps=2)


def model_cases(rank: int, world_size: int, folder: Path) -> list[dict[str, float]]:
    """Split and whole groups in megatron-core's schedule, with the kernel in the place of the CPU's."""
    KERNELS["sdpa"] = kernel = TeOnCpu(NEWEST)
    found = pipeline_cases.compare_all(rank, world_size, [SPLIT], folder)
    assert len(kernel.compiled.launches) > 100
    return found


def test_a_step_with_split_groups_equals_plain_megatron_core(tmp_path: Path) -> None:
    TeOnCpu(NEWEST)
    run_distributed(pipeline_cases.write_oracles, 1, [SPLIT.model], tmp_path, timeout_s=TIMEOUT_S)
    ((found,),) = run_distributed(model_cases, 1, tmp_path, timeout_s=TIMEOUT_S)
    assert found["prefixes"] == 3 and found["moved"] > 1e-4
    worst = {name: found[name] for name in ("log_probs", "loss", "gradients", "grad_norm", "parameters")}
    assert max(worst.values()) <= MODEL_TOLERANCE[torch.float32], worst


def cp_model(rank: int, world_size: int) -> list[dict[str, Any]]:
    KERNELS["sdpa"] = TeOnCpu(NEWEST)
    cases = [cp_cases.Case("p2p", "branch", dtype="float32"), cp_cases.Case("a2a", "dual_chunk_swap", dtype="float32")]
    return cp_cases.compare_all(rank, world_size, cp_cases.World(cp=world_size), cases)


def test_a_context_parallel_model_equals_plain_megatron_core() -> None:
    TeOnCpu(NEWEST)
    for found in run_distributed(cp_model, 2, timeout_s=TIMEOUT_S):
        assert [case["worst"] <= MODEL_TOLERANCE[torch.float32] for case in found] == [True, True], found


# ---- in place


@pytest.mark.parametrize("layout", [FLAT, TWO_GROUPS, DEEP, RAGGED], ids=["flat", "two groups", "deep", "ragged"])
def test_no_row_is_gathered(layout: PrefixLayout) -> None:
    """Every launch, forward and backward, reads q, k, v, out and dout where they are."""
    kernel = TeOnCpu(NEWEST)
    q, k, v, dout = inputs(layout.num_rows, dtype=torch.float32)
    first = len(kernel.compiled.launches)
    run(attention_by(kernel, layout), q, k, v, dout)
    launches = kernel.compiled.launches[first:]
    places = {name: {given[name].untyped_storage().data_ptr() for given in launches} for name in ("q", "k", "v")}
    assert places == {name: {x.untyped_storage().data_ptr()} for name, x in (("q", q), ("k", k), ("v", v))}
    backward = [given for given in launches if "o" in given]
    assert len(launches) == 2 * len(backward) == 2 * (1 + len(layout.ancestor_levels))
    for name in ("o", "do"):
        assert len({given[name].untyped_storage().data_ptr() for given in backward}) == 1
    gaps = [given for given in launches if given["cu_q"].tolist() != given["cu_q_padded"].tolist()]
    assert bool(gaps) == (layout in (TWO_GROUPS, RAGGED))


def test_tensors_that_share_memory_are_made_contiguous_once() -> None:
    """Queries, keys and values of one projection, as megatron-core splits them, and a transposed gradient."""
    kernel = TeOnCpu(NEWEST)
    joint = torch.randn(DEEP.num_rows, 2, 4 * 8, generator=torch.Generator().manual_seed(1))
    q, k, v = joint.split([16, 8, 8], dim=-1)
    dout = torch.randn(8, 4, DEEP.num_rows, generator=torch.Generator().manual_seed(2)).permute(2, 1, 0)
    tensors = (q.reshape(DEEP.num_rows, 4, 8), k, v, dout)
    assert not k.is_contiguous() and not dout.is_contiguous()
    assert_matches(attention_by(kernel, DEEP), DEEP, tensors, 0.3)


# ---- deliberate errors: each must show


def with_changed_arguments(kernel: TeOnCpu, change: Any) -> TeOnCpu:
    """``kernel`` whose library's arguments go through ``change`` before Transformer Engine gets them."""
    library: Any = kernel._library
    for name in ("_forward", "_backward"):
        function = getattr(library, name)
        setattr(library, name, lambda _function=function, **settings: _function(**change(settings)))
    return kernel


def without(*names: str) -> Any:
    return lambda settings: {name: value for name, value in settings.items() if name not in names}


def with_own_lse(settings: dict[str, Any]) -> dict[str, Any]:
    """As if heads came before rows."""
    if "aux_ctx_tensors" not in settings:
        return settings
    lse, rng_state = settings["aux_ctx_tensors"]
    turned = lse.transpose(0, 1).contiguous().view(lse.shape)
    return settings | {"aux_ctx_tensors": [turned, rng_state]}


@pytest.mark.parametrize(
    "change",
    [
        without("cu_seqlens_q_padded"),
        without("cu_seqlens_kv_padded"),
        without("window_size"),
        with_own_lse,
        lambda settings: settings | {"attn_mask_type": "padding_causal", "window_size": (-1, 0)},
        lambda settings: settings | {"cu_seqlens_q_padded": settings["cu_seqlens_q"]},
    ],
    ids=["no q offsets", "no kv offsets", "no window", "lse turned", "causal ancestors", "q offsets without gaps"],
)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_wrong_arguments_are_noticed(version: str, change: Any) -> None:
    tensors = inputs(RAGGED.num_rows, dtype=torch.float32)
    assert_matches(attention_by(TeOnCpu(version), RAGGED), RAGGED, tensors, 0.3)
    with pytest.raises(AssertionError):
        assert_matches(attention_by(with_changed_arguments(TeOnCpu(version), change), RAGGED), RAGGED, tensors, 0.3)


@pytest.mark.parametrize("name", ["qkv_layout", "o_format", "do_format", "dqkv_layout"])
def test_a_default_that_is_not_thd_is_noticed(name: str) -> None:
    kernel = with_changed_arguments(TeOnCpu(NEWEST), without(name))
    with pytest.raises(ValueError, match="tensors of three dimensions are not"):
        run(attention_by(kernel, FLAT), *inputs(FLAT.num_rows, dtype=torch.float32))


@pytest.mark.parametrize("arch", [PACKED, DENSE], ids=["packed lse", "dense lse"])
def test_another_lse_layout_than_expected_is_an_error(arch: tuple[int, int]) -> None:
    kernel = TeOnCpu(NEWEST, arch)
    library: Any = kernel._library
    library._packed_stats = not library._packed_stats
    with pytest.raises(RuntimeError, match="returned the log-sum-exp as"):
        run(attention_by(kernel, FLAT), *inputs(FLAT.num_rows, dtype=torch.float32))


@pytest.mark.parametrize("arch", [PACKED, DENSE], ids=["packed lse", "dense lse"])
def test_garbage_of_padding_is_noticed(arch: tuple[int, int]) -> None:
    """What the stand-in leaves unwritten is NaN: taking the whole span instead of the ranges' rows must show."""
    kernel = TeOnCpu(NEWEST, arch)
    tensors = inputs(RAGGED.num_rows, dtype=torch.float32)

    def whole(self: Any, stats: Tensor, rows: Any) -> Tensor:
        return stats.reshape(-1, tensors[0].shape[1])[: rows.num_rows]

    with mock.patch.object(FusedAttention, "_lse", whole), pytest.raises(AssertionError):
        assert_matches(attention_by(kernel, RAGGED), RAGGED, tensors, 0.3)
