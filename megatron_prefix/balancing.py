"""Packing a step: its groups over data-parallel ranks and into micro-batches, by modelled time and not by tokens.

The modelled time of a step is that of its slowest rank. Without pipeline stages that is the sum of its micro-batches'
costs (`CostModel`: attention area, work that goes with rows, communication, and what a micro-batch costs whatever its
size). With stages the largest micro-batch and the number of them count too: `stages - 1` micro-batches' time is lost
while the pipeline fills and drains.

A group stays on one rank, because its prefix is encoded there once. So groups are spread over ranks by cost first. All
ranks then get the same number of micro-batches: schedules with collectives inside the model (expert parallelism) and
interleaved ones need that. It is what the fullest rank needs under the token limit, or more where a smaller pipeline
bubble is worth it; a rank that needs fewer spreads its groups over more micro-batches, and where it has fewer groups
than micro-batches it splits some, the costliest first, by the schedule of split groups. A rank whose groups cannot be
cut that far is refused: an idle micro-batch would do nothing in a model without such collectives, and would hang one
with them.

Plain Python on lengths, the same on every rank without communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heappop, heappush

from megatron_prefix.balanced_plan import Group, PipelineShape, RankPlan, SplitGroup, StepPlan, as_tree
from megatron_prefix.cost_model import CostModel
from megatron_prefix.packing import group_name
from megatron_prefix.pipeline_plan import even_bubble
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.splitting import prefix_nodes, subtrees_below
from megatron_prefix.spreading import best_fit, least_makespan, spread
from megatron_prefix.workload import Workload

SMALL_BUBBLE = 0.01
"""A pipeline bubble below which more micro-batches are not tried."""

_GROWTH = 1.5
"""Numbers of micro-batches that are tried grow by that."""

_ENOUGH = 0.01
"""Evenness of the micro-batches of a rank: the largest of them counts once, in a pipeline."""

_BISECTIONS = 10
"""Of the cost of the largest micro-batch: to a thousandth of the range."""


@dataclass(frozen=True, eq=False)
class GroupLoad:
    """What planning knows of a group.

    Attributes:
        index: of the group.
        group: its lengths are read.
        work: of the whole group.
        limit: most rows of a micro-batch, None for any number.
        cost: modelled time of its parts.
    """

    index: int
    group: Group = field(repr=False)
    work: Workload
    limit: int | None
    cost: CostModel = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether a micro-batch holds it."""
        return self.limit is None or self.work.rows <= self.limit

    @property
    def most_packs(self) -> int:
        """Micro-batches that it can be cut into."""
        if isinstance(self.group, RolloutTree) or not self.fits:
            return max(1, len(self.cut.subtrees) + self.cut.has_rows)
        return len(self.group.responses) + (len(self.group.prompt) > 1)

    @cached_property
    def least_parts(self) -> int:
        """Parts that it is split into at the least, 0 where it fits."""
        if self.limit is None or self.fits:
            return 0
        return len(best_fit(self.cut.rows, self.limit))

    @cached_property
    def cut(self) -> Cut:
        """Where it can be cut.

        Raises:
            ValueError: it does not fit, nor does its prefix or one of its responses; names the limit that is needed.
        """
        if isinstance(self.group, RolloutGroup):
            cut = Cut.of_group(self.group, self.cost)
            if self.limit is None or max(cut.prefix_work.rows, *cut.rows) <= self.limit:
                return cut
        tree = as_tree(self.group.lengths_only())
        if self.limit is None or self.fits:
            prefix = _shared_nodes(tree)
        else:
            prefix = prefix_nodes(tree, self.limit, group_name(self.group, self.index))
        subtrees = subtrees_below(tree, prefix)
        prefix_work, *works = Workload.of_nodes(tree, [prefix, *subtrees])
        rows, levels = [work.rows for work in works], [work.levels for work in works]
        return Cut(prefix, prefix_work, subtrees, rows, [self.cost.without_levels(work) for work in works], levels)


@dataclass(frozen=True)
class Cut:
    """A group's prefix and the subtrees below it.

    Attributes:
        prefix: its nodes.
        prefix_work: counts of the prefix.
        subtrees: nodes of each.
        rows: of each subtree.
        costs: modelled time of each, beside the varlen calls of levels.
        levels: of each.
    """

    prefix: list[int]
    prefix_work: Workload
    subtrees: list[list[int]]
    rows: list[int]
    costs: list[float]
    levels: list[int]

    @classmethod
    def of_group(cls, group: RolloutGroup, cost: CostModel) -> Cut:
        """Of a plain group, without the tree that it is."""
        prefix = len(group.prompt) - 1
        rows = [len(tokens) for tokens in group.responses]
        numbers = range(1, len(rows) + 1)
        levels = [1 if prefix else 0] * len(rows)
        return cls(
            [0], Workload.of_lengths(prefix, []), [[i] for i in numbers], rows, cost.responses(prefix, rows), levels
        )

    @cached_property
    def has_rows(self) -> bool:
        """Whether the prefix takes a micro-batch of its own."""
        return self.prefix_work.rows > 0


