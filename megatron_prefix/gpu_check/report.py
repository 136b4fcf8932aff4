"""What a check found: records that are shown as they come and written to a JSON file after every stage.

A record is one thing that was checked: it is "ok", "refused" (the implementation says that it does not do this, which
is no failure), "failed", or "skipped" (the time was up). The JSON is the whole report, so that a run that is killed has
left what it had.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

LAUNCH_ERRORS = (
    *(RuntimeError, ImportError, OSError, ValueError, TypeError),
    *(AttributeError, AssertionError, LookupError, ArithmeticError),
)
"""What a kernel library may raise when it is loaded, or launched in a way that it does not take: torch's out-of-memory
error and a compiler's are RuntimeErrors, Transformer Engine asserts, a missing library is an OSError."""

SHARE = 0.2
"""Of the time, what one implementation may take before speeds are measured: one that compiles for minutes must leave
the others, and the speeds, their time."""


class Output(Protocol):
    """Where results are shown, as they come."""

    def line(self, text: str) -> None:
        """Show a line."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table."""

    def progress(self, note: str, steps: int = 0) -> None:
        """``note`` is done; so are ``steps`` stages."""


class DeviceLostError(Exception):
    """An error left the GPU unusable for this process, so that nothing after it would mean anything."""


@dataclass(frozen=True)
class Record:
    """One thing that was checked.

    Attributes:
        stage: "correctness", "context_parallel", ...
        impl: the implementation.
        what: dtype, heads, sizes, in words.
        status: "ok", "refused", "failed" or "skipped".
        note: what was measured, why it was refused, or the first line of what went wrong.
        values: numbers, for the JSON.
        trace: of an unexpected error.
    """

    stage: str
    impl: str
    what: str
    status: str
    note: str
    values: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""


class Report:
    """The report of a run.

    Args:
        head: what ran where, see `environment.describe`.
        output: shows what is added.
        path: of the JSON.
        seconds: after which what is left is skipped; one implementation gets a `SHARE` of them before its speed.
    """

    def __init__(self, head: dict[str, Any], output: Output, path: Path, seconds: float) -> None:
        self.head, self.output, self.path, self.seconds = head, output, path, seconds
        self.started = time.monotonic()
        self.spent: dict[str, float] = {}
        self.records: list[Record] = []
        self.speed: dict[str, Any] = {}
        self.finished = False
        self._said: set[tuple[str, str]] = set()

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record.status == "failed"]

    @property
    def counts(self) -> Counter[str]:
        """Records by status."""
        return Counter(record.status for record in self.records)

    @property
    def ok(self) -> bool:
        """Whether all stages ran, something was right, and nothing failed."""
        return self.finished and self.counts["ok"] > 0 and not self.failures

    def is_wrong(self, impl: str) -> bool:
        """Whether an implementation failed a check before its speed."""
        return any(record.impl == impl and record.stage != "speed" for record in self.failures)

    def add(self, record: Record) -> None:
        """Keep and show a record; a refusal or skip for one reason is shown once per implementation."""
        self.records.append(record)
        if record.status in ("refused", "skipped"):
            if (record.impl, record.note) in self._said:
                return
            self._said.add((record.impl, record.note))
        status = record.status.upper() if record.status == "failed" else record.status
        self.output.line(f"{status:8} {record.impl:10} {record.what}: {record.note}")
        self.output.progress(f"{record.stage}: {record.impl}")

    def attempt(self, stage: str, impl: str, what: str, check: Callable[[], Record]) -> None:
        """Add what ``check`` finds; an error that it does not expect is a failure, and the rest goes on.

        Raises:
            DeviceLostError: the error has left the GPU unusable.
        """
        no_time = self._no_time(stage, impl)
        if no_time:
            self.add(Record(stage, impl, what, "skipped", no_time))
            return
        started = time.monotonic()
        try:
            record = check()
        except LAUNCH_ERRORS as error:
            first = next(iter(str(error).strip().splitlines()), "")
            note = f"{type(error).__name__}: {first}"
            self.add(Record(stage, impl, what, "failed", note, trace=traceback.format_exc()))
            self._see_device(f"{impl}, {what}")
            return
        finally:
            self.spent[impl] = self.spent.get(impl, 0.0) + time.monotonic() - started
        self.add(record)

    def _no_time(self, stage: str, impl: str) -> str | None:
        if time.monotonic() - self.started > self.seconds:
            return f"the {self.seconds:.0f} s are over; give more --seconds"
        if stage != "speed" and self.spent.get(impl, 0.0) > SHARE * self.seconds:
            return f"{impl} has had its {SHARE:.0%} of {self.seconds:.0f} s; give more --seconds"
        return None

    def _see_device(self, after: str) -> None:
        """An illegal access on a GPU fails everything that follows it: it must not be blamed on that."""
        if self.head["device"] != "cuda":
            return
        try:
            torch.zeros(1, device="cuda").sum().item()
        except RuntimeError as error:
            raise DeviceLostError(
                f"the GPU cannot be used any more after {after}; nothing that follows was run: {error}"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **self.head,
            "finished": self.finished,
            "ok": self.ok,
            "seconds": time.monotonic() - self.started,
            "counts": self.counts,
            "records": [asdict(record) for record in self.records],
            "speed": self.speed,
        }

    def write(self) -> None:
        """Replace the JSON file at once, so that it is whole whenever the run ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(_finite(self.as_dict()), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain aligned text; every column but the first is right-aligned."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(widths)))])
        for line in lines
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
