"""Conversations in OpenAI's form, as JSON Lines or Parquet; a tokenizer with a chat template makes tokens of them.

    {"group_id": "task-17", "reward": 1.0, "tools": [...],
     "messages": [{"role": "user", "content": "How warm is it in Ulm?"},
                  {"role": "assistant", "content": "", "tool_calls": [...]},
                  {"role": "tool", "content": "21 C"},
                  {"role": "assistant", "content": "21 degrees."}]}

Everything that the assistant wrote is trained, its end-of-sequence tokens included; what system, user and tools wrote
is not. ``tools`` and ``trajectory_id`` are optional.
"""

from __future__ import annotations

import reprlib
from typing import Any

from megatron_prefix.formats.lines import key_of, list_of
from megatron_prefix.formats.names import text_of
from megatron_prefix.generation.tokenizer import ChatTokenizer


def chat_lines(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """The trajectory line of a conversation.

    Raises:
        ValueError: messages that are not as documented, or a template that cannot say what the assistant wrote.
    """
    messages = list_of(key_of(record, "messages", "conversation"), "'messages'", "messages")
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object with 'role' and 'content', got {reprlib.repr(message)}")
        text_of(message, "role", where)
        if message.get("content") is not None:
            text_of(message, "content", where)
        elif not message.get("tool_calls"):
            raise ValueError(f"{where} has neither 'content' nor 'tool_calls'")
    tools = record.get("tools")
    tokens, generated = tokenizer.encode_messages(messages, None if tools is None else list_of(tools, "'tools'"))
    line: dict[str, Any] = {key: record[key] for key in ("group_id", "trajectory_id") if key in record}
    return [{**line, "tokens": tokens, "generated": generated, "reward": key_of(record, "reward", "conversation")}]
