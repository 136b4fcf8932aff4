"""From the records of a file to its groups: what is bad is refused or skipped and counted, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_prefix.formats.lines import LeftOutError, Parsed, Sample, parse
from megatron_prefix.prefix_trie import share_prefixes
from megatron_prefix.rollout_group import RolloutGroup, check_same_prompt
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.trajectory import Trajectory

MOST_PROBLEMS = 1000
"""Problems that are kept; further ones are only counted."""

Load = Callable[[], dict[str, Any]]
Translate = Callable[[dict[str, Any], int], list[dict[str, Any]]]


class Problem(NamedTuple):
    """Something that was not read: where ("FILE:LINE") and why."""

    place: str
    message: str


@dataclass
class Problems:
    """What was not read of a file.

    Attributes:
        skipped: number of bad records; a group whose trajectories contradict one another counts as one.
        left_out: number of records that the file itself marks as not to be trained.
        first: of both, in the order of the file, at most `MOST_PROBLEMS`.
    """

    skipped: int = 0
    left_out: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, place: str, error: ValueError) -> None:
        """Counts a record that was not read."""
        if isinstance(error, LeftOutError):
            self.left_out += 1
        else:
            self.skipped += 1
        if len(self.first) < MOST_PROBLEMS:
            self.first.append(Problem(place, str(error)))


class Placed(NamedTuple):
    """A whole group and where it began: a line or row, counted from 1. Trajectories are those of one group_id."""

    number: int
    group: RolloutGroup | list[Trajectory]


@dataclass(frozen=True)
class Assembly:
    """How the records of one file become groups.

    Attributes:
        file: as messages name it.
        translate: a record of the file and its number to native records, at least one, all of one group.
        unit: what a record is called, "line" or "row".
        skip_bad: bad records are skipped and counted; else the first raises.
        vocab_size: as `lines.parse`.
    """

    file: str
    translate: Translate
    unit: str = "line"
    skip_bad: bool = False
    vocab_size: int | None = None

    def place(self, number: int) -> str:
        """Where a record stands: "FILE:3", "FILE, row 3"."""
        return f"{self.file}:{number}" if self.unit == "line" else f"{self.file}, {self.unit} {number}"

    def run(self, records: Iterable[tuple[int, Load]], problems: Problems) -> Iterator[Placed]:
        """Groups, each as soon as nothing can add to it: at once where one record holds it, else at the end.

        A record counts as a whole: where anything in it is bad, nothing of it is read. A group keeps its other records.

        Raises:
            ValueError: a bad record (without ``skip_bad``), or no group at all.
        """
        groups = _OpenGroups(self.unit)
        number, found = 0, False
        for number, load in records:
            try:
                parsed = [parse(record, self.vocab_size) for record in self.translate(load(), number)]
                whole = groups.add(parsed, number)
            except ValueError as error:
                if not self.skip_bad and not isinstance(error, LeftOutError):
                    raise ValueError(f"{self.place(number)}: {error}") from error
                problems.add(self.place(number), error)
                continue
            if whole is not None:
                found = True
                yield Placed(number, whole)
        for placed in groups.close():
            found = True
            yield placed
        if not found:
            raise ValueError(self._nothing(number, problems))

    def share(self, groups: Iterable[Placed], problems: Problems) -> Iterator[tuple[int, RolloutGroup | RolloutTree]]:
        """Numbers and groups of `run`, trajectories as trees (`prefix_trie`).

        Raises:
            ValueError: trajectories that cannot be one group (without ``skip_bad``), or no group is left.
        """
        number, found = 0, False
        for number, group in groups:
            try:
                shared = group if isinstance(group, RolloutGroup) else _tree(group)
            except ValueError as error:
                if not self.skip_bad:
                    raise ValueError(f"{self.place(number)}: {error}") from error
                problems.add(self.place(number), error)
                continue
            found = True
            yield number, shared
        if not found:
            raise ValueError(self._nothing(number, problems))

    def _nothing(self, number: int, problems: Problems) -> str:
        if not problems.first:
            return (
                f"{self.place(max(number, 1))}: the file holds no rollouts; write at least one group line or sample "
                "line"
            )
        first = problems.first[0]
        return (
            f"{self.file}: nothing is left of the file: {problems.skipped + problems.left_out} {self.unit}s were "
            f"skipped; the first: {first.place}: {first.message}"
        )


def _tree(trajectories: list[Trajectory]) -> RolloutTree:
    (tree,) = share_prefixes(trajectories)  # they have one group_id
    return tree


@dataclass
class _OpenGroup:
    """A group to which records may still add; all agree with the first."""

    number: int
    first: Sample | Trajectory
    parts: list[Sample | Trajectory] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # of trajectories in several sequences

    def check(self, new: Parsed, number: int, unit: str) -> None:
        """Raises ValueError when ``new`` does not belong to the group."""
        first, places = self.first, (f"{unit} {self.number}", f"{unit} {number}")
        if isinstance(first, Sample) and isinstance(new, Sample):
            group_id = new.group.group_id
            differ = (first.group.log_probs is None) != (new.group.log_probs is None)
            check_same_prompt(group_id, first.group.prompt, new.group.prompt, places=places)
        elif isinstance(first, Trajectory) and isinstance(new, Trajectory):
            group_id = new.group_id
            differ = (first.log_probs is None) != (new.log_probs is None)
            score = new.reward if new.trajectory_id is None else self.scores.get(new.trajectory_id, new.reward)
            if score != new.reward:
                raise ValueError(
                    f"trajectory {new.trajectory_id!r} of group {group_id!r} has the rewards {score} and {new.reward}; "
                    "one trajectory has one reward"
                )
        else:
            group_id = new.group.group_id if isinstance(new, Sample) else new.group_id
            raise ValueError(
                f"group {group_id!r} was given already on {places[0]}; only sample lines may share a group_id, or only "
                "trajectory lines"
            )
        if differ:
            where = f"one of {unit}s {self.number} and {number} has" if number != self.number else "some rollouts have"
            raise ValueError(
                f"group {group_id!r}: only {where} log_probs; give them on all {unit}s of a group or on none"
            )

    def add(self, new: Sample | Trajectory) -> None:
        """Takes what `check` allows."""
        self.parts.append(new)
        if isinstance(new, Trajectory) and new.trajectory_id is not None:
            self.scores[new.trajectory_id] = new.reward

    def close(self) -> RolloutGroup | list[Trajectory]:
        samples = [part.group for part in self.parts if isinstance(part, Sample)]
        if not samples:
            return [part for part in self.parts if isinstance(part, Trajectory)]
        if len(samples) == 1:
            return samples[0]
        return RolloutGroup(
            samples[0].prompt,
            [sample.responses[0] for sample in samples],
            [sample.rewards[0] for sample in samples],
            samples[0].group_id,
            [sample.log_probs[0] if sample.log_probs else None for sample in samples],
            [sample.loss_masks[0] if sample.loss_masks else None for sample in samples],
        )


class _OpenGroups:
    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.open: dict[str, _OpenGroup] = {}
        self.whole: dict[str, int] = {}  # group_id -> where a group line gave it

    def add(self, parsed: list[Parsed], number: int) -> RolloutGroup | None:
        """Adds all that a record holds or nothing; returns the group if it is whole.

        Raises:
            ValueError: a group_id that is taken, or parts that do not agree with those of their group.
        """
        first = parsed[0]
        group_id = first.group.group_id if isinstance(first, Sample) else first.group_id
        if group_id is None and isinstance(first, RolloutGroup):
            return first
        assert group_id is not None
        known = self.open.get(group_id)
        given = self.whole.get(group_id) if known is None else known.number
        if given is not None and (known is None or isinstance(first, RolloutGroup)):
            raise ValueError(
                f"group {group_id!r} was given already on {self.unit} {given}; only sample lines may share a group_id"
            )
        if isinstance(first, RolloutGroup):
            self.whole[group_id] = number
            return first
        parts = [part for part in parsed if not isinstance(part, RolloutGroup)]
        group = known or _OpenGroup(number, first)
        for part in parts:
            group.check(part, number, self.unit)
        for part in parts:
            group.add(part)
        self.open[group_id] = group
        return None

    def close(self) -> Iterator[Placed]:
        for group in self.open.values():
            yield Placed(group.number, group.close())
