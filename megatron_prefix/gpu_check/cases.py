"""What is checked: layouts, heads, head dims and dtypes, and the random tensors of a case.

Shapes: T rows of a layout, Hq query heads and Hkv key-value heads, D and Dv head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prefix.layout import PrefixLayout

# Around and across a kernel's tiles of 64 and 128 rows; no length is a multiple of one but where that is the case.
LAYOUTS = {
    "group": PrefixLayout([300, 129, 1, 64, 257], [-1, 0, 0, 0, 0]),
    "two groups, one without prefix rows": PrefixLayout([130, 70, 1, 0, 40, 90], [-1, 0, 0, -1, 3, 3]),
    "deep tree": PrefixLayout([70, 33, 40, 129, 1, 64, 200, 8], [-1, 0, 1, 2, 2, 1, -1, 6]),
    "chain": PrefixLayout([25] * 12, list(range(-1, 11))),
    "groups of one": PrefixLayout([128, 1, 65, 127], [-1, 0, -1, 2]),
}
QUICK_SHRINK = 10


class Shape(NamedTuple):
    """(Hq, Hkv) and (D, Dv)."""

    heads: tuple[int, int]
    dims: tuple[int, int]

    def __str__(self) -> str:
        widths = f"{self.dims[0]}" if self.dims[0] == self.dims[1] else f"{self.dims[0]} and {self.dims[1]}"
        return f"{self.heads[0]} heads, {self.heads[1]} of keys, dim {widths}"


SHAPES = (
    Shape((8, 2), (64, 64)),
    Shape((4, 4), (128, 128)),
    Shape((6, 1), (128, 128)),
    Shape((8, 2), (192, 128)),  # multi-head latent attention
    Shape((4, 2), (256, 256)),
)
FIRST_SHAPE = SHAPES[0]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = {"fp32": torch.float32, "fp64": torch.float64}
DTYPES = HALVES | EXACT


class Inputs(NamedTuple):
    """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], the gradient of the output [T, Hq, Dv], and the scores' factor."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    scale: float

    def exact(self) -> Inputs:
        """The same numbers in fp64."""
        return Inputs(self.q.double(), self.k.double(), self.v.double(), self.dout.double(), self.scale)


def layouts(*, quick: bool) -> dict[str, PrefixLayout]:
    """The layouts; ``quick`` ones are `QUICK_SHRINK` times shorter."""
    return {name: shrink(layout, QUICK_SHRINK if quick else 1) for name, layout in LAYOUTS.items()}


def shrink(layout: PrefixLayout, by: int) -> PrefixLayout:
    """The same tree with shorter segments; none that has rows loses all."""
    return PrefixLayout([-(-length // by) for length in layout.lengths], layout.parents)


def make_inputs(layout: PrefixLayout, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Standard normal tensors as a model has them: views of one projection's output where head dims allow it.

    The factor of the scores is not 1 / sqrt(D), which a kernel might assume.
    """
    generator = torch.Generator(device).manual_seed(layout.checksum)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    (query, key), (width, width_v), rows = shape.heads, shape.dims, layout.num_rows
    if width == width_v:
        q, k, v = draw(rows, query + 2 * key, width).split([query, key, key], dim=1)
    else:
        q, k, v = draw(rows, query, width), draw(rows, key, width), draw(rows, key, width_v)
    return Inputs(q, k, v, draw(query, rows, width_v).transpose(0, 1), 0.8 * width**-0.5)
