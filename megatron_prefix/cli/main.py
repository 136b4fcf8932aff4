"""The `megatron-prefix` command: a table of subcommands, each imported when it is used.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import os
import time
import warnings
from importlib import import_module
from typing import Any, NamedTuple

try:
    import click
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the megatron-prefix command needs the cli extra: pip install 'megatron-prefix[cli]'"
    ) from error

from megatron_prefix.version import __version__


class Command(NamedTuple):
    """Where a subcommand lives ("module:attribute") and its line in the list of commands."""

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "import": Command("megatron_prefix.cli.import_:import_command", "Hugging Face or GGUF weights to a checkpoint."),
    "export": Command("megatron_prefix.cli.export:export_command", "A checkpoint to a Hugging Face folder."),
    "rollout": Command("megatron_prefix.cli.rollout:rollout_command", "Sample responses to prompts and score them."),
    "inspect": Command("megatron_prefix.cli.inspect_:inspect_command", "What a rollouts file holds and would save."),
    "train": Command("megatron_prefix.cli.train:train_command", "GRPO on a rollouts file or on policy."),
    "verify": Command("megatron_prefix.cli.verify:verify_command", "Compare prefix groups with plain megatron-core."),
    "plan": Command("megatron_prefix.cli.plan:plan_command", "Choose parallel sizes: predicted memory and step time."),
    "plan-cp": Command(
        "megatron_prefix.cli.plan_cp:plan_cp_command", "Show what context parallelism will do with a layout."
    ),
    "bench": Command("megatron_prefix.cli.bench:bench_command", "Time prefix groups against repeated prefixes."),
    "patch": Command("megatron_prefix.cli.patch:patch_command", "Let Megatron-LM or verl train on prefix groups."),
    "gpu-check": Command(
        "megatron_prefix.cli.gpu_check:gpu_check_command", "Check and time every attention kernel on this GPU."
    ),
}


PATIENCE_S = 20.0
"""How long other ranks keep a message back. Bad input fails on every rank; rank 0, maybe the slower one, shows it, and
torchrun then ends the others. A rank alone with its error shows it after all."""


class InputError(click.ClickException):
    """What the user gave cannot be used: the message alone, exit code 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group that imports a subcommand only to run it or to show its own help.

    The one place where bad input ends: a ValueError raised by any subcommand becomes an InputError, shown by rank 0.
    """

    def __init__(self, *args: Any, table: dict[str, Command], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        # Deprecations and missing optional packages inside megatron-core are nothing that a user of a command can mend.
        warnings.filterwarnings("ignore", module=r"megatron\.|torch\.(distributed\.checkpoint|utils\.cpp_extension)")
        module, _, attribute = self.table[cmd_name].target.partition(":")
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.summary) for name, command in self.table.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException:
            _leave_it_to_rank_0()
            raise
        except ValueError as error:
            _leave_it_to_rank_0()
            raise InputError(str(error)) from error


def _leave_it_to_rank_0() -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True},
    epilog="'megatron-prefix COMMAND --help' describes a command. Commands that train or compare also run under "
    "torchrun: torchrun --nproc-per-node 2 -m megatron_prefix COMMAND ...",
)
@click.version_option(__version__, prog_name="megatron-prefix")
def main() -> None:
    """Train on prefix groups with every shared prefix encoded once, on megatron-core.

    Several responses to one prompt (GRPO and its relatives) share the prompt's rows instead of repeating them: the same
    gradients for less work.
    """
