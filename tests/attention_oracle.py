"""Repeated prefixes, one dense softmax per sequence: the attention oracle that knows nothing of masks or forests.

Every root-to-leaf sequence is put together explicitly, its prefix copied again, and goes through plain causal
attention. Rows shared by several sequences get the same output in each; the first is taken. Gradients are autograd's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_prefix import PrefixLayout
from megatron_prefix.attention import KERNELS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

FLAT = PrefixLayout([9, 4, 1, 6], [-1, 0, 0, 0])
TWO_GROUPS = PrefixLayout([5, 3, 3, 0, 2, 7, 1], [-1, 0, 0, -1, 3, -1, 5])
DEEP = PrefixLayout([3, 2, 4, 1, 2, 0, 3, 5], [-1, 0, 1, 2, 3, 2, 5, 0])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain torch math of one sequence in the dtype of q (softmax in fp32 at least, as megatron-core's in bf16)."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) * scale) @ k.transpose(1, 2)
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(q.dtype) @ v).transpose(0, 1)


def repeated_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float | None = None) -> Tensor:
    """`prefix_grouped_attention` by repeating prefixes."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first_rows = [sum(layout.lengths[:s]) for s in range(len(layout.lengths))]
    done: dict[int, Tensor] = {}
    for leaf in range(len(layout.lengths)):
        if leaf in layout.parents:
            continue
        rows: list[int] = []
        segment = leaf
        while segment != -1:
            rows = [*range(first_rows[segment], first_rows[segment] + layout.lengths[segment]), *rows]
            segment = layout.parents[segment]
        if rows:
            index = torch.tensor(rows)
            for row, out in zip(rows, causal_attention(q[index], k[index], v[index], scale), strict=True):
                done.setdefault(row, out)
    if not done:
        return q.new_zeros(0, q.shape[1], v.shape[2]) + (q.sum() + k.sum() + v.sum())
    return torch.stack([done[row] for row in range(len(done))])


def inputs(
    rows: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, standard normal; heads = (Hq, Hkv), dims = (D, Dv)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    q, k, v, dout = (torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, dout


def run(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and gradients of an attention."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    out.backward(dout)
    return {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}  # type: ignore[dict-item]


def errors(result: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of every tensor, over its largest entry where that is above 1. NaN stays NaN."""
    found = {}
    for name, value in expected.items():
        assert result[name].shape == value.shape, name
        reference = value.double()
        worst = (result[name].double() - reference).abs().amax() if value.numel() else torch.zeros(())
        found[name] = (worst / max(1.0, reference.abs().amax().item() if value.numel() else 0.0)).item()
    return found


def assert_matches(
    attention: Attention,
    layout: PrefixLayout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float | None = None,
    tolerance: float | None = None,
) -> None:
    """Output and all gradients of ``attention`` against repeated prefixes in fp64, and their dtypes."""
    result = run(attention, *tensors)
    exact = [x.double() for x in tensors]
    expected = run(lambda q, k, v: repeated_attention(q, k, v, layout, scale), exact[0], exact[1], exact[2], exact[3])
    limit = TOLERANCE[tensors[0].dtype] if tolerance is None else tolerance
    assert {value.dtype for value in result.values()} == {tensors[0].dtype}
    found = errors(result, expected)
    assert all(error <= limit for error in found.values()), f"above {limit}: {found}, layout {layout}"


CPU_KERNELS = [
    name for name, kernel in KERNELS.items() if kernel.refusal(torch.device("cpu"), torch.float32, 16, 16) is None
]
CPU_IMPLS = ["reference", *CPU_KERNELS]
