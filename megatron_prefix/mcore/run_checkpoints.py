"""The checkpoints of a run: when one is due, in the foreground or the background, which are kept, which is good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_prefix.checkpoint_folder import (
    checkpoints,
    find_damage,
    keep_last,
    remove_leftovers,
    set_aside,
    step_folder,
)
from megatron_prefix.collectives import all_gather_object, on_all_ranks
from megatron_prefix.mcore.checkpoint import PendingSave
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.model_config import ModelConfig


@dataclass(frozen=True)
class SaveSettings:
    """Where and when a run saves itself.

    Attributes:
        folder: of the checkpoints.
        every: steps between checkpoints; None saves at the end only.
        keep: how many of the newest stay; 0 keeps all.
        in_background: write while training goes on, from a copy in another process (megatron-core's).
    """

    folder: Path
    every: int | None = None
    keep: int = 2
    in_background: bool = False


class RunCheckpoints:
    """Saves a run. All ranks call its methods together.

    Args:
        settings: where and when.
        trainer: what is saved: weights, optimizer, generators.
        config: of the model.
        state: JSON values of the run that do not change.
        tokenizer_from: a folder whose tokenizer files are copied.

    Its methods raise ValueError where a checkpoint cannot be written; those before it are as they were.
    """

    def __init__(
        self,
        settings: SaveSettings,
        trainer: PackTrainer,
        config: ModelConfig,
        state: Mapping[str, Any],
        *,
        tokenizer_from: Path | None = None,
    ) -> None:
        self.settings, self.trainer, self.config, self.state = settings, trainer, config, state
        self.tokenizer_from = tokenizer_from
        self._queue = AsyncCallsQueue()
        self._pending: PendingSave | None = None

    def due(self, step: int) -> bool:
        """Whether to save after this step, be it the last or not."""
        return self.settings.every is not None and step % self.settings.every == 0

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the run as it is after ``step``, with ``state`` beside the values that do not change."""
        self.wait()
        with self.trainer.start_save(
            step_folder(self.settings.folder, step),
            self.config,
            state={**self.state, **state, "step": step},
            tokenizer_from=self.tokenizer_from,
            with_rng=True,
        ) as save:
            if not self.settings.in_background:
                save.finish()
                self._keep_last()
                return
            with save.named_errors():
                self._queue.schedule_async_request(save.request)
            self._pending = save

    def poll(self) -> None:
        """Complete a save in the background that all ranks have written."""
        self._finish(blocking=False)

    def wait(self) -> None:
        """Complete the save in the background, where there is one."""
        self._finish(blocking=True)

    def _finish(self, *, blocking: bool) -> None:
        if self._pending is not None:
            with self._pending.named_errors():
                self._queue.maybe_finalize_async_calls(blocking)
            if self._queue.get_num_unfinalized_calls() == 0:
                self._pending = None
                self._keep_last()

    def _keep_last(self) -> None:
        folder, count = self.settings.folder, self.settings.keep
        try:
            on_all_ranks(lambda: keep_last(folder, count) if dist.get_rank() == 0 else None, dist.group.WORLD)
        except OSError as error:
            raise ValueError(f"old checkpoints in {folder} could not be removed: {error}") from error


def newest_good_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in ``folder`` whose files are as they were written; None where there is no checkpoint.

    Every rank calls this: they share the reading. Leftovers of killed runs are removed, damaged checkpoints newer than
    the good one renamed.

    Args:
        folder: of the run.
        warn: told of every damaged checkpoint that is passed over.

    Raises:
        ValueError: there are checkpoints, all of them damaged.
        OSError: leftovers cannot be removed, or a damaged checkpoint cannot be renamed.
    """
    first = dist.get_rank() == 0
    on_all_ranks(lambda: remove_leftovers(folder) if first else None, dist.group.WORLD)
    found = checkpoints(folder)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(found):
        ranks = all_gather_object(find_damage(path, dist.get_rank(), dist.get_world_size()), dist.group.WORLD)
        damage = next((each for each in ranks if each is not None), None)
        if damage is None:
            break
        damaged.append((path, damage))
    if found and len(damaged) == len(found):
        newest, damage = damaged[0]
        raise ValueError(
            f"all {len(found)} checkpoints in {folder} are damaged; {newest.name}: {damage}. Name another folder to "
            "start anew, or restore one"
        )
    for path, damage in damaged:
        aside = on_all_ranks(partial(set_aside, path) if first else path.absolute, dist.group.WORLD)[0]
        warn(f"checkpoint {path} is damaged: {damage}; it is now {aside.name}")
    return found[-1 - len(damaged)] if found else None
