"""The command's frame: lazy subcommands, help, version, bad input, and the helpers all commands share."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megatron_prefix.cli.console import print_json, torchrun_ranks
from megatron_prefix.cli.main import COMMANDS, Command, LazyGroup, main
from megatron_prefix.version import __version__

ROOT = Path(__file__).resolve().parents[1]


@click.command()
@click.argument("value")
def refusing_command(value: str) -> None:
    """Take anything, refuse it."""
    raise ValueError(f"value {value!r} is too long; give at most 3 letters")


@click.command()
def broken_command() -> None:
    """Fail in a way that is not the user's fault."""
    raise KeyError("a defect")


GROUP = LazyGroup(
    "main",
    table={
        "refuse": Command(f"{__name__}:refusing_command", "Refuses its input."),
        "break": Command(f"{__name__}:broken_command", "Is broken."),
        "elsewhere": Command("megatron_prefix.cli.no_such_module:command", "Is never imported."),
    },
)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_of_the_table_shows_its_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"main {name}" in result.output and "--help" in result.output


def test_help_lists_the_commands_without_importing_them() -> None:
    result = CliRunner().invoke(GROUP, ["--help"])
    assert result.exit_code == 0
    assert all(command.summary in result.output for command in GROUP.table.values())


def test_unknown_command_exits_2() -> None:
    result = CliRunner().invoke(main, ["no-such-command"])
    assert result.exit_code == 2
    assert "No such command 'no-such-command'" in result.output


def test_value_error_is_a_message_and_exit_code_2() -> None:
    result = CliRunner().invoke(GROUP, ["refuse", "four"])
    assert result.exit_code == 2
    assert result.output == "Error: value 'four' is too long; give at most 3 letters\n"


def test_other_errors_are_defects_and_keep_their_traceback() -> None:
    result = CliRunner().invoke(GROUP, ["break"])
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )


def test_python_m_and_version() -> None:
    run = _python("-m", "megatron_prefix", "--version")
    assert (run.returncode, run.stdout) == (0, f"megatron-prefix, version {__version__}\n"), run.stderr


def test_help_imports_no_heavy_module() -> None:
    code = (
        "import sys; from megatron_prefix.cli.main import main; main(['--help'], standalone_mode=False); "
        "print(sorted({'megatron', 'matplotlib', 'transformers', 'reasoning_gym', 'rich.progress'} & set(sys.modules)))"
    )
    run = _python("-c", code)
    assert run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK set without WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK must be a whole number of 0 or more, got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_a_broken_torchrun_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_ranks() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        torchrun_ranks()


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"ok": True, "gap": float("nan"), "sizes": (1, float("inf"), 2.5)})
    assert json.loads(capsys.readouterr().out) == {"ok": True, "gap": None, "sizes": [1, None, 2.5]}


SCRIPT = """
import torch, torch.distributed as dist
from megatron_prefix.cli.console import print_json, print_table, progress_bar, start_distributed
world = start_distributed()
total = torch.tensor([world.rank + 1], device=world.device)
dist.all_reduce(total)
with progress_bar("counting", 3, unit="tokens") as advance:
    for step in range(3):
        advance(units=10, note=f"step {step}")
print_table("sums", ["what", "value"], [["sum", total.item()]])
print_json({"sum": total.item(), "size": world.size})
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_output_comes_once_from_rank_0(tmp_path: Path, world_size: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun: Sequence[str] = ()
    if world_size > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}")
    run = _python(*torchrun, str(script))
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines()] == [
        {"sum": 3 if world_size == 2 else 1, "size": world_size}
    ]
    assert run.stderr.count("counting") == 1 and "3/3" in run.stderr and "step 2" in run.stderr
    assert run.stderr.count("sums") == 1
