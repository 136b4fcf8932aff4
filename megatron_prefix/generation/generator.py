"""What samples responses from the policy: the interface, and the project's own batched sampler behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_prefix.collectives import Group, all_gather_object, share_of_rank
from megatron_prefix.generation.sampling import SampledResponse, sample_responses
from megatron_prefix.mcore.stages import copy_parameters


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled.

    Attributes:
        group_size: responses per prompt.
        max_new_tokens: a response without an end-of-sequence token stops here.
        temperature: logits are divided by it.
        eos_token_ids: tokens that end a response, the last one of it.

    Raises:
        ValueError: a number that is out of range.
    """

    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0 to train on what is sampled, got {self.temperature}")


class Generator(Protocol):
    """Samples from the policy. Every rank of the job calls each method with the same arguments."""

    def update_weights(self, iteration: int) -> None:
        """Take the policy as it now is, for all that `generate` samples from here on."""

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[list[SampledResponse]]:
        """Sample a group of responses to each prompt; every rank gets all of them.

        Args:
            prompts: token ids, at least one each.
            seed: of the random numbers.

        Returns:
            For each prompt its responses, with the log-probs of the distribution that they were drawn from.
        """


class LocalGenerator:
    """`sample_responses` on a model of this job. Data-parallel ranks share the prompts.

    The responses to a prompt depend on the weights, the seed and its place among the prompts alone, so a resumed run
    samples what an uninterrupted one does.

    Args:
        model: with a prefix-grouped layer spec, in one pipeline stage and without context parallelism; wrapped or not.
        sampling: how.
        dp_group: the ranks that hold copies of ``model``.
        policy: the model whose weights are taken, where it is not ``model`` itself, which is always up to date.
        prompts_per_batch: prompts decoded at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sampling: SamplingSettings,
        dp_group: Group,
        *,
        policy: torch.nn.Module | None = None,
        prompts_per_batch: int = 8,
    ) -> None:
        self.model, self.policy, self.sampling = model, policy, sampling
        self.dp_group, self.prompts_per_batch = dp_group, prompts_per_batch

    def update_weights(self, iteration: int) -> None:
        if self.policy is not None:
            copy_parameters(self.policy, self.model)

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[list[SampledResponse]]:
        mine = share_of_rank(len(prompts), self.dp_group)
        sampled = sample_responses(
            self.model,
            prompts[mine.start : mine.stop],
            group_size=self.sampling.group_size,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            eos_token_ids=self.sampling.eos_token_ids,
            seed=seed,
            first_prompt=mine.start,
            prompts_per_batch=self.prompts_per_batch,
        )
        return [group for share in all_gather_object(sampled, self.dp_group) for group in share]
