"""Prefix-grouped attention on the CPU: every implementation against repeated prefixes, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix import PrefixLayout, prefix_grouped_attention
from megatron_prefix.attention import reference_attention
from tests.attention_oracle import (
    CPU_IMPLS,
    CPU_KERNELS,
    DEEP,
    FLAT,
    TWO_GROUPS,
    assert_matches,
    causal_attention,
    errors,
    inputs,
    repeated_attention,
    run,
)
from tests.strategies import forests

EXACT = [torch.float64, torch.float32]


def use(layout: PrefixLayout, impl: str, scale: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The implementation as a function of q, k and v."""
    return lambda q, k, v: prefix_grouped_attention(q, k, v, layout, softmax_scale=scale, impl=impl)


def test_some_fused_kernel_runs_here() -> None:
    assert CPU_KERNELS


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("impl", CPU_IMPLS)
@settings(max_examples=40)
@given(
    layout=forests(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    dims=st.sampled_from([(8, 8), (16, 16), (4, 12), (12, 4), (1, 1)]),
    scale=st.sampled_from([None, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_random_forests(
    impl: str,
    dtype: torch.dtype,
    layout: PrefixLayout,
    heads: tuple[int, int],
    dims: tuple[int, int],
    scale: float | None,
    seed: int,
) -> None:
    assert_matches(use(layout, impl, scale), layout, inputs(layout.num_rows, heads, dims, dtype, seed), scale)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize(
    "layout",
    [
        PrefixLayout([150, 40, 7, 133], [-1, 0, 0, 0]),
        PrefixLayout([70, 33, 40, 129, 5, 64], [-1, 0, 1, 2, 1, -1]),
        PrefixLayout([2] * 40, list(range(-1, 39))),
    ],
    ids=["flat", "tree", "chain of 40 levels"],
)
def test_longer_than_a_kernel_block(layout: PrefixLayout, impl: str, dtype: torch.dtype) -> None:
    assert_matches(use(layout, impl), layout, inputs(layout.num_rows, (4, 2), (16, 16), dtype))


def bf16_by_torch(layout: PrefixLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: repeated_attention(q, k, v, layout)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize(
    "layout",
    [
        PrefixLayout([64, 30, 17, 24], [-1, 0, 0, 0]),
        PrefixLayout([20, 16, 24, 30, 9], [-1, 0, 1, 1, 0]),
        PrefixLayout([3] * 40, list(range(-1, 39))),
    ],
    ids=["flat", "three levels", "chain of 40 levels"],
)
def test_bf16_error_is_at_most_twice_the_dense_paths_own(layout: PrefixLayout, impl: str) -> None:
    """The dense path is plain torch math in bf16; both are measured against fp32 on the same bf16 inputs."""
    tensors = inputs(layout.num_rows, (4, 2), (32, 32), torch.bfloat16)
    q, k, v, dout = (x.float() for x in tensors)
    exact = run(bf16_by_torch(layout), q, k, v, dout)
    dense = run(bf16_by_torch(layout), *tensors)
    mine = run(use(layout, impl), *tensors)
    for name, value in exact.items():
        assert mine[name].dtype is torch.bfloat16
        own, allowed = ((run_[name].float() - value).norm().item() for run_ in (mine, dense))
        assert own <= 2 * allowed, f"{name}: {own} against {allowed} of the dense path"


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layout", [FLAT, TWO_GROUPS, DEEP], ids=["flat", "two groups", "deep"])
def test_tensors_that_are_not_contiguous(layout: PrefixLayout, impl: str) -> None:
    rows = layout.num_rows
    q, k, v, dout = inputs(rows)
    strided = torch.empty(rows, 4, 16, dtype=torch.float64)
    strided[..., ::2] = q
    transposed = k.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # one projection's output, as megatron splits it
    v_view = fused[:, 48:].unflatten(1, (2, 8))
    out_view = dout.transpose(1, 2).contiguous().transpose(1, 2)
    views = (strided[..., ::2], transposed, v_view, out_view)
    assert not any(x.is_contiguous() for x in views)
    assert_matches(use(layout, impl), layout, views)
    one_head, one_row = k[:, :1].expand_as(k), dout[:1].expand_as(dout)
    assert_matches(use(layout, impl), layout, (q, one_head, v[..., :1].expand_as(v), one_row))
    # sum() sends a gradient of stride 0 back
    assert_matches(use(layout, impl), layout, (q, k, v, torch.ones((), dtype=torch.float64).expand_as(dout)))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_scores(impl: str, dtype: torch.dtype) -> None:
    """Scores of thousands, in which one key takes all: no NaN, no overflow, and the right key."""
    for layout in (FLAT, DEEP):
        q, k, v, dout = inputs(layout.num_rows, dtype=dtype)
        q, k = q * 60, k * 60
        result = run(use(layout, impl), q, k, v, dout)
        exact = run(bf16_by_torch(layout), *(x.double() for x in (q, k, v, dout)))
        assert all(value.isfinite().all() for value in result.values())
        # Scores near 1e4 carry the rounding of their dtype, and the exponential makes it absolute.
        limit = {torch.float64: 1e-8, torch.float32: 5e-2}.get(dtype)
        if limit is not None:
            assert all(error <= limit for error in errors(result, exact).values())
        assert ((result["out"].double() - exact["out"]).abs().amax((1, 2)) < 0.05).double().mean() > 0.8
    # The prefix holds all the weight, then none of it: a merge of very different log-sum-exps.
    layout = PrefixLayout([2, 2], [-1, 0])
    for sign in (1.0, -1.0):
        q, v = torch.ones(4, 1, 8, dtype=dtype), torch.arange(4.0, dtype=dtype).reshape(4, 1, 1).expand(4, 1, 8)
        k = (torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype) * sign * 500).reshape(4, 1, 1).expand(4, 1, 8)
        out = use(layout, impl)(q, k, v)[:, 0, 0]
        assert out.tolist() == ([0.0, 0.5, 0.5, 0.5] if sign > 0 else [0.0, 0.5, 2.0, 2.5])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_gradients_by_finite_differences(impl: str) -> None:
    """gradcheck: the backward belongs to this forward, whatever the oracles say."""
    q, k, v, _ = (x.requires_grad_() for x in inputs(DEEP.num_rows, (2, 1), (4, 4)))
    assert torch.autograd.gradcheck(use(DEEP, impl), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_only_some_inputs_need_gradients(impl: str) -> None:
    q, k, v, dout = inputs(FLAT.num_rows)
    full = run(use(FLAT, impl), q, k, v, dout)
    key = k.clone().requires_grad_()
    use(FLAT, impl)(q, key, v).backward(dout)
    assert torch.equal(key.grad, full["dk"])  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_inputs_stay_as_they_are(impl: str) -> None:
    tensors = inputs(DEEP.num_rows)
    before = [x.clone() for x in tensors]
    run(use(DEEP, impl), *tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("impl", [*CPU_IMPLS, "auto"])
def test_no_rows_at_all(impl: str) -> None:
    layout = PrefixLayout([0, 0], [-1, 0])
    assert_matches(use(layout, impl), layout, inputs(0))


def test_auto_is_sdpa_on_the_cpu() -> None:
    q, k, v, _ = inputs(DEEP.num_rows, dtype=torch.float32)
    assert torch.equal(use(DEEP, "auto")(q, k, v), use(DEEP, "sdpa")(q, k, v))


def test_the_two_oracles_agree() -> None:
    """One builds a mask, the other repeats prefixes: they share no code."""
    q, k, v, _ = inputs(DEEP.num_rows)
    one = PrefixLayout([DEEP.num_rows], [-1])
    for repeated, masked in (
        (repeated_attention(q, k, v, DEEP, 0.3), reference_attention(q, k, v, DEEP, 0.3)),
        (causal_attention(q, k, v, 0.3), reference_attention(q, k, v, one, 0.3)),
    ):
        torch.testing.assert_close(masked, repeated, atol=1e-12, rtol=0)


def qkv(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (qkv((20, 32), (20, 2, 8), (20, 2, 8)), r"q must be \[T, heads"),
        (qkv((19, 4, 8), (20, 2, 8), (20, 2, 8)), "q has 19 rows, the layout has 20"),
        (qkv((20, 4, 8), (21, 2, 8), (20, 2, 8)), "k has 21 rows, the layout has 20"),
        (qkv((20, 4, 8), (20, 2, 8), (1, 2, 8)), "v has 1 rows, the layout has 20"),
        (qkv((20, 4, 8), (20, 3, 8), (20, 3, 8)), "divide the query heads, got q 4, k 3, v 3"),
        (qkv((20, 4, 8), (20, 2, 8), (20, 4, 8)), "equal for k and v .* k 2, v 4"),
        (qkv((20, 4, 8), (20, 0, 8), (20, 0, 8)), "got q 4, k 0"),
        (qkv((20, 4, 8), (20, 2, 16), (20, 2, 8)), "one head dim, got 8 and 16"),
        ([*qkv((20, 4, 8), (20, 2, 8)), torch.zeros(20, 2, 8).double()], "v is torch.float64 on cpu"),
        ([*qkv((20, 4, 8), (20, 2, 8)), torch.zeros(20, 2, 8, device="meta")], "v is torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("impl", [*CPU_IMPLS, "auto"])
def test_tensors_that_do_not_fit_are_refused(tensors: list[Tensor], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix_grouped_attention(*tensors, FLAT, impl=impl)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("impl", [*CPU_IMPLS, "auto"])
def test_a_scale_that_is_not_above_0_is_refused(impl: str, scale: float) -> None:
    with pytest.raises(ValueError, match=f"softmax_scale must be a finite number above 0, got {scale}"):
        prefix_grouped_attention(*inputs(FLAT.num_rows)[:3], FLAT, impl=impl, softmax_scale=scale)


def test_an_unknown_impl_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown impl 'cudnn'; choose one of auto, reference, flex, sdpa, te, "):
        prefix_grouped_attention(*inputs(FLAT.num_rows)[:3], FLAT, impl="cudnn")


def test_a_kernel_refuses_tensors_it_cannot_take() -> None:
    half = inputs(FLAT.num_rows, dtype=torch.bfloat16)[:3]
    with pytest.raises(ValueError, match="impl='flash' runs on CUDA, the tensors are on cpu; use impl='sdpa'"):
        prefix_grouped_attention(*half, FLAT, impl="flash")
    with pytest.raises(ValueError, match=r"impl='sdpa' takes fp64, fp32, bf16 or fp16, got torch.int64"):
        prefix_grouped_attention(*(x.long() for x in half), FLAT, impl="sdpa")
    for dims, shown in (((12, 12), "12"), ((264, 264), "264"), ((8, 20), "20")):
        odd = [x.to("meta") for x in inputs(FLAT.num_rows, dims=dims, dtype=torch.bfloat16)[:3]]
        with pytest.raises(ValueError, match=f"multiples of 8, got {shown}"):
            prefix_grouped_attention(*odd, FLAT, impl="flash")
    with pytest.raises(ValueError, match=r"impl='flash' takes bf16 or fp16, got torch.float32"):
        prefix_grouped_attention(*(x.float().to("meta") for x in half), FLAT, impl="flash")
    # No CUDA tensor can exist here; another device is refused by the same words.
    elsewhere = [x.to("meta") for x in half]
    with pytest.raises(ValueError, match="impl='sdpa' runs on the CPU, the tensors are on meta; use impl='flash'"):
        prefix_grouped_attention(*elsewhere, FLAT, impl="sdpa")
