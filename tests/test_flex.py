"""`impl="flex"`: its block mask against the dense one, its attention and a model's against the oracles, refusals."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_prefix import PrefixLayout, prefix_grouped_attention
from megatron_prefix.attention import WHOLE_LAYOUT, block_mask, check_impl, dense_mask, kernel_named, layout_attention
from megatron_prefix.attention import calls as calls_module
from megatron_prefix.attention.block_mask import tree_block_mask
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.flex import FlexAttention
from tests import equivalence_cases as ec
from tests.attention_oracle import DEEP, FLAT, TWO_GROUPS, assert_matches, errors, inputs, repeated_attention, run
from tests.distributed import run_distributed
from tests.strategies import forests

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = PrefixLayout([150, 40, 7, 133], [-1, 0, 0, 0])
BLOCKS = [
    LONG,
    PrefixLayout([128, 128, 1, 255], [-1, 0, 0, 0]),
    PrefixLayout([70, 33, 40, 129, 5, 64, 300], [-1, 0, 1, 2, 1, -1, 5]),
]
"""Layouts of several blocks, with and without a ragged last one."""


def ends_of(layout: PrefixLayout) -> Tensor:
    """By definition: the row behind the last row that sees each row."""
    rows = torch.arange(layout.num_rows)
    return (torch.where(dense_mask(layout), rows[:, None], -1).amax(0) + 1).to(torch.int32)


def calls_of(layout: PrefixLayout) -> AttentionCalls:
    return AttentionCalls.build(layout, CPU)


# ---- the block mask


def by_block(mask: Tensor, size: int) -> Tensor:
    """[T, T] -> [blocks, size, blocks, size]; rows and keys that the last block lacks are not seen."""
    blocks = -(-len(mask) // size)
    padded = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    return padded.view(blocks, size, blocks, size)


def listed(number: Tensor, indices: Tensor) -> Tensor:
    """bool [blocks, blocks] of the blocks that FlexAttention visits, each once."""
    result = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(number.flatten().tolist()):
        visited = indices[0, 0, row, :count].tolist()
        assert len(set(visited)) == count
        result[row, visited] = True
    return result


def wrong_blocks(block_mask: BlockMask, layout: PrefixLayout, size: int) -> list[str]:
    """Where a block mask is not that of the layout."""
    seen = by_block(dense_mask(layout), size)
    some, every = seen.any(3).any(1), seen.all(3).all(1)
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)  # type: ignore[arg-type]
    by_kv = listed(block_mask.q_num_blocks, block_mask.q_indices)  # type: ignore[arg-type]
    full_by_kv = listed(block_mask.full_q_num_blocks, block_mask.full_q_indices)  # type: ignore[arg-type]
    rows = torch.arange(layout.num_rows)
    by_mod = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows[:, None], rows)
    checks = {
        "mask_mod": torch.equal(by_mod, dense_mask(layout)),
        "full": torch.equal(full, every),
        "partial": torch.equal(partial, some & ~every),
        "transposed": torch.equal(by_kv, partial.T) and torch.equal(full_by_kv, full.T),
        "lengths": block_mask.seq_lengths == (layout.num_rows,) * 2 and (size, size) == block_mask.BLOCK_SIZE,
    }
    return [name for name, right in checks.items() if not right]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@settings(max_examples=150)
@given(layout=forests(max_segments=10, max_length=9).filter(lambda layout: layout.num_rows > 0))
def test_blocks_are_those_of_the_dense_mask(size: int, layout: PrefixLayout) -> None:
    """Every full block is full, every partial one neither full nor empty, none is missing; forward and transposed."""
    assert not wrong_blocks(tree_block_mask(ends_of(layout), size), layout, size)


@pytest.mark.parametrize("layout", BLOCKS)
def test_the_calls_have_the_mask_that_torch_would_make(layout: PrefixLayout) -> None:
    mine = calls_of(layout).block_mask
    assert not wrong_blocks(mine, layout, 128)
    made = create_block_mask(mine.mask_mod, None, None, layout.num_rows, layout.num_rows, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in (f"{name}_num_blocks", f"{name}_indices"):
            ours, theirs = getattr(mine, part), getattr(made, part)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), part


def test_a_prefix_block_is_full_for_its_responses() -> None:
    """The point of a block mask: what lies between the diagonal and the prefix costs neither work nor a mask."""
    mask = calls_of(PrefixLayout([256, *[128] * 6], [-1, *[0] * 6])).block_mask
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, *[2] * 6]
    assert mask.kv_num_blocks.flatten().tolist() == [1] * 8


MUTANTS = {
    "full a row early": ("first + block_size - 1", "first + block_size - 2"),
    "full a row late": ("first + block_size - 1", "first + block_size"),
    "full from the largest end": ("by_block.amin(1)", "by_block.amax(1)"),
    "seen a row early": ("by_block.amax(1) > first)", "by_block.amax(1) >= first)"),
    "seen a row late": ("by_block.amax(1) > first)", "by_block.amax(1) > first + 1)"),
    "seen from the smallest end": ("by_block.amax(1) > first)", "by_block.amin(1) > first)"),
    "no diagonal": ("tril(-1)", "tril(-2)"),
    "partial are full too": ("seen & ~full |", "seen |"),
    "rows see what follows": ("(kv <= q) & (q < ends[kv])", "q < ends[kv]"),
    "rows behind the subtree": ("q < ends[kv]", "q <= ends[kv]"),
    "rows not themselves": ("return (kv <= q)", "return (kv < q)"),
}


def mutant(old: str, new: str) -> Callable[[Tensor, int], BlockMask]:
    with open(block_mask.__file__, encoding="utf-8") as file:
        source = file.read()
    assert source.count(old) == 1
    names: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), "mutant", "exec"), names)
    return names["tree_block_mask"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_noticed(name: str) -> None:
    layout = PrefixLayout([9, 4, 1, 6, 8, 8, 3], [-1, 0, 0, 0, -1, 4, 4])
    sizes = (2, 3, 4, 8)
    ends = ends_of(layout)
    assert not any(wrong_blocks(tree_block_mask(ends, size), layout, size) for size in sizes)
    assert any(wrong_blocks(mutant(*MUTANTS[name])(ends, size), layout, size) for size in sizes)


# ---- attention


def use(layout: PrefixLayout, scale: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: prefix_grouped_attention(q, k, v, layout, softmax_scale=scale, impl="flex")


@pytest.fixture
def backward_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the dense backward of its CUDA kernel, but refuses it on the CPU; for a comparison it will do."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(FlexAttention, "refusal", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=15)
@given(
    layout=forests(max_length=40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    dims=st.sampled_from([(8, 8), (4, 12), (16, 4)]),
    scale=st.sampled_from([None, 0.05, 1.0]),
)
def test_forward_of_random_forests(
    dtype: torch.dtype, layout: PrefixLayout, heads: tuple[int, int], dims: tuple[int, int], scale: float | None
) -> None:
    q, k, v, _ = inputs(layout.num_rows, heads, dims, dtype)
    found = {"out": use(layout, scale)(q, k, v)}
    expected = {"out": repeated_attention(*(x.double() for x in (q, k, v)), layout, scale)}
    assert found["out"].dtype is dtype
    assert errors(found, expected)["out"] <= {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]


@pytest.mark.usefixtures("backward_on_the_cpu")
@pytest.mark.parametrize("layout", [FLAT, TWO_GROUPS, DEEP, *BLOCKS])
def test_forward_and_backward(layout: PrefixLayout) -> None:
    for dtype in (torch.float64, torch.float32):
        assert_matches(use(layout, 0.2), layout, inputs(layout.num_rows, (4, 2), (8, 4), dtype), 0.2)


@pytest.mark.usefixtures("backward_on_the_cpu")
def test_no_rows_at_all() -> None:
    layout = PrefixLayout([0, 0], [-1, 0])
    assert_matches(use(layout), layout, inputs(0))


def test_tensors_that_are_not_contiguous() -> None:
    q, k, v, _ = inputs(LONG.num_rows)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # one projection's output, as megatron splits it
    parts = fused.split([32, 16, 16], dim=1)
    views = [x.unflatten(1, (-1, 8)) for x in parts]
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(use(LONG)(*views), use(LONG)(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [FLAT, TWO_GROUPS, DEEP, *BLOCKS], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (48, 32)])
def test_the_compiled_kernel(layout: PrefixLayout, dims: tuple[int, int]) -> None:
    """On a GPU, against the oracle on the CPU: fp32 without TF32, and bf16 within twice the dense path's own error."""
    torch.compiler.reset()  # torch allows a function 8 kernels, and every dtype and head dim is one
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(layout.num_rows, (4, 2), dims, dtype)
        exact = run(lambda q, k, v: repeated_attention(q, k, v, layout), *(x.double() for x in tensors))
        dense = run(lambda q, k, v: repeated_attention(q, k, v, layout), *tensors)
        found = {name: x.cpu() for name, x in run(use(layout), *(x.to(GPU) for x in tensors)).items()}
        own, plain = errors(found, exact), errors(dense, exact)
        assert all(own[name] <= max(1e-5, 2 * plain[name]) for name in exact), (dtype, own, plain)


