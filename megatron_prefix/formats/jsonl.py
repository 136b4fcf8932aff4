"""JSON Lines: one object per line, UTF-8, read one line at a time."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from megatron_prefix.formats.assemble import Load


def json_lines(file: str) -> Iterator[tuple[int, Load]]:
    """Line numbers, and what decodes each line; blank lines are skipped.

    Raises:
        ValueError: the file cannot be read.
    """
    number = 0
    try:
        with open(file, "rb") as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    yield number, partial(decode_line, raw)
    except OSError as error:
        raise ValueError(f"{file}: cannot read rollouts: {error.strerror or error}") from error


def decode_line(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: it is none, it is not UTF-8, a key stands in it twice, or it has NaN or infinity.
    """
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}; save as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        ending = "" if raw.rstrip().endswith(b"}") else "; the line is cut short (truncated?): write it again"
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{ending}") from error
    except RecursionError as error:
        raise ValueError("not a rollout: the JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, got {reprlib.repr(record)}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one of them")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON knows; rewards and log_probs must be finite")
