"""The plan of a step: which groups are in which micro-batch of which data-parallel rank, and how long it should take.

Plain data: every rank has the plan of all, and builds its own packs from it (`StepPlan.packs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_prefix.packing import Pack, check_sampler_log_probs, pack_groups
from megatron_prefix.pipeline_order import in_turns, order_jobs
from megatron_prefix.pipeline_plan import BACKWARD_WORK, PipelineJob, plan_pipeline, with_prefix_backwards
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.splitting import Split, packs_of_split

Group = RolloutGroup | RolloutTree


@dataclass(frozen=True)
class PipelineShape:
    """How a model is cut into pipeline stages.

    Attributes:
        stages: of the pipeline.
        chunks: model chunks of each stage (interleaved schedule); None for 1F1B.
        chunk_group: megatron-core's ``microbatch_group_size_per_vp_stage``; None for its default.
    """

    stages: int = 1
    chunks: int | None = None
    chunk_group: int | None = None


@dataclass(frozen=True)
class SplitGroup:
    """A group in several micro-batches.

    Attributes:
        group: its index.
        prefix: nodes (of `RolloutTree`; 0 is a plain group's prompt and i + 1 its response i) encoded once.
        parts: the other nodes, by micro-batch.
        has_rows: whether the prefix has rows, and then a micro-batch; a prompt of one token has none.
    """

    group: int
    prefix: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    has_rows: bool


@dataclass(frozen=True)
class RankPlan:
    """The micro-batches of one data-parallel rank, in order: of each split group its prefix and parts, then the others.

    Attributes:
        splits: groups in several micro-batches.
        whole: groups of each other micro-batch.
        costs: modelled seconds of each micro-batch, forward and backward of the whole model.
    """

    splits: tuple[SplitGroup, ...]
    whole: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]

    @property
    def groups(self) -> tuple[int, ...]:
        """Indices of all groups, ascending."""
        return tuple(sorted([*(split.group for split in self.splits), *(i for each in self.whole for i in each)]))

    def jobs(self, num_stages: int) -> list[PipelineJob]:
        """The micro-batches on one pipeline stage of several."""
        kinds: list[tuple[str, int | None]] = []
        for number, split in enumerate(self.splits):
            if split.has_rows:
                kinds += [("A", number), *[("B", number)] * len(split.parts)]
            else:
                kinds += [("whole", None)] * len(split.parts)
        kinds += [("whole", None)] * len(self.whole)
        share = 1 / num_stages / (1 + BACKWARD_WORK)
        return with_prefix_backwards(
            [PipelineJob(kind, cost * share, n) for (kind, n), cost in zip(kinds, self.costs, strict=True)]
        )

    def seconds(self, pipeline: PipelineShape) -> float:
        """Modelled time of the rank's step, waiting of pipeline stages included."""
        stages, chunks, group = pipeline.stages, pipeline.chunks, pipeline.chunk_group
        if stages == 1:
            return sum(self.costs)
        jobs = self.jobs(stages)
        turns = in_turns(jobs, order_jobs(jobs, stages, num_chunks=chunks, chunk_group=group))
        return plan_pipeline(turns, stages, num_chunks=chunks, chunk_group=group).total


@dataclass(frozen=True)
class StepPlan:
    """A step on all data-parallel ranks, each with as many micro-batches.

    A micro-batch is one pack. Each runs its forward and its backward once, so that collectives inside a model (those of
    expert parallelism) come as often on every rank. The backward of a split group's prefix comes after that of its
    parts, in a turn of its own or one that it shares (see `pipeline_order`).

    Attributes:
        ranks: by data-parallel rank.
        pipeline: of each.
        lower_bound: modelled seconds that no step of these groups undercuts, see `StepPlanner`.
    """

    ranks: tuple[RankPlan, ...]
    pipeline: PipelineShape
    lower_bound: float

    @property
    def groups(self) -> tuple[int, ...]:
        """Indices of all groups, ascending."""
        return tuple(sorted(i for rank in self.ranks for i in rank.groups))

    @property
    def num_microbatches(self) -> int:
        """Of each rank."""
        return len(self.ranks[0].costs)

    @property
    def num_splits(self) -> int:
        """Groups in several micro-batches."""
        return sum(len(rank.splits) for rank in self.ranks)

    @property
    def balance(self) -> float:
        """Modelled cost of the costliest rank over that of the mean rank."""
        costs = [sum(rank.costs) for rank in self.ranks]
        return max(costs) * len(costs) / sum(costs)

    @cached_property
    def seconds(self) -> float:
        """Modelled time of the step: that of the slowest rank.

        Found when first asked for: with stages it plays every rank's schedule, which takes longer than planning does.
        """
        return max(rank.seconds(self.pipeline) for rank in self.ranks)

    def describe(self) -> str:
        """One line: "64 groups (2 split) in 9 micro-batches on each of 8 ranks, balance 1.01, modelled step 1.02 of the
        lower bound"."""
        split = f" ({self.num_splits} split)" if self.num_splits else ""
        many = "micro-batch" if self.num_microbatches == 1 else "micro-batches"
        where = "1 rank" if len(self.ranks) == 1 else f"each of {len(self.ranks)} ranks"
        return (
            f"{len(self.groups)} groups{split} in {self.num_microbatches} {many} on {where}, "
            f"balance {self.balance:.2f}, modelled step {self.seconds / self.lower_bound:.2f} of the lower bound"
        )

    def metrics(self) -> dict[str, float]:
        """Counts and balance, for a step's record."""
        return {
            "groups_split": self.num_splits,
            "microbatches": self.num_microbatches,
            "balance": self.balance,
        }

    def packs(
        self, groups: Sequence[Group] | Mapping[int, Group], rank: int, *, normalize_std: bool = True
    ) -> list[Pack]:
        """The packs of a data-parallel rank, in the order of its micro-batches.

        Args:
            groups: by index; of the rank's own groups, at least.
            rank: data-parallel.
            normalize_std: see `pack_groups`.

        Raises:
            ValueError: sampler log-probs in some groups only.
        """
        mine = self.ranks[rank]
        check_sampler_log_probs([groups[i] for i in mine.groups])
        packs: list[Pack] = []
        for split in mine.splits:
            parts = [list(nodes) for nodes in split.parts]
            cut = Split(as_tree(groups[split.group]), list(split.prefix), parts)
            packs += packs_of_split(cut, normalize_std=normalize_std)
        for members in mine.whole:
            packs += pack_groups([groups[i] for i in members], normalize_std=normalize_std)
        return packs

    def by_pack(
        self, groups: Sequence[Group] | Mapping[int, Group], rank: int, values: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """Values of response rows, such as old log-probs, from groups to the packs of a rank.

        Args:
            groups: as in `packs`.
            rank: data-parallel.
            values: of each of the rank's groups [response rows], in the order of `pack_groups` of the group alone.

        Returns:
            Of each pack of `packs`, [response rows].
        """
        return [
            torch.cat([values[i][rows] for i, rows in pack]) if pack else torch.zeros(0)
            for pack in self._rows(groups, rank)
        ]

    def by_group(
        self, groups: Sequence[Group] | Mapping[int, Group], rank: int, values: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """The way back of `by_pack`: values of each pack's response rows to those of each group."""
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for pack, of_pack in zip(self._rows(groups, rank), values, strict=True):
            for (i, rows), part in zip(pack, of_pack.split([len(rows) for _, rows in pack]), strict=True):
                found.setdefault(i, []).append((rows, part))
        together = {i: [torch.cat(each) for each in zip(*parts, strict=True)] for i, parts in found.items()}
        return {i: part[torch.argsort(rows)] for i, (rows, part) in together.items()}

    def _rows(self, groups: Sequence[Group] | Mapping[int, Group], rank: int) -> list[list[tuple[int, Tensor]]]:
        """Of each pack, its groups and which of the group's response rows it has, int64, in the order of the pack."""
        found: list[list[tuple[int, Tensor]]] = []
        for split in self.ranks[rank].splits:
            rows = _target_rows(groups[split.group])
            prefix = [split.prefix] if split.has_rows else []
            for nodes in (*prefix, *split.parts):
                mine = torch.cat([rows[i] for i in sorted(nodes)])
                found.append([(split.group, mine)] if len(mine) else [])
        for members in self.ranks[rank].whole:
            found.append([(i, torch.cat(_target_rows(groups[i]))) for i in members])
        return found


def as_tree(group: Group) -> RolloutTree:
    """A plain group as the tree of two levels that it is."""
    return group if isinstance(group, RolloutTree) else RolloutTree.from_group(group)


def _target_rows(group: Group) -> list[Tensor]:
    """By node, its rows with a target among those of the whole group."""
    counts = [len(node.tokens) if node.rollouts else 0 for node in as_tree(group).nodes]
    return list(torch.arange(sum(counts)).split(counts))