# ---- one mask per micro-batch, one kernel for all


def test_packs_of_other_lengths_share_a_kernel() -> None:
    """One compilation for all packs of several blocks, and one for those of a single block, which torch sets apart."""
    counter = CompileCounter()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=counter)):
        compiled = FlexAttention()._compiled
    layouts = [*BLOCKS, *(PrefixLayout([100 + 50 * i, 60, 7 * i], [-1, 0, 0]) for i in range(6)), FLAT, DEEP]
    for layout in layouts:
        q, k, v, _ = (x.transpose(0, 1).unsqueeze(0) for x in inputs(layout.num_rows, dtype=torch.float32))
        out = compiled(q, k, v, block_mask=calls_of(layout).block_mask, scale=0.3, enable_gqa=True)
        alone = flex_attention(q, k, v, block_mask=calls_of(layout).block_mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out, alone)
    assert counter.frame_count == 2


def test_one_mask_for_all_layers() -> None:
    q, k, v, _ = inputs(LONG.num_rows)
    with mock.patch.object(calls_module, "tree_block_mask", side_effect=tree_block_mask) as build:
        calls = calls_of(LONG)
        assert build.call_count == 0  # other implementations need none
        outs = [layout_attention(q, k, v, calls, 0.3, "flex") for _ in range(4)]
        assert build.call_count == 1
        layout_attention(q, k, v, calls_of(LONG), 0.3, "flex")
        assert build.call_count == 2
    assert all(torch.equal(out, outs[0]) for out in outs)


