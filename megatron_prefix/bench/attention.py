"""Attention alone, forward and backward: repeated prefixes, prefix groups, and the `prefix-grouper` package.

Shapes: T rows of the group, N = G (P + R) repeated rows, Hq and Hkv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_prefix.attention import layout_attention, resolve_impl
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.bench.group import DTYPES, GroupSizes, ratios
from megatron_prefix.bench.peer import prefix_grouper_area, prefix_grouper_attention, prefix_grouper_status
from megatron_prefix.bench.report import (
    TOLERANCE,
    Differences,
    check_equal,
    new_report,
    relative_difference,
    speed_ups,
    with_total,
)
from megatron_prefix.layout import FLOPS_PER_PAIR, PrefixLayout
from megatron_prefix.measure import (
    Stopwatch,
    Times,
    interleaved_times,
    package_version,
    track_memory,
    track_saved_tensors,
)

PEERS = {"prefix_grouper": False, "prefix_grouper_tuned": True}
"""Paths of the package, and whether its attention function is tuned by hand, see `peer`."""


@dataclass(frozen=True)
class AttentionSizes:
    """Heads and kernel of the benchmark.

    Raises:
        ValueError: a size below 1, query heads that the key-value heads do not divide, or an unknown dtype.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "fp32"
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}; choose a divisor")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class AttentionPath:
    """One way to compute the attention, on its own rows.

    Attributes:
        inputs: q, k, v and the gradient of the output.
        copy_of: int64 [rows], the row of the group that each row is a copy of; None where the rows are the group's.
    """

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    area: int
    copy_of: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def time(self) -> dict[str, float]:
        """Seconds of one forward and backward."""
        q, k, v = (x.detach().requires_grad_() for x in self.inputs[:3])
        watch = Stopwatch(self.device)
        out = self.attend(q, k, v)
        watch.lap("forward")
        torch.autograd.grad(out, (q, k, v), self.inputs[3])
        watch.lap("backward")
        return with_total(watch.phases)

    def measure(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """out, dq, dk and dv in rows of the group, and bytes: saved for backward, and the peak with all inputs."""
        with track_memory(self.device) as memory:
            q, k, v = (x.detach().clone().requires_grad_() for x in self.inputs[:3])
            dout = self.inputs[3].clone()
            with track_saved_tensors() as saved:
                out = self.attend(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), dout)
        sums = [self._to_group(x) for x in (out.detach(), *grads)]
        if self.copy_of is not None:
            # Outputs of copies are equal, their gradients add up.
            sums[0] /= torch.bincount(self.copy_of)[:, None, None]
        results = dict(zip(("out", "dq", "dk", "dv"), sums, strict=True))
        return results, {"saved_bytes": saved.num_bytes, "peak_bytes": memory.peak_bytes}

    def _to_group(self, x: Tensor) -> Tensor:
        """Rows of this path to rows of the group: copies are summed, in fp32 or better."""
        if self.copy_of is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        total = torch.zeros(int(self.copy_of.max()) + 1, *x.shape[1:], dtype=wide.dtype, device=x.device)
        return total.index_add_(0, self.copy_of, wide)


