"""--engine and --ds-config: what reduces a run's gradients and updates its parameters."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from megatron_prefix.cli.cp_options import Command, gather
from megatron_prefix.cli.options import ParallelFlags
from megatron_prefix.cli.run_options import bytes_per_parameter
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.parallel import ParallelSizes
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings

ENGINES = ("megatron", "deepspeed")


@dataclass(frozen=True)
class EngineFlags:
    """The engine as given.

    Raises:
        ValueError: DeepSpeed without a configuration or not installed, or a configuration without DeepSpeed.
    """

    engine: str = "megatron"
    ds_config: Path | None = None

    def __post_init__(self) -> None:
        if (self.engine == "deepspeed") != (self.ds_config is not None):
            raise ValueError("--engine deepspeed and --ds-config, its JSON file, go together: give both or neither")
        if self.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("--engine deepspeed needs DeepSpeed: pip install 'megatron-prefix[deepspeed]'")

    def open(
        self, settings: TrainSettings, dtype: torch.dtype, parallel: ParallelFlags, groups_per_step: int
    ) -> MegatronEngine | DeepSpeedEngine:
        """The engine, checked against the run before any work.

        Raises:
            ValueError: what it cannot do.
        """
        if self.ds_config is None:
            return MegatronEngine()
        if parallel.pp > 1 or parallel.vpp > 1:
            raise ValueError(
                f"--engine deepspeed with --pp {parallel.pp}: ZeRO-2 and 3 know no pipeline, and DeepSpeed's own sends "
                "no layouts of packs between stages; leave --pp out, or use --engine megatron"
            )
        _keep_quiet()
        from megatron_prefix.deepspeed.config import engine_config, read_config  # DeepSpeed takes seconds to import

        config = read_config(self.ds_config)
        return DeepSpeedEngine(config, engine_config(config, settings, dtype, groups_per_step), dtype)


@dataclass(frozen=True)
class MegatronEngine:
    """megatron-core's DDP and optimizers, which take all options."""

    def check_options(self, given: Mapping[str, bool]) -> None:
        """See `DeepSpeedEngine`."""

    def check_parts(self, has_parts: bool) -> None:
        """See `DeepSpeedEngine`."""

    def start(self) -> list[str]:
        """See `DeepSpeedEngine`."""
        return []

    def state(self, sizes: ParallelSizes) -> dict[str, Any]:
        """See `DeepSpeedEngine`."""
        return {"engine": "megatron"}

    def bytes_per_parameter(self, dtype: torch.dtype, optimizer: str) -> int:
        """See `DeepSpeedEngine`."""
        return bytes_per_parameter(dtype, optimizer)

    def trainer(self, model: Any, settings: TrainSettings, loss: LossConfig) -> PackTrainer:
        """See `DeepSpeedEngine`."""
        return PolicyTrainer(model, settings, loss)


@dataclass(frozen=True)
class DeepSpeedEngine:
    """DeepSpeed with a checked configuration.

    Attributes:
        config: as in the file.
        values: as the engine gets it.
        dtype: of the model.
    """

    config: Mapping[str, Any]
    values: Mapping[str, Any]
    dtype: torch.dtype

    def check_options(self, given: Mapping[str, bool]) -> None:
        """Refuse options that need megatron-core's engine.

        Args:
            given: whether each of them is; with ``--on-policy`` generation needs whole parameters, as below ZeRO-3.

        Raises:
            ValueError: one is.
        """
        from megatron_prefix.deepspeed.config import zero_stage

        stage = zero_stage(self.values)
        for option, is_given in given.items():
            if is_given and (option != "--on-policy" or stage == 3):
                raise ValueError(
                    f"{option} with --engine deepspeed{' at ZeRO-3' if stage == 3 else ''} is not supported; leave it "
                    "out, or use --engine megatron"
                )

    def check_parts(self, has_parts: bool) -> None:
        """Refuse split groups where the ZeRO stage cannot take them.

        Raises:
            ValueError: there are some.
        """
        from megatron_prefix.deepspeed.config import grad_dtype, zero_stage
        from megatron_prefix.deepspeed.training import check_split_groups

        if has_parts:
            check_split_groups(zero_stage(self.values), self.dtype, grad_dtype(self.values, self.dtype))

    def start(self) -> list[str]:
        """Make ready for `deepspeed.initialize`, until the command ends; returns lines for the user."""
        click.get_current_context().with_resource(_single_process_launched())
        if torch.cuda.is_available():
            return []
        from megatron_prefix.deepspeed.cpu import use_plain_gloo

        return [use_plain_gloo()]

    def state(self, sizes: ParallelSizes) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must have in common: DeepSpeed's files are those of their ranks."""
        from megatron_prefix.deepspeed.config import zero_stage

        ranks = {"tp": sizes.tp, "cp": sizes.cp, "dp": sizes.dp}
        return {"engine": "deepspeed", "zero_stage": zero_stage(self.values)} | ranks

    def bytes_per_parameter(self, dtype: torch.dtype, optimizer: str) -> int:
        """What a checkpoint holds of one parameter: itself, also in DeepSpeed's files, an fp32 copy and two moments."""
        return 2 * dtype.itemsize + 3 * 4

    def trainer(self, model: Any, settings: TrainSettings, loss: LossConfig) -> PackTrainer:
        """A policy in training by this engine."""
        from megatron_prefix.deepspeed.training import DeepSpeedTrainer

        return DeepSpeedTrainer(model, settings, loss, self.config)


def engine_options(command: Command) -> Command:
    """Add the engine; the command gets it as ``engine: EngineFlags``."""
    return gather(
        command,
        "engine",
        EngineFlags,
        click.option("--engine", type=click.Choice(ENGINES), default="megatron", help="Reduces gradients and updates."),
        click.option(
            "--ds-config",
            type=click.Path(dir_okay=False, path_type=Path),
            help="DeepSpeed's JSON configuration, for --engine deepspeed.",
        ),
    )


@contextmanager
def _single_process_launched() -> Iterator[None]:
    """DeepSpeed reads in the environment, also in ZeRO-3's steps, what launchers set there; not all runs have one."""
    missing = {} if "LOCAL_RANK" in os.environ else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= missing
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _keep_quiet() -> None:
    """DeepSpeed logs every thing that it makes, to stdout, which is for results; and calls what torch has renamed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    with redirect_stdout(sys.stderr):
        from deepspeed.utils import logger
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
