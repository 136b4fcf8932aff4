"""Texts and names inside records of other programs."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from typing import Any

from megatron_prefix.formats.lines import key_of


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """``record[key]``. Raises ValueError when it is missing, no string, or no text that UTF-8 can write."""
    value = key_of(record, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {reprlib.repr(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{where}: {key!r} has half a surrogate pair, which is no text; write it again")
    return value


def id_of(value: Any, where: str) -> str:
    """A group's id as a string. Raises ValueError when it is neither a string nor an integer."""
    if type(value) not in (str, int):
        raise ValueError(f"{where} must be a string or an integer, got {reprlib.repr(value)}")
    return str(value)


def short_hash(of: str | Sequence[int]) -> str:
    """16 hexadecimal digits that stand for a text or for token ids: a name for a group that has none."""
    text = of if isinstance(of, str) else ",".join(map(str, of))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
