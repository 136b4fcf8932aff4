"""Memory of tensors, times and the description of the machine."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_prefix.measure import (
    Stopwatch,
    Times,
    git_commit,
    interleaved_times,
    machine_info,
    time_median,
    track_memory,
    track_saved_tensors,
)

pytestmark = pytest.mark.ci_oldest

KIB = 1024  # bytes of 256 fp32 numbers


def test_memory_counts_storages_once_and_until_they_are_freed() -> None:
    before = torch.zeros(256)
    with track_memory() as memory:
        a = torch.zeros(512)
        view, slice_ = a.view(2, 256), a[:10]
        before.view(2, 128).add_(1)  # a storage of before the block
        assert memory.current_bytes == 2 * KIB
        del a, view
        assert memory.current_bytes == 2 * KIB  # the slice keeps the storage
        del slice_
        assert memory.current_bytes == 0
        b = torch.ones(256)
        c = b + 1
        del b
        d = c * 2
        assert memory.current_bytes == 2 * KIB
    assert memory.peak_bytes == 2 * KIB
    del c
    assert memory.current_bytes == KIB  # also after the block
    del d
    assert memory.current_bytes == 0


def test_memory_sees_tensors_from_lists_and_resizing() -> None:
    with track_memory() as memory:
        a = torch.tensor([0.0] * 256)
        assert memory.current_bytes == KIB
        a.resize_(1024)
        assert memory.current_bytes == 4 * KIB
    assert memory.peak_bytes == 4 * KIB


def test_memory_of_backward_by_hand() -> None:
    x = torch.randn(256, requires_grad=True)
    with track_memory() as memory:
        y = x.exp()  # saves y
        z = y.sin()  # saves y
        assert memory.current_bytes == 2 * KIB
        grad = torch.ones_like(z)
        z.backward(grad)
        del y, z, grad
        assert x.grad is not None
        assert memory.current_bytes == KIB
    # y, z, grad and in backward: cos(y), grad * cos(y), and then that times y
    assert 5 * KIB <= memory.peak_bytes <= 6 * KIB


class _Doubling(torch.autograd.Function):
    """Keeps a copy of four times its input's size for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.repeat(4))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (copy,) = ctx.saved_tensors
        return grad * 2 + 0 * copy[: grad.numel()]


def test_memory_of_custom_functions_and_saved_tensors() -> None:
    x = torch.randn(256, requires_grad=True)
    with track_memory() as memory:
        with track_saved_tensors() as saved:
            y = _Doubling.apply(x)
            assert memory.current_bytes == 5 * KIB
        y.sum().backward()
        del y
        assert memory.current_bytes == KIB  # the gradient
    assert saved.num_bytes == 4 * KIB
    assert memory.peak_bytes >= 6 * KIB


def test_saved_tensors_count_a_storage_once_and_change_no_gradient() -> None:
    x = torch.randn(16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(((x @ x).exp() * x).sum(), x)
    with track_saved_tensors() as saved:
        loss = ((x @ x).exp() * x).sum()
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, expected)
    assert saved.num_bytes == 2 * KIB  # x (four times) and exp's output (twice)


def _layers(x: torch.Tensor, weights: list[torch.Tensor], recompute: bool | None) -> torch.Tensor:
    def layer(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h @ w).sin().exp().cos()

    for w in weights:
        x = layer(x, w) if recompute is None else checkpoint(layer, x, w, use_reentrant=recompute)
    return x


def test_memory_under_recompute_is_less_and_deterministic() -> None:
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(512, 32, requires_grad=True)
    peaks: dict[bool | None, set[int]] = {None: set(), False: set(), True: set()}
    for recompute, seen in peaks.items():
        for _ in range(3):
            with track_memory() as memory:
                _layers(x, weights, recompute).sum().backward()
                held = sum(w.grad.nbytes for w in weights if w.grad is not None) + x.grad.nbytes  # type: ignore[union-attr]
                assert memory.current_bytes == held
                for w in (x, *weights):
                    w.grad = None
            seen.add(memory.peak_bytes)
            assert memory.current_bytes == 0
    assert all(len(seen) == 1 for seen in peaks.values())
    plain, recomputed, reentrant = (seen.pop() for seen in peaks.values())
    assert recomputed < 0.75 * plain and reentrant < 0.75 * plain


def test_memory_does_not_change_results_and_survives_errors() -> None:
    with pytest.raises(RuntimeError), track_memory() as memory:
        torch.zeros(256) @ torch.zeros(3)
    torch.zeros(256)
    assert memory.current_bytes == 0 and memory.peak_bytes >= KIB


@pytest.mark.gpu
def test_memory_on_cuda() -> None:
    with track_memory("cuda") as memory:
        a = torch.zeros(1 << 20, device="cuda")
        b = a + 1
        del a
    assert memory.peak_bytes == 8 << 20 and memory.current_bytes == b.nbytes


def test_times() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"forward": float(len(order)), "backward": 1.0}

    seen: list[str] = []
    times = interleaved_times(
        {"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3, warmup=1, after_each=seen.append
    )
    assert order == seen == ["a", "b"] * 4
    assert times["a"]["forward"].seconds == (3.0, 5.0, 7.0)
    assert times["b"]["forward"].as_dict() == {"median": 6.0, "min": 4.0, "all": [4.0, 6.0, 8.0]}
    assert times["b"]["backward"] == Times((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        interleaved_times({}, repeats=0)
    assert time_median(lambda: None, repeats=3) >= 0


def test_stopwatch_divides_the_time() -> None:
    watch = Stopwatch()
    watch.lap("first")
    watch.lap("second")
    assert list(watch.phases) == ["first", "second"] and all(value >= 0 for value in watch.phases.values())


def test_machine_info_is_json_with_versions() -> None:
    info = machine_info()
    assert json.loads(json.dumps(info)) == info
    assert info["cpu"] and info["cores"] >= 1 and info["threads"] == torch.get_num_threads()
    assert info["ram_bytes"] > 1 << 28
    assert torch.__version__.startswith(info["versions"]["torch"]) and "megatron-core" in info["versions"]


def test_git_commit_of_a_checkout_only(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    inside = tmp_path / "environment"
    inside.mkdir()
    assert git_commit(inside) is None
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == commit + "-dirty"
