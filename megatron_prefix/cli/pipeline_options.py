"""Options of pipeline parallelism. Needs no megatron-core, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click

from megatron_prefix.cli.cp_options import SIZE, Command, gather

pp_option = click.option("--pp", type=SIZE, default=1, help="Pipeline-parallel size.")
vpp_option = click.option("--vpp", type=SIZE, default=1, help="Stages per pipeline rank (interleaved).")
max_tokens_option = click.option(
    "--max-tokens-per-microbatch",
    type=SIZE,
    help="Most rows of one micro-batch; groups over it are split, their prefix encoded once all the same.",
)


@dataclass(frozen=True)
class PipelineFlags:
    """The options of a pipeline as given, for commands with no other parallelism beside it.

    Raises:
        ValueError: several stages per rank of a pipeline of one rank.
    """

    pp: int = 1
    vpp: int = 1
    groups: int | None = None
    max_tokens_per_microbatch: int | None = None

    def __post_init__(self) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"--vpp {self.vpp} needs a pipeline of 2 ranks or more, --pp is 1; raise --pp")

    @property
    def given(self) -> tuple[str, ...]:
        """The options, as typed, that ask for a step through the schedule of a pipeline."""
        limit = self.max_tokens_per_microbatch
        values = {"--pp": self.pp > 1, "--groups": self.groups, "--max-tokens-per-microbatch": limit}
        return tuple(option for option, value in values.items() if value)

    @property
    def num_groups(self) -> int:
        """Groups of a step: as many as there are stages where nothing else is said."""
        return self.groups or self.pp

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError when so many layers do not divide into the stages."""
        stages = self.pp * self.vpp
        if num_layers % stages:
            raise ValueError(
                f"{num_layers} layers do not divide into --pp {self.pp} x --vpp {self.vpp} = {stages} stages; choose "
                "sizes that divide them, or another --layers"
            )


def pipeline_flags(*, with_limit: bool) -> Callable[[Command], Command]:
    """Add the options, --max-tokens-per-microbatch if so told; the command gets them as ``pipeline: PipelineFlags``."""
    groups = click.option("--groups", type=SIZE, help="Prefix groups of a step in a pipeline; default: --pp.")
    limit = (max_tokens_option,) if with_limit else ()
    return lambda command: gather(command, "pipeline", PipelineFlags, pp_option, vpp_option, groups, *limit)
