"""How inference servers are asked: what is posted to sample and to load weights, and what their answers mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_prefix.generation.generator import SamplingSettings

_WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said in every request: a server takes what is not said from the model's generation_config.json."""


class Answer(NamedTuple):
    """One response as a server gives it. ``finish_reason`` is the server's word, for messages."""

    tokens: list[int]
    log_probs: list[float]
    finish_reason: str


class Post(NamedTuple):
    """A request: the path behind the server's address and the JSON body."""

    path: str
    body: dict[str, Any]


class Dialect(Protocol):
    """Of one kind of server."""

    def sample(self, model: str, prompt: Sequence[int], sampling: SamplingSettings, seed: int) -> Post:
        """The request for a group of responses. ``model`` is the name that the server gives its model."""

    def answers(self, body: Any) -> list[Answer]:
        """The responses in the answer to `sample`.

        Raises:
            ValueError, or a look-up's own error: ``body`` is no such answer, or has no token ids.
        """

    def load(self, folder: Path) -> list[Post]:
        """The requests, in order, after which the server samples with the weights in a Hugging Face folder."""

    def refused(self, body: Any) -> str | None:
        """What an answer to `load` that came with status 200 says against it."""


class Vllm:
    """vLLM's OpenAI-compatible server, asked for token ids.

    Sampling: `/v1/completions` with token ids as the prompt. Ids come back as `token_ids` (`return_token_ids`) or, from
    older releases, as tokens named "token_id:N" (`return_tokens_as_token_ids`). vLLM gives log-probs before temperature
    unless it is started with `--logprobs-mode processed_logprobs`.

    Loading: the worker's `reload_weights` with a `weights_path`, through `/collective_rpc`, then `/reset_prefix_cache`,
    since keys of the old weights would be read again. Both exist where the server runs with VLLM_SERVER_DEV_MODE=1.
    """

    def sample(self, model: str, prompt: Sequence[int], sampling: SamplingSettings, seed: int) -> Post:
        body = {
            "model": model,
            "prompt": list(prompt),
            "n": sampling.group_size,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,  # of the first response; vLLM adds its index for the others
            "logprobs": 1,
            "stop_token_ids": list(sampling.eos_token_ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return Post("/v1/completions", body | _WHOLE_DISTRIBUTION)

    def answers(self, body: Any) -> list[Answer]:
        return [
            Answer(_vllm_tokens(choice), choice["logprobs"]["token_logprobs"], str(choice["finish_reason"]))
            for choice in body["choices"]
        ]

    def load(self, folder: Path) -> list[Post]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        return [Post("/collective_rpc", reload), Post("/reset_prefix_cache", {})]

    def refused(self, body: Any) -> str | None:
        return None


def _vllm_tokens(choice: dict[str, Any]) -> list[int]:
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    prefix = "token_id:"
    names = choice["logprobs"]["tokens"]
    if not all(name.startswith(prefix) for name in names):
        raise ValueError("it has text but no token ids, neither token_ids nor tokens named token_id:N; is it a vLLM?")
    return [int(name.removeprefix(prefix)) for name in names]


class Sglang:
    """SGLang's server, through its native API: its OpenAI-compatible one gives no token ids.

    Sampling: `/generate`, ids and log-probs from `meta_info.output_token_logprobs`; SGLang gives log-probs after
    temperature. It takes no seed outside its deterministic mode, so runs are not repeatable.

    Loading: `/update_weights_from_disk`, which also flushes the prefix cache.
    """

    def sample(self, model: str, prompt: Sequence[int], sampling: SamplingSettings, seed: int) -> Post:
        parameters = {
            "n": sampling.group_size,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.eos_token_ids),
        }
        body = {"input_ids": list(prompt), "sampling_params": parameters | _WHOLE_DISTRIBUTION, "return_logprob": True}
        return Post("/generate", body)

    def answers(self, body: Any) -> list[Answer]:
        found = []
        for each in body if isinstance(body, list) else [body]:
            meta = each["meta_info"]
            if "output_token_logprobs" not in meta:
                raise ValueError("it has text but no token ids (no meta_info.output_token_logprobs)")
            pairs = [(log_prob, token) for log_prob, token, *_ in meta["output_token_logprobs"]]
            found.append(Answer([t for _, t in pairs], [x for x, _ in pairs], str(meta["finish_reason"])))
        return found

    def load(self, folder: Path) -> list[Post]:
        return [Post("/update_weights_from_disk", {"model_path": str(folder)})]

    def refused(self, body: Any) -> str | None:
        return None if body.get("success") else str(body.get("message"))


DIALECTS: dict[str, Dialect] = {"vllm": Vllm(), "sglang": Sglang()}
