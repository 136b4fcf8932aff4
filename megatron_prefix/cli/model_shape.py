"""Options that say what model a benchmark runs: sizes, or a checkpoint folder whose shape it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from megatron_prefix.cli.cp_options import SIZE, Command, gather
from megatron_prefix.model_config import ModelConfig

SHAPE_FLAGS = ("layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class ShapeFlags:
    """The options as given.

    Raises:
        ValueError: sizes on the command line beside --model.
    """

    layers: int
    hidden_size: int
    ffn_hidden_size: int | None
    heads: int
    kv_heads: int
    head_dim: int | None
    vocab_size: int
    model: Path | None

    def __post_init__(self) -> None:
        if self.model is None:
            return
        source = click.get_current_context().get_parameter_source
        given = [name for name in SHAPE_FLAGS if source(name) is click.core.ParameterSource.COMMANDLINE]
        if given:
            raise ValueError(f"--model gives the shape; leave out --{given[0].replace('_', '-')}")

    def config(self, max_positions: int) -> ModelConfig:
        """The model; one that is given by sizes has ``max_positions``. Raises ValueError as `ModelConfig` does."""
        if self.model is not None:
            return ModelConfig.from_json(self.model / "model.json" if self.model.is_dir() else self.model)
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size or 3 * self.hidden_size,
            num_attention_heads=self.heads,
            num_query_groups=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=max_positions,
        )


def shape_flags(command: Command) -> Command:
    """Add the options; the command gets them as ``shape: ShapeFlags``."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--layers", type=SIZE, default=4, help="Transformer layers."),
        click.option("--hidden-size", type=SIZE, default=256, help="Width of the model."),
        click.option("--ffn-hidden-size", type=SIZE, help="Width of the MLP; default: 3 x --hidden-size."),
        click.option("--heads", type=SIZE, default=4, help="Query heads."),
        click.option("--kv-heads", type=SIZE, default=2, help="Key-value heads."),
        click.option("--head-dim", type=SIZE, help="Channels of a head; default: --hidden-size / --heads."),
        click.option("--vocab-size", type=SIZE, default=2048, help="Tokens of the vocabulary."),
        click.option(
            "--model",
            type=click.Path(exists=True, path_type=Path),
            help="Checkpoint folder or model.json whose shape to use instead (weights stay random).",
        ),
    )
    return gather(command, "shape", ShapeFlags, *options)
