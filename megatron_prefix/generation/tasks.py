"""What to sample for: prompts with verifiable answers, and the scoring of responses. No model, no tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# What pure-Python scorers raise when a response is not what they expect; anything else is a defect and ends the run.
SCORER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        name: of the kind of task, for summaries.
        prompt: text shown to the model.
        answer: the expected answer, as text.
        scorer: reward of an answer.
    """

    name: str
    prompt: str
    answer: str
    scorer: Callable[[str], float]


@dataclass(frozen=True)
class Score:
    """Reward of a response; ``error`` says what the scorer raised, where it did (the reward is then 0)."""

    reward: float
    error: str | None = None


@dataclass(frozen=True)
class TaskSource:
    """Some prompts of one reasoning-gym generator.

    Attributes:
        name: of the generator, such as "needle_haystack".
        count: prompts wanted.
        options: settings of the generator, such as {"min_num_statements": 30}.
    """

    name: str
    count: int
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> TaskSource:
        """From "NAME", "NAME:COUNT" or "NAME:COUNT:OPTIONS", the options as a JSON object.

        Raises:
            ValueError: anything else.
        """
        name, _, rest = text.partition(":")
        count, _, options = rest.partition(":")
        if not name or not (count or "1").isdecimal() or int(count or "1") < 1:
            raise ValueError(
                f"a task is NAME, NAME:COUNT or NAME:COUNT:{{JSON options}}, COUNT at least 1; got {text!r}"
            )
        try:
            settings = json.loads(options or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"task {name!r}: options are not JSON ({error}): {options!r}") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f'task {name!r}: options must be a JSON object such as {{"min_terms": 2}}, got {options!r}'
            )
        if "size" in settings:
            raise ValueError(f"task {name!r}: the number of prompts is COUNT in NAME:COUNT, not the option 'size'")
        return cls(name, int(count or "1"), settings)


def reasoning_gym_tasks(source: TaskSource, seed: int) -> list[Task]:
    """Prompts and scorers of a reasoning-gym generator, the same for a seed.

    Raises:
        ValueError: an unknown generator, or options that it refuses.
        ImportError: the cli extra is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("--task needs reasoning-gym: pip install 'megatron-prefix[cli]'") from error
    try:
        dataset = reasoning_gym.create_dataset(source.name, **{"seed": seed, "size": source.count} | source.options)
        entries = [dataset[i] for i in range(source.count)]
    except (AssertionError, IndexError, TypeError, ValueError) as error:  # what its settings classes raise
        raise ValueError(
            f"task {source.name!r} with options {json.dumps(source.options)}: reasoning-gym refuses them: {error}"
        ) from error

    def scorer(entry: dict[str, Any], answer: str) -> float:
        return dataset.score_answer(answer=answer, entry=entry)

    return [Task(source.name, entry["question"], str(entry["answer"]), partial(scorer, entry)) for entry in entries]


def read_prompts(path: str | Path) -> list[Task]:
    """Prompts of a JSONL file: one {"prompt": text, "answer": text} per line, "task" (a name) optional.

    An answer scores 1 when it is the expected text, else 0.

    Raises:
        ValueError: FILE:LINE and what is wrong there; or a file without prompts.
    """
    tasks = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read prompts: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}:{number}: a line must be a JSON object, got {type(entry).__name__}")
        for key in ("prompt", "answer"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(f"{path}:{number}: {key!r} must be text, got {entry.get(key)!r}")
        name, answer = str(entry.get("task", Path(path).stem)), entry["answer"]
        tasks.append(Task(name, entry["prompt"], answer, partial(_exact_match, answer)))
    if not tasks:
        raise ValueError(f"{path}: the file holds no prompts")
    return tasks


def score_response(task: Task, response: str) -> Score:
    """The best reward among the `answer_candidates` of a response. A scorer that raises counts as 0 and is named."""
    scores = [checked_score(task.scorer, answer) for answer in answer_candidates(response)]
    failed = [score.error for score in scores if score.error is not None]
    return Score(max([0.0, *(score.reward for score in scores)]), failed[-1] if failed else None)


def checked_score(scorer: Callable[..., float], *arguments: str) -> Score:
    """What ``scorer`` gives for the arguments; reward 0, and why, where it raises or gives no finite number."""
    try:
        reward = float(scorer(*arguments))
    except SCORER_ERRORS as error:
        return Score(0.0, f"{type(error).__name__}: {error}")
    return Score(reward) if math.isfinite(reward) else Score(0.0, f"the reward is {reward}")


def answer_candidates(response: str) -> list[str]:
    """What may be meant as the answer: the text inside the last <answer> tag alone; without one the whole response, its
    first and last line, and its first and last word, each without the punctuation behind it."""
    tagged = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    if tagged:
        return [tagged[-1].strip()]
    whole = response.strip()
    if not whole:
        return []
    lines, words = whole.splitlines(), whole.split()
    found = (whole, lines[0].strip(), lines[-1].strip(), words[0], words[-1])
    return list(dict.fromkeys(text.rstrip(".,:;!?") or text for text in found))


def _exact_match(expected: str, answer: str) -> float:
    return float(answer.strip() == expected.strip())
