"""Options that several commands share, and what they stand for: process groups, groups of rollouts, models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_prefix.attention import IMPLS, check_impl
from megatron_prefix.attention.prefix_cache import PREFIX_GRAD_DTYPES
from megatron_prefix.cli.console import start_distributed
from megatron_prefix.cli.cp_options import Command, check_a2a, cp_options, cp_placement_option, gather
from megatron_prefix.cli.pipeline_options import pp_option, vpp_option
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.checkpoint import CONFIG_FILE, load_checkpoint, load_config
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import RECOMPUTE, build_model, transformer_config
from megatron_prefix.mcore.parallel import ParallelSizes, initialize
from megatron_prefix.mcore.repeated import build_plain_model
from megatron_prefix.mcore.schedule import PREFIX_ACTIVATIONS
from megatron_prefix.mcore.stages import Model, copy_parameters
from megatron_prefix.mcore.training import TrainSettings
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import check_sampler_log_probs
from megatron_prefix.rollout_stats import sequence_lengths
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup, check_vocabulary
from megatron_prefix.splitting import Split, plan_splits

prefix_activations_option = click.option(
    "--prefix-activations",
    type=click.Choice(PREFIX_ACTIVATIONS),
    default="keep",
    help="What becomes of the activations of a split group's prefix until its backward.",
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ParallelFlags:
    """The parallel sizes and how they talk, as given."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_comm_type: str = "p2p"
    cp_a2a: int | None = None
    dp: int | None = None
    sequence_parallel: bool = False

    def start(self, seed: int, timeout_s: float = 600) -> ParallelSizes:
        """Process groups as torchrun and the flags say, on the GPU where there is one, else on the CPU.

        Raises:
            ValueError: sizes that do not divide the world size, or are not supported.
        """
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp of 2 or more")
        check_a2a(self.cp_comm_type, self.cp_a2a)
        if not torch.cuda.is_available():
            run_on_cpu()
        vpp = None if self.vpp == 1 else self.vpp
        sizes = ParallelSizes(tp=self.tp, pp=self.pp, cp=self.cp, vpp=vpp, dp=self.dp, cp_a2a=self.cp_a2a)
        world = start_distributed(timeout_s=timeout_s)
        sizes.resolve(world.size)
        return initialize(sizes, seed=seed, local_rank=world.local_rank, timeout_s=timeout_s)

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that these flags set."""
        if self.cp == 1:
            return {}
        levels = None if self.cp_a2a is None else [self.cp_a2a, self.cp // self.cp_a2a]
        return {"cp_comm_type": self.cp_comm_type, "hierarchical_context_parallel_sizes": levels}


@dataclass(frozen=True)
class ModelFlags:
    """--model, --dtype, --impl, --use-te and --recompute; dtype "auto" becomes bf16 on a GPU and fp32 elsewhere."""

    model: Path | None
    dtype: str
    impl: str
    use_te: bool
    recompute: str

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bf16" if torch.cuda.is_available() else "fp32")
        if self.use_te and not HAVE_TE:
            raise ValueError("--use-te needs Transformer Engine: pip install 'megatron-prefix[te]', or leave it out")

    def config(self) -> ModelConfig:
        """The model's shape, from a checkpoint folder or a JSON file.

        Raises:
            ValueError: no --model, or neither a checkpoint folder nor a model.json.
        """
        if self.model is None:
            raise ValueError("--model is missing: a checkpoint folder (from `import` or `train`) or a model.json")
        return load_config(self.model) if self.model.is_dir() else ModelConfig.from_json(self.model)

    def check_impl(self, config: ModelConfig, cp_size: int, has_parts: bool = False, backward: bool = True) -> None:
        """Refuse an attention implementation that cannot run this model on this machine, before any work.

        Raises:
            ValueError: why it cannot, and what can.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        how: dict[str, Any] = {"cp_size": cp_size, "has_parts": has_parts, "backward": backward}
        check_impl(self.impl, device, self.torch_dtype, config.channels, **how)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return DTYPES[self.dtype]

    def build(self, config: ModelConfig, parallel: ParallelFlags, *, seed: int) -> list[torch.nn.Module]:
        """This rank's chunks of the model with prefix-grouped attention, random or from the checkpoint.

        Raises:
            ValueError: what the sizes or the checkpoint do not allow.
        """
        settings: dict[str, Any] = self._settings(parallel) | {"overrides": parallel.overrides}
        spec = prefix_gpt_layer_spec(transformer_config(config, **settings), impl=self.impl, use_te=self.use_te)
        settings |= {"layer_spec": spec, "recompute": self.recompute, "seed": seed}
        stages = [None] if parallel.vpp == 1 else range(parallel.vpp)
        chunks: list[torch.nn.Module] = [build_model(config, vp_stage=stage, **settings) for stage in stages]
        if self.model is not None and self.model.is_dir():
            load_checkpoint(self.model, chunks, config=config)
        return chunks

    def build_plain(self, config: ModelConfig, parallel: ParallelFlags, weights: Model) -> torch.nn.Module:
        """The whole model with megatron-core's plain local spec on every rank, with the values of ``weights``."""
        model = build_plain_model(config, recompute=self.recompute, **self._settings(parallel))
        copy_parameters(weights, model)
        return model

    def _settings(self, parallel: ParallelFlags) -> dict[str, Any]:
        return {"dtype": self.torch_dtype, "sequence_parallel": parallel.sequence_parallel}


