"""Flash attention libraries without a GPU: every argument of every version, by value, and torch's on meta tensors."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix import PrefixLayout, prefix_grouped_attention
from megatron_prefix.attention import KERNELS, grouped_attention
from megatron_prefix.attention.calls import AttentionCalls, VarlenCall
from megatron_prefix.attention.flash import FlashKernel
from megatron_prefix.attention.flash_packages import FLASH2, FLASH3, FLASH4, FlashPackage, PackagedFlash
from megatron_prefix.attention.grouped import CachedKeys
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.ring import RingCalls
from megatron_prefix.layout import PartLayout
from tests import flash_stand_ins as stand_ins
from tests.attention_oracle import DEEP, FLAT, TWO_GROUPS, assert_matches, inputs, run
from tests.strategies import forests, parts

pytestmark = pytest.mark.ci_oldest

Pair = tuple[int, int]
CPU, META, GPU = (torch.device(name) for name in ("cpu", "meta", "cuda"))

LIBRARIES: dict[str, Callable[[], Any]] = {
    "aten": stand_ins.AtenOnCpu,
    "flash-attn 2.8.3": stand_ins.flash2,
    "FlashAttention-3 3.0.0.b1": stand_ins.flash3,
    "FlashAttention-3 3.0.0": stand_ins.flash3_new,
    **{
        f"flash-attn-4 {version}": lambda version=version: stand_ins.flash4(version)
        for version in ("4.0.0b3", "4.0.0b20", "4.0.0b36")
    },
}


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.aten_stand_ins(monkeypatch)


@pytest.fixture(params=LIBRARIES)
def kernel(request: pytest.FixtureRequest, aten: None) -> FlashKernel:
    return FlashKernel(LIBRARIES[request.param]())


# ---- every argument binds and means what it should


def against_the_oracle(
    kernel: FlashKernel,
    layout: PrefixLayout,
    heads: Pair = (4, 2),
    dims: Pair = (8, 8),
    dtype: torch.dtype = torch.float32,
) -> None:
    calls = AttentionCalls.build(layout, CPU)
    tensors = inputs(layout.num_rows, heads, dims, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert_matches(
        lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, kernel), layout, tensors, 0.3, tolerance=tolerance
    )


def test_equal_to_the_dense_oracle(kernel: FlashKernel) -> None:
    """Forward and all gradients of random forests."""

    @settings(max_examples=40)
    @given(
        layout=forests(max_segments=10),
        heads=st.sampled_from([(4, 2), (2, 2), (6, 1)]),
        dims=st.sampled_from([(8, 8), (16, 8), (8, 16)]),
    )
    def over_forests(layout: PrefixLayout, heads: Pair, dims: Pair) -> None:
        against_the_oracle(kernel, layout, heads, dims)

    over_forests()
    for layout in (FLAT, TWO_GROUPS, DEEP):
        against_the_oracle(kernel, layout)
        against_the_oracle(kernel, layout, dtype=torch.bfloat16)


def test_strides_are_free(kernel: FlashKernel) -> None:
    """Views of one fused tensor go to the kernel as they are, and a gradient that is one expanded row too."""
    fused = torch.randn(FLAT.num_rows, 8, 8)
    calls = AttentionCalls.build(FLAT, CPU)
    tensors = (*fused.split([4, 2, 2], dim=1), torch.randn(1, 4, 8).expand(FLAT.num_rows, 4, 8))
    assert_matches(lambda q, k, v: grouped_attention(q, k, v, calls, 0.3, kernel), FLAT, tensors, 0.3)


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_where_torch_has_to_be(kernel: FlashKernel, deterministic: bool) -> None:
    """The stand-ins compare the flag."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    against_the_oracle(kernel, FLAT)


# ---- deliberate errors: the oracle must notice each


class LseAsItComes(FlashKernel):
    """Takes [Hq, Tq] for [Tq, Hq]."""

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*args)
        return out, lse.T.reshape(lse.shape)


class WithoutTheCausalFlag(FlashKernel):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, v, replace(call, causal=False), softmax_scale)


class WithoutTheCausalFlagInBackward(FlashKernel):
    def backward(self, grads, dout, qkv, out, lse, call, softmax_scale):  # type: ignore[no-untyped-def]
        super().backward(grads, dout, qkv, out, lse, replace(call, causal=False), softmax_scale)


class MaxSeqlensSwapped(FlashKernel):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        call = replace(
            call,
            q=replace(call.q, max_seqlen=call.kv.max_seqlen),
            kv=replace(call.kv, max_seqlen=call.q.max_seqlen),
        )
        return super().forward(q, k, v, call, softmax_scale)


