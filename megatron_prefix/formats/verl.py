"""verl's dumps of generated texts, as JSON Lines.

`RayPPOTrainer._dump_generations` (verl/trainer/ppo/ray_trainer.py) writes them for ``trainer.rollout_data_dir`` and
``trainer.validation_data_dir``.

    {"input": "user\\nWhat is ...", "output": "It is ...", "gts": "3", "score": 1.0, "step": 7, ...}

Further keys are the reward function's. Samples of one ``uid`` are a group; verl writes none by itself, and then samples
with the same ``step`` and ``input`` are one. verl decodes with ``skip_special_tokens``, so the tokens that come back
are those of the text without the chat template's special tokens and the end of the response: good enough to plan and
to measure, but not what the policy saw. Train on its tensors (`formats.data_proto`).
"""

from __future__ import annotations

import reprlib
from typing import Any

from megatron_prefix.formats.lines import key_of
from megatron_prefix.formats.names import id_of, short_hash, text_of
from megatron_prefix.generation.tokenizer import ChatTokenizer


def verl_lines(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """The sample line of a line of a text dump. Raises ValueError when a key is missing or no text."""
    prompt, response = text_of(record, "input", "verl dump"), text_of(record, "output", "verl dump")
    if record.get("uid") is not None:
        group_id = id_of(record["uid"], "uid")
    else:
        group_id = f"{reprlib.repr(record.get('step'))}-{short_hash(prompt)}"
    return [
        {
            "group_id": group_id,
            "prompt": tokenizer.encode(prompt),
            "response": tokenizer.encode(response),
            "reward": key_of(record, "score", "verl dump"),
        }
    ]
