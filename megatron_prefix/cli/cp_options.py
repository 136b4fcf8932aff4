"""Options of context parallelism. Needs no megatron-core, which takes seconds to import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import click

from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.traffic import inner_size

Command = TypeVar("Command", bound=Callable[..., Any])

SIZE = click.IntRange(1)

cp_placement_option = click.option(
    "--cp-placement",
    type=click.Choice(["auto", *PLACEMENTS]),
    default="auto",
    help="Where rows go under --cp; auto: lower predicted cost.",
)


@dataclass(frozen=True)
class CpFlags:
    """The options of context parallelism as given, for commands with no other parallelism.

    Raises:
        ValueError: as `check_a2a`, or a --cp-a2a that does not divide --cp.
    """

    cp: int = 1
    cp_comm_type: str = "p2p"
    cp_a2a: int | None = None
    cp_placement: str = "auto"

    def __post_init__(self) -> None:
        check_a2a(self.cp_comm_type, self.cp_a2a)
        inner_size(self.cp, self.cp_comm_type, self.cp_a2a)


def check_a2a(comm_type: str, a2a: int | None) -> None:
    """Raises ValueError when a2a+p2p and its inner size do not come together."""
    if (a2a is not None) != (comm_type == "a2a+p2p"):
        raise ValueError("--cp-a2a is the inner size of --cp-comm-type a2a+p2p: give both or neither")


def cp_options(default_cp: int = 1) -> tuple[Callable[[Any], Any], ...]:
    """--cp, --cp-comm-type and --cp-a2a."""
    return (
        click.option("--cp", type=SIZE, default=default_cp, help="Context-parallel size."),
        click.option("--cp-comm-type", type=click.Choice(COMM_TYPES), default="p2p", help="How keys reach queries."),
        click.option("--cp-a2a", type=SIZE, help="Inner size of --cp-comm-type a2a+p2p."),
    )


def cp_flags(default_cp: int = 1) -> Callable[[Command], Command]:
    """Add the options and --cp-placement; the command gets them as ``cp: CpFlags``."""
    return lambda command: gather(command, "cp", CpFlags, *cp_options(default_cp), cp_placement_option)


def gather(command: Command, name: str, kind: type, *options: Callable[[Any], Any]) -> Command:
    """Collect the options that are fields of ``kind`` into one argument of the command; other fields keep defaults."""

    @functools.wraps(command)
    def gathered(**kwargs: Any) -> Any:
        values = {field.name: kwargs.pop(field.name) for field in fields(kind) if field.name in kwargs}
        return command(**kwargs, **{name: kind(**values)})

    result: Any = gathered
    for option in reversed(options):
        result = option(result)
    return result
