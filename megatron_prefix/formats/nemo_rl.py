"""NeMo-RL's trajectories, as JSON Lines or Parquet, in either of two forms.

`train_data_step{N}.jsonl` of its logger (nemo_rl/algorithms/grpo.py): one padded sequence per line. Every value is a
batch of one, as the logger writes it, or the value itself.

    {"token_ids": [[5, 6, 7, 8, 0, 0]], "input_lengths": [4], "token_loss_mask": [[0, 0, 1, 1, 0, 0]],
     "generation_logprobs": [[0.0, 0.0, -0.1, -2.3, 0.0, 0.0]], "rewards": [1.0], "sample_loss_mask": [1.0], "idx": 0}

A message log (`LLMMessageLogType`, what its rollouts return): one conversation per line.

    {"message_log": [{"role": "user", "token_ids": [5, 6]},
                     {"role": "assistant", "token_ids": [7, 8], "generation_logprobs": [-0.1, -2.3]},
                     {"role": "environment", "token_ids": [9]}],
     "total_reward": 1.0, "loss_multiplier": 1.0}

The assistant's messages are trained, unless a message's ``token_loss_mask`` says otherwise. ``sample_loss_mask`` (or
``loss_multiplier``) of 0 leaves the line out, as NeMo-RL does. Where there is no ``group_id``, lines with the same
tokens before the first trained one are a group: NeMo-RL compares the rewards of equal prompts too. With dynamic
sampling ``filtered_rewards`` are those of the lines, and are taken.
"""

from __future__ import annotations

import reprlib
from typing import Any

from megatron_prefix.formats.lines import LeftOutError, key_of, list_of
from megatron_prefix.formats.names import id_of, short_hash
from megatron_prefix.rollout_group import token_ids


def nemo_rl_lines(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The trajectory line of one NeMo-RL line.

    Raises:
        ValueError: keys are missing or their lists do not fit one another.
        LeftOutError: the line says that it is not trained.
    """
    multiplier = _one(record.get("sample_loss_mask", record.get("loss_multiplier", 1)))
    if multiplier not in (0, 1):
        raise ValueError(f"sample_loss_mask (loss_multiplier) must be 0 or 1, got {reprlib.repr(multiplier)}")
    if not multiplier:
        raise LeftOutError("sample_loss_mask (loss_multiplier) is 0: NeMo-RL does not train on it")
    line = _of_messages(record) if "message_log" in record else _of_training_data(record)
    if record.get("group_id") is not None:
        group_id = id_of(record["group_id"], "group_id")
    else:
        tokens = token_ids("token_ids", line["tokens"])
        group_id = f"prompt-{short_hash(tokens[: _first_trained(line['generated'])])}"
    return [{"group_id": group_id, **line}]


def _of_training_data(record: dict[str, Any]) -> dict[str, Any]:
    where = "NeMo-RL training data"
    tokens = _row(record, "token_ids", where)
    masks = _row(record, "token_loss_mask", where)
    length = _one(record.get("input_lengths", len(tokens)))
    if type(length) is not int or not 0 < length <= len(tokens):
        raise ValueError(f"{where}: input_lengths must be 1 to {len(tokens)}, got {reprlib.repr(length)}")
    _same_length("token_loss_mask", masks, len(tokens))
    if any(masks[length:]):
        raise ValueError(f"{where}: token_loss_mask trains padding: it is not 0 after input_lengths {length}")
    reward = "filtered_rewards" if "filtered_rewards" in record else "rewards"
    line = {"tokens": tokens[:length], "generated": masks[:length], "reward": _one(key_of(record, reward, where))}
    if "generation_logprobs" in record:
        log_probs = _row(record, "generation_logprobs", where)
        _same_length("generation_logprobs", log_probs, len(tokens))
        line["log_probs"] = log_probs[:length]
    return line


def _of_messages(record: dict[str, Any]) -> dict[str, Any]:
    tokens: list[Any] = []
    generated: list[Any] = []
    log_probs: list[Any] = []
    have_log_probs = True
    for i, message in enumerate(list_of(record["message_log"], "message_log", "messages")):
        where = f"message {i}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must be an object with 'role' and 'token_ids', got {reprlib.repr(message)}")
        ids = list_of(key_of(message, "token_ids", where), f"{where}, token_ids", "token ids")
        mask = message.get("token_loss_mask", [int(message["role"] == "assistant")] * len(ids))
        _same_length(f"{where}, token_loss_mask", list_of(mask, f"{where}, token_loss_mask"), len(ids))
        found = message.get("generation_logprobs")
        if found is not None:
            _same_length(f"{where}, generation_logprobs", list_of(found, f"{where}, generation_logprobs"), len(ids))
        have_log_probs &= found is not None or not any(mask)
        tokens += ids
        generated += mask
        log_probs += found or [0.0] * len(ids)
    line = {"tokens": tokens, "generated": generated, "reward": _one(key_of(record, "total_reward", "message log"))}
    return {**line, "log_probs": log_probs} if have_log_probs else line


def _first_trained(generated: list[Any]) -> int:
    return next((t for t, own in enumerate(generated) if own), 0)


def _row(record: dict[str, Any], key: str, where: str) -> list[Any]:
    """A list per token, taken out of its batch of one."""
    values = list_of(key_of(record, key, where), f"{where}: {key}")
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _same_length(name: str, values: list[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} tokens; give one per token")
