"""What `impl="te"` refuses and why, which versions it takes, and its guard against an endless workspace."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prefix.attention import check_impl
from megatron_prefix.attention import te as te_kernel
from megatron_prefix.attention.calls import AttentionCalls, VarlenCall
from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.attention.te import TeKernel, deterministic_workspace
from megatron_prefix.attention.te_library import FusedAttention, TeSupport, installed_version, load
from megatron_prefix.layout import PrefixLayout
from tests.downloads import downloaded
from tests.te_on_cpu import VERSIONS, CompiledFunctions, importable, te_module, te_version

pytestmark = pytest.mark.ci_oldest

BF16, FP16 = torch.bfloat16, torch.float16
H100, B200, B300, RTX = (9, 0), (10, 0), (10, 3), (12, 0)


@pytest.mark.parametrize(
    ("te", "cudnn", "arch", "dims", "message"),
    [
        ((2, 12), (9, 14, 0), (8, 0), (64, 64), "needs Hopper or newer for packed sequences, this GPU is sm80; use"),
        ((2, 12), (9, 5, 1), H100, (64, 64), "needs cuDNN 9.6 or newer for packed sequences"),
        ((2, 12), (9, 10, 1), H100, (64, 64), "not 9.10.0 or 9.10.1 (wrong results), this is 9.10.1; upgrade"),
        ((2, 20), (9, 11, 0), H100, (64, 64), "Transformer Engine 2.20 needs cuDNN 9.12 or newer, this is 9.11.0"),
        ((2, 12), (9, 6, 0), B200, (64, 64), "needs cuDNN 9.7 or newer on sm100, this is 9.6.0"),
        ((2, 12), (9, 20, 0), RTX, (64, 64), "needs Transformer Engine 2.15 and cuDNN 9.18.1 or newer"),
        ((2, 18), (9, 18, 0), RTX, (64, 64), "on sm120, these are 2.18 and 9.18.0; upgrade them, or use impl='flash'"),
        ((2, 12), (9, 14, 0), H100, (60, 60), "got 60 for q and k and 60 for v; use impl='flash'"),
        ((2, 12), (9, 14, 0), H100, (264, 264), "trains with head dims up to 256 that are multiples of 8"),
        ((2, 12), (9, 14, 0), H100, (256, 128), "equal ones, or 192 and 128, above 128"),
        ((2, 12), (9, 14, 0), B200, (192, 192), "sm100 with cuDNN 9.14.0 trains with head dims up to 128"),
        ((2, 12), (9, 10, 2), B200, (192, 128), "head dims up to 128 that are multiples of 8, or 192 and 128, got 192"),
        ((2, 18), (9, 20, 0), RTX, (192, 128), "equal head dims up to 128 that are multiples of 8, got 192 for q"),
        ((2, 18), (9, 20, 0), RTX, (64, 96), "equal head dims up to 128 that are multiples of 8, got 64 for q and k"),
    ],
)  # fmt: skip
def test_what_is_refused(
    te: tuple[int, int], cudnn: tuple[int, int, int], arch: tuple[int, int], dims: tuple[int, int], message: str
) -> None:
    refusal = TeSupport(te, cudnn, arch).refusal(BF16, *dims, deterministic=False)
    assert refusal is not None and message in refusal and "use impl=" in refusal


@pytest.mark.parametrize(
    ("te", "cudnn", "arch", "dims"),
    [
        ((2, 8), (9, 6, 0), H100, (128, 128)),
        ((2, 8), (9, 10, 2), H100, (256, 256)),
        ((2, 20), (9, 14, 0), H100, (192, 128)),
        ((2, 20), (9, 14, 0), H100, (64, 96)),
        ((2, 10), (9, 7, 0), B200, (128, 128)),
        ((2, 12), (9, 11, 0), B300, (192, 128)),
        ((2, 15), (9, 18, 1), RTX, (128, 128)),
    ],
)
def test_what_is_taken(
    te: tuple[int, int], cudnn: tuple[int, int, int], arch: tuple[int, int], dims: tuple[int, int]
) -> None:
    support = TeSupport(te, cudnn, arch)
    assert (
        support.refusal(BF16, *dims, deterministic=False) is support.refusal(FP16, *dims, deterministic=False) is None
    )
    for dtype in (torch.float32, torch.float64):
        refusal = support.refusal(dtype, *dims, deterministic=False)
        assert refusal == f"impl='te' takes bf16 or fp16, got {dtype}; use impl='reference' or cast"


def test_deterministic_backward() -> None:
    assert TeSupport((2, 12), (9, 14, 0), H100).refusal(BF16, 64, 64, deterministic=True) is None
    assert TeSupport((2, 12), (9, 18, 1), B200).refusal(BF16, 64, 64, deterministic=True) is None
    for support in (TeSupport((2, 12), (9, 18, 0), B200), TeSupport((2, 18), (9, 20, 0), RTX)):
        assert "deterministic" in (support.refusal(BF16, 64, 64, deterministic=True) or "")
        assert support.refusal(BF16, 64, 64, deterministic=False) is None


def test_where_the_lse_has_a_row_per_query() -> None:
    assert TeSupport((2, 12), (9, 6, 0), H100).packed_stats
    assert not TeSupport((2, 12), (9, 5, 2), H100).packed_stats
    assert not TeSupport((2, 18), (9, 20, 0), RTX).packed_stats


# ---- on the machine at hand


def test_tensors_off_the_gpu_are_refused_without_looking_for_transformer_engine() -> None:
    with pytest.raises(ValueError, match=re.escape("impl='te' runs on CUDA, the tensors are on cpu; use impl='sdpa'")):
        check_impl("te", torch.device("cpu"), BF16, 64)


def test_auto_prefers_transformer_engine_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setitem(KERNELS, "te", kernel := TeKernel())
    kernel.__dict__["_te"] = "not here"
    assert check_impl("auto", gpu, BF16, 64) == "flash"
    kernel.__dict__ |= {"_te": (2, 12), "_cudnn": (9, 14, 0), "_library": object()}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    assert check_impl("auto", gpu, BF16, 64) == check_impl("te", gpu, BF16, 192, 128) == "te"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert check_impl("auto", gpu, BF16, 64) == "flash"
    with pytest.raises(ValueError, match="needs Hopper or newer"):
        check_impl("te", gpu, BF16, 64)
    with pytest.raises(ValueError, match=r"finds no kernel: impl='te' needs Hopper.*; impl='flash' takes bf16 or fp16"):
        check_impl("auto", gpu, torch.float32, 64)


def test_functions_that_are_not_known_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_arguments(support: TeSupport) -> None:
        raise ImportError("fused_attn_fwd of Transformer Engine 2.12 has other arguments")

    monkeypatch.setattr(te_kernel, "load", other_arguments)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    monkeypatch.setitem(KERNELS, "te", kernel := TeKernel())
    kernel.__dict__ |= {"_te": (2, 12), "_cudnn": (9, 14, 0)}
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match="impl='te' cannot use what is installed: fused_attn_fwd of"):
        check_impl("te", gpu, BF16, 64)
    assert check_impl("auto", gpu, BF16, 64) == "flash"


def test_a_missing_or_broken_transformer_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> Any:
        raise OSError("libcudnn.so.9: cannot open shared object file\nand more")

    monkeypatch.setattr("importlib.import_module", no_library)
    assert installed_version() == (
        "impl='te' needs Transformer Engine 2.8 to 2.20 with its PyTorch extension, which cannot be imported "
        "(libcudnn.so.9: cannot open shared object file): pip install 'megatron-prefix[te]', or use impl='flash'"
    )


@pytest.mark.parametrize(
    ("version", "supported"),
    [("2.7.0", False), ("2.8.0", True), ("2.20.2", True), ("2.21.0", False), ("3.0", False), ("2.12.0+cu13", True)],
)
def test_which_versions_are_taken(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(__version__=version))
    found = installed_version()
    if supported:
        assert found == (2, int(version.split(".")[1]))
    else:
        assert (
            found == f"impl='te' supports Transformer Engine 2.8 to 2.20, {version} is installed; or use impl='flash'"
        )


# ---- the adapter


@pytest.mark.parametrize("version", VERSIONS)
def test_functions_with_other_arguments_are_refused_at_construction(version: str) -> None:
    module, dtypes, _ = te_module(version, True)

    def needs_more(**settings: Any) -> None: ...

    def forward_with_more(q: Any, k: Any, v: Any, sink: Any) -> None: ...

    backend = {"F16_arbitrary_seqlen": 1}
    changed = SimpleNamespace(
        fused_attn_fwd=forward_with_more, fused_attn_bwd=module.fused_attn_bwd, FusedAttnBackend=backend
    )
    with pytest.raises(
        ImportError, match=r"forward_with_more of Transformer Engine 9\.9 .*lacks .*attn_mask_type.* needs sink"
    ):
        FusedAttention(changed, "9.9", True, dtypes)
    changed = SimpleNamespace(fused_attn_fwd=module.fused_attn_fwd, fused_attn_bwd=needs_more, FusedAttnBackend=backend)
    with pytest.raises(ImportError, match="lacks attn_bias_type"):
        FusedAttention(changed, "9.9", True, dtypes)


# ---- the workspace of a deterministic backward


def one_call(lengths: list[int]) -> VarlenCall:
    layout = PrefixLayout(lengths, [-1] * len(lengths))
    return AttentionCalls.build(layout, torch.device("cpu")).own


def test_the_workspace_grows_as_was_observed() -> None:
    two, four = deterministic_workspace(one_call([64] * 2), 8), deterministic_workspace(one_call([64] * 4), 8)
    assert two == 128 * 2 * 8 * 64 * 64 and four == 4 * two
    assert deterministic_workspace(one_call([64]), 8) == 128 * 8 * 64 * 64


def test_a_workspace_over_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, call, cpu = TeKernel(), one_call([512, 512]), torch.device("cpu")
    needed = deterministic_workspace(call, 32)
    monkeypatch.setattr(TeKernel, "support", lambda self, device: TeSupport((2, 12), (9, 14, 0), H100))
    monkeypatch.setattr(te_kernel, "free_bytes", lambda device: needed)
    kernel.check_workspace(call, 32, cpu)
    monkeypatch.setattr(te_kernel, "free_bytes", lambda device: needed - 1)
    with pytest.raises(
        ValueError, match=r"needs 2\.0 GiB of workspace .* 2 x 512 queries, 32 heads and 512 keys, 2\.0 GiB"
    ):
        kernel.check_workspace(call, 32, cpu)
    monkeypatch.setattr(TeKernel, "support", lambda self, device: TeSupport((2, 12), (9, 18, 1), B200))
    kernel.check_workspace(call, 32, cpu)


def test_the_backward_asks_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(self: TeKernel, call: VarlenCall, heads: int, device: torch.device) -> None:
        asked.append(heads)
        raise ValueError("guarded")

    monkeypatch.setattr(TeKernel, "check_workspace", refuse)
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="guarded"):
        TeKernel().backward((x, x, x), x, (x, x, x), x, x[..., 0], one_call([4]), 1.0)
    assert asked == [2]


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_the_installed_modules_are_found_by_their_names(version: str) -> None:
    functions = CompiledFunctions(te_version(version), True)
    with importable(downloaded(f"transformer-engine=={version}"), functions):
        library = load(TeSupport(te_version(version), (9, 20, 0), B200))
        x, call = torch.randn(4, 2, 8), one_call([3, 1])
        out, lse = library.forward(x, x, x, call, 0.3)
    assert (out.shape, lse.shape, len(functions.launches)) == (x.shape, (4, 2), 1)
