"""The options that say which rollouts a command reads, and how. Needs no megatron-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from megatron_prefix.cli.console import stderr_console
from megatron_prefix.cli.cp_options import Command, gather
from megatron_prefix.formats.assemble import Problems
from megatron_prefix.formats.read import FORMATS, RolloutReader
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree


@dataclass(frozen=True)
class RolloutInput:
    """The options as given; ``path`` is None where the command can do without and none was given."""

    path: Path | None
    format: str = "auto"
    tokenizer: Path | None = None
    skip_bad: bool = False

    def reader(self, vocab_size: int | None = None) -> RolloutReader:
        """What reads the file. Raises ValueError or ImportError as `ChatTokenizer` does."""
        tokenizer = None if self.tokenizer is None else ChatTokenizer(self.tokenizer)
        return RolloutReader(self.format, tokenizer, self.skip_bad, vocab_size)

    def read(self, vocab_size: int | None = None) -> list[RolloutGroup | RolloutTree]:
        """The groups of the file; says on stderr what was skipped.

        Args:
            vocab_size: of the model; records with other tokens are bad.

        Raises:
            ValueError: as `RolloutReader.load`, or no file was given.
        """
        if self.path is None:
            raise ValueError("--rollouts is missing: a file of rollouts")
        found = self.reader(vocab_size).load(self.path)
        if found.problems.first:
            stderr_console().print(describe(found.problems), markup=False)
        return found.groups


def describe(problems: Problems) -> str:
    """One line: how many records were not read, and the first of them."""
    counts = [(problems.skipped, "bad records skipped"), (problems.left_out, "records left out")]
    first = problems.first[0]
    return (
        f"{', '.join(f'{count:,} {what}' for count, what in counts if count)}; the first: {first.place}: "
        f"{first.message}"
    )


def rollout_input_options(path_option: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add ``path_option``, whose parameter must be named "path", and how to read it; the command gets all as
    ``rollouts: RolloutInput``."""
    return lambda command: gather(
        command,
        "rollouts",
        RolloutInput,
        path_option,
        click.option(
            "--format",
            type=click.Choice(["auto", *FORMATS]),
            default="auto",
            help="What the records are; auto goes by their keys. Parquet and .pt files are known by their names.",
        ),
        click.option(
            "--tokenizer",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder with tokenizer.json: for formats that hold text, and prompts (there by default --model).",
        ),
        click.option("--skip-bad", is_flag=True, help="Skip and count bad records; without it the first is an error."),
    )