class WithoutGradientsOfKeys(FlashKernel):
    """Loses what the library wrote for dk."""

    def backward(self, grads, *args):  # type: ignore[no-untyped-def]
        super().backward((grads[0], torch.zeros_like(grads[1]), grads[2]), *args)


@pytest.mark.parametrize(
    "wrong",
    [LseAsItComes, WithoutTheCausalFlag, WithoutTheCausalFlagInBackward, MaxSeqlensSwapped, WithoutGradientsOfKeys],
)
@pytest.mark.parametrize("name", ["aten", "FlashAttention-3 3.0.0"])
def test_a_wrong_launch_is_noticed(wrong: type[FlashKernel], name: str, aten: None) -> None:
    library = LIBRARIES[name]()
    against_the_oracle(FlashKernel(library), DEEP)
    with pytest.raises(AssertionError):
        against_the_oracle(wrong(library), DEEP)


def test_another_layout_of_the_log_sum_exp_is_refused(aten: None) -> None:
    """Older versions pad it to [segments, heads, longest], and some have rows first."""
    for change in (lambda lse: lse.T, lambda lse: lse.unsqueeze(0), lambda lse: torch.nn.functional.pad(lse, (0, 4))):
        library = stand_ins.AtenOnCpu()
        forward = library.forward
        library.forward = lambda *args, forward=forward, change=change: (forward(*args)[0], change(forward(*args)[1]))
        with pytest.raises(ValueError, match=r"has shape \(.*\), not \[heads, rows\]; install another version of the"):
            against_the_oracle(FlashKernel(library), FLAT)


# ---- what cannot run says so


def unusable(package: FlashPackage, forward: Any, backward: Any = None) -> str:
    with pytest.raises(ImportError) as found:
        stand_ins.by_signature(package, forward, backward)
    return str(found.value)


def takes(parameters: str) -> Any:
    return stand_ins.stand_in(parameters, dict)


def test_versions_with_other_arguments_are_refused() -> None:
    """A name that is missing or unknown is an error before anything runs, never a guess."""
    old = (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size"
    )
    name = r"flash-attn \S+.*: _flash_attn_varlen_forward "
    assert re.fullmatch(
        name + "lacks window_size_left, window_size_right and asks for window_size", unusable(FLASH2, takes(old))
    )
    new = old.replace("window_size", "window_size_left, window_size_right, sinks")
    assert re.fullmatch(name + "asks for sinks", unusable(FLASH2, takes(new)))
    bad = unusable(FLASH3, takes(stand_ins.FLASH3_NEW_FORWARD), takes("dout, q, k, v, out, softmax_lse, dq, dk, dv"))
    assert re.search("_flash_attn_backward lacks cu_seqlens_k, cu_seqlens_q, deterministic, is_causal, max_seq", bad)
    module = SimpleNamespace(flash_attn_func=None)
    with stand_ins.importable(None, {FLASH3.module: module}), pytest.raises(ImportError, match="has no _flash_attn_f"):
        _ = PackagedFlash(FLASH3).launches


def test_an_older_flash4_inside_flash_attn_is_refused() -> None:
    """flash-attn 2.8 brings a first draft of it under the same name."""
    path = stand_ins.sources("flash-attn") / "flash_attn" / "cute" / "interface.py"
    found = unusable(FLASH4, takes(stand_ins.parameters_of(path, FLASH4.forward)))
    assert "_flash_attn_fwd lacks max_seqlen_k, max_seqlen_q, return_lse" in found


def test_a_package_that_lacks_another_says_which() -> None:
    """The real wheel, without the compiler that it needs."""
    library = PackagedFlash(FLASH4)
    with stand_ins.importable(stand_ins.sources("flash-attn-4"), {"cutlass": None}):
        found = library.refusal(GPU, torch.bfloat16, 128, 128)
    assert found is not None
    assert re.fullmatch(
        r"impl='flash4' has no usable package: flash-attn-4 4\.0\.0b36: flash_attn\.cute\.interface cannot be imported "
        r"\(.*cutlass.*\); install one or use impl='flash'",
        found,
    )


@pytest.mark.parametrize(
    ("package", "module"), [(FLASH2, "flash_attn"), (FLASH3, "flash_attn_interface"), (FLASH4, "flash_attn")]
)
def test_a_package_that_is_not_installed(package: FlashPackage, module: str) -> None:
    names = {package.module: None, module: None}
    with stand_ins.importable(None, names):
        found = PackagedFlash(package).refusal(GPU, torch.bfloat16, 128, 128)
    assert found is not None and f"{package.module} cannot be imported" in found and "use impl='flash'" in found


