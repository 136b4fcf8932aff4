"""All sensible choices of parallel sizes, micro-batch and recompute; those that fit, and the quickest.

The same groups go to every choice, so that only the rank with the most work is looked at, and its micro-batches are
counted once for every data-parallel size and limit of rows. A choice then takes some hundred operations, whatever the
cluster's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megatron_prefix.estimator.cluster import Cluster
from megatron_prefix.estimator.communication import Communication
from megatron_prefix.estimator.loads import RankLoad, Sequences, busiest_rank, smallest_limit
from megatron_prefix.estimator.memory import MemoryEstimate, estimate_memory, live_prefixes
from megatron_prefix.estimator.model import PlannedModel
from megatron_prefix.estimator.sizes import RECOMPUTE, RunSettings, Sizes
from megatron_prefix.estimator.step_time import StepTime, bubble_share, device_cost, estimate_step
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.workload import Workload

MOST_CP = 64
MOST_CHUNKS = 4
MOST_LIMITS = 6
ROUND_ROWS = 256
"""Limits of a micro-batch's rows are multiples of this."""

GIB = 2**30


@dataclass(frozen=True)
class Fixed:
    """What the search may not change; None where it may.

    Attributes:
        tp, pp, vpp, cp, ep, dp: see `Sizes`.
        recompute: "none", "selective" or "full".
        max_tokens: most rows of a micro-batch.
    """

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    dp: int | None = None
    recompute: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "recompute" and value is not None and value < 1:
                raise ValueError(f"{each.name} must be at least 1, got {value}")
        if self.recompute not in (None, *RECOMPUTE):
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")

    def allows(self, sizes: Sizes) -> bool:
        """Whether these are the sizes that are given."""
        return all(getattr(self, name) in (None, value) for name, value in asdict(sizes).items())


@dataclass(frozen=True)
class Task:
    """What is planned: a model, the groups of one step, the cluster.

    Raises:
        ValueError: no groups.
    """

    model: PlannedModel
    groups: Sequence[RolloutGroup]
    cluster: Cluster
    settings: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("there is nothing to plan for: no rollout groups were given")


@dataclass(frozen=True)
class Run:
    """One way to train with one choice: prefixes repeated, or grouped."""

    step: StepTime
    memory: MemoryEstimate
    microbatches: int
    communication_bytes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: seconds, bytes."""
        return {
            "seconds": self.step.to_dict(),
            "memory_bytes": self.memory.to_dict(),
            "microbatches": self.microbatches,
            "bubble": bubble_share(self.step),
            "communication_bytes": self.communication_bytes,
        }


@dataclass(frozen=True)
class Choice:
    """One choice and its two ways.

    Attributes:
        sizes: parallel sizes.
        recompute: "none", "selective" or "full".
        max_tokens: most rows of a micro-batch of groups.
        live_prefixes: of split groups that a stage holds; 0 when no group is split.
        grouped, repeated: the same responses with prefixes encoded once, and with each response. A repeated sequence
            longer than ``max_tokens`` raises the limit of that way.
    """

    sizes: Sizes
    recompute: str
    max_tokens: int
    live_prefixes: int
    grouped: Run
    repeated: Run

    @property
    def speed_up(self) -> float:
        """Of grouped over repeated prefixes."""
        return self.repeated.step.total / self.grouped.step.total

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self.sizes),
            "sequence_parallel": self.sizes.tp > 1,
            "recompute": self.recompute,
            "max_tokens_per_microbatch": self.max_tokens,
            "max_live_prefixes": self.live_prefixes or None,
            "grouped": self.grouped.to_dict(),
            "repeated": self.repeated.to_dict(),
            "speed_up": self.speed_up,
        }


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        choices: those that fit with grouped prefixes, quickest first.
        best_repeated: the quickest choice that fits with repeated prefixes, by that way's time; None when none does.
        evaluated: choices that were looked at.
    """

    choices: tuple[Choice, ...]
    best_repeated: Choice | None
    evaluated: int

    @property
    def distinct(self) -> list[Choice]:
        """The quickest of each tp, cp, pp, ep and dp, quickest first."""
        best: dict[Sizes, Choice] = {}
        for choice in self.choices:
            best.setdefault(replace(choice.sizes, vpp=1), choice)
        return list(best.values())


