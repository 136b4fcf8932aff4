"""Tasks, answers, scores, the chat tokenizer, and the `rollout` command on a tiny model."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("tokenizers")

from megatron_prefix.cli.main import main
from megatron_prefix.generation.tasks import (
    Task,
    TaskSource,
    answer_candidates,
    read_prompts,
    reasoning_gym_tasks,
    score_response,
)
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollouts import read_rollouts
from tests.tokenizer_files import PLAIN, write_byte_tokenizer

pytestmark = pytest.mark.ci_newest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a byte tokenizer, a chat template, and the shape of a tiny model (random weights)."""
    folder = write_byte_tokenizer(tmp_path / "tiny", PLAIN, bos_token={"content": "<s>"})
    ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=260,
        max_position_embeddings=256, tied_embeddings=True, eos_token_ids=(257, 5),
    ).to_json(folder / "model.json")  # fmt: skip
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "What is 1 + 1?", "answer": "2"}\n\n{"prompt": "Say a.", "answer": "a", "task": "say"}\n'
    )
    return file


def a_task(scorer: Callable[[str], float]) -> Task:
    return Task("t", "prompt", "answer", scorer)


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        ("Luk", ["Luk"]),
        (" Luk.\n", ["Luk"]),
        ("The answer is 12.", ["The answer is 12", "The", "12"]),
        ("First this.\nThen 7 8", ["First this.\nThen 7 8", "First this", "Then 7 8", "First", "8"]),
        ("Yes, it is!", ["Yes, it is", "Yes", "is"]),
        ("so <answer>3</answer>, no, <answer> 4.\n</answer> it is 5", ["4."]),
        ("...", ["..."]),
        ("  ", []),
    ],
)
def test_what_may_be_the_answer(response: str, answers: list[str]) -> None:
    assert answer_candidates(response) == answers


def test_the_best_candidate_counts() -> None:
    rewards = {"The answer is 12": 0.25, "12": 1.0}
    assert score_response(a_task(rewards.__getitem__), "The answer is 12.").reward == 1.0
    assert score_response(a_task(lambda answer: float(answer == "Luk")), "Luk is it.").reward == 1.0
    assert score_response(a_task(lambda answer: 1.0), "").reward == 0.0


