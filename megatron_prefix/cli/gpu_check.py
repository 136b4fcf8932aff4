"""`megatron-prefix gpu-check`: proof on a GPU, in one command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from megatron_prefix.cli.console import print_json, print_table, progress_bar, stderr_console
from megatron_prefix.gpu_check.program import (
    DEFAULT_OUT,
    DEFAULT_SECONDS,
    DEVICES,
    STAGES,
    Settings,
    draw,
    read_report,
    run_all,
)


class _RichOutput:
    """Lines and tables above a progress bar, on stderr."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.console, self.advance = stderr_console(), advance

    def line(self, text: str) -> None:
        style = "red" if text.startswith(("FAILED", "STOPPED")) else None
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print_table(title, columns, rows)

    def progress(self, note: str, steps: int = 0) -> None:
        self.advance(steps, note=note)


@click.command("gpu-check")
@click.option("--device", type=click.Choice(DEVICES), default="cuda", help="The CPU tries the program itself.")
@click.option("--quick", is_flag=True, help="Tiny sizes; always so on the CPU.")
@click.option("--seconds", type=click.FloatRange(0), default=DEFAULT_SECONDS, help="Then skip what is left.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT_OUT, help="JSON; PNG beside it."
)
@click.option(
    "--draw",
    "report_to_draw",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only draw the picture of an earlier run: its JSON.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
def gpu_check_command(
    device: str, quick: bool, seconds: float, out: Path, report_to_draw: Path | None, as_json: bool
) -> None:
    """Check every attention implementation on this machine's GPU, then time it: minutes, no other package needed.

    Compared with a dense oracle in fp64, forward and backward: ragged layouts and trees, grouped-query heads, head
    dims, context parallelism (its ranks one after another) and split groups; then determinism, then speed next to alpha
    and the device's matmul peak. An implementation that says it cannot run here is refused, which is no failure.

    Exit code 0: all that ran is right, 1: something failed, 2: it cannot run here. Where click is not installed,
    `python -m megatron_prefix.gpu_check` is the same.

    \b
    megatron-prefix gpu-check
    megatron-prefix gpu-check --device cpu
    megatron-prefix gpu-check --draw gpu_check.json
    """
    if report_to_draw is not None:
        stderr_console().print(f"picture: {draw(read_report(report_to_draw), report_to_draw)}", markup=False)
        return
    with progress_bar("gpu-check", len(STAGES), unit="stages") as advance:
        report = run_all(Settings(device, quick, seconds, out), _RichOutput(advance))
    if as_json:
        print_json(report.as_dict())
    if not report.ok:
        raise SystemExit(1)
