"""`train --on-policy`: the model itself or a real HTTP server process samples, resuming, what is refused."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_prefix.generation.dialects import DIALECTS
from megatron_prefix.generation.on_policy import Prompt, load_reward, score_groups
from megatron_prefix.generation.sampling import SampledResponse
from megatron_prefix.generation.server import InferenceServer, ServerSettings
from megatron_prefix.generation.tasks import Score
from megatron_prefix.weights import open_source
from tests.cli_runs import Arguments, Run, one_line, run_cli, run_one
from tests.server_process import ServerProcess, serving
from tests.tokenizer_files import PLAIN, write_byte_tokenizer

pytestmark = pytest.mark.ci_oldest

pytest.importorskip("tokenizers", reason="needs the cli extra")
pytest.importorskip("urllib3", reason="needs the cli extra")
transformers = pytest.importorskip("transformers", reason="the model of the server")

ITERATIONS = 3
PROMPTS = ("Say a.", "What is 1 + 1?", "bb", "The longest of these prompts.", "x")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Hugging Face model; policy: the checkpoint that `import` makes of it; prompts.jsonl."""
    folder = tmp_path_factory.mktemp("on_policy")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=[257, 5],
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    write_byte_tokenizer(folder / "hf", PLAIN, bos_token={"content": "<s>"})
    lines = [json.dumps({"prompt": prompt, "answer": "a"}) + "\n" for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(lines))
    run = run_one("import", folder / "hf", folder / "policy", "--dtype", "fp32")
    assert run.exit_code == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def process(files: Path) -> Iterator[ServerProcess]:
    with serving(files / "hf") as server:
        yield server


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    yield process
    process.fault(None, 0)


def train(files: Path, *arguments: str | Path, steps: int = ITERATIONS) -> Arguments:
    common = ("--groups-per-step", "2", "--group-size", "3", "--max-new-tokens", "5", "--lr", "1e-2", "--dtype", "fp32")
    data = ("--on-policy", "--prompts", files / "prompts.jsonl", "--reward", "tests.rewards:odd_letters")
    return ("train", "--model", files / "policy", *data, *common, "--steps", f"{steps}", *arguments)


def of_server(server: ServerProcess, folder: Path, kind: str = "vllm") -> Arguments:
    return ("--generator", kind, "--server", server.url, "--weights-folder", folder, "--max-sampler-gap", "1e-4")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def succeed(runs: Sequence[Sequence[Run]]) -> None:
    for ranks in runs:
        for run in ranks:
            assert run.exit_code == 0 and not run.crash, run.crash + run.stderr


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included, by its path."""
    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "weights", whole)
    return dict(leaves(torch.load(whole, weights_only=False), ""))


def leaves(tree: Any, path: str) -> Any:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")


TIMES = ("seconds", "tokens_per_second", "memory_bytes", "mfu")


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in each.items() if not any(word in name for word in TIMES)} for each in records]


def test_a_server_samples_with_the_weights_of_every_iteration(
    server: ServerProcess, files: Path, tmp_path: Path
) -> None:
    """Log-probs that transformers computes, from weights that went through a folder, are the policy's own."""
    folder, before = tmp_path / "weights", len(server.seen()["loaded"])
    run = run_one(*train(files, *of_server(server, folder), "--metrics", tmp_path / "metrics.jsonl", "--save",
                         tmp_path / "out"))  # fmt: skip
    assert run.exit_code == 0, run.stderr
    records = lines(tmp_path / "metrics.jsonl")
    assert [each["iteration"] for each in records] == [0, 1, 2]
    assert all(0 < each["sampler_gap"] < 1e-5 for each in records)
    assert all(each["updated"] and each["grad_norm"] > 1e-3 and each["reward_std"] > 0 for each in records)
    loaded = server.seen()["loaded"][before:]
    assert [Path(path).name for path, _ in loaded] == [f"weights_{i:06d}" for i in range(ITERATIONS)]
    sums = [total for _, total in loaded]
    assert len(set(sums)) == ITERATIONS and abs(sums[0] - sums[1]) > 1e-3
    # The first iteration's are those of the model that the run began with, and the last version stays.
    first, again = open_source(str(files / "hf")), open_source(str(folder / "weights_000002"))
    assert sums[0] == pytest.approx(sum(float(first.read(name).double().sum()) for name in first.shapes))
    assert sums[2] == pytest.approx(sum(float(again.read(name).double().sum()) for name in again.shapes))
    assert [path.name for path in folder.iterdir()] == ["weights_000002"]
    assert (folder / "weights_000002" / "tokenizer.json").is_file()


