"""Options of `train --on-policy`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import click

from megatron_prefix.cli.cp_options import Command, gather
from megatron_prefix.generation.dialects import DIALECTS

LOCAL = "local"


@dataclass(frozen=True)
class OnPolicyFlags:
    """The options as given; without --on-policy all others must be at their defaults.

    Raises:
        ValueError: options that do not go together.
    """

    on_policy: bool = False
    tasks: tuple[str, ...] = ()
    prompts: Path | None = None
    reward: str | None = None
    group_size: int = 8
    max_new_tokens: int = 64
    steps_per_iteration: int = 1
    generator: str = LOCAL
    server: str | None = None
    weights_folder: Path | None = None
    server_timeout: float = 600.0
    max_sampler_gap: float = 0.1

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if given and not self.on_policy:
            raise ValueError(f"{_option(given[0])} needs --on-policy")
        if not self.on_policy:
            return
        if not self.tasks and self.prompts is None:
            raise ValueError("--on-policy has nothing to sample for: give --task or --prompts")
        of_server = ("server", "weights_folder")
        for name in of_server:
            if self.generator == LOCAL and getattr(self, name) is not None:
                raise ValueError(f"{_option(name)} is for a server: add --generator {' or '.join(DIALECTS)}")
            if self.generator != LOCAL and getattr(self, name) is None:
                raise ValueError(
                    f"--generator {self.generator} needs {' and '.join(map(_option, of_server))}: where the server "
                    "is, and a folder on a disk of both, through which it gets the weights"
                )


def _option(field: str) -> str:
    return "--task" if field == "tasks" else "--" + field.replace("_", "-")


def on_policy_options(command: Command) -> Command:
    """Add the options; the command gets them as ``on_policy: OnPolicyFlags``."""
    return gather(
        command,
        "on_policy",
        OnPolicyFlags,
        click.option("--on-policy", is_flag=True, help="Sample from the policy instead of reading --rollouts."),
        click.option(
            "--task",
            "tasks",
            multiple=True,
            metavar="NAME[:COUNT[:JSON]]",
            help="Prompts of a reasoning-gym generator, such as chain_sum:100; may be given several times.",
        ),
        click.option(
            "--prompts",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help='Prompts of your own: a JSONL file of {"prompt": text, "answer": text}, exact match.',
        ),
        click.option(
            "--reward",
            metavar="MODULE:FUNCTION",
            help="Your own reward, function(prompt, response, answer) -> float, all text.",
        ),
        click.option("--group-size", type=click.IntRange(1), default=8, help="Responses per prompt."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=64, help="Longest response."),
        click.option(
            "--steps-per-iteration",
            type=click.IntRange(1),
            default=1,
            help="Optimizer steps, each on --groups-per-step prompts, between two rollouts.",
        ),
        click.option(
            "--generator",
            type=click.Choice([LOCAL, *DIALECTS]),
            default=LOCAL,
            help="What samples: the model under training itself, or a server.",
        ),
        click.option("--server", metavar="URL", help="Of --generator vllm or sglang, such as http://localhost:8000."),
        click.option(
            "--weights-folder",
            type=click.Path(file_okay=False, path_type=Path),
            help="Where each iteration's weights are written for the server to read.",
        ),
        click.option(
            "--server-timeout",
            type=click.FloatRange(0, min_open=True),
            default=600.0,
            help="Seconds to wait for an answer.",
        ),
        click.option(
            "--max-sampler-gap",
            type=click.FloatRange(0, min_open=True),
            default=0.1,
            help="Stop where the sampler's log-probs are further from the policy's own, in the mean.",
        ),
    )