def _shared_nodes(tree: RolloutTree) -> list[int]:
    """The prefix to split a tree at that fits: the root, and what follows it up to the first fork or response. Several
    roots share nothing, and are parted without a prefix."""
    prefix = [i for i, node in enumerate(tree.nodes) if node.parent < 0]
    if len(prefix) > 1:
        return []
    inner = {node.parent for node in tree.nodes}
    while len(below := subtrees_below(tree, prefix)) == 1:
        (first, *_) = below[0]
        if first not in inner or tree.nodes[first].rollouts:
            break
        prefix.append(first)
    return prefix


@dataclass(frozen=True)
class StepPlanner:
    """Plans steps (see the module).

    `StepPlan.lower_bound` is the largest of: the mean rank's cost; the costliest group's; that of the groups that some
    rank must hold together. Each with as many micro-batches as the limit asks for at the least, and, in a pipeline,
    with the bubble that as many even micro-batches as the plan has would have.

    Attributes:
        cost: what is balanced. Tensor and context parallelism divide all of it alike.
        dp_size: data-parallel ranks.
        max_tokens_per_pack: most rows of a micro-batch, None for any number.
        pipeline: stages of the model.

    Raises:
        ValueError: a size below 1.
    """

    cost: CostModel
    dp_size: int = 1
    max_tokens_per_pack: int | None = None
    pipeline: PipelineShape = field(default_factory=PipelineShape)

    def __post_init__(self) -> None:
        sizes = {"dp_size": self.dp_size, "pipeline.stages": self.pipeline.stages}
        if self.max_tokens_per_pack is not None:
            sizes["max_tokens_per_pack"] = self.max_tokens_per_pack
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def measure(self, index: int, group: Group) -> GroupLoad:
        """What planning knows of a group, under the limit.

        Raises:
            ValueError: a response or the prefix of a group that does not fit is itself over the limit.
        """
        load = GroupLoad(index, group, Workload.of_group(group), self.max_tokens_per_pack, self.cost)
        if not load.fits:
            _ = load.cut
        return load

    def plan(self, groups: Sequence[Group] | Mapping[int, Group]) -> StepPlan:
        """The plan of a step of these groups, whose indices are positions in the sequence, or keys.

        Raises:
            ValueError: fewer groups than data-parallel ranks, a group that cannot be split under the limit, or a rank
                whose groups cannot be cut into as many micro-batches as another rank needs.
        """
        items = groups.items() if isinstance(groups, Mapping) else enumerate(groups)
        return self.plan_loads([self.measure(i, group) for i, group in items])

    def plan_loads(self, loads: Sequence[GroupLoad]) -> StepPlan:
        """`plan` of groups from `measure`."""
        if len(loads) < self.dp_size:
            raise ValueError(
                f"{len(loads)} groups cannot feed {self.dp_size} data-parallel ranks; give every rank at least one"
            )
        costs = [self._cost_of(load) for load in loads]
        ranks = [
            _Rank(self, [loads[i] for i in members], sum(costs[i] for i in members))
            for members in spread(costs, self.dp_size)
        ]
        count = self._best_count(ranks)
        plans = tuple(rank.filled(count) for rank in ranks)
        return StepPlan(plans, self.pipeline, self._lower_bound(loads, count))

    def _best_count(self, ranks: Sequence[_Rank]) -> int:
        """Micro-batches of each rank."""
        fewest = max(rank.fewest for rank in ranks)
        most = min(rank.most for rank in ranks)
        if most < fewest:
            _refuse(ranks, fewest)
        if self._even_bubble(fewest) <= SMALL_BUBBLE:
            return fewest
        costliest = max(ranks, key=lambda rank: rank.cost)
        count, worse = fewest, 0
        best = (costliest.seconds(count), count)
        while count < most and worse < 2 and self._even_bubble(count) > SMALL_BUBBLE:
            count = min(most, max(count + 1, round(count * _GROWTH)))
            found = (costliest.seconds(count), count)
            worse = worse + 1 if found > best else 0
            best = min(best, found)
        return best[1]

    def _even_bubble(self, count: int) -> float:
        """Of a pipeline with so many even micro-batches."""
        shape = self.pipeline
        if shape.stages == 1:
            return 0.0
        return even_bubble(count, shape.stages, shape.chunks, shape.chunk_group)

    def _lower_bound(self, loads: Sequence[GroupLoad], count: int) -> float:
        limit = self.max_tokens_per_pack
        packs = [1 if limit is None else -(-load.work.rows // limit) for load in loads]
        alone = [self.cost.without_levels(load.work) for load in loads]
        together = 1 if limit is None else -(-sum(load.work.rows for load in loads) // (limit * self.dp_size))
        single = max(cost + n * self.cost.microbatch for cost, n in zip(alone, packs, strict=True))
        seconds = max(least_makespan(alone, self.dp_size) + together * self.cost.microbatch, single)
        return seconds / self.pipeline.stages / (1 - self._even_bubble(count))

    def _cost_of(self, load: GroupLoad) -> float:
        """What the group adds to a rank; groups in one micro-batch share the calls of a level."""
        if load.fits:
            return self.cost.without_levels(load.work)
        work = self.cost.cost(load.cut.prefix_work) + sum(load.cut.costs)
        return work + (load.least_parts + load.cut.has_rows) * self.cost.microbatch

    def pack_cost(self, works: Sequence[Workload]) -> float:
        """Modelled seconds of a micro-batch of all these."""
        levels = max(work.levels for work in works)
        return sum(map(self.cost.without_levels, works)) + levels * self.cost.level + self.cost.microbatch


def _refuse(ranks: Sequence[_Rank], fewest: int) -> None:
    fullest = max(ranks, key=lambda rank: rank.fewest)
    emptiest = min(ranks, key=lambda rank: rank.most)
    largest = max(fullest.loads, key=lambda load: load.work.rows)
    raise ValueError(
        f"data-parallel ranks need the same number of micro-batches: one with group "
        f"{group_name(largest.group, largest.index)} of {largest.work.rows} rows needs {fewest} of at most "
        f"{largest.limit} rows, and the groups of another can be cut into {emptiest.most} at most; raise "
        "max_tokens_per_pack, or give a step more groups"
    )


class _Rank:
    """The groups of one rank, on their way into micro-batches."""

    def __init__(self, planner: StepPlanner, loads: Sequence[GroupLoad], cost: float) -> None:
        self.planner, self.loads, self.cost = planner, loads, cost
        self.limit = planner.max_tokens_per_pack or sum(load.work.rows for load in loads)
        # Parts of each group that is split, by its position among the loads: as few as the limit allows.
        self.least_parts = {n: load.least_parts for n, load in enumerate(loads) if load.least_parts}

    @property
    def most(self) -> int:
        """Micro-batches that its groups can be cut into."""
        return sum(load.most_packs for load in self.loads)

    @cached_property
    def fewest(self) -> int:
        """Micro-batches that it needs under the limit."""
        return self._fewest(self.least_parts)

    def _fewest(self, parts: Mapping[int, int]) -> int:
        rows = [load.work.rows for n, load in enumerate(self.loads) if n not in parts]
        return self._split_packs(parts) + len(best_fit(rows, self.limit))

    def _split_packs(self, parts: Mapping[int, int]) -> int:
        return sum(count + self.loads[n].cut.has_rows for n, count in parts.items())

    def seconds(self, count: int) -> float:
        """Modelled time in ``count`` micro-batches."""
        return self.filled(count).seconds(self.planner.pipeline)

    def filled(self, count: int) -> RankPlan:
        """Its groups in ``count`` micro-batches."""
        parts = self._parts(count)
        of_splits = sorted((self._split(n, each) for n, each in parts.items()), key=lambda split: -sum(split[1]))
        whole = [load for n, load in enumerate(self.loads) if n not in parts]
        sets: list[list[GroupLoad]] = []
        if whole:
            costs = [self.planner.pack_cost([load.work]) for load in whole]
            rows = [load.work.rows for load in whole]
            free = count - self._split_packs(parts)
            sets = [
                [whole[i] for i in each] for each in spread(costs, free, rows=rows, limit=self.limit, enough=_ENOUGH)
            ]
        packed = [(self.planner.pack_cost([load.work for load in each]), each) for each in sets]
        packed.sort(key=lambda pack: -pack[0])  # a small one last: less time to drain the pipeline
        costs = [cost for _, split_costs in of_splits for cost in split_costs] + [cost for cost, _ in packed]
        assert len(costs) == count
        return RankPlan(
            tuple(split for split, _ in of_splits),
            tuple(tuple(sorted(load.index for load in each)) for _, each in packed),
            tuple(costs),
        )

    def _split(self, n: int, count: int) -> tuple[SplitGroup, list[float]]:
        """Group ``n`` in ``count`` parts, and the cost of each of its micro-batches."""
        cut, cost = self.loads[n].cut, self.planner.cost

        def cost_of(part: list[int]) -> float:
            levels = max(cut.levels[i] for i in part)
            return sum(cut.costs[i] for i in part) + levels * cost.level + cost.microbatch

        # Without stages only the sum of the parts counts.
        enough = _ENOUGH if self.planner.pipeline.stages > 1 else math.inf
        sets = spread(cut.costs, count, rows=cut.rows, limit=self.limit, enough=enough)
        parts = sorted(((cost_of(each), each) for each in sets), key=lambda part: -part[0])
        nodes = tuple(tuple(sorted(node for i in each for node in cut.subtrees[i])) for _, each in parts)
        found = [self.planner.pack_cost([cut.prefix_work])] * cut.has_rows + [each for each, _ in parts]
        return SplitGroup(self.loads[n].index, tuple(cut.prefix), nodes, cut.has_rows), found

    def _parts(self, count: int) -> dict[int, int]:
        """Which groups are split for ``count`` micro-batches, and into how many parts."""
        parts = self._even_parts(count) if self.planner.pipeline.stages > 1 else dict(self.least_parts)
        # Every whole group in a micro-batch of its own is as far as they go without splitting.
        lacking = count - self._split_packs(parts) - (len(self.loads) - len(parts))
        self._split_further(parts, lacking)
        while self._fewest(parts) > count:
            self._split_less(parts)
        return parts

    def _even_parts(self, count: int) -> dict[int, int]:
        """Parts that make the largest of ``count`` micro-batches small, which sets the pace of a pipeline.

        MULTIFIT (Coffman, Garey, Johnson 1978): bisects for the smallest cost of a micro-batch that all fit in.
        """
        low, high = self.cost / count, max(self._costs)
        if high <= low:
            return dict(self.least_parts)
        parts = dict(self.least_parts)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = self._parts_under(middle)
            small = [min(cost, middle) for n, cost in enumerate(self._costs) if n not in found]
            if self._split_packs(found) + len(best_fit(small, middle)) <= count:
                parts, high = found, middle
            else:
                low = middle
        return parts

    def _parts_under(self, most: float) -> dict[int, int]:
        """Parts of the groups that cost more than ``most``, at least as many as make each cost less."""
        found = dict(self.least_parts)
        for n, (load, cost) in enumerate(zip(self.loads, self._costs, strict=True)):
            if cost > most and load.most_packs > 1:
                below = cost - self.planner.cost.cost(load.cut.prefix_work)
                found[n] = min(len(load.cut.subtrees), max(self.least_parts.get(n, 1), math.ceil(below / most)))
        return found

    @cached_property
    def _costs(self) -> list[float]:
        """Of each group in a micro-batch of its own."""
        return [self.planner.pack_cost([load.work]) for load in self.loads]

    def _split_further(self, parts: dict[int, int], lacking: int) -> None:
        """So many more micro-batches: again and again one, or two of a group that was whole, out of the group with the
        largest parts."""
        if lacking <= 0:
            return
        packs = [self._packs_of(n, parts) for n in range(len(self.loads))]
        largest = [(-load.work.rows / packs[n], n) for n, load in enumerate(self.loads) if packs[n] < load.most_packs]
        heapify(largest)
        while lacking > 0:
            assert largest, "the planner counted what is there to split"
            _, n = heappop(largest)
            cut = self.loads[n].cut
            whole = min(2 if lacking > 1 or not cut.has_rows else 1, len(cut.subtrees))
            parts[n] = parts[n] + 1 if n in parts else whole
            before, packs[n] = packs[n], self._packs_of(n, parts)
            lacking -= packs[n] - before
            if packs[n] < self.loads[n].most_packs:
                heappush(largest, (-self.loads[n].work.rows / packs[n], n))

    def _split_less(self, parts: dict[int, int]) -> None:
        """One micro-batch less, of the group with the smallest parts; one that fits may be whole again."""
        spare = [n for n, count in parts.items() if count > self.least_parts.get(n, 0)]
        assert spare, "as few parts as the limit allows fit the number of micro-batches"
        n = min(spare, key=lambda n: (self.loads[n].work.rows / parts[n], n))
        parts[n] -= 1
        if parts[n] == 0:
            del parts[n]

    def _packs_of(self, n: int, parts: Mapping[int, int]) -> int:
        return parts[n] + self.loads[n].cut.has_rows if n in parts else 1