def test_a_scorer_that_raises_gives_no_reward_and_says_so() -> None:
    score = score_response(a_task(int), "junk")
    assert score.reward == 0.0
    assert score.error is not None and score.error.startswith("ValueError: invalid literal for int()")
    assert score_response(a_task(lambda answer: math.nan), "x").error == "the reward is nan"

    def interrupted(answer: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_response(a_task(interrupted), "x")


def test_task_sources_are_read() -> None:
    assert TaskSource.parse("chain_sum") == TaskSource("chain_sum", 1, {})
    assert TaskSource.parse("chain_sum:4") == TaskSource("chain_sum", 4, {})
    assert TaskSource.parse('a:2:{"b": "c:d"}') == TaskSource("a", 2, {"b": "c:d"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain_sum:0", "COUNT at least 1; got 'chain_sum:0'"),
        ("chain_sum:many", "COUNT at least 1"),
        (":3", "a task is NAME"),
        ("chain_sum:1:{", "options are not JSON"),
        ("chain_sum:1:[1]", "must be a JSON object"),
        ('chain_sum:1:{"size": 3}', "COUNT in NAME:COUNT"),
    ],
)
def test_bad_task_sources_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSource.parse(text)


def test_reasoning_gym_prompts_and_scorers() -> None:
    pytest.importorskip("reasoning_gym")
    source = TaskSource("chain_sum", 3, {"max_terms": 2})
    tasks = reasoning_gym_tasks(source, seed=1)
    assert [task.prompt for task in tasks] == [task.prompt for task in reasoning_gym_tasks(source, seed=1)]
    assert tasks[0].prompt != reasoning_gym_tasks(source, seed=2)[0].prompt
    assert len({task.prompt for task in tasks}) == 3
    for task, other in pairwise(tasks):
        assert score_response(task, f"It is {task.answer}.").reward == 1.0
        assert task.answer == other.answer or score_response(task, other.answer).reward < 1.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TaskSource("no_such_task", 1, {}), "'no_such_task' with options {}: reasoning-gym refuses them"),
        (TaskSource("chain_sum", 1, {"no_such_option": 1}), "no_such_option"),
        (TaskSource("chain_sum", 1, {"min_terms": 9, "max_terms": 1}), "max_terms must be >= min_terms"),
    ],
)
def test_bad_generators_are_refused(source: TaskSource, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        reasoning_gym_tasks(source, seed=0)


def test_a_missing_package_names_the_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'megatron-prefix\[cli\]'"):
        reasoning_gym_tasks(TaskSource("chain_sum", 1, {}), seed=0)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'megatron-prefix\[cli\]'"):
        ChatTokenizer(checkpoint)


def test_prompts_of_a_file(prompts: Path) -> None:
    first, second = read_prompts(prompts)
    assert (first.name, first.prompt, second.name, second.answer) == ("prompts", "What is 1 + 1?", "say", "a")
    assert score_response(first, "2").reward == 1.0
    assert score_response(first, "22").reward == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt"', "p.jsonl:2: not JSON"),
        ('{"prompt": "a"}', "p.jsonl:1: 'answer' must be text, got None"),
        ('{"prompt": "", "answer": "b"}', "p.jsonl:1: 'prompt' must be text"),
        ("[1]", "p.jsonl:1: a line must be a JSON object"),
        ("\n", "holds no prompts"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_prompts_go_through_the_chat_template(checkpoint: Path) -> None:
    text = ChatTokenizer(checkpoint)
    ids = text.encode_prompt("hi there")
    assert ids[0] == 256
    assert text.decode(ids) == "user: hi there\nanswer: "
    assert text.decode([*ids[-3:], 257]) == "r: "


def test_without_a_template_prompts_are_plain(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    text = ChatTokenizer(checkpoint)
    assert text.decode(text.encode_prompt("hi there")) == "hi there"


def test_tokenizers_that_cannot_be_used_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        ChatTokenizer(tmp_path)
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(ValueError, match="the chat template is broken"):
        ChatTokenizer(checkpoint)
    (checkpoint / "tokenizer_config.json").write_text("""{"chat_template": "{{ raise_exception('no') }}"}""")
    with pytest.raises(ValueError, match="refuses this prompt: no"):
        ChatTokenizer(checkpoint).encode_prompt("x")
    (checkpoint / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
        ChatTokenizer(checkpoint)


def invoke(checkpoint: Path, out: Path, *arguments: str) -> Result:
    values: list[Any] = ["rollout", "--model", str(checkpoint / "model.json"), "--out", str(out), *arguments]
    return CliRunner().invoke(main, values)


def test_the_command_writes_scored_groups(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = (
        "--tokenizer",
        str(checkpoint),
        "--prompts",
        str(prompts),
        "--group-size",
        "4",
        "--max-new-tokens",
        "6",
    )
    result = invoke(checkpoint, out, *arguments, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    groups = read_rollouts(out)
    assert [group.group_id for group in groups] == ["prompts-0", "say-0"]
    assert [len(group) for group in groups] == [4, 4]
    assert summary["groups"] == 2 and summary["responses"] == 8
    lengths = [len(response) for group in groups for response in group.responses]
    assert summary["mean_response_tokens"] == sum(lengths) / 8
    assert all(group.log_probs is not None for group in groups)
    first = json.loads(out.read_text().splitlines()[0])
    text = ChatTokenizer(checkpoint)
    assert first["prompt"] == text.encode_prompt("What is 1 + 1?") and first["answer"] == "2"
    assert first["response_texts"] == [text.decode(response["tokens"]) for response in first["responses"]]
    for word in ("rollouts", "prompts", "say", "all", "mixed"):
        assert word in result.stderr


@pytest.mark.slow
def test_the_command_under_torchrun(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Two processes, once sharing the model and once the prompts: the file is that of one process."""
    model = ("--model", str(checkpoint / "model.json"), "--tokenizer", str(checkpoint))
    arguments = (*model, "--prompts", str(prompts), "--group-size", "3", "--max-new-tokens", "6")
    files = []
    for count, sizes in ((1, ()), (2, ("--tp", "2")), (2, ("--dp", "2"))):
        files.append(tmp_path / f"{len(files)}.jsonl")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "megatron_prefix", "rollout", *arguments, *sizes, "--out", str(files[-1])]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    alone, *shared = [[group.responses for group in read_rollouts(file)] for file in files]
    assert all(responses == alone for responses in shared)


def test_an_existing_file_is_not_overwritten(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    result = invoke(checkpoint, out, "--prompts", str(prompts))
    assert result.exit_code == 2 and "give --overwrite" in result.output
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --task or --prompts"),
        (("--cp", "2"), "--cp 2: sampling does not cut a sequence"),
        (("--task", "no_such_task:1"), "reasoning-gym refuses"),
        (("--task", "chain_sum:1", "--tokenizer", "{folder}"), "has no tokenizer.json"),
    ],
)
def test_bad_input_exits_2_before_any_work(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "out.jsonl"
    result = invoke(checkpoint, out, *(text.format(folder=tmp_path) for text in arguments))
    assert result.exit_code == 2 and message in result.output
    assert not out.exists()
