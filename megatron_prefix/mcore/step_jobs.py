"""The micro-batches of a step with split groups as every pipeline stage has them, and what cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.layout import PartLayout
from megatron_prefix.mcore.deferred import DeferredGraph
from megatron_prefix.packing import Pack
from megatron_prefix.pipeline_order import Turn


@dataclass(eq=False)
class Job:
    """One micro-batch on one model chunk.

    Attributes:
        kind: "A", "B", "C", or "idle": neither loss nor work, where an interleaved pipeline needs one more.
        item: what the data iterator yielded (A and B).
        ends: of a C its A, whose backward is this micro-batch's. Of an A the one of another prefix, where that one's C
            shares its turns.
        number: in the step, from 0, in the order of the forwards.
        is_last: of the step: its backward is the one during which megatron-core synchronises gradients.
        ends_prefix: a forward-only part after which no other reads the prefix.
        graph: of an A that has run, held until C.
    """

    kind: str
    item: Any = None
    ends: Job | None = None
    number: int = 0
    is_last: bool = False
    ends_prefix: bool = False
    graph: DeferredGraph | None = None

    @property
    def has_targets(self) -> bool:
        """Whether an A has a loss of its own: in a tree, trained tokens that several parts continue."""
        return bool(self.pack.response_rows.numel())

    @property
    def pack(self) -> Pack:
        return _pack_of(self.item)

    def close(self) -> None:
        """Free what an unfinished step left."""
        self.graph = None
        if self.item is not None and self.pack.prefix is not None:
            self.pack.prefix.cache = None


def _pack_of(item: Any) -> Pack:
    return item if isinstance(item, Pack) else item.pack


def jobs_of(items: list[Any], num_microbatches: int, forward_only: bool) -> list[Job]:
    """The step's micro-batches of one model chunk, with a C behind the last part of every prefix."""
    if len(items) < num_microbatches:
        raise ValueError(f"the data iterator ended after {len(items)} of {num_microbatches} micro-batches")
    last_part: dict[int, int] = {}
    begins: dict[int, Job] = {}
    for i, item in enumerate(items):
        pack = _pack_of(item)
        if pack.prefix is None:
            continue
        key = id(pack.prefix)
        if pack.is_prefix:
            if key in begins:
                raise ValueError(f"micro-batch {i} is a prefix that came before; give every prefix once a step")
            begins[key] = Job("A", item)
        elif key not in begins:
            raise ValueError(
                f"micro-batch {i} is a part without its prefix before it; keep the order of pack_and_split"
            )
        else:
            _check_part(i, pack)
            last_part[key] = i
    for key, begin in begins.items():
        if key not in last_part:
            rows = begin.pack.layout.num_rows
            raise ValueError(f"a prefix of {rows} rows has no part in this step; keep pack_and_split's packs together")
    jobs: list[Job] = []
    for i, item in enumerate(items):
        pack = _pack_of(item)
        key = id(pack.prefix)
        if pack.is_prefix:
            jobs.append(begins[key])
            continue
        ends = pack.prefix is not None and last_part[key] == i
        jobs.append(Job("B", item, ends_prefix=ends and forward_only))
        if ends and not forward_only:
            jobs.append(Job("C", ends=begins[key]))
    if not any(job.kind == "B" for job in jobs):
        raise ValueError(f"none of the {len(items)} micro-batches has a response; give at least one")
    return jobs


def in_turns(jobs: Sequence[Job], turns: Sequence[Turn]) -> list[Job]:
    """The jobs in the order of a plan. A C that shares the turns of an A leaves its backward to that."""
    for begin, end in turns:
        jobs[begin].ends = jobs[end].ends
    return [jobs[begin] for begin, _ in turns]


def _check_part(number: int, pack: Pack) -> None:
    """Raises ValueError for a part that was made for another prefix."""
    assert pack.prefix is not None and isinstance(pack.layout, PartLayout)
    if pack.layout.num_cached_rows > pack.prefix.num_rows:
        raise ValueError(
            f"micro-batch {number} reads {pack.layout.num_cached_rows} rows of a prefix that has "
            f"{pack.prefix.num_rows}; keep pack_and_split's packs together"
        )


def check_stages(items: list[Any], group: Any) -> None:
    """Raises ValueError on every stage when stages would run different micro-batches, once per step."""
    packs = [_pack_of(item) for item in items]
    prefixes: dict[int, int] = {}  # numbered as they come: parts of equal layout may belong to different groups
    mine = [(pack.layout.checksum, prefixes.setdefault(id(pack.prefix), len(prefixes))) for pack in packs]
    stages = all_gather_object(mine, group)
    for stage, theirs in enumerate(stages):
        if theirs == stages[0]:
            continue
        same = zip(theirs, stages[0], strict=False)
        first = next((i for i, (a, b) in enumerate(same) if a != b), min(len(theirs), len(stages[0])))
        raise ValueError(
            f"pipeline stages 0 and {stage} have different micro-batches: of {len(stages[0])} and {len(theirs)}, "
            f"number {first} is the first that differs; build the same packs in the same order on every stage"
        )
