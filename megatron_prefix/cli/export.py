"""`megatron-prefix export`: a checkpoint folder to a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from megatron_prefix.cli.console import print_json, start_distributed, stderr_console
from megatron_prefix.cli.options import DTYPES
from megatron_prefix.mcore.checkpoint import load_checkpoint, load_config
from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.export_weights import export_weights
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.parallel import ParallelSizes, destroy, initialize
from megatron_prefix.weights import check_exportable
from megatron_prefix.weights.hf_writer import check_new_folder


@click.command("export")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice([x for x in DTYPES if x != "fp64"]), default="bf16", help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line of stdout.")
def export_command(checkpoint: Path, out: Path, dtype: str, as_json: bool) -> None:
    """Convert a checkpoint folder to a Hugging Face folder, which transformers, vLLM and SGLang read.

    CHECKPOINT: a folder from import or train, saved at any parallel sizes. Its tokenizer is copied.

    OUT: the folder to make: config.json, generation_config.json, safetensors.
    """
    started = time.perf_counter()
    config = load_config(checkpoint)
    kind = check_exportable(config)
    check_new_folder(out)
    if not torch.cuda.is_available():
        run_on_cpu()
    world = start_distributed()
    if world.size != 1:
        raise ValueError("export runs in one process: start it without torchrun")
    initialize(ParallelSizes())
    try:
        model = build_model(config, dtype=DTYPES[dtype], overrides={"perform_initialization": False})
        load_checkpoint(checkpoint, model, config=config)
        export_weights(model, config, out, tokenizer_from=checkpoint)
    finally:
        destroy()
    tokenizer = (out / "tokenizer.json").is_file()
    stderr_console().print(f"{kind}, {config.num_layers} layers, {dtype}, {time.perf_counter() - started:.1f} s: {out}")
    if as_json:
        print_json({"out": str(out), "model_type": kind, "dtype": dtype, "tokenizer": tokenizer})
