"""Options of a training run beside its model and its loss: checkpoints, and the learning rate's schedule."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console

from megatron_prefix.checkpoint_folder import latest_checkpoint
from megatron_prefix.cli.cp_options import Command, gather
from megatron_prefix.cli.options import check_writable
from megatron_prefix.mcore.lr_schedule import DECAY_STYLES, LrSchedule
from megatron_prefix.mcore.run_checkpoints import SaveSettings, newest_good_checkpoint


@dataclass(frozen=True)
class SaveFlags:
    """--save and what belongs to it.

    Raises:
        ValueError: an option that needs --save is given without it.
    """

    save: Path | None = None
    save_every: int | None = None
    keep: int = 2
    async_save: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if (self.resume or self.save_every or self.async_save) and self.save is None:
            raise ValueError("--resume, --save-every and --async-save need --save, the folder of the checkpoints")

    def check(self, num_bytes: int) -> None:
        """See, before any work, whether a run can be saved there.

        Args:
            num_bytes: of a checkpoint, roughly.

        Raises:
            ValueError: the folder has a run already, cannot be written, or has no room for a checkpoint.
        """
        if self.save is None:
            return
        found = latest_checkpoint(self.save)
        if found and not self.resume:
            raise ValueError(
                f"--save {self.save} already holds {found.name}; add --resume to go on, or name another folder"
            )
        check_writable("--save", self.save)
        nearest = next(path for path in (self.save, *self.save.absolute().parents) if path.exists())
        free = shutil.disk_usage(nearest).free
        if free < num_bytes:
            raise ValueError(
                f"--save: a checkpoint takes about {num_bytes / 2**20:,.0f} MiB, the disk of {self.save} has "
                f"{free / 2**20:,.0f} MiB free; make room or name another folder"
            )

    def start_from(self, console: Console) -> Path | None:
        """The newest good checkpoint to resume from, None where there is none or none is wanted; all ranks call it.

        Raises:
            ValueError: all checkpoints are damaged, or what earlier runs left cannot be removed or renamed.
        """
        if self.save is None:
            return None
        try:
            return newest_good_checkpoint(
                self.save, lambda text: console.print(f"warning: {text}. Going back to the one before", markup=False)
            )
        except OSError as error:
            raise ValueError(f"--save: what earlier runs left in {self.save} cannot be tidied up: {error}") from error

    def settings(self) -> SaveSettings | None:
        """Of the loop; None without --save."""
        return SaveSettings(self.save, self.save_every, self.keep, self.async_save) if self.save else None


def bytes_per_parameter(dtype: torch.dtype, optimizer: str) -> int:
    """What a checkpoint holds for one parameter: itself, in bf16 also its fp32 copy, and Adam's two moments."""
    full = max(dtype.itemsize, 4)
    copy = full if dtype.itemsize < 4 else 0
    return dtype.itemsize + copy + (2 * full if optimizer == "adam" else 0)


def save_options(command: Command) -> Command:
    """Add checkpoints; the command gets them as ``saving: SaveFlags``."""
    return gather(
        command,
        "saving",
        SaveFlags,
        click.option("--save", type=click.Path(file_okay=False, path_type=Path), help="Folder of the checkpoints."),
        click.option("--save-every", type=click.IntRange(1), help="Steps between them; default: at the end only."),
        click.option("--keep", type=click.IntRange(0), default=2, help="Newest checkpoints that stay; 0 keeps all."),
        click.option("--async-save", is_flag=True, help="Write checkpoints in the background, from a copy in memory."),
        click.option("--resume", is_flag=True, help="Go on from the newest good checkpoint in --save, if any."),
    )


def schedule_options(command: Command) -> Command:
    """Add the learning rate's schedule; the command gets it as ``schedule: LrSchedule``."""
    return gather(
        command,
        "schedule",
        LrSchedule,
        click.option("--lr-decay-style", type=click.Choice(DECAY_STYLES), default="constant", help="After warm-up."),
        click.option("--lr-warmup-steps", type=click.IntRange(0), default=0, help="Updates in which the rate rises."),
        click.option("--lr-decay-steps", type=click.IntRange(1), help="Length of the schedule; default: --steps."),
        click.option("--lr-wsd-decay-steps", type=click.IntRange(1), help="Length of WSD's decay at its end."),
        click.option("--min-lr", type=float, default=0.0, help="What the rate falls to."),
    )
