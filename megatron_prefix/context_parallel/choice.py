"""Which placement "auto" takes: the one with the lower predicted cost for the cp_comm_type of every layer.

With p2p and all_gather a rank computes the area of its rows and moves the keys that they read. With a2a every rank
computes its heads over the whole pack wherever rows are, and moves its own rows: there only even shares of rows count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_prefix.context_parallel.comm_types import check_comm_type
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape, computed_areas, layer_traffic
from megatron_prefix.layout import FLOPS_PER_PAIR, PrefixLayout

FLOPS_PER_BYTE = 8000
"""FLOPs that take as long as one byte that is sent or received: 400 TFLOP/s beside 50 GB/s."""


@dataclass(frozen=True)
class CpLayers:
    """The attention layers of a model, as far as the cost of a plan depends on them.

    Attributes:
        shape: of every layer, on one tensor-parallel rank.
        comm_types: cp_comm_type of each layer, or one entry for all.
        a2a_size: ranks of an inner group, for a2a+p2p.

    Raises:
        ValueError: no or an unknown cp_comm_type.
    """

    shape: AttentionShape
    comm_types: tuple[str, ...] = ("p2p",)
    a2a_size: int | None = None

    def __post_init__(self) -> None:
        if not self.comm_types:
            raise ValueError("comm_types needs an entry for every layer, or one for all, got none")
        for comm_type in self.comm_types:
            check_comm_type(comm_type)


def choose_plan(layout: PrefixLayout, cp_size: int, placement: str, layers: CpLayers) -> CpPlan:
    """The plan of ``layout`` over ``cp_size`` ranks; "auto" takes the placement with the lower `predicted_cost`.

    Raises:
        ValueError: an unknown placement, a size below 1, or what a cp_comm_type cannot do (see `layer_traffic`).
    """
    if placement != "auto":
        return CpPlan.build(layout, cp_size, placement)
    plans = [CpPlan.build(layout, cp_size, name) for name in PLACEMENTS]
    return min(plans, key=lambda plan: predicted_cost(plan, layers))


def predicted_cost(plan: CpPlan, layers: CpLayers) -> float:
    """FLOPs of attention, forward and backward, and bytes by `FLOPS_PER_BYTE`: the slowest rank's, summed over layers.

    Meant for choosing, not for predicting a time: linear layers are left out, and so is what overlaps.

    Raises:
        ValueError: as `layer_traffic`.
    """
    return sum(
        count * max(_rank_costs(plan, layers, comm_type)) for comm_type, count in Counter(layers.comm_types).items()
    )


def _rank_costs(plan: CpPlan, layers: CpLayers, comm_type: str) -> list[float]:
    flops_per_pair = FLOPS_PER_PAIR * layers.shape.head_dim * layers.shape.query_heads
    areas = computed_areas(plan, comm_type, layers.a2a_size)
    moved = [each.total for each in layer_traffic(plan, layers.shape, comm_type, layers.a2a_size)]
    return [
        flops_per_pair * area + FLOPS_PER_BYTE * (each.sent + each.received)
        for area, each in zip(areas, moved, strict=True)
    ]
