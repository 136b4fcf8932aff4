"""Training on policy: each iteration samples from the policy as it is, scores, and trains on that alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_prefix.balancing import StepPlanner
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.epoch_order import EpochOrder
from megatron_prefix.generation.generator import Generator
from megatron_prefix.generation.on_policy import Prompt, score_groups
from megatron_prefix.mcore.pack_trainer import PackTrainer, StepInput
from megatron_prefix.mcore.step_source import StepBatch, StoredRollouts
from megatron_prefix.sampler import PrefixGroupSampler
from megatron_prefix.sharing import share_where_it_pays

ITERATIONS_APART = 1_000_003  # seeds of two runs do not meet within so many iterations


@dataclass(frozen=True)
class OnPolicySettings:
    """How an iteration is trained on.

    Attributes:
        groups_per_step: prefix groups of an optimizer step's global batch.
        steps_per_iteration: optimizer steps between two rollouts, each on its own groups. Above 1, all but the first
            are off policy by the steps before them, which ratios and clipping are for.
        seed: of sampling, and of the order of the groups in an iteration.
        max_tokens: most rows of a micro-batch.
        max_sampler_gap: largest mean difference between the sampler's log-probs and the policy's own (natural log), see
            `OnPolicyRollouts`; None does not look.

    Raises:
        ValueError: a number that is out of range.
    """

    groups_per_step: int
    steps_per_iteration: int = 1
    seed: int = 0
    max_tokens: int | None = None
    max_sampler_gap: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "steps_per_iteration"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_sampler_gap is not None and not self.max_sampler_gap > 0:
            raise ValueError(f"max_sampler_gap must be above 0, got {self.max_sampler_gap}")

    @property
    def groups_per_iteration(self) -> int:
        """Prompts that an iteration samples for."""
        return self.groups_per_step * self.steps_per_iteration


class OnPolicyRollouts:
    """A `StepSource`: hands the policy to the generator, samples, scores and measures the old log-probs.

    Old log-probs are those of the policy through the grouped path, as in training on stored rollouts; the sampler's own
    stay with the groups, for truncated importance weights. How far the two are apart on the sampled tokens, the mean of
    the absolute differences, is ``sampler_gap`` of every step: rounding, where the sampler has the policy's weights
    (about 1e-6 in fp32, 1e-2 between two bf16 implementations). A larger one than ``max_sampler_gap`` is an error: the
    sampler then has other weights, another temperature in its log-probs, or is another model.

    The other metrics are those of `score_groups`, for the whole iteration, and on its first step the seconds that went
    into handing over weights, sampling, scoring and old log-probs (0 on later steps).

    The state is the number of steps and the place in the prompts' order: with a generator that samples the same for the
    same weights and seed, a resumed run takes the same steps as an uninterrupted one. Nothing goes on within an
    iteration, whose policy is gone: after a run that was stopped there the next iteration begins.

    Args:
        trainer: of the policy.
        generator: which samples.
        prompts: all of them; an iteration takes the next `OnPolicySettings.groups_per_iteration`, see `EpochOrder`.
        planner: packs a step, and decides by its cost model where sharing pays.
        settings: how to train on them.
    """

    def __init__(
        self,
        trainer: PackTrainer,
        generator: Generator,
        prompts: Sequence[Prompt],
        planner: StepPlanner,
        settings: OnPolicySettings,
    ) -> None:
        self.trainer, self.generator, self.prompts = trainer, generator, prompts
        self.planner, self.settings = planner, settings
        self._order = EpochOrder(len(prompts), settings.groups_per_iteration, settings.seed)
        self.step = 0
        self._rollouts: StoredRollouts | None = None
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def next_step(self) -> StepBatch:
        """See `StepSource`.

        Raises:
            ValueError: the sampler's log-probs are not the policy's; or what the generator raises.
        """
        iteration, step = divmod(self.step, self.settings.steps_per_iteration)
        if step == 0:
            self._roll_out(iteration)
        assert self._rollouts is not None
        batch = self._rollouts.next_step()
        gap = self._sampler_gap(batch.inputs)
        limit = self.settings.max_sampler_gap
        if limit is not None and not gap <= limit:
            raise ValueError(
                f"iteration {iteration}: the sampler's log-probs are {gap:.2g} from the policy's own in the mean, the "
                f"limit is {limit:g}: the sampler did not take the new weights, or gives log-probs of another "
                "distribution (for vLLM: --logprobs-mode processed_logprobs) or in low precision (then raise the limit)"
            )
        self.step += 1
        metrics, self._seconds = self._metrics | self._seconds, dict.fromkeys(self._seconds, 0.0)
        return dataclasses.replace(batch, metrics=metrics | {"iteration": float(iteration), "sampler_gap": gap})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "prompts": self._order.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StepSource`."""
        length = self.settings.steps_per_iteration
        self.step = -(-state["step"] // length) * length
        self._order.load_state_dict(state["prompts"])

    def close(self) -> None:
        """Nothing is open."""

    def _roll_out(self, iteration: int) -> None:
        self._seconds = {}
        prompts = [self.prompts[i] for i in self._order.take()]
        with self._timed("update_weights"):
            self.generator.update_weights(iteration)
        seed = self.settings.seed * ITERATIONS_APART + iteration
        with self._timed("generate"):
            sampled = self.generator.generate([prompt.tokens for prompt in prompts], seed=seed)
        with self._timed("score"):
            groups, self._metrics = score_groups(prompts, sampled, dist.group.WORLD)
        shared, _ = share_where_it_pays(groups, self.planner.cost)
        sampler = PrefixGroupSampler(shared, self.planner, groups_per_step=self.settings.groups_per_step, seed=seed)
        self._rollouts = StoredRollouts(self.trainer, sampler, with_reference=False)
        with self._timed("old_log_probs"):
            self._rollouts.measure_old_log_probs(self.settings.steps_per_iteration)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[f"seconds_{what}"] = time.perf_counter() - started

    def _sampler_gap(self, inputs: Sequence[StepInput]) -> float:
        """Mean |difference| over the tokens of the global batch."""
        total, count = 0.0, 0
        for each in inputs:
            if (sampled := each.pack.sampler_log_probs) is not None:
                total += float((each.old_log_probs[each.pack.pairs.row].double() - sampled.double()).abs().sum())
                count += sampled.numel()
        shares = all_gather_object((total, count), self.trainer.dp_group)
        return sum(total for total, _ in shares) / sum(count for _, count in shares)