@pytest.mark.parametrize(
    ("impl", "capability", "dims", "message"),
    [
        ("flash", (7, 5), (64, 64), "impl='flash' needs a GPU from sm80 on, this one is sm7x; use impl='reference'"),
        ("flash2", (7, 5), (64, 64), "impl='flash2' needs a GPU from sm80 on, this one is sm7x; use impl='reference'"),
        ("flash2", (9, 0), (272, 64), "impl='flash2' takes head dims up to 256 that are multiples of 8, got 272; use"),
        ("flash3", (8, 0), (64, 64), "impl='flash3' needs an sm90 GPU, this one is sm8x; use impl='flash'"),
        ("flash3", (10, 0), (64, 64), "impl='flash3' needs an sm90 GPU, this one is sm10x; use impl='flash'"),
        ("flash3", (9, 0), (128, 256), "impl='flash3' takes head dims up to 192 while torch's algorithms are determin"),
        ("flash4", (12, 0), (64, 64), "impl='flash4' needs an sm90, sm100 or sm110 GPU, this one is sm12x; use impl="),
        (
            "flash4",
            (10, 0),
            (192, 192),
            "up to 128, (192, 128) or (256, 256) on sm10x, got (192, 192); use impl='flash'",
        ),
        (
            "flash4",
            (9, 0),
            (64, 12),
            "impl='flash4' takes head dims up to 256 that are multiples of 8, got 12; use imp",
        ),
        *((impl, (9, 0), (192, 128), None) for impl in ("flash", "flash2", "flash3", "flash4")),
        *((impl, (10, 0), (128, 128), None) for impl in ("flash", "flash2", "flash4")),
        *(("flash4", (10, 0), dims, None) for dims in ((192, 128), (256, 256), (64, 128))),
        ("flash4", (9, 0), (256, 192), None),
        *((impl, (8, 0), (256, 256), None) for impl in ("flash", "flash2")),
    ],
)
def test_hardware_and_head_dims(
    impl: str,
    capability: Pair,
    dims: Pair,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked of the GPU before the package is looked for; here with a package that would do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel: Any = KERNELS[impl]
    if impl != "flash":
        kernel = FlashKernel(PackagedFlash(kernel.functions.package))
        kernel.functions.launches = (None, None)
    found = kernel.refusal(GPU, torch.bfloat16, *dims)
    assert found is None if message is None else found is not None and message in found


@pytest.mark.parametrize("impl", ["flash2", "flash3", "flash4"])
def test_tensors_that_no_flash_kernel_takes(impl: str) -> None:
    """Found before anything is imported."""
    for device, dtype, message in (
        (CPU, torch.bfloat16, f"impl={impl!r} runs on CUDA, the tensors are on cpu; use impl='sdpa'"),
        (META, torch.bfloat16, f"impl={impl!r} runs on CUDA, the tensors are on meta; use impl='sdpa'"),
        (GPU, torch.float32, f"impl={impl!r} takes bf16 or fp16, got torch.float32; use impl='reference' or cast"),
    ):
        assert KERNELS[impl].refusal(device, dtype, 64, 64) == message


# ---- torch's real operators on meta tensors: shapes of every launch, and nothing read back


class Launches(TorchDispatchMode):
    """Rows and ranges of every launch, which must fit together."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[tuple[int, int, int]] = []
        self.backward: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._flash_attention_forward.default:
            self.forward.append(self.checked(args[:3], args[3:7]))
            assert result[0].shape == args[0].shape and result[1].shape == (args[0].shape[1], args[0].shape[0])
        elif func is torch.ops.aten._flash_attention_backward.default:
            dout, *qkv, out, lse = args[:6]
            self.backward.append(self.checked(qkv, args[6:10]))
            assert dout.shape == out.shape == qkv[0].shape and lse.shape == (qkv[0].shape[1], qkv[0].shape[0])
            assert [x.shape for x in result] == [x.shape for x in qkv]
        return result

    @staticmethod
    def checked(qkv: Sequence[Tensor], ranges: Sequence[Any]) -> tuple[int, int, int]:
        (q, k, v), (cu_q, cu_k, max_q, max_k) = qkv, ranges
        assert k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
        assert cu_q.shape == cu_k.shape and cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) > 1
        assert {x.device.type for x in (q, k, v, cu_q, cu_k)} == {"meta"}
        assert 0 < max_q <= len(q) <= max_q * (len(cu_q) - 1) and 0 < max_k <= len(k) <= max_k * (len(cu_k) - 1)
        return len(q), len(k), len(cu_q) - 1


def planned(calls: Sequence[VarlenCall]) -> list[tuple[int, int, int]]:
    return [(call.q.num_rows, call.kv.num_rows, len(call.q.ranges)) for call in calls if call.q.num_rows]


def on_meta(rows: int, heads: int, dim: int) -> Tensor:
    return torch.empty(rows, heads, dim, dtype=torch.bfloat16, device=META)


HEADS = st.sampled_from([(4, 2), (2, 2), (6, 1)])


@settings(max_examples=40)
@given(
    layout=forests(max_segments=10),
    heads=HEADS,
    dims=st.sampled_from([(8, 8), (64, 64), (16, 8), (8, 128), (256, 256)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_layouts_on_meta(layout: PrefixLayout, heads: Pair, dims: Pair, dtype: torch.dtype) -> None:
    q, k, v, dout = (
        on_meta(layout.num_rows, h, d).to(dtype)
        for h, d in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    )
    with Launches() as launches:
        result = run(lambda *x: prefix_grouped_attention(*x, layout, impl="flash"), q, k, v, dout)
    for name, like in (("out", dout), ("dq", q), ("dk", k), ("dv", v)):
        assert (result[name].shape, result[name].dtype, result[name].device) == (like.shape, dtype, like.device), name
    calls = AttentionCalls.build(layout, CPU)
    assert launches.forward == launches.backward == planned([calls.own, *calls.ancestors])


@settings(max_examples=40)
@given(layout=parts(), heads=HEADS, dims=st.sampled_from([(8, 8), (16, 8), (8, 24)]))
def test_parts_of_split_groups_on_meta(layout: PartLayout, heads: Pair, dims: Pair) -> None:
    """Keys in a cache: their gradients are added to the cache's sums, in fp32."""
    wide, rows = max(dims), layout.num_cached_rows + 3
    cached = CachedKeys(on_meta(rows, heads[1], wide), on_meta(rows, heads[1], wide), torch.float32)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    q, k, v, dout = (on_meta(layout.num_rows, *shape) for shape in shapes)
    calls = AttentionCalls.build(layout, META)
    with Launches() as launches:
        result = run(lambda *x: grouped_attention(*x, calls, 0.3, KERNELS["flash"], cached), q, k, v, dout)
    for name, like in (("out", dout), ("dq", q), ("dk", k), ("dv", v)):
        assert (result[name].shape, result[name].dtype) == (like.shape, like.dtype), name
    assert launches.forward == launches.backward == planned([calls.own, *calls.ancestors, *calls.cached])
    assert [(x.shape, x.dtype) for x in cached.gradients()] == [((rows, heads[1], wide), torch.float32)] * 2


@settings(max_examples=40)
@given(
    layout=st.one_of(forests(max_segments=10, max_length=12), parts()),
    cp_size=st.integers(1, 4),
    placement=st.sampled_from(PLACEMENTS),
)
def test_context_parallel_calls_on_meta(layout: PrefixLayout, cp_size: int, placement: str) -> None:
    """Every call of every rank, with keys of its own rows, of its cache and of what other ranks send it."""
    plan = CpPlan.build(layout, cp_size, placement)
    kernel = KERNELS["flash"]
    for rank in range(cp_size):
        ring = RingCalls.build(plan, rank, META)
        own = ring.own.layout
        num_cached = own.num_cached_rows if isinstance(own, PartLayout) else 0
        keys = [(own.num_rows, (ring.own.own, *ring.own.ancestors)), (num_cached, ring.own.cached)]
        keys += [(step.num_received, step.calls) for step in ring.steps]
        q, dout = on_meta(own.num_rows, 4, 8), on_meta(own.num_rows, 4, 8)
        lse = torch.empty(own.num_rows, 4, device=META)
        for num_keys, calls in keys:
            k, v = torch.empty(num_keys, 2, 16, dtype=torch.bfloat16, device=META).split(8, dim=-1)
            grads = tuple(torch.zeros(x.shape, device=META) for x in (q, k, v))
            for call in calls:
                if not call.q.num_rows:
                    continue
                with Launches() as launches:
                    out, part = kernel.forward(q, k, v, call, 0.3)
                    kernel.backward(grads, dout, (q, k, v), dout, lse, call, 0.3)  # type: ignore[arg-type]
                assert out.shape == (call.q.num_rows, 4, 8) and part.shape == out.shape[:2]
                assert launches.forward == launches.backward == planned([call])
