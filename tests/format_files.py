"""Files that the tests of formats write, and their comparison."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.formats.assemble import Problems
from megatron_prefix.formats.read import RolloutReader
from megatron_prefix.trajectory import Trajectory


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def same(found: Sequence[Trajectory], expected: Sequence[Trajectory]) -> bool:
    """NaN stands for log-probs that are not there, and is equal here."""
    return repr(list(found)) == repr(list(expected))


def trajectories(path: Path, **options: Any) -> tuple[list[list[Trajectory]], Problems]:
    """The trajectories of each group, and what was not read."""
    problems = Problems()
    placed = list(RolloutReader(**options).sequences(path, problems))
    return [each.group for each in placed if isinstance(each.group, list)], problems
