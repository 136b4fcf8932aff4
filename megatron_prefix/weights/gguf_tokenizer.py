"""A tokenizer.json from the byte-level BPE vocabulary inside a GGUF file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# What llama.cpp's names for pre-tokenizers stand for (src/llama-vocab.cpp): the pattern, None for GPT-2's own.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")
_PROBE = "Round trip: 12 + 345 = 357,\n\tnaïve café — 東京 🙂  don't  "


def write_gguf_tokenizer(fields: Mapping[str, Any], source: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens, chat template) to `folder`.

    fields: the metadata of the GGUF file `source`. Raises ValueError for a tokenizer that is not byte-level BPE with a
    known pre-tokenizer, or that does not give a text and its special tokens back; ImportError naming the pip extra.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models
    except ImportError as error:
        raise ImportError("writing a tokenizer needs the cli extra: pip install 'megatron-prefix[cli]'") from error
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only byte-level BPE with "
            f"{', '.join(_PRE_TOKENIZERS)}; import the weights alone with --no-tokenizer"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, i in zip(tokens, types, strict=True) if i == wanted
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    _add_bos(tokenizer, fields, tokens)
    _check_round_trip(tokenizer, source, [t for t, i in zip(tokens, types, strict=True) if i == _CONTROL], vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(fields, tokens), indent=2), encoding="utf-8")


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "llama-bpe")
    if name == "gpt-2":
        return byte_level
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if name == "smollm"
        else pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
    )
    return pre_tokenizers.Sequence([first, byte_level])


def _add_bos(tokenizer: Any, fields: Mapping[str, Any], tokens: list[str]) -> None:
    from tokenizers import processors

    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )


def _settings(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json as transformers writes it."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            settings[f"{ours}_token"] = tokens[token]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return settings


def _check_round_trip(tokenizer: Any, source: Path, special: list[str], vocabulary: Mapping[str, int]) -> None:
    back = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
    if back != _PROBE:
        raise ValueError(f"{source}: the tokenizer turns {_PROBE!r} into {back!r}")
    for token in special:
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
        if vocabulary[token] not in ids:
            raise ValueError(f"{source}: special token {token!r} is not recognised in text")
