"""`megatron-prefix rollout`: sample responses to prompts with verifiable answers, score them, write a rollouts file."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_prefix.cli.console import print_json, print_table, progress_bar, stderr_console
from megatron_prefix.cli.options import ModelFlags, ParallelFlags, model_options, parallel_options
from megatron_prefix.collectives import all_gather_object, share_of_rank
from megatron_prefix.generation.sampling import SampledResponse, sample_responses
from megatron_prefix.generation.tasks import Score, Task, TaskSource, read_prompts, reasoning_gym_tasks, score_response
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.rollouts import RolloutGroup, write_rollouts

LOG_PROB_DIGITS = 5  # of the sampler's log-probs in the file: beyond what fp32 kernels agree on


@click.command("rollout")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME[:COUNT[:JSON]]",
    help="Prompts of a reasoning-gym generator, such as chain_sum:4; may be given several times.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Prompts of your own: a JSONL file of {"prompt": text, "answer": text}, exact match.',
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Rollouts JSONL to write.")
@click.option("--overwrite", is_flag=True, help="Replace --out where it exists.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with tokenizer.json; default: --model.",
)
@click.option("--group-size", type=click.IntRange(1), default=8, help="Responses per prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, help="Longest response.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, help="Of sampling; 0 takes the likeliest token.")
@click.option("--prompts-per-batch", type=click.IntRange(1), default=8, help="Prompts decoded at a time.")
@click.option("--seed", type=int, default=0, help="Of prompts and sampling.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")
@model_options
@parallel_options
def rollout_command(
    tasks: tuple[str, ...],
    prompts: Path | None,
    out: Path,
    overwrite: bool,
    tokenizer: Path | None,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    prompts_per_batch: int,
    seed: int,
    as_json: bool,
    flags: ModelFlags,
    parallel: ParallelFlags,
) -> None:
    """Sample a group of responses to every prompt, score them and write them with the sampler's log-probs.

    A prompt is encoded once; its responses are decoded together and read its keys in place. The response ends with an
    end-of-sequence token of the model, or is cut at --max-new-tokens. An answer is what stands in the last
    <answer>...</answer> of a response; without that, whatever scores best of the whole response, its first and last
    line, and its first and last word.

    \b
    megatron-prefix rollout --model smollm2 --task needle_haystack:8 --task chain_sum:4 --out rollouts.jsonl
    megatron-prefix rollout --model smollm2 --prompts mine.jsonl --out rollouts.jsonl
    torchrun --nproc-per-node 2 -m megatron_prefix rollout --tp 2 --model smollm2 --task chain_sum:4 --out r.jsonl
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another --out, or give --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}; create it first")
    if parallel.cp != 1:
        raise ValueError(
            f"--cp {parallel.cp}: sampling does not cut a sequence over ranks; use --dp, which shares the prompts"
        )
    config = flags.config()
    flags.check_impl(config, parallel.cp, backward=False)
    wanted = [task for text in tasks for task in reasoning_gym_tasks(TaskSource.parse(text), seed)]
    wanted += read_prompts(prompts) if prompts else []
    if not wanted:
        raise ValueError("there is nothing to sample for: give --task or --prompts")
    assert flags.model is not None  # config() has refused that
    text = ChatTokenizer(tokenizer or flags.model)
    encoded = [text.encode_prompt(task.prompt) for task in wanted]
    parallel.start(seed)
    (model,) = flags.build(config, parallel, seed=seed)
    started = time.perf_counter()
    mine = share_of_rank(len(wanted), parallel_state.get_data_parallel_group())
    with progress_bar("sample", len(mine) * group_size, unit="tokens") as advance:
        sampled = sample_responses(
            model,
            encoded[mine.start : mine.stop],
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_ids=config.eos_token_ids,
            seed=seed,
            first_prompt=mine.start,
            prompts_per_batch=prompts_per_batch,
            on_step=lambda tokens, finished: advance(finished, units=tokens),
        )
    shares = all_gather_object(sampled, parallel_state.get_data_parallel_group())
    seconds = time.perf_counter() - started
    if dist.get_rank() == 0:
        results = [
            _Result.score(task, tokens, responses, text)
            for task, tokens, responses in zip(
                wanted, encoded, [group for share in shares for group in share], strict=True
            )
        ]
        _write(out, results)
        _show(results)
        if as_json:
            print_json(_summary(results) | {"out": str(out), "seconds": round(seconds, 3)})
    destroy()


