"""An inference server as the generator: against a real HTTP server process over a model in transformers."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.generation.dialects import DIALECTS, Sglang, Vllm
from megatron_prefix.generation.generator import SamplingSettings
from megatron_prefix.generation.server import InferenceServer, ServerError, ServerGenerator, ServerSettings
from tests.distributed import run_distributed
from tests.server_process import ServerProcess, serving

pytestmark = pytest.mark.ci_oldest

pytest.importorskip("urllib3", reason="needs the cli extra")
transformers = pytest.importorskip("transformers", reason="the model of the server")

VOCABULARY, EOS = 24, (3, 5)
SAMPLING = SamplingSettings(group_size=3, max_new_tokens=6, temperature=0.7, eos_token_ids=EOS)
PROMPTS = [[1, 2], [7], [9, 9, 4, 11]]


def model_folder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # so that distributions are far from flat
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [model_folder(folder / f"weights_{seed:06d}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def process(folders: list[Path]) -> Iterator[ServerProcess]:
    with serving(folders[0]) as server:
        yield server


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    """The server, without faults that were not met."""
    yield process
    process.fault(None, 0)


def connect(server: ServerProcess, dialect: str = "vllm", **settings: Any) -> InferenceServer:
    values: dict[str, Any] = {"timeout_s": 30.0, "backoff_s": 0.0, "retries": 1}
    return InferenceServer(ServerSettings(server.url, **(values | settings)), DIALECTS[dialect])


def own_log_probs(folder: Path, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Of ``tokens`` after ``prompt``, in one pass over the whole sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_responses_come_with_their_log_probs_and_end_where_they_should(
    server: ServerProcess, folders: list[Path], dialect: str
) -> None:
    connection = connect(server, dialect)
    connection.load(folders[0])
    groups = connection.sample(PROMPTS, SAMPLING, seed=4)
    assert [len(group) for group in groups] == [3, 3, 3]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            expected = own_log_probs(folders[0], prompt, response.tokens, SAMPLING.temperature)
            assert response.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
            assert response.truncated == (response.tokens[-1] not in EOS)
            assert len(response.tokens) == 6 or not response.truncated
    assert len({tuple(response.tokens) for group in groups for response in group}) > 3, "each prompt and each response"


def test_a_seed_gives_the_same_responses_however_prompts_are_shared(server: ServerProcess) -> None:
    connection = connect(server)
    whole = connection.sample(PROMPTS, SAMPLING, seed=4)
    parts = [connection.sample(PROMPTS[i : i + 1], SAMPLING, seed=4, first_prompt=i)[0] for i in range(3)]
    assert parts == whole
    assert connection.sample(PROMPTS, SAMPLING, seed=5) != whole
    first, second = connection.sample([PROMPTS[0]] * 2, SAMPLING, seed=4)  # one prompt in two places
    assert first == whole[0] != second


def test_older_servers_name_tokens_by_their_ids(server: ServerProcess) -> None:
    connection = connect(server, max_in_flight=1)
    expected = connection.sample(PROMPTS, SAMPLING, seed=4)
    server.fault("names", 3)
    assert connection.sample(PROMPTS, SAMPLING, seed=4) == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_loading_changes_what_is_sampled(server: ServerProcess, folders: list[Path], dialect: str) -> None:
    connection = connect(server, dialect)
    for folder in (folders[1], folders[0]):
        connection.load(folder)
        assert server.seen()["loaded"][-1][0] == str(folder)
        (response, *_), *_ = connection.sample(PROMPTS[:1], SAMPLING, seed=1)
        expected = own_log_probs(folder, PROMPTS[0], response.tokens, SAMPLING.temperature)
        assert response.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
    if dialect == "vllm":  # keys of the old weights must not be read again
        assert server.seen()["requests"].count("/reset_prefix_cache") >= 2


@pytest.mark.parametrize(("kind", "value"), [("status", 503), ("status", 429), ("drop", None), ("hang", 3.0)])
def test_what_may_pass_is_tried_again(server: ServerProcess, kind: str, value: Any) -> None:
    connection = connect(server, timeout_s=1.5)
    expected = connection.sample(PROMPTS, SAMPLING, seed=4)
    server.fault(kind, 1, value)
    before = len(server.seen()["requests"])
    assert connection.sample(PROMPTS, SAMPLING, seed=4) == expected
    assert len(server.seen()["requests"]) == before + len(PROMPTS) + 1


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("status", 503, r"POST {url}/v1/completions: status 503: {{\"error\": \"made to fail\"}}"),
        ("status", 400, "status 400"),
        ("drop", None, "no answer after 2 attempts of at most 30 s"),
        ("garbage", None, "the answer is not JSON: <html>not JSON</html>"),
        ("no_ids", None, "{url}/v1/completions: an answer cannot be used: it has text but no token ids"),
        ("count", None, "it has 2 responses, 3 were asked for: "),
        ("early", None, r"a response ended after 1 of 6 tokens, .*end-of-sequence tokens \[3, 5\] .*abort"),
        ("infinite", None, "a log-prob is not a finite number"),
    ],
)
def test_what_does_not_pass_is_an_error_by_name(server: ServerProcess, kind: str, value: Any, message: str) -> None:
    connection = connect(server)
    server.fault(kind, 99, value)
    with pytest.raises(ServerError, match=message.format(url=server.url)) as raised:
        connection.sample(PROMPTS, SAMPLING, seed=4)
    assert len(str(raised.value)) < 600


def test_a_refusal_is_not_tried_again(server: ServerProcess) -> None:
    connection = connect(server, retries=5)
    server.fault("status", 1, 400)
    before = len(server.seen()["requests"])
    with pytest.raises(ServerError, match="status 400"):
        connection.sample(PROMPTS[:1], SAMPLING, seed=4)
    assert len(server.seen()["requests"]) == before + 1


def test_sglang_without_ids_or_without_success_is_an_error(server: ServerProcess, folders: list[Path]) -> None:
    connection = connect(server, "sglang")
    server.fault("no_ids", 99)
    with pytest.raises(ServerError, match=r"/generate: an answer cannot be used: it has text but no token ids"):
        connection.sample(PROMPTS, SAMPLING, seed=4)
    server.fault("refuse")
    with pytest.raises(ServerError, match=f"did not load the weights in {folders[1]}: made to fail"):
        connection.load(folders[1])


def test_requests_at_a_time_are_bounded(server: ServerProcess) -> None:
    server.fault(None, 0)  # the count starts anew
    connect(server, max_in_flight=2).sample(PROMPTS * 4, SAMPLING, seed=4)
    assert server.seen()["most_at_once"] == 2


def test_a_server_that_is_not_there_is_an_error_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ServerError, match=f"GET {url}/v1/models: no answer after 3 attempts .*is the server running"):
        InferenceServer(ServerSettings(url, retries=2, backoff_s=0.0), Vllm())
    assert time.monotonic() - started < 10


def test_the_generator_hands_versions_over_and_keeps_the_last(
    server: ServerProcess, folders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "handed"
    written: list[Path] = []

    def export(path: Path) -> None:
        assert not path.exists()
        model_folder(path, len(written))
        written.append(path)

    generator = ServerGenerator(connect(server), SAMPLING, export, folder, None)
    for iteration in (0, 1, 1):  # the last again, as after a stop
        generator.update_weights(iteration)
        version = folder / f"weights_{iteration:06d}"
        assert list(folder.iterdir()) == [version] and version == written[-1]
        assert server.seen()["loaded"][-1][0] == str(version)
    ((first, *_), *_) = generator.generate(PROMPTS, seed=2)
    expected = own_log_probs(version, PROMPTS[0], first.tokens, SAMPLING.temperature)
    assert first.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
    server.fault("status", 99, 500)
    generator.update_weights(2)  # only sampling fails
    with pytest.raises(ServerError, match="status 500"):
        generator.generate(PROMPTS, seed=2)


def _generate(rank: int, world_size: int, url: str) -> Any:
    server = InferenceServer(ServerSettings(url, retries=0), Vllm())
    generator = ServerGenerator(server, SAMPLING, lambda path: None, Path("unused"), dist.group.WORLD)
    try:
        return generator.generate(PROMPTS, seed=4)
    except ServerError as error:
        return str(error)


def test_ranks_share_the_prompts_and_a_failure(server: ServerProcess) -> None:
    expected = connect(server).sample(PROMPTS, SAMPLING, seed=4)
    before = len(server.seen()["requests"])
    assert run_distributed(_generate, 2, server.url) == [expected, expected]
    assert len(server.seen()["requests"]) == before + len(PROMPTS)
    server.fault("status", 1, 400)
    first, second = run_distributed(_generate, 2, server.url)
    assert first == second and "status 400" in first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "an address is like|address is like http://localhost:8000, got 'localhost:8000'"),
        ({"url": "http://a", "retries": -1}, "retries must be at least 0, got -1"),
        ({"url": "http://a", "max_in_flight": 0}, "max_in_flight must be at least 1"),
        ({"url": "http://a", "timeout_s": 0.0}, "timeout_s must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**settings)


def test_every_request_asks_for_the_whole_distribution() -> None:
    """What is left out, servers take from generation_config.json, where models have a top_p of their own."""
    for body in (
        Vllm().sample("m", [1], SAMPLING, 0).body,
        Sglang().sample("m", [1], SAMPLING, 0).body["sampling_params"],
    ):
        assert {name: body[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")} == {
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
