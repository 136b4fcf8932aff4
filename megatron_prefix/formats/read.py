"""Reading a file of rollouts, whatever wrote it.

The name says how a file is stored: `.parquet` is Parquet, `.pt` holds tensors (`formats.data_proto`), anything else is
JSON Lines. What a line or row means is one of `FORMATS`; "auto" takes the first that knows the keys of a record, for
the whole file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from megatron_prefix.formats.assemble import Assembly, Load, Placed, Problems, Translate
from megatron_prefix.formats.chat import chat_lines
from megatron_prefix.formats.jsonl import json_lines
from megatron_prefix.formats.megatron_rl import megatron_rl_lines
from megatron_prefix.formats.nemo_rl import nemo_rl_lines
from megatron_prefix.formats.parquet import parquet_rows
from megatron_prefix.formats.verl import verl_lines
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree

LOOK_AT = 100
"""Records among which one must be of a known format; a file where none is, is read as native."""


class Format(NamedTuple):
    """What the records of a file mean.

    Attributes:
        keys: sets of keys, one of which a record of this format has.
        translate: a record and its number to native records; the tokenizer is given where ``needs_tokenizer``.
    """

    keys: tuple[Set[str], ...]
    translate: Callable[[dict[str, Any], int, Any], list[dict[str, Any]]]
    needs_tokenizer: bool = False


FORMATS: dict[str, Format] = {
    "native": Format(
        (frozenset({"responses"}), frozenset({"response"}), frozenset({"tokens", "generated"})),
        lambda record, number, tokenizer: [record],
    ),
    "chat": Format(
        (frozenset({"messages"}),),
        lambda record, number, tokenizer: chat_lines(record, tokenizer),
        needs_tokenizer=True,
    ),
    "verl": Format(
        (frozenset({"input", "output", "score"}),),
        lambda record, number, tokenizer: verl_lines(record, tokenizer),
        needs_tokenizer=True,
    ),
    "nemo-rl": Format(
        (frozenset({"message_log"}), frozenset({"token_ids", "token_loss_mask"})),
        lambda record, number, tokenizer: nemo_rl_lines(record),
    ),
    "megatron-rl": Format(
        (frozenset({"rollouts"}), frozenset({"trajectory", "generation_mask"})),
        lambda record, number, tokenizer: megatron_rl_lines(record, number),
    ),
}
"""By the names that --format takes, in the order in which "auto" tries them."""


@dataclass(frozen=True)
class RolloutFile:
    """What a file holds.

    Attributes:
        groups: in the order of their first record; those of trajectories as trees, which share what they can.
        problems: what was skipped or left out.
    """

    groups: list[RolloutGroup | RolloutTree]
    problems: Problems


@dataclass(frozen=True)
class RolloutReader:
    """How files are read.

    Attributes:
        format: one of `FORMATS`, or "auto".
        tokenizer: for formats that hold text.
        skip_bad: skip and count bad records; without it the first is an error. A record is bad as a whole. A group
            keeps its other records, as long as there is one.
        vocab_size: token ids of this and above are bad.

    Raises:
        ValueError: no such format.
    """

    format: str = "auto"
    tokenizer: ChatTokenizer | None = None
    skip_bad: bool = False
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format must be auto or one of {', '.join(FORMATS)}, got {self.format!r}")

    def load(self, path: str | os.PathLike[str]) -> RolloutFile:
        """Reads a whole file.

        Raises:
            ValueError: the file cannot be read, a record is bad, or no group is left; the message starts with
                FILE:LINE where a line is to blame.
            ImportError: a package that the file needs is not installed.
        """
        problems = Problems()
        found = sorted(self.stream(path, problems), key=lambda placed: placed[0])
        return RolloutFile([group for _, group in found], problems)

    def stream(
        self, path: str | os.PathLike[str], problems: Problems
    ) -> Iterator[tuple[int, RolloutGroup | RolloutTree]]:
        """As `load`, one group after another with the number of its first line: groups that one line holds at once,
        those of several at the end. ``problems`` is added to meanwhile."""
        assembly, records = self._open(os.fspath(path))
        return assembly.share(assembly.run(records, problems), problems)

    def sequences(self, path: str | os.PathLike[str], problems: Problems) -> Iterator[Placed]:
        """As `stream`, with trajectories as they stand in the file."""
        assembly, records = self._open(os.fspath(path))
        return assembly.run(records, problems)

    def _open(self, file: str) -> tuple[Assembly, Iterator[tuple[int, Load]]]:
        unit, name = "line", self.format
        if file.endswith(".parquet"):
            records, unit = parquet_rows(file), "row"
        elif file.endswith(".pt"):
            from megatron_prefix.formats.data_proto import tensor_rows  # torch: not needed for other files

            records, unit, name = tensor_rows(file), "sample", "native"
        elif file.endswith((".pkl", ".pickle")):
            raise ValueError(f"{file}: a pickle could run code and is not read; write JSONL, Parquet or a .pt file")
        else:
            records = json_lines(file)
        if name == "auto":
            name, records = _recognise(records)
        if FORMATS[name].needs_tokenizer and self.tokenizer is None:
            raise ValueError(f"{file}: {name} holds texts; name the folder of the tokenizer (--tokenizer)")
        translate = _with_tokenizer(FORMATS[name], self.tokenizer)
        return Assembly(file, translate, unit, self.skip_bad, self.vocab_size), records


def load_rollouts(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    tokenizer: ChatTokenizer | None = None,
    skip_bad: bool = False,
    vocab_size: int | None = None,
) -> RolloutFile:
    """`RolloutReader(...).load(path)`."""
    return RolloutReader(format, tokenizer, skip_bad, vocab_size).load(path)


def _with_tokenizer(format: Format, tokenizer: ChatTokenizer | None) -> Translate:
    return lambda record, number: format.translate(record, number, tokenizer)


def _recognise(records: Iterator[tuple[int, Load]]) -> tuple[str, Iterator[tuple[int, Load]]]:
    """The first format that knows the keys of a record, and all the records; native where none does."""
    seen = []
    for number, load in islice(records, LOOK_AT):
        seen.append((number, load))
        try:
            keys = load().keys()
        except ValueError:
            continue
        for name, format in FORMATS.items():
            if any(needed <= keys for needed in format.keys):
                return name, chain(seen, records)
    return "native", chain(seen, records)