def test_a_server_that_ignores_new_weights_is_caught(server: ServerProcess, files: Path, tmp_path: Path) -> None:
    InferenceServer(ServerSettings(server.url), DIALECTS["vllm"]).load(files / "hf")  # the policy of the start
    server.fault("ignore", 99)
    run = run_one(*train(files, *of_server(server, tmp_path / "weights"), "--metrics", tmp_path / "metrics.jsonl"))
    assert run.exit_code == 2
    text = one_line(run.stderr)
    assert "the sampler's log-probs are" in text and "did not take the new weights" in text
    (first,) = lines(tmp_path / "metrics.jsonl")  # in which there is nothing new
    assert first["updated"] == 1 and "iteration 1: " in text


def test_log_probs_of_another_temperature_are_caught(server: ServerProcess, files: Path, tmp_path: Path) -> None:
    server.fault("raw", 99)  # vLLM without --logprobs-mode processed_logprobs
    run = run_one(*train(files, *of_server(server, tmp_path / "weights"), "--temperature", "0.5", steps=1))
    assert run.exit_code == 2 and "processed_logprobs" in one_line(run.stderr)


def test_a_server_samples_for_a_pipeline(server: ServerProcess, files: Path, tmp_path: Path) -> None:
    """Two stages, which cannot sample themselves."""
    arguments = ("--pp", "2", "--metrics", tmp_path / "pp.jsonl", *of_server(server, tmp_path / "weights", "sglang"))
    before = server.seen()["requests"].count("/generate")
    succeed(run_cli(train(files, *arguments, steps=2), world_size=2))
    assert all(0 < each["sampler_gap"] < 1e-5 for each in lines(tmp_path / "pp.jsonl"))
    assert server.seen()["requests"].count("/generate") == before + 2 * 2  # two prompts a step, each asked once


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(files: Path, tmp_path: Path) -> None:
    """To the bit, with several steps per iteration."""
    common = ("--steps-per-iteration", "2", "--temperature", "0.7", "--json", "--seed", "4")

    def run(name: str, steps: int, *more: str) -> Arguments:
        out = ("--save", tmp_path / name, "--metrics", tmp_path / f"{name}.jsonl")
        return train(files, *common, *out, *more, steps=steps)

    succeed(run_cli(run("whole", 6), run("halves", 2), run("halves", 6, "--resume")))
    whole, halves = (without_times(lines(tmp_path / f"{name}.jsonl")) for name in ("whole", "halves"))
    assert whole == halves and [each["iteration"] for each in whole] == [0, 0, 1, 1, 2, 2]
    assert all(each["sampler_gap"] < 1e-5 for each in whole)
    expected, found = (tensors(tmp_path / name / "step_000006") for name in ("whole", "halves"))
    assert expected.keys() == found.keys() and any("optimizer" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_every_iteration_draws_anew(files: Path, tmp_path: Path) -> None:
    """The same prompts and, without a learning rate, the same policy."""
    metrics = tmp_path / "metrics.jsonl"
    succeed(run_cli(train(files, "--lr", "0", "--groups-per-step", "5", "--metrics", metrics, steps=2)))
    first, second = lines(metrics)
    assert first["reward"] != second["reward"]


def test_the_model_samples_alike_at_all_sizes(files: Path, tmp_path: Path) -> None:
    one, *two = ((), ("--tp", "2"), ("--dp", "2"))
    succeed(run_cli(train(files, "--metrics", tmp_path / "0.jsonl", *one)))
    for i, sizes in enumerate(two, start=1):
        succeed(run_cli(train(files, "--metrics", tmp_path / f"{i}.jsonl", *sizes), world_size=2))
    expected = lines(tmp_path / "0.jsonl")
    for i in (1, 2):
        for theirs, ours in zip(lines(tmp_path / f"{i}.jsonl"), expected, strict=True):
            for name in ("reward", "tokens", "response_tokens", "truncated", "loss", "grad_norm"):
                assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rollouts", "{files}/prompts.jsonl"), "give either --rollouts, a file to train on, or --on-policy"),
        (("--kl-coef", "0.1"), "--kl-coef 0.1 with --on-policy"),
        (("--compare", "1"), "--compare runs groups of --rollouts"),
        (("--pp", "2"), "--generator local samples with --pp 1 and --cp 1, got 2 and 1; use a server"),
        (("--cp", "2"), "got 1 and 2; use a server"),
        (("--server", "http://a"), "--server is for a server: add --generator vllm or sglang"),
        (("--generator", "vllm"), "--generator vllm needs --server and --weights-folder"),
        (("--steps-per-iteration", "2"), "--steps 3 ends within an iteration of 2 steps"),
        (("--groups-per-step", "6"), "5 prompts, an iteration takes 6"),
        (("--max-new-tokens", "60"), "passes the model's 64 positions"),
        (("--max-tokens-per-microbatch", "4"), "must hold the longest prefix and response"),
        (("--reward", "tests.rewards:missing"), "'tests.rewards:missing' cannot be imported: module"),
        (("--reward", "tests.rewards:NUMBER"), "is a int; name a function"),
        (("--reward", "nothing"), "a reward function is module:function, got 'nothing'"),
        (("--tokenizer", "{files}"), "has no tokenizer.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(files: Path, arguments: tuple[str, ...], message: str) -> None:
    from click.testing import CliRunner

    from megatron_prefix.cli.main import main

    words = [str(word) for word in train(files, *(each.format(files=files) for each in arguments))]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert message in one_line(result.stderr)


def test_options_of_on_policy_training_need_it(files: Path) -> None:
    from click.testing import CliRunner

    from megatron_prefix.cli.main import main

    model = ["train", "--model", str(files / "policy")]
    for arguments, message in (
        ([], "give either --rollouts, a file to train on, or --on-policy"),
        (["--task", "chain_sum:2"], "--task needs --on-policy"),
        (["--group-size", "4"], "--group-size needs --on-policy"),
        (["--on-policy"], "nothing to sample for: give --task or --prompts"),
    ):
        result = CliRunner().invoke(main, [*model, *arguments])
        assert result.exit_code == 2 and message in one_line(result.stderr), result.output


def test_scores_become_groups_and_what_fails_is_counted() -> None:
    def score(tokens: Sequence[int]) -> Score:
        return Score(float(tokens[0])) if tokens[0] else Score(0.0, "ValueError: no")

    prompts = [Prompt(f"p{i}", [1, i], score) for i in range(2)]
    sampled = [
        [SampledResponse([2, 3], [-1.0, -2.0]), SampledResponse([0], [-0.5], truncated=False)],
        [SampledResponse([4], [-3.0]), SampledResponse([4], [-3.0])],
    ]
    groups, metrics = score_groups(prompts, sampled, None)
    assert [group.rewards for group in groups] == [(2.0, 0.0), (4.0, 4.0)]
    assert groups[0].log_probs == ((-1.0, -2.0), (-0.5,)) and groups[1].prompt == (1, 1)
    assert metrics == {"response_tokens": 1.25, "truncated": 0.75, "scorer_errors": 1.0}


def test_a_users_reward_gets_text_and_may_fail(files: Path, tmp_path: Path) -> None:
    assert load_reward("tests.rewards:odd_letters")("", "ab", "") == 0.5
    metrics = tmp_path / "metrics.jsonl"
    run = run_one(*train(files, "--reward", "tests.rewards:broken", "--metrics", metrics, steps=1))
    assert run.exit_code == 0, run.stderr
    (record,) = lines(metrics)
    assert record["scorer_errors"] == 6 and record["reward"] == 0