def search(task: Task, fixed: Fixed | None = None) -> Found:
    """Look at every sensible choice.

    Raises:
        ValueError: no sizes fit the model, the cluster and the groups, or no choice fits the memory; says what is
            nearest and what would help.
    """
    fixed = fixed or Fixed()
    loads = _Loads(task)
    limits = _limits(loads.grouped, fixed)
    all_sizes = [s for s in legal_sizes(task.model, task.cluster, len(task.groups)) if fixed.allows(s)]
    if not all_sizes:
        raise ValueError(_no_sizes(task, fixed))
    methods = (fixed.recompute,) if fixed.recompute else RECOMPUTE
    usable = task.cluster.usable_memory
    candidates = [
        candidate
        for sizes in all_sizes
        for limit in limits
        for candidate in _candidates(task, sizes, limit, loads.of(sizes.dp, limit), methods)
    ]
    nearest = min(candidates, key=lambda c: c.memory[0].total)
    if nearest.memory[0].total > usable:
        raise ValueError(_no_memory(task, nearest))
    choices = [candidate.timed(task) for candidate in candidates if candidate.least_memory <= usable]
    fitting = [c for c in choices if c.grouped.memory.total <= usable]
    fitting.sort(key=lambda c: (c.grouped.step.total, c.grouped.memory.total))
    repeated = [c for c in choices if c.repeated.memory.total <= usable]
    best_repeated = min(repeated, key=lambda c: c.repeated.step.total, default=None)
    return Found(tuple(fitting), best_repeated, len(candidates))


@dataclass(frozen=True)
class _Candidate:
    """A choice whose memory is known; pairs are (grouped, repeated)."""

    sizes: Sizes
    recompute: str
    limit: int
    loads: tuple[RankLoad, RankLoad]
    memory: tuple[MemoryEstimate, MemoryEstimate]

    @property
    def least_memory(self) -> float:
        """Of the way that needs less."""
        return min(each.total for each in self.memory)

    def timed(self, task: Task) -> Choice:
        """With its times."""
        runs = [self._run(task, load, memory) for load, memory in zip(self.loads, self.memory, strict=True)]
        return Choice(self.sizes, self.recompute, self.limit, live_prefixes(self.loads[0], self.sizes), *runs)

    def _run(self, task: Task, load: RankLoad, memory: MemoryEstimate) -> Run:
        how = task.model, self.sizes, task.cluster
        moved = Communication(*how, task.settings, load, self.recompute).by_kind()
        step = estimate_step(*how, load, task.settings, self.recompute, moved)
        return Run(step, memory, load.microbatches, {kind: each.num_bytes for kind, each in moved.items()})


def _candidates(
    task: Task, sizes: Sizes, limit: int, loads: tuple[RankLoad, RankLoad], methods: Sequence[str]
) -> Iterator[_Candidate]:
    """By recompute, least first, until both ways fit: more of it only takes time then."""
    for recompute in methods:
        grouped, repeated = (estimate_memory(task.model, sizes, load, task.settings, recompute) for load in loads)
        yield _Candidate(sizes, recompute, limit, loads, (grouped, repeated))
        if max(grouped.total, repeated.total) <= task.cluster.usable_memory:
            return