def compare_models(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Differences from plain megatron-core, and how often a mask was made and used."""
    found = {}
    masks, calls, attend = tree_block_mask, AttentionCalls.build, FlexAttention.attend
    for recompute in ("none", "full"):
        case = ec.Case(trees=True, recompute=recompute, qk_layernorm=True, impl="flex")
        with (
            mock.patch.object(torch_flex, "_validate_device", lambda *_: None),
            mock.patch.object(FlexAttention, "refusal", lambda *_: None),
            mock.patch.object(calls_module, "tree_block_mask", side_effect=masks) as made,
            mock.patch.object(AttentionCalls, "build", side_effect=calls) as micro_batches,
            mock.patch.object(FlexAttention, "attend", autospec=True, side_effect=attend) as used,
        ):
            result = ec.in_groups(1, 1, ec.compare, case)
        counts = {"masks": made.call_count, "micro-batches": micro_batches.call_count, "layers": used.call_count}
        found[recompute] = result | counts
    return found


def test_a_model_equals_plain_megatron_core() -> None:
    """Trained with gradients too: five steps, without recompute and with."""
    (found,) = run_distributed(compare_models, 1)
    for recompute, result in found.items():
        assert result["worst"] <= 1e-10 and result["gradients"] and result["packs"] > 1
        assert result["masks"] == result["micro-batches"] > result["packs"]  # made once for all layers
        assert result["layers"] >= (3 if recompute == "full" else 2) * result["masks"]


# ---- refusals


@pytest.mark.parametrize(
    ("device", "dtype", "dims", "backward", "message"),
    [
        (CPU, torch.float32, (64, 64), True, "no backward on the CPU, because torch has none; use impl='sdpa'"),
        (CPU, torch.int32, (64, 64), False, "takes fp64, fp32, bf16 or fp16, got torch.int32; cast"),
        (torch.device("meta"), torch.float32, (64, 64), True, "the tensors are on meta; use impl='reference'"),
        (GPU, torch.float64, (64, 64), True, "takes fp32, bf16 or fp16 on CUDA, got torch.float64; use impl="),
        (GPU, torch.float32, (8, 64), True, "takes head dims from 16 to 256 on CUDA, got 8; use impl='reference'"),
        (GPU, torch.bfloat16, (64, 264), True, "takes head dims from 16 to 256 on CUDA, got 264; use impl="),
    ],
)
def test_what_cannot_run_is_refused(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], backward: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=f"impl='flex' .*{message}"):
        check_impl("flex", device, dtype, *dims, backward=backward)


def test_what_can_run_is_not_refused() -> None:
    for dims in ((16, 16), (192, 128), (80, 256)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert check_impl("flex", GPU, dtype, *dims) == "flex"
    assert check_impl("flex", CPU, torch.float64, 7, backward=False) == "flex"


@pytest.mark.parametrize("impl", WHOLE_LAYOUT)
@pytest.mark.parametrize("how", [{"cp_size": 2}, {"has_parts": True}])
def test_whole_layouts_cannot_be_split(impl: str, how: dict[str, Any]) -> None:
    message = f"impl='{impl}' holds the whole mask and cannot be split over ranks or parts; use 'auto'"
    with pytest.raises(ValueError, match=message):
        check_impl(impl, GPU, torch.bfloat16, 64, **how)
    with pytest.raises(ValueError, match=message):
        kernel_named(impl)


def test_gradients_on_the_cpu_are_refused_before_torch_does() -> None:
    q, k, v, _ = inputs(FLAT.num_rows)
    k.requires_grad_()
    with pytest.raises(ValueError, match="impl='flex' has no backward on the CPU"):
        use(FLAT)(q, k, v)
    with torch.no_grad():
        use(FLAT)(q, k, v)