def check_groups(
    groups: Sequence[RolloutGroup | RolloutTree], config: ModelConfig, max_tokens: int | None
) -> list[Split]:
    """Refuse groups that the model or a micro-batch cannot take, before any work; returns how groups will be split.

    Raises:
        ValueError: a token of a prefix group outside the vocabulary (those of trees are checked when they are read), a
            sequence longer than the model's positions, a response or prefix larger than a micro-batch, or the sampler's
            log-probs in some groups only.
    """
    check_vocabulary([group for group in groups if isinstance(group, RolloutGroup)], config.vocab_size)
    for i, group in enumerate(groups):
        longest = max(sequence_lengths(group))
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"group {i} ({group.group_id!r}) has a sequence of {longest} tokens, the model takes "
                f"{config.max_position_embeddings}; shorten or drop it"
            )
    check_sampler_log_probs(groups)
    return check_limit(groups, max_tokens)


def check_limit(groups: Sequence[RolloutGroup | RolloutTree], max_tokens: int | None) -> list[Split]:
    """Refuse groups of which a response or prefix is larger than a micro-batch; returns how groups will be split.

    Raises:
        ValueError: there is one; names --max-tokens-per-microbatch and what it must be.
    """
    try:
        return [split for split in plan_splits(groups, max_tokens_per_pack=max_tokens) if split is not None]
    except ValueError as error:
        raise ValueError(str(error).replace("max_tokens_per_pack", "--max-tokens-per-microbatch")) from error


def check_writable(option: str, folder: Path) -> None:
    """See whether files can be written to ``folder``, before any work; a folder that is not there is not made yet.

    Raises:
        ValueError: they cannot; names the option.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: cannot write to the folder {folder} ({error.strerror}); name one that can be written"
        ) from error


def parallel_options(command: Command) -> Command:
    """Add the parallel sizes; the command gets them as ``parallel: ParallelFlags``."""
    return gather(
        command,
        "parallel",
        ParallelFlags,
        click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel size."),
        pp_option,
        vpp_option,
        *cp_options(),
        click.option("--dp", type=click.IntRange(1), default=None, help="Data-parallel size; default: what is left."),
        click.option("--sequence-parallel", is_flag=True, help="Shard activations between layers over --tp."),
    )


def model_options(command: Command) -> Command:
    """Add the model and how it is built; the command gets them as ``flags: ModelFlags``."""
    return gather(
        command,
        "flags",
        ModelFlags,
        click.option(
            "--model",
            type=click.Path(exists=True, path_type=Path),
            help=f"Checkpoint folder, or a {CONFIG_FILE} for random weights.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", *DTYPES]),
            default="auto",
            help="Of parameters and activations; auto is bf16 on a GPU, fp32 on the CPU.",
        ),
        click.option("--impl", type=click.Choice(IMPLS), default="auto", help="Attention implementation."),
        click.option("--use-te", is_flag=True, help="Transformer Engine's linear and norm modules."),
        click.option("--recompute", type=click.Choice(RECOMPUTE), default="none", help="Activation recompute."),
    )


def loss_options(command: Command) -> Command:
    """Add the loss; the command gets it as ``loss: LossConfig``."""
    return gather(
        command,
        "loss",
        LossConfig,
        click.option("--clip-low", type=float, default=0.2, help="Ratios are clipped below 1 minus this."),
        click.option("--clip-high", type=float, default=0.2, help="Ratios are clipped above 1 plus this."),
        click.option("--kl-coef", type=float, default=0.0, help="Weight of the KL to the policy at the start."),
        click.option("--kl-estimator", type=click.Choice(["k1", "k2", "k3"]), default="k3", help="Of that KL."),
        click.option(
            "--aggregation",
            type=click.Choice(["token", "sequence", "constant"]),
            default="token",
            help="Mean over tokens (DAPO), over sequences (GRPO), or a constant length (Dr. GRPO).",
        ),
        click.option("--constant-length", type=int, help="Tokens, for --aggregation constant."),
        click.option("--ratio", type=click.Choice(["token", "sequence"]), default="token", help="sequence is GSPO."),
        click.option("--importance-cap", type=float, help="Truncated importance weights against the sampler."),
        click.option("--entropy-coef", type=float, default=0.0, help="Weight of the entropy bonus."),
    )


def train_options(command: Command) -> Command:
    """Add the optimizer; the command gets it as ``settings: TrainSettings``."""
    return gather(
        command,
        "settings",
        TrainSettings,
        click.option("--lr", "learning_rate", type=float, default=1e-6, help="Learning rate."),
        click.option("--weight-decay", type=float, default=0.0, help="Decoupled weight decay."),
        click.option("--clip-grad", type=float, default=1.0, help="Largest gradient norm; 0 turns clipping off."),
        click.option("--optimizer", type=click.Choice(["adam", "sgd"]), default="adam", help="Update rule."),
        click.option("--distributed-optimizer", is_flag=True, help="Shard optimizer state over --dp."),
        click.option("--overlap-grad-reduce", is_flag=True, help="Reduce gradients while backward runs."),
        click.option("--temperature", type=float, default=1.0, help="Logits are divided by it, as in sampling."),
        click.option("--log-entropy", is_flag=True, help="Measure the entropy also without --entropy-coef."),
        click.option("--chunk-rows", type=int, default=4096, help="Most rows whose logits exist at once."),
        cp_placement_option,
        prefix_activations_option,
        click.option(
            "--prefix-grad-dtype",
            type=click.Choice(PREFIX_GRAD_DTYPES),
            default="fp32",
            help="Of the sums of gradients of a split group's prefix; param: that of the parameters.",
        ),
        click.option(
            "--max-live-prefixes",
            type=click.IntRange(1),
            help="Most prefixes of split groups that a pipeline stage holds; default: as few as a small bubble takes.",
        ),
    )
