"""The tokenizer of a checkpoint folder, with its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"


class ChatTokenizer:
    """Text to token ids and back, from `tokenizer.json` and `tokenizer_config.json` (optional) of a folder.

    Prompts go through the chat template where `tokenizer_config.json` has one, and are plain text otherwise.

    Raises:
        ValueError: a folder without `tokenizer.json`, or files that cannot be read.
        ImportError: the cli extra is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("tokenizers need the cli extra: pip install 'megatron-prefix[cli]'") from error
        file = Path(folder) / TOKENIZER_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {TOKENIZER_FILE}; put the model's there (`import` does where it finds one)"
            )
        self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        self._settings = _read_settings(Path(folder) / SETTINGS_FILE)
        self._template = None
        if (source := _template_source(self._settings)) is not None:
            # As the transformers library sets it up, which templates are written for.
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
            environment.globals["raise_exception"] = _refuse
            environment.filters["tojson"] = _to_json
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise ValueError(f"{Path(folder) / SETTINGS_FILE}: the chat template is broken: {error}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a user's message, up to where the model answers."""
        if self._template is None:
            return list(self._tokenizer.encode(text).ids)
        return self.encode(self._render([{"role": "user", "content": text}], answer_next=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: special tokens where their names are in it, and none beside."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant wrote it.

        What the assistant wrote is what its message adds to the conversation before it, as the template shows that to
        the model that answers next, up to the end-of-sequence token where there is one. Both must be exact prefixes,
        token by token, of the conversation that goes on: templates that change earlier turns (by dropping their
        reasoning, for one) do not say what the policy saw.

        Args:
            messages: with "role", "content" and what else the template reads.
            tools: descriptions of tools for the template.

        Raises:
            ValueError: no chat template, a template that refuses the messages or changes earlier turns, or an
                assistant's message that is empty.
        """
        if self._template is None:
            raise ValueError(f"the tokenizer has no chat template; add 'chat_template' to its {SETTINGS_FILE}")
        whole = self.encode(self._render(messages, tools))
        generated = [False] * len(whole)
        eos = self._tokenizer.token_to_id(_token_text(self._settings.get("eos_token")))
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.encode(self._render(messages[:i], tools, answer_next=True))
            after = self.encode(self._render(messages[: i + 1], tools))
            if after[: len(before)] != before or whole[: len(after)] != after:
                raise ValueError(
                    f"message {i}: the chat template is not prefix-stable: the tokens before or of this answer change "
                    "when the conversation goes on, so what the policy saw and wrote is not known; give token ids "
                    "instead (trajectory lines), or a template that keeps earlier turns"
                )
            written = after[len(before) :]
            if eos in written:
                written = written[: len(written) - written[::-1].index(eos)]
            if not written:
                raise ValueError(f"message {i}: the assistant's message is empty; drop it")
            generated[len(before) : len(before) + len(written)] = [True] * len(written)
        return whole, generated

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, answer_next: bool = False
    ) -> str:
        """The conversation as text, special tokens included: the template writes them itself."""
        from jinja2.exceptions import TemplateError

        assert self._template is not None
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=answer_next,
                bos_token=_token_text(self._settings.get("bos_token")),
                eos_token=_token_text(self._settings.get("eos_token")),
            )
        except (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"the chat template cannot take these messages: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _template_source(settings: dict[str, Any]) -> str | None:
    """The chat template: a string, or a list of named ones, of which "default" is taken."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def _token_text(token: Any) -> str:
    """A special token as `tokenizer_config.json` writes it: a string, an object with "content", or null."""
    if isinstance(token, dict):
        return str(token["content"])
    return token or ""


def _to_json(value: Any, indent: int | None = None) -> str:
    """As templates expect it: jinja2's own filter escapes signs that HTML reserves."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses this prompt: {message}")
