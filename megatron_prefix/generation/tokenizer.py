"""The tokenizer of a checkpoint folder, with its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise ValueError(f"{Path(folder) / SETTINGS_FILE}: the chat template is broken: {error}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a user's message, up to where the model answers."""
        if self._template is None:
            return list(self._tokenizer.encode(text).ids)
        rendered = self._template.render(
            messages=[{"role": "user", "content": text}],
            add_generation_prompt=True,
            bos_token=_token_text(self._settings.get("bos_token")),
            eos_token=_token_text(self._settings.get("eos_token")),
        )
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(rendered, add_special_tokens=False).ids)

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


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses this prompt: {message}")
