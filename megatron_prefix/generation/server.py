"""Responses from an inference server: requests with retries, and weights handed over through a folder on disk."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.collectives import Group, group_rank, on_all_ranks, share_of_rank
from megatron_prefix.generation.dialects import Answer, Dialect
from megatron_prefix.generation.generator import SamplingSettings
from megatron_prefix.generation.sampling import SampledResponse

SHOWN = 200  # characters of a server's answer in a message
_RETRIED = (429, 500, 502, 503, 504)


class ServerError(ValueError):
    """A server that does not do what it was asked. Names its address, what it was asked and what it answered."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server is reached.

    Attributes:
        url: its address, such as "http://localhost:8000".
        timeout_s: longest wait for an answer; a connection that is not there within 10 seconds counts as refused.
        retries: requests are sent so many times more where there is no connection, no answer in time, or one of the
            statuses 429, 500, 502, 503 and 504; each time after twice the wait, from ``backoff_s``.
        backoff_s: see ``retries``; 0 does not wait.
        max_in_flight: requests at a time, from each rank.

    Raises:
        ValueError: an address or a number that cannot be meant.
    """

    url: str
    timeout_s: float = 600.0
    retries: int = 4
    backoff_s: float = 1.0
    max_in_flight: int = 32

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"a server's address is like http://localhost:8000, got {self.url!r}")
        for name, minimum in (("retries", 0), ("backoff_s", 0), ("max_in_flight", 1)):
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {self.timeout_s}")


class InferenceServer:
    """A server that is there.

    Raises:
        ServerError: it cannot be reached, or serves no model.
        ImportError: the cli extra is not installed.
    """

    def __init__(self, settings: ServerSettings, dialect: Dialect) -> None:
        try:
            import urllib3
        except ImportError as error:
            raise ImportError("servers need the cli extra: pip install 'megatron-prefix[cli]'") from error
        self.settings, self.dialect = settings, dialect
        self.url = settings.url.rstrip("/")
        self._http = urllib3.PoolManager(
            maxsize=settings.max_in_flight,
            block=True,
            timeout=urllib3.Timeout(connect=min(10.0, settings.timeout_s), read=settings.timeout_s),
            retries=urllib3.Retry(
                settings.retries,
                status_forcelist=_RETRIED,
                allowed_methods=None,  # sampling again, or loading the same folder again, does no harm
                backoff_factor=settings.backoff_s,
                raise_on_status=False,
            ),
        )
        self._http_error = urllib3.exceptions.HTTPError
        models = self._request("GET", "/v1/models")
        try:
            self.model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.url}/v1/models names no model: {_shown(models)}") from error

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, *, seed: int, first_prompt: int = 0
    ) -> list[list[SampledResponse]]:
        """A group of responses to each prompt, several prompts at a time.

        Args:
            prompts: token ids.
            sampling: how.
            seed: of the random numbers, with the index of the prompt.
            first_prompt: index of the first prompt, where these are a part.

        Raises:
            ServerError: no answer, another number of responses, no token ids, a log-prob that is missing or no finite
                number, or a response that ended without an end-of-sequence token before its time.
        """

        def one(i: int) -> list[SampledResponse]:
            post = self.dialect.sample(self.model, prompts[i], sampling, _request_seed(seed, first_prompt + i))
            body = self._request("POST", post.path, post.body)
            try:
                answers = self.dialect.answers(body)
                if len(answers) != sampling.group_size:
                    raise ValueError(f"it has {len(answers)} responses, {sampling.group_size} were asked for")
                return [_checked(answer, sampling) for answer in answers]
            except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
                what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
                raise ServerError(f"{self.url}{post.path}: an answer cannot be used: {what}: {_shown(body)}") from error

        with ThreadPoolExecutor(self.settings.max_in_flight) as pool:
            return list(pool.map(one, range(len(prompts))))

    def load(self, folder: Path) -> None:
        """Make the server sample with the weights in a Hugging Face folder, which it sees under the same path.

        Raises:
            ServerError: it does not.
        """
        for post in self.dialect.load(folder):
            body = self._request("POST", post.path, post.body)
            if (reason := self.dialect.refused(body)) is not None:
                raise ServerError(f"{self.url}{post.path} did not load the weights in {folder}: {reason[:SHOWN]}")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = self._http.request(method, self.url + path, **({} if body is None else {"json": body}))
        except self._http_error as error:
            raise ServerError(
                f"{method} {self.url}{path}: no answer after {self.settings.retries + 1} attempts of at most "
                f"{self.settings.timeout_s:g} s ({_shown(error)}); is the server running?"
            ) from error
        if answer.status != 200:
            text = answer.data.decode("utf-8", "replace")
            raise ServerError(f"{method} {self.url}{path}: status {answer.status}: {text[:SHOWN]}")
        if not answer.data:  # as vLLM answers to /reset_prefix_cache
            return {}
        try:
            return answer.json()
        except ValueError as error:
            text = answer.data.decode("utf-8", "replace")
            raise ServerError(f"{method} {self.url}{path}: the answer is not JSON: {text[:SHOWN]}") from error


class ServerGenerator:
    """A `Generator` that asks an `InferenceServer`. The ranks of ``group`` share the prompts.

    Args:
        server: which has a model of the policy's shape.
        sampling: how to sample.
        export: writes the policy to a Hugging Face folder that does not exist yet; called by all ranks.
        folder: holds the policy's weights, one version at a time, for the server to read: on a disk of both.
        group: all ranks of the job.
    """

    def __init__(
        self,
        server: InferenceServer,
        sampling: SamplingSettings,
        export: Callable[[Path], None],
        folder: Path,
        group: Group,
    ) -> None:
        self.server, self.sampling, self.export = server, sampling, export
        self.folder, self.group = folder.absolute(), group

    def update_weights(self, iteration: int) -> None:
        """See `Generator`.

        Raises:
            ServerError: the server does not load them; on every rank.
        """
        version = self.folder / f"weights_{iteration:06d}"
        first = group_rank(self.group) == 0
        if first:
            shutil.rmtree(version, ignore_errors=True)  # of a run that was stopped here
        self.export(version)
        on_all_ranks(lambda: self.server.load(version) if first else None, self.group, ServerError)
        if first:
            for other in self.folder.glob("weights_" + 6 * "[0-9]"):
                if other != version:
                    shutil.rmtree(other)

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[list[SampledResponse]]:
        """See `Generator`.

        Raises:
            ServerError: as `InferenceServer.sample`; on every rank.
        """
        mine = share_of_rank(len(prompts), self.group)
        part = prompts[mine.start : mine.stop]
        # Where the server fails one rank, all raise: none is left waiting for the others.
        shares = on_all_ranks(
            lambda: self.server.sample(part, self.sampling, seed=seed, first_prompt=mine.start),
            self.group,
            ServerError,
        )
        return [group for share in shares for group in share]


def _checked(answer: Answer, sampling: SamplingSettings) -> SampledResponse:
    tokens, log_probs = answer.tokens, answer.log_probs
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise ValueError("a response has no token ids")
    if len(log_probs) != len(tokens):
        raise ValueError(f"{len(log_probs)} log-probs for {len(tokens)} tokens")
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in log_probs):
        raise ValueError("a log-prob is not a finite number")
    truncated = tokens[-1] not in sampling.eos_token_ids
    if len(tokens) > sampling.max_new_tokens or (truncated and len(tokens) < sampling.max_new_tokens):
        raise ValueError(
            f"a response ended after {len(tokens)} of {sampling.max_new_tokens} tokens, not with one of the "
            f"end-of-sequence tokens {list(sampling.eos_token_ids)} (finish reason {answer.finish_reason})"
        )
    return SampledResponse(tokens, [float(x) for x in log_probs], truncated)


def _request_seed(seed: int, prompt: int) -> int:
    """48 bits far apart for all prompts: servers count on from them for the responses of a group."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{prompt}".encode(), digest_size=6).digest())


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
