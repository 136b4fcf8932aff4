"""What `train --on-policy` trains on: prompts, their rewards, and the generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prefix.cli.on_policy_options import LOCAL, OnPolicyFlags
from megatron_prefix.cli.options import ModelFlags, ParallelFlags, check_writable
from megatron_prefix.cost_model import CostModel
from megatron_prefix.generation.dialects import DIALECTS
from megatron_prefix.generation.generator import Generator, LocalGenerator, SamplingSettings
from megatron_prefix.generation.on_policy import Prompt, load_reward, task_prompts
from megatron_prefix.generation.server import InferenceServer, ServerGenerator, ServerSettings
from megatron_prefix.generation.tasks import Task, TaskSource, read_prompts, reasoning_gym_tasks
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.export_weights import export_weights
from megatron_prefix.mcore.on_policy import OnPolicyRollouts, OnPolicySettings
from megatron_prefix.mcore.pack_trainer import PackTrainer
from megatron_prefix.mcore.parallel import ParallelSizes
from megatron_prefix.mcore.step_plan import step_planner
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.weights import check_exportable


@dataclass(frozen=True)
class OnPolicyData:
    """All that is known of a run on policy before its model is built.

    Attributes:
        flags: the options.
        config: of the model.
        settings: of an iteration.
        sampling: of its responses.
        prompts: all of them.
        sha256: of the prompts, their answers and the options that decide the rewards and the responses.
        tokenizer_from: a folder with the tokenizer.
        server: the server, where there is one.
    """

    flags: OnPolicyFlags
    config: ModelConfig
    settings: OnPolicySettings
    sampling: SamplingSettings
    prompts: Sequence[Prompt]
    sha256: str
    tokenizer_from: Path
    server: InferenceServer | None

    @property
    def name(self) -> str:
        """What the prompts are, for messages."""
        return ", ".join([*self.flags.tasks, *([str(self.flags.prompts)] if self.flags.prompts else [])])

    @classmethod
    def read(
        cls,
        flags: OnPolicyFlags,
        model: ModelFlags,
        config: ModelConfig,
        settings: OnPolicySettings,
        *,
        tokenizer: Path | None,
        temperature: float,
    ) -> OnPolicyData:
        """Prompts as the options say, checked against the model; a server is asked whether it is there.

        Raises:
            ValueError: what cannot be used.
        """
        tasks = [task for text in flags.tasks for task in reasoning_gym_tasks(TaskSource.parse(text), settings.seed)]
        tasks += read_prompts(flags.prompts) if flags.prompts else []
        folder = tokenizer or model.model
        assert folder is not None  # config has been read from --model
        reward = load_reward(flags.reward) if flags.reward else None
        prompts = task_prompts(tasks, ChatTokenizer(folder), reward)
        _check_prompts(prompts, flags, config, settings)
        server = None
        if flags.generator != LOCAL:
            check_exportable(config)
            assert flags.server is not None and flags.weights_folder is not None
            check_writable("--weights-folder", flags.weights_folder)
            server = InferenceServer(
                ServerSettings(flags.server, timeout_s=flags.server_timeout), DIALECTS[flags.generator]
            )
        sampling = SamplingSettings(flags.group_size, flags.max_new_tokens, temperature, config.eos_token_ids)
        return cls(flags, config, settings, sampling, prompts, _sha256(tasks, flags, sampling), folder, server)

    @property
    def batch_groups(self) -> int:
        """See `StepData`."""
        return self.settings.groups_per_step

    @property
    def may_split(self) -> bool:
        """See `StepData`."""
        return self.settings.max_tokens is not None

    def source(
        self, trainer: PackTrainer, cost: CostModel, steps: range, saved: Mapping[str, Any] | None
    ) -> OnPolicyRollouts:
        """See `StepData`."""
        planner = step_planner(trainer.config, trainer.dp_group.size(), cost, self.settings.max_tokens)
        return OnPolicyRollouts(trainer, self._generator(trainer), self.prompts, planner, self.settings)

    def describe(self, source: OnPolicyRollouts, steps: range, sizes: ParallelSizes) -> Iterator[str]:
        """See `StepData`."""
        yield (
            f"on policy: {len(self.prompts)} prompts, {self.settings.groups_per_iteration} per iteration, "
            f"{self.sampling.group_size} responses to each by {self.flags.server or 'the policy itself'}; "
            f"steps {steps.start} to {steps.stop}"
        )

    def _generator(self, trainer: PackTrainer) -> Generator:
        if self.server is None:
            return LocalGenerator(trainer.model, self.sampling, trainer.dp_group)
        export = partial(export_weights, trainer.model, self.config, tokenizer_from=self.tokenizer_from)
        assert self.flags.weights_folder is not None
        return ServerGenerator(self.server, self.sampling, export, self.flags.weights_folder, dist.group.WORLD)


def check_on_policy(
    flags: OnPolicyFlags,
    rollouts: Path | None,
    loss: LossConfig,
    parallel: ParallelFlags,
    step_counts: Mapping[str, int],
) -> None:
    """Refuse options of `train` that do not go with --on-policy, or need what is missing without it.

    ``step_counts``: the options that count steps or groups.

    Raises:
        ValueError: there is one.
    """
    if flags.on_policy == (rollouts is not None):
        raise ValueError("give either --rollouts, a file to train on, or --on-policy with --task or --prompts")
    if not flags.on_policy:
        return
    if loss.kl_coef:
        raise ValueError(
            f"--kl-coef {loss.kl_coef} with --on-policy: the policy of the start is not kept to measure the KL to; "
            "leave it out"
        )
    if flags.generator == LOCAL and (parallel.pp, parallel.cp) != (1, 1):
        raise ValueError(
            f"--generator local samples with --pp 1 and --cp 1, got {parallel.pp} and {parallel.cp}; use a server "
            f"(--generator {' or '.join(DIALECTS)})"
        )
    if step_counts["--compare"]:
        raise ValueError("--compare runs groups of --rollouts both ways; leave it out with --on-policy")
    for option, count in step_counts.items():
        if count % flags.steps_per_iteration:
            raise ValueError(
                f"{option} {count} ends within an iteration of {flags.steps_per_iteration} steps, from which no run "
                "goes on; use a multiple"
            )


def _check_prompts(
    prompts: Sequence[Prompt], flags: OnPolicyFlags, config: ModelConfig, settings: OnPolicySettings
) -> None:
    if len(prompts) < settings.groups_per_iteration:
        raise ValueError(
            f"{len(prompts)} prompts, an iteration takes {settings.groups_per_iteration} (--groups-per-step times "
            "--steps-per-iteration); give more, as in --task NAME:COUNT"
        )
    for prompt in prompts:
        length, outside = len(prompt.tokens), [t for t in prompt.tokens if not 0 <= t < config.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {prompt.name} has token id {outside[0]}, outside the model's vocabulary of "
                f"{config.vocab_size}; is --tokenizer that of the model?"
            )
        if length + flags.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {prompt.name} has {length} tokens, with --max-new-tokens {flags.max_new_tokens} it passes the "
                f"model's {config.max_position_embeddings} positions; shorten it or lower --max-new-tokens"
            )
        if settings.max_tokens is not None and max(length - 1, flags.max_new_tokens) > settings.max_tokens:
            raise ValueError(
                f"--max-tokens-per-microbatch {settings.max_tokens} must hold the longest prefix and response: prompt "
                f"{prompt.name} has {length - 1} rows, a response up to {flags.max_new_tokens}"
            )


def _sha256(tasks: Sequence[Task], flags: OnPolicyFlags, sampling: SamplingSettings) -> str:
    texts = [[task.name, task.prompt, task.answer] for task in tasks]
    values = [texts, flags.reward, flags.steps_per_iteration, repr(sampling)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
