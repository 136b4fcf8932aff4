"""Below prefix-grouped attention: memory, the merge, the choice of a kernel, and deliberate errors that must show."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_prefix import PrefixLayout, prefix_grouped_attention
from megatron_prefix.attention import KERNELS, check_impl, grouped_attention, merge, merge_attention, sdpa
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.sdpa import SdpaKernel
from tests.attention_oracle import CPU_KERNELS, DEEP, FLAT, assert_matches, inputs, run

CPU = torch.device("cpu")


# ---- memory


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("responses", [1, 4, 16])
@pytest.mark.parametrize("impl", CPU_KERNELS)
def test_saved_bytes_are_q_k_v_out_and_lse(impl: str, responses: int, groups: int) -> None:
    """Whatever the number of responses, the tensors kept for backward are the pack's own: no copy of a prefix key."""
    lengths, parents = [], []
    for group in range(groups):
        lengths += [64, *[2] * responses]
        parents += [-1, *[group * (responses + 1)] * responses]
    layout = PrefixLayout(lengths, parents)
    q, k, v, _ = inputs(layout.num_rows, (4, 2), (16, 16), torch.float32)
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = prefix_grouped_attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), layout, impl=impl)
    lse = layout.num_rows * 4 * 4  # fp32, one per row and query head
    expected = size(q) + size(k) + size(v) + size(out) + lse
    assert sum(map(size, saved)) == expected
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert sum(storages.values()) == expected  # and no view keeps something larger alive


class LargestTensor(TorchDispatchMode):
    """Rows x heads of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("impl", CPU_KERNELS)
def test_no_tensor_is_larger_than_the_pack(impl: str) -> None:
    """Nor does any operation, forward or backward, make a tensor with a prefix row per response."""
    layout = PrefixLayout([64, *[2] * 16, 40, *[3] * 8], [-1, *[0] * 16, -1, *[17] * 8])
    q, k, v, dout = inputs(layout.num_rows, (2, 2), (16, 16), torch.float32)
    with LargestTensor() as largest:
        run(lambda *x: prefix_grouped_attention(*x, layout, impl=impl), q, k, v, dout)
    assert largest.numel == q.numel()


# ---- the merge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_is_attention_over_the_union(dtype: torch.dtype) -> None:
    scores = torch.randn(5, 3, 12, dtype=torch.float64) * 4
    values = torch.randn(5, 3, 12, 8, dtype=torch.float64)

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        part = scores[..., keys]
        return (part.softmax(-1).unsqueeze(-1) * values[..., keys, :]).sum(2), part.logsumexp(-1)

    (out_a, lse_a), (out_b, lse_b), (out, lse) = attend(slice(0, 7)), attend(slice(7, 12)), attend(slice(0, 12))
    lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    merged, merged_lse = merge_attention(out_a.to(dtype), lse_a.to(lse_dtype), out_b.to(dtype), lse_b.to(lse_dtype))
    assert (merged.dtype, merged_lse.dtype) == (dtype, lse_dtype)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(merged.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(merged_lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_merge_of_rows_that_see_nothing() -> None:
    """(-inf, -inf) stays -inf with an output of 0; one -inf leaves the other side as it is."""
    nothing = torch.full((1, 1), -torch.inf)
    some = torch.tensor([[2.5]])
    a, b = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[5.0, -3.0]]])
    out, lse = merge_attention(a, nothing, b, nothing)
    assert out.tolist() == [[[0.0, 0.0]]] and lse.tolist() == [[-torch.inf]]
    for left, right, expected in ((nothing, some, b), (some, nothing, a)):
        out, lse = merge_attention(a, left, b, right)
        assert torch.equal(out, expected) and torch.equal(lse, some)
    for low, high in ((-3e38, 3e38), (-1e4, 1e4)):  # no overflow between far ends either
        out, lse = merge_attention(a, torch.tensor([[low]]), b, torch.tensor([[high]]))
        assert torch.equal(out, b) and lse.item() == pytest.approx(high)


# ---- deliberate errors: the oracle must notice each


class LseOfTheCallInBackward(SdpaKernel):
    """Normalises each call's gradients by its own log-sum-exp instead of the merged one."""

    def backward(self, grads, dout, qkv, out, lse, call, softmax_scale):  # type: ignore[no-untyped-def]
        lse = lse.clone()
        call.q.put(lse, self.forward(*qkv, call, softmax_scale)[1])
        super().backward(grads, dout, qkv, out, lse, call, softmax_scale)


class OutOfTheCallInBackward(SdpaKernel):
    def backward(self, grads, dout, qkv, out, lse, call, softmax_scale):  # type: ignore[no-untyped-def]
        out = out.clone()
        call.q.put(out, self.forward(*qkv, call, softmax_scale)[0])
        super().backward(grads, dout, qkv, out, lse, call, softmax_scale)


class NoScaleInBackward(SdpaKernel):
    def backward(self, grads, dout, qkv, out, lse, call, softmax_scale):  # type: ignore[no-untyped-def]
        super().backward(grads, dout, qkv, out, lse, call, 1.0)


class PrefixGradientsOverwritten(SdpaKernel):
    """Stores the gradient of an ancestor call's keys where it must be added."""

    def backward(self, grads, dout, qkv, out, lse, call, softmax_scale):  # type: ignore[no-untyped-def]
        if not call.causal:
            for grad in grads[1:]:
                for start, end in call.kv.ranges:
                    grad[start:end] = 0
        super().backward(grads, dout, qkv, out, lse, call, softmax_scale)


