"""Rollouts that arrive while training runs: steps in the order of arrival, from a bounded buffer.

Every rank reads the stream for itself. Steps are made of the groups as they come, so ranks that see different lengths
of a growing file at one moment still make the same steps of it: the one that sees less waits.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_prefix.balanced_plan import Group, StepPlan
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.formats.jsonl import decode_line
from megatron_prefix.formats.lines import parse
from megatron_prefix.rollout_group import RolloutGroup

_POLL_S = 0.1
"""How often a thread that waits looks whether it shall end."""

_CHUNK = 2**24
"""Bytes of a file that are read at once."""


@dataclass(frozen=True)
class StreamedStep:
    """A step of a stream.

    Attributes:
        groups: by their number in the stream, from 0.
        plan: whose indices are those numbers.
    """

    groups: dict[int, Group]
    plan: StepPlan


class _End:
    """Stands behind the last group in the buffer. As a context manager it keeps the error that ends the source."""

    error: Exception | None = None

    def __enter__(self) -> _End:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if isinstance(error, Exception):
            self.error = error
            return True
        return False


class RolloutStream:
    """Steps of groups as they arrive. Use it in a ``with`` statement, or call `close`.

    A thread of its own takes groups from the source and keeps ``capacity`` of them; while those wait, it takes no
    more, so that a source that samples is held back too.

    Args:
        source: groups, in an order that does not change when it is read again.
        planner: packs a step.
        groups_per_step: of the global batch.
        capacity: groups in the buffer at most.
        consumed: groups to skip, which a run before this one took: ``state_dict()["consumed"]`` of it.
        stop: set by `close`, for a source that waits for more, as `follow_rollouts` does.

    Attributes:
        left_over: groups at the end of the source that were too few to give every data-parallel rank one; 0 before.

    Raises:
        ValueError: a size below 1, or steps with fewer groups than data-parallel ranks.
    """

    def __init__(
        self,
        source: Iterable[Group],
        planner: StepPlanner,
        *,
        groups_per_step: int,
        capacity: int = 1024,
        consumed: int = 0,
        stop: threading.Event | None = None,
    ) -> None:
        if capacity < 1 or consumed < 0:
            raise ValueError(f"capacity must be at least 1 and consumed at least 0, got {capacity} and {consumed}")
        if groups_per_step < planner.dp_size:
            raise ValueError(
                f"{groups_per_step} groups per step cannot feed {planner.dp_size} data-parallel ranks; raise "
                "groups_per_step"
            )
        self.planner, self.groups_per_step = planner, groups_per_step
        self.left_over = 0
        self._consumed = consumed
        self._end: _End | None = None
        self._buffer: queue.Queue[Group | _End] = queue.Queue(capacity)
        self._closing, self._stop = threading.Event(), stop or threading.Event()
        self._reader = threading.Thread(target=self._read, args=(source, consumed), name="rollouts", daemon=True)
        self._reader.start()

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, once the source has given the group that it is at; what is in the buffer is dropped."""
        self._closing.set()
        self._stop.set()
        self._end = self._end or _End()
        self._reader.join()

    def next_step(self) -> StreamedStep | None:
        """The next step, as soon as its groups are there; None at the end of the source.

        The last step may have fewer groups, at least one for every data-parallel rank; see `left_over`.

        Raises:
            Exception: what the source raised, once the steps before it are taken.
            ValueError: groups that cannot be planned, see `StepPlanner.plan`.
        """
        found: list[Group] = []
        while len(found) < self.groups_per_step and self._end is None:
            item = self._buffer.get()
            if isinstance(item, _End):
                self._end = item
            else:
                found.append(item)
        if self._end is not None and self._end.error is not None:
            self.left_over += len(found)
            raise self._end.error
        if len(found) < self.planner.dp_size:
            self.left_over += len(found)
            return None
        groups = dict(enumerate(found, start=self._consumed))
        plan = self.planner.plan(groups)
        self._consumed += len(found)
        return StreamedStep(groups, plan)

    def state_dict(self) -> dict[str, int]:
        """How many groups of the source are in the steps so far, skipped ones included."""
        return {"consumed": self._consumed}

    def _read(self, source: Iterable[Group], skip: int) -> None:
        number = 0
        with _End() as end:
            for number, group in enumerate(source, 1):
                if self._closing.is_set() or (number > skip and not self._put(group)):
                    return
            if number < skip and not self._closing.is_set():
                raise ValueError(
                    f"the source ended after {number} groups, but the saved run took {skip}; give the same source"
                )
        self._put(end)

    def _put(self, item: Group | _End) -> bool:
        """Whether the buffer took it before the stream was closed."""
        while not self._closing.is_set():
            try:
                self._buffer.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


def follow_rollouts(
    path: str | os.PathLike[str], *, stop: threading.Event | None = None, poll_s: float = 1.0
) -> Iterator[RolloutGroup]:
    """The groups of a rollouts file that grows, each once its line is complete; waits for the file to appear.

    Group lines only (schema: `rollouts`), because more samples of a group could always follow.

    Args:
        path: of the file. What is written stays: it only gets longer.
        stop: ends it, behind the last line that is there then. Where several ranks follow one file, set it when the
            file is complete, so that all end at the same line. None goes on for ever.
        poll_s: seconds between looks at the file.

    Raises:
        ValueError: a line that is not a group line, as FILE:LINE, or a file that got shorter.
    """
    file, number, start, begun = os.fspath(path), 0, 0, b""
    stop = stop or threading.Event()
    while True:
        ending = stop.is_set()  # before the file is read, so that nothing written before it is missed
        added = _bytes_from(file, start)
        start += len(added)
        *lines, begun = (begun + added).split(b"\n")
        if ending and not added:
            lines.append(begun)
        for raw in lines:
            number += 1
            if raw.strip():
                try:
                    group = parse(decode_line(raw))
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from error
                if not isinstance(group, RolloutGroup):
                    raise ValueError(
                        f"{file}:{number}: no group line, and more of its group may follow; write group lines"
                    )
                yield group
        if not added:
            if ending:
                return
            stop.wait(poll_s)


def _bytes_from(file: str, start: int) -> bytes:
    """What stands in a file from there on, up to `_CHUNK`; nothing where there is no file yet."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size < start:
                raise ValueError(f"{file}: it got shorter, from {start} bytes to {size}; a followed file may only grow")
            stream.seek(start)
            return stream.read(_CHUNK)
    except FileNotFoundError as error:
        if start:
            raise ValueError(f"{file}: it is gone; a followed file may only grow") from error
        return b""