def bench_attention(
    group: GroupSizes,
    sizes: AttentionSizes,
    *,
    repeats: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare, then time, attention over one prefix group with random q, k, v and output gradient.

    The reference is repeated prefixes through torch's own attention, one sequence at a time, in fp64 (fp32 for half
    precision). The run that is compared is also the one whose memory is measured, and the warm-up of the timed ones.

    Args:
        after_each: called with a note after each of `num_runs` runs.

    Returns:
        The report: JSON values, see `megatron_prefix.bench.report`.

    Raises:
        ResultsDifferError: a path's output or a gradient differs from the reference.
        ValueError: tensors that the implementation cannot take.
    """
    device = torch.device(device)
    note = after_each or (lambda _: None)
    impl = resolve_impl(sizes.impl, device, DTYPES[sizes.dtype], sizes.head_dim)
    report = new_report("attention", asdict(group) | asdict(sizes) | {"impl": impl, "repeats": repeats}, seed)
    inputs = random_inputs(group, sizes, seed, device)
    paths = attention_paths(group, inputs, impl) | _peer_paths(group, inputs)
    repeated = group.layout().repeated()
    report["bound"] = {"name": "alpha", "value": group.alpha, "rho": group.rho}
    report["ratios"] = ratios(group.layout(), repeated)

    results: dict[str, dict[str, Any]] = {}
    differences: dict[str, Differences] = {}
    measured = {}
    for name, path in paths.items():
        measured[name], memory = path.measure()
        rows = path.inputs[0].shape[0]
        flops = FLOPS_PER_PAIR * path.area * sizes.heads * sizes.head_dim
        results[name] = {"rows": rows, "area": path.area, "flops": flops, **memory}
        note(f"checking {name}")
    reference = repeated_reference(group, inputs)
    note("checking against the reference")
    for name, tensors in measured.items():
        differences[name] = {x: relative_difference(tensors[x], reference[x]) for x in reference}
    check_equal(report, differences, DTYPES[sizes.dtype])
    del measured, reference

    times = interleaved_times(
        {name: path.time for name, path in paths.items()},
        repeats=repeats,
        warmup=0,
        after_each=lambda name: note(f"timing {name}"),
    )
    _add_times(report, results, times, group)
    report["prefix_grouper"] = _peer_entry(times, results, prefix_grouper_status(device))
    return report


def num_runs(repeats: int, device: torch.device | str = "cpu") -> int:
    """How often `bench_attention` calls ``after_each``."""
    paths = 2 + (len(PEERS) if prefix_grouper_status(torch.device(device)) == "compared" else 0)
    return paths * (1 + repeats) + 1


def random_inputs(group: GroupSizes, sizes: AttentionSizes, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, in rows of the group; drawn on the device, so each kind has its own."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = group.layout().num_rows
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    made = (torch.randn(rows, n, sizes.head_dim, generator=generator, device=device) for n in heads)
    return tuple(x.to(DTYPES[sizes.dtype]) for x in made)


def attention_paths(group: GroupSizes, inputs: tuple[Tensor, ...], impl: str) -> dict[str, AttentionPath]:
    """The attention of `random_inputs` with repeated prefixes ("repeated") and with a shared one ("grouped").

    Args:
        impl: a resolved implementation; both ways run it.

    Raises:
        ValueError: tensors that it cannot take.
    """
    q, k, v, dout = inputs
    layout, index = group.layout(), group.repeated_rows().to(q.device)
    # Every copy of a prefix row gets its share of the row's gradient, so the copies' gradients add up to the group's.
    shares = (dout / torch.bincount(index).to(dout.dtype)[:, None, None])[index]

    def own(of: PrefixLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        calls = AttentionCalls.build(of, q.device)
        return lambda q, k, v: layout_attention(q, k, v, calls, q.shape[-1] ** -0.5, impl)

    repeated = layout.repeated()
    return {
        "repeated": AttentionPath((q[index], k[index], v[index], shares), own(repeated), repeated.area, index),
        "grouped": AttentionPath((q, k, v, dout), own(layout), layout.area),
    }


def _peer_paths(group: GroupSizes, inputs: tuple[Tensor, ...]) -> dict[str, AttentionPath]:
    q, k, v, dout = inputs
    if prefix_grouper_status(q.device) != "compared":
        return {}
    paths = {}
    for name, tuned in PEERS.items():
        attend = prefix_grouper_attention(group, q.dtype, tuned=tuned)
        paths[name] = AttentionPath((q, k, v, dout), attend, prefix_grouper_area(group, tuned=tuned))
    return paths


def repeated_reference(group: GroupSizes, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """out, dq, dk and dv by torch's causal attention over one repeated sequence at a time, fp64 (fp32 for halves)."""
    wide = torch.float64 if inputs[0].dtype in TOLERANCE else torch.float32
    q, k, v = (x.to(wide).requires_grad_() for x in inputs[:3])
    dout = inputs[3].to(wide)
    index = group.repeated_rows().to(q.device)
    shares = dout / torch.bincount(index)[:, None, None]
    results = {name: torch.zeros_like(x) for name, x in (("out", dout), ("dq", q), ("dk", k), ("dv", v))}
    for rows in index.split(group.prefix_len + group.response_len):
        query, key, value = (x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out = out.squeeze(0).transpose(0, 1)
        grads = torch.autograd.grad(out, (q, k, v), shares[rows])
        results["out"][rows] = out.detach()
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            results[name] += grad
    return results


def _add_times(
    report: dict[str, Any], results: dict[str, dict[str, Any]], times: dict[str, dict[str, Times]], group: GroupSizes
) -> None:
    for name, result in results.items():
        result["seconds"] = {phase: taken.as_dict() for phase, taken in times[name].items()}
    report["results"] = results
    report["speed_up"] = speed_ups(times["repeated"], times["grouped"])
    report["speed_up_over_bound"] = report["speed_up"]["total"] / group.alpha


def _peer_entry(times: dict[str, dict[str, Times]], results: dict[str, dict[str, Any]], status: str) -> dict[str, Any]:
    """Prefix groups against the `prefix-grouper` package, or why not."""
    if "prefix_grouper" not in times:
        return {"status": status}
    return {
        "status": status,
        "version": package_version("prefix-grouper"),
        "speed_up": speed_ups(times["prefix_grouper"], times["grouped"]),
        "speed_up_over_tuned": speed_ups(times["prefix_grouper_tuned"], times["grouped"]),
        "saved_bytes_ratio": results["prefix_grouper_tuned"]["saved_bytes"] / results["grouped"]["saved_bytes"],
    }