class FirstHeadsOnly(SdpaKernel):
    """Grouped-query heads taken in turn (0 1 0 1) instead of in blocks (0 0 1 1)."""

    def forward(self, q, k, v, call, softmax_scale):  # type: ignore[no-untyped-def]
        order = torch.tensor([0, 2, 1, 3])
        out, lse = super().forward(q[:, order], k, v, call, softmax_scale)
        return out[:, order], lse[:, order]


@pytest.mark.parametrize(
    "kernel",
    [LseOfTheCallInBackward, OutOfTheCallInBackward, NoScaleInBackward, PrefixGradientsOverwritten, FirstHeadsOnly],
)
@pytest.mark.parametrize("layout", [FLAT, DEEP], ids=["flat", "deep"])
def test_a_wrong_kernel_is_noticed(kernel: type[SdpaKernel], layout: PrefixLayout) -> None:
    calls = AttentionCalls.build(layout, CPU)
    tensors = inputs(layout.num_rows, dtype=torch.float32)
    assert_matches(lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, SdpaKernel()), layout, tensors, 0.3)
    with pytest.raises(AssertionError, match="above 1e-05"):
        assert_matches(lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, kernel()), layout, tensors, 0.3)


def without_last_level(calls: AttentionCalls) -> AttentionCalls:
    return replace(calls, ancestors=calls.ancestors[:-1])


def first_level_twice(calls: AttentionCalls) -> AttentionCalls:
    return replace(calls, ancestors=(*calls.ancestors, calls.ancestors[0]))


def own_rows_see_all(calls: AttentionCalls) -> AttentionCalls:
    return replace(calls, own=replace(calls.own, causal=False))


@pytest.mark.parametrize("change", [without_last_level, first_level_twice, own_rows_see_all])
@pytest.mark.parametrize("layout", [FLAT, DEEP], ids=["flat", "deep"])
def test_wrong_calls_are_noticed(change: Any, layout: PrefixLayout) -> None:
    calls = change(AttentionCalls.build(layout, CPU))
    tensors = inputs(layout.num_rows, dtype=torch.float32)
    with pytest.raises(AssertionError, match="above 1e-05"):
        assert_matches(lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, SdpaKernel()), layout, tensors, 0.3)


def test_a_causal_ancestor_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = sdpa._forward, sdpa._backward
    monkeypatch.setattr(sdpa, "_forward", lambda *args, scale: forward(*args[:-1], True, scale=scale))
    monkeypatch.setattr(sdpa, "_backward", lambda *args, scale: backward(*args[:-1], True, scale=scale))
    with pytest.raises(AssertionError, match="above 1e-10"):
        assert_matches(lambda *x: prefix_grouped_attention(*x, FLAT, impl="sdpa"), FLAT, inputs(FLAT.num_rows))


def test_a_merge_without_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "merge_attention", lambda a, la, b, lb: ((a + b) / 2, torch.logaddexp(la, lb)))
    with pytest.raises(AssertionError, match="above 1e-10"):
        assert_matches(lambda *x: prefix_grouped_attention(*x, FLAT, impl="sdpa"), FLAT, inputs(FLAT.num_rows))


def test_every_kernel_of_the_table_is_known_by_its_name() -> None:
    """A kernel that runs here is held to the oracles above; one that does not must say what it needs."""
    for name, kernel in KERNELS.items():
        refusal = kernel.refusal(CPU, torch.bfloat16, 16, 16)
        assert refusal is None or f"impl={name!r}" in refusal


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "head_dim", "cp_size", "message"),
    [
        ("flash", CPU, torch.bfloat16, 64, 1, "impl='flash' runs on CUDA, the tensors are on cpu; use impl='sdpa'"),
        ("flash", GPU, torch.float32, 64, 1, "impl='flash' takes bf16 or fp16, got torch.float32; use impl="),
        ("auto", GPU, torch.bfloat16, 12, 1, "impl='flash' takes head dims up to 256 that are multiples of 8, got 12"),
        ("sdpa", GPU, torch.float32, 64, 1, "impl='sdpa' runs on the CPU, the tensors are on cuda; use impl='flash'"),
        ("auto", CPU, torch.int32, 64, 1, "impl='sdpa' takes fp64, fp32, bf16 or fp16, got torch.int32"),
        ("reference", GPU, torch.float32, 64, 2, "impl='reference' holds the whole mask and cannot be split over"),
        ("fast", CPU, torch.float32, 64, 1, "unknown impl 'fast'; choose one of auto, reference, flex, sdpa, te, "),
    ],
)  # fmt: skip
def test_what_cannot_run_is_known_beforehand(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, cp_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_impl(impl, device, dtype, head_dim, cp_size=cp_size)


def test_what_can_run_is_resolved() -> None:
    assert check_impl("auto", CPU, torch.float64, 7) == check_impl("sdpa", CPU, torch.bfloat16, 7, cp_size=2) == "sdpa"
    assert check_impl("auto", GPU, torch.float16, 256, cp_size=2) == "flash"
    assert check_impl("reference", GPU, torch.float64, 7) == "reference"
