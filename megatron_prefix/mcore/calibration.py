"""The cost model of this device and model, from steps that are run and timed.

Each of a designed set of packs is the model's forward and backward with the loss: from few long sequences to many
short ones, with few and with many rows that have a target, with prefixes shared on no, one and two tree levels, whole
and a quarter of the size. The coefficients are the non-negative ones whose modelled times have the least squared
relative error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.cost_model import CostModel
from megatron_prefix.loss import grpo_loss
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.measure import Stopwatch, interleaved_times
from megatron_prefix.packing import Pack, pack_groups
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree, TreeNode
from megatron_prefix.workload import Workload

MIN_ROWS = 64
"""Below this the designed packs are no longer different."""


@dataclass(frozen=True)
class Sample:
    """A pack that was timed.

    Attributes:
        name: what it is there for.
        work: its counts.
        seconds: median of forward and backward.
        modelled: seconds that the cost model gives it.
    """

    name: str
    work: Workload
    seconds: float
    modelled: float

    @property
    def error(self) -> float:
        """(modelled - measured) / measured."""
        return self.modelled / self.seconds - 1


@dataclass(frozen=True)
class Calibration:
    """A cost model in seconds and the measurements that it fits."""

    cost: CostModel
    samples: tuple[Sample, ...]

    @property
    def residual(self) -> float:
        """Root mean square of the relative errors."""
        return (sum(sample.error**2 for sample in self.samples) / len(self.samples)) ** 0.5

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "cost": asdict(self.cost),
            "residual": self.residual,
            "samples": [asdict(sample) | {"error": sample.error} for sample in self.samples],
        }


def calibrate(
    model: torch.nn.Module,
    *,
    max_rows: int = 4096,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> Calibration:
    """Measure the coefficients of a `CostModel`. Every rank of the job calls it, and all get the same.

    Args:
        model: with prefix-grouped attention and all layers on this rank, not in DDP. Gradients are dropped.
        max_rows: of the largest pack and of the longest sequence; as many as the micro-batches to be modelled.
        repeats: timed runs of each pack, in turn, after one that is not; the median counts, and over ranks the slowest.
        seed: of the random tokens.
        after_each: called with a note after each of `num_runs` runs.

    Raises:
        ValueError: a model with other pipeline stages or fewer positions than ``max_rows``, or a number out of range.
    """
    inner = unwrap(model)
    if not (inner.pre_process and inner.post_process):
        raise ValueError("this rank has a stage of a pipeline; calibrate a model with all layers (pp 1)")
    if max_rows < MIN_ROWS:
        raise ValueError(f"max_rows must be at least {MIN_ROWS}, got {max_rows}")
    if max_rows > inner.max_sequence_length:
        raise ValueError(f"max_rows {max_rows} is over the model's {inner.max_sequence_length} positions; choose fewer")
    packs = designed_packs(max_rows, inner.vocab_size, seed)
    times = interleaved_times(
        {name: lambda pack=pack: _step(model, pack) for name, pack in packs.items()},  # type: ignore[misc]
        repeats=repeats,
        after_each=after_each,
    )
    mine = [times[name]["step"].median for name in packs]
    # All ranks must plan alike, and a step takes as long as the slowest of them.
    seconds = [max(column) for column in zip(*all_gather_object(mine, torch.distributed.group.WORLD), strict=True)]
    works = [Workload.of_layout(pack.layout, pack.response_rows.numel()) for pack in packs.values()]
    cost = fit(works, seconds)
    modelled = [cost.microbatch + cost.cost(work) for work in works]
    return Calibration(cost, tuple(map(Sample, packs, works, seconds, modelled)))


def num_runs(repeats: int) -> int:
    """How often `calibrate` calls ``after_each``."""
    return (1 + repeats) * len(designed_packs(MIN_ROWS, 2, 0))


def designed_packs(max_rows: int, vocab_size: int, seed: int) -> dict[str, Pack]:
    """Packs that differ in every count of a `Workload`, by name: sequences by themselves, and shared prefixes."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    def group(prompt: int, *responses: int) -> RolloutGroup:
        return RolloutGroup(ids(prompt), [ids(n) for n in responses], [draw.random() for _ in responses])

    def turns(prompt: int, turn: int, response: int) -> RolloutTree:
        """A prompt, two turns below it, two responses below each."""
        nodes = [TreeNode(ids(prompt), -1)]
        for t in range(2):
            nodes += [TreeNode(ids(turn), 0), *(TreeNode(ids(response), 1 + 3 * t, (2 * t + r,)) for r in range(2))]
        return RolloutTree(tuple(nodes), tuple(draw.random() for _ in range(4)))

    packs = {}
    for size in (max_rows, max_rows // 4):
        part = size // 16
        groups: dict[str, list[RolloutGroup | RolloutTree]] = {
            "long": [group(size - part, part)],
            "long, targets": [group(1, size - 1)],
            "short": [group(1, part) for _ in range(16)],
            "shared long": [group(size // 2, *[part] * 8)],
            "shared short": [group(part, part, part, part) for _ in range(4)],
            "two levels": [turns(size // 2, size // 8, part)],
        }
        for name, members in groups.items():
            repeated = name.startswith(("long", "short"))  # sequences of one segment
            (packs[f"{name} {size}"],) = pack_groups(members, repeated=repeated)
    return packs


def _step(model: torch.nn.Module, pack: Pack) -> dict[str, float]:
    device = next(model.parameters()).device
    watch = Stopwatch(device)
    log_probs = response_log_probs(model, pack)
    assert isinstance(log_probs, Tensor)
    pairs, advantages = pack.pairs.to(device), pack.advantages.to(device)
    loss, _ = grpo_loss(log_probs, log_probs.detach(), advantages, pairs, pack.totals)
    loss.backward()
    watch.lap("step")
    model.zero_grad(set_to_none=True)
    return watch.phases


def fit(works: Sequence[Workload], seconds: Sequence[float]) -> CostModel:
    """The cost model of least squared relative error, without negative coefficients.

    Raises:
        ValueError: the times do not grow with the work.
    """
    counts = torch.tensor([[*astuple(work), 1] for work in works], dtype=torch.float64)
    # Modelled over measured is to be 1.
    row, target_row, pair, merged_row, level, microbatch = nonnegative_least_squares(
        counts / torch.tensor(seconds, dtype=torch.float64)[:, None]
    ).tolist()
    if not (row or target_row or pair):
        raise ValueError(
            f"the times of {len(works)} micro-batches of up to {max(work.rows for work in works)} rows do not grow "
            "with their work; calibrate with more rows, on a machine that does nothing else"
        )
    return CostModel(row, target_row, pair, merged_row, level, microbatch)


def nonnegative_least_squares(columns: Tensor) -> Tensor:
    """x of 0 or more for which ``columns @ x`` is as near to 1 as can be: fp64 [n, k] to [k], for a small k.

    It is the plain solution on those columns that it leaves above 0: of all their subsets, the best whose plain
    solution is not negative.
    """
    size = columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    ones = torch.ones(len(columns), 1, dtype=columns.dtype)
    best, least = torch.zeros(columns.shape[1], dtype=columns.dtype), float("inf")
    for number in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), number)):
            scaled = columns[:, chosen] / size[chosen]
            found = torch.linalg.lstsq(scaled, ones, driver="gelsd").solution
            error = (scaled @ found - 1).norm().item()
            if error < least and bool((found >= 0).all()):
                least, best = error, torch.zeros_like(best)
                best[chosen] = found[:, 0] / size[chosen]
    return best