@dataclass(frozen=True)
class _Result:
    """One prompt with its responses."""

    task: Task
    prompt: list[int]
    responses: list[SampledResponse]
    texts: list[str]
    scores: list[Score]

    @classmethod
    def score(cls, task: Task, prompt: list[int], responses: list[SampledResponse], text: ChatTokenizer) -> _Result:
        texts = [text.decode(response.tokens) for response in responses]
        return cls(task, prompt, responses, texts, [score_response(task, written) for written in texts])

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores]

    @property
    def is_mixed(self) -> bool:
        """Rewards differ, so that the group has advantages."""
        return len(set(self.rewards)) > 1


def _write(out: Path, results: Sequence[_Result]) -> None:
    groups, notes = [], []
    seen: Counter[str] = Counter()
    for result in results:
        name = result.task.name
        groups.append(
            RolloutGroup(
                prompt=result.prompt,
                responses=[response.tokens for response in result.responses],
                rewards=result.rewards,
                group_id=f"{name}-{seen[name]}",
                log_probs=[[round(x, LOG_PROB_DIGITS) for x in response.log_probs] for response in result.responses],
            )
        )
        notes.append(
            {
                "task": name,
                "answer": result.task.answer,
                "prompt_text": result.task.prompt,
                "response_texts": result.texts,
                "truncated": [response.truncated for response in result.responses],
            }
        )
        seen[name] += 1
    write_rollouts(out, groups, notes)


def _summary(results: Sequence[_Result]) -> dict[str, Any]:
    """Means and counts over some groups."""
    responses = [response for result in results for response in result.responses]
    rewards = [reward for result in results for reward in result.rewards]
    return {
        "groups": len(results),
        "responses": len(responses),
        "mean_prompt_tokens": statistics.mean(len(result.prompt) for result in results),
        "mean_response_tokens": statistics.mean(len(response.tokens) for response in responses),
        "truncated_share": statistics.mean(response.truncated for response in responses),
        "mean_reward": statistics.mean(rewards),
        "reward_0_share": statistics.mean(reward <= 0 for reward in rewards),
        "reward_1_share": statistics.mean(reward >= 1 for reward in rewards),
        "mixed_groups": sum(result.is_mixed for result in results),
        "scorer_errors": sum(score.error is not None for result in results for score in result.scores),
    }


def _show(results: Sequence[_Result]) -> None:
    by_task: dict[str, list[_Result]] = {}
    for result in results:
        by_task.setdefault(result.task.name, []).append(result)
    rows = []
    for name, members in [*by_task.items(), *([("all", list(results))] if len(by_task) > 1 else [])]:
        values = _summary(members)
        rows.append(
            (
                name,
                values["groups"],
                f"{values['mean_prompt_tokens']:.0f}",
                f"{values['mean_response_tokens']:.1f}",
                f"{values['truncated_share']:.0%}",
                f"{values['mean_reward']:.3f}",
                f"{100 * values['reward_0_share']:.0f}/{values['reward_1_share']:.0%}",
                values["mixed_groups"],
            )
        )
    columns = ("task", "prompts", "prompt", "response", "cut", "reward", "0/1", "mixed")
    print_table("rollouts: mean lengths in tokens, rewards, groups with mixed rewards", columns, rows)
    errors = Counter(score.error for result in results for score in result.scores if score.error is not None)
    for error, count in errors.items():
        stderr_console().print(
            f"the scorer raised on {count} responses, which have reward 0 there: {error}", markup=False
        )
