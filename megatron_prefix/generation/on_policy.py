"""Prompts with rewards, and the scoring of what a generator sampled: the groups that one iteration trains on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from megatron_prefix.collectives import Group, all_gather_object, share_of_rank
from megatron_prefix.generation.sampling import SampledResponse
from megatron_prefix.generation.tasks import Score, Task, checked_score, score_response
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.rollouts import RolloutGroup

RewardFunction = Callable[[str, str, str], float]
"""A user's own reward: ``function(prompt, response, answer)``, all three text, the response without special tokens.

``answer`` is the task's expected answer. The reward must be a finite number of any size. What it raises (see
`SCORER_ERRORS`) counts as reward 0 and is counted as ``scorer_errors``. It is called on the response as a whole, on any
rank, once per response.
"""


@dataclass(frozen=True)
class Prompt:
    """What responses are sampled for.

    Attributes:
        name: in messages.
        tokens: token ids of the prompt.
        score: the reward of a response's token ids.
    """

    name: str
    tokens: Sequence[int]
    score: Callable[[Sequence[int]], Score]


def task_prompts(tasks: Sequence[Task], tokenizer: ChatTokenizer, reward: RewardFunction | None = None) -> list[Prompt]:
    """The prompts of tasks, scored by their own scorers or by ``reward``.

    Raises:
        ValueError: a prompt that the tokenizer's chat template refuses.
    """

    def score(task: Task, tokens: Sequence[int]) -> Score:
        text = tokenizer.decode(tokens)
        return score_response(task, text) if reward is None else checked_score(reward, task.prompt, text, task.answer)

    return [
        Prompt(f"{task.name}-{i}", tokenizer.encode_prompt(task.prompt), partial(score, task))
        for i, task in enumerate(tasks)
    ]


def load_reward(text: str) -> RewardFunction:
    """The `RewardFunction` named by "module:function", the module importable as in ``python -c "import module"``.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise ValueError(f"a reward function is module:function, got {text!r}")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {text!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"reward {text!r} is a {type(found).__name__}; name a function")
    return found


def score_groups(
    prompts: Sequence[Prompt], sampled: Sequence[Sequence[SampledResponse]], group: Group
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """The scored groups of all prompts, with the sampler's log-probs, and what is to know about them.

    The ranks of ``group`` share the scoring and get the same. Metrics: ``response_tokens``, the mean length;
    ``truncated``, the share of responses without an end-of-sequence token; ``scorer_errors``, how many responses a
    scorer failed on.
    """
    mine = share_of_rank(len(prompts), group)
    part = [[prompts[i].score(response.tokens) for response in sampled[i]] for i in mine]
    scores = [each for share in all_gather_object(part, group) for each in share]
    groups = [
        RolloutGroup(
            prompt=prompt.tokens,
            responses=[response.tokens for response in responses],
            rewards=[score.reward for score in given],
            group_id=prompt.name,
            log_probs=[response.log_probs for response in responses],
        )
        for prompt, responses, given in zip(prompts, sampled, scores, strict=True)
    ]
    responses = [response for each in sampled for response in each]
    return groups, {
        "response_tokens": statistics.fmean(len(response.tokens) for response in responses),
        "truncated": statistics.fmean(response.truncated for response in responses),
        "scorer_errors": float(sum(score.error is not None for given in scores for score in given)),
    }