def legal_sizes(model: PlannedModel, cluster: Cluster, num_groups: int) -> Iterator[Sizes]:
    """Sizes that `mcore.model` and megatron-core can run, and that use every GPU of the cluster.

    Tensor parallelism stays inside a node and divides heads, key-value heads, MLP (of a dense model) and vocabulary;
    stages divide layers; every data-parallel rank has a group; experts divide over ranks of one stage.
    """
    config, gpus = model.config, cluster.num_gpus
    cut = [config.num_attention_heads, config.groups, config.vocab_size]
    if model.experts is None:
        cut.append(config.ffn_hidden_size)
    for tp in _divisors(gpus):
        if tp > cluster.gpus_per_node or any(width % tp for width in cut):
            continue
        for pp in _divisors(gpus // tp):
            if config.num_layers % pp:
                continue
            for cp in _divisors(gpus // (tp * pp)):
                dp = gpus // (tp * pp * cp)
                if cp > MOST_CP or dp > num_groups:
                    continue
                chunks = [1] if pp == 1 else _divisors(config.num_layers // pp)
                for vpp in (v for v in chunks if v <= MOST_CHUNKS):
                    for ep in _expert_sizes(model, tp * cp * dp):
                        yield Sizes(tp, pp, vpp, cp, ep, dp)


def _expert_sizes(model: PlannedModel, stage_gpus: int) -> list[int]:
    if model.experts is None:
        return [1]
    return [ep for ep in _divisors(model.experts.num_experts) if stage_gpus % ep == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _limits(groups: Sequence[Sequences], fixed: Fixed) -> list[int]:
    """Limits of a micro-batch's rows to try: doubling, from what the longest response needs to the largest group."""
    least = smallest_limit(groups)
    if fixed.max_tokens is not None:
        if fixed.max_tokens < least:
            raise ValueError(
                f"max_tokens_per_microbatch {fixed.max_tokens} is less than the longest prefix or response of {least} "
                f"rows; raise it to at least {least}, or cut responses"
            )
        return [fixed.max_tokens]
    most = _rounded(max(each.rows for each in groups))
    limits = [_rounded(least)]
    while limits[-1] < most and len(limits) < MOST_LIMITS:
        limits.append(min(most, 2 * limits[-1]))
    # Small groups can share a micro-batch.
    return limits if len(limits) == MOST_LIMITS else [*limits, 2 * limits[-1]]


def _rounded(rows: int) -> int:
    return -(-rows // ROUND_ROWS) * ROUND_ROWS


class _Loads:
    """The busiest rank's micro-batches both ways, by data-parallel size and limit of rows."""

    def __init__(self, task: Task) -> None:
        self.grouped = [Sequences.grouped(group) for group in task.groups]
        self.repeated = [Sequences.each(group) for group in task.groups]
        self.cost = device_cost(task.model, task.cluster.device).cost
        works = [sum((each.work for each in sequences), Workload()) for sequences in self.repeated]
        self.costs = [self.cost(each.work) for each in self.grouped], [self.cost(work) for work in works]
        self._ranks: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._found: dict[tuple[int, int], tuple[RankLoad, RankLoad]] = {}

    def of(self, dp: int, limit: int) -> tuple[RankLoad, RankLoad]:
        """(grouped, repeated)."""
        if (dp, limit) not in self._found:
            grouped, repeated = self._busiest(dp)
            self._found[dp, limit] = (
                RankLoad.of([self.grouped[i] for i in grouped], limit, self.cost),
                RankLoad.of([each for i in repeated for each in self.repeated[i]], limit, self.cost),
            )
        return self._found[dp, limit]

    def _busiest(self, dp: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if dp not in self._ranks:
            self._ranks[dp] = busiest_rank(self.costs[0], dp), busiest_rank(self.costs[1], dp)
        return self._ranks[dp]


def _no_sizes(task: Task, fixed: Fixed) -> str:
    given = ", ".join(f"{k}={v}" for k, v in asdict(fixed).items() if v is not None and k in asdict(Sizes()))
    config, gpus = task.model.config, task.cluster.num_gpus
    return (
        f"no parallel sizes{' with ' + given if given else ''} use all {gpus} GPUs: tp must divide "
        f"{config.num_attention_heads} heads and {config.groups} key-value heads and stay in a node of "
        f"{task.cluster.gpus_per_node}, pp must divide {config.num_layers} layers, and {len(task.groups)} groups "
        f"feed at most dp={len(task.groups)} ranks; take more groups per step, other GPU counts, or fix fewer sizes"
    )


def _no_memory(task: Task, nearest: _Candidate) -> str:
    sizes = ", ".join(f"{name}={value}" for name, value in asdict(nearest.sizes).items() if value > 1) or "one GPU"
    memory = nearest.memory[0]
    rest = "weights, gradients and optimizer" if memory.at_rest > memory.total / 2 else "activations"
    return (
        f"nothing fits {task.cluster.usable_memory / GIB:.1f} GiB of a {task.cluster.device.name}: the least is "
        f"{memory.total / GIB:.1f} GiB ({sizes}, recompute {nearest.recompute}, {nearest.limit} rows a micro-batch), "
        f"most of it {rest}; take more GPUs, shorter responses, fix fewer sizes, or a device with more memory"
    )
