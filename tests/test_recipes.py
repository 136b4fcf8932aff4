"""The recipes of examples/: what the estimator gives, and what the real parsers and megatron-core's checks take."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prefix.cli.main import main
from megatron_prefix.cli.options import DTYPES, ParallelFlags
from megatron_prefix.estimator.model import PRESETS
from megatron_prefix.mcore.parallel import ParallelSizes, destroy
from tests.distributed import run_distributed
from tests.launching import MULTINODE, ROOT, run_script
from tests.test_examples import example

pytestmark = pytest.mark.ci_newest

FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.args"))
OURS = [path for path in RECIPES if not path.name.endswith(".megatron-lm.args")]
MEGATRON_LM = [path for path in RECIPES if path not in OURS]


def model_and_gpus(path: Path) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)_(\d+)xh100(\.megatron-lm)?\.args", path.name)
    assert match
    return match[1], int(match[2])


def launched(path: Path, *arguments: str, program: str = "") -> list[str]:
    """The words that the launcher hands to the program."""
    nodes = model_and_gpus(path)[1] // 8
    settings: dict[str, Any] = {"NNODES": nodes, "NODE_RANK": 0, "MASTER_ADDR": "node0", "RECIPE": path}
    run = run_script(MULTINODE, "--dry-run", *arguments, **settings, **({"PROGRAM": program} if program else {}))
    assert run.returncode == 0 and run.stderr == "", run.stderr
    words = shlex.split(run.stdout)
    assert words[words.index("--nnodes") + 1] == str(nodes)
    return words[words.index(program or "train") + 1 :]


def parsed(path: Path) -> dict[str, Any]:
    """What `train` makes of a recipe."""
    command = main.get_command(click.Context(main), "train")
    assert command is not None
    words = launched(path, "--model", str(FOLDER), "--rollouts", "rollouts.jsonl")
    return command.make_context("train", words).params


def test_they_are_what_the_estimator_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models on 64 GPUs, and what does not fit on 8: files, and their lines in the table."""
    recipes = example("recipes")
    monkeypatch.setattr(recipes, "GPUS", (64,))
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--out", str(tmp_path)])
    recipes.main()
    written = sorted(tmp_path.glob("*.args"))
    assert len(written) == 4
    for path in written:
        assert path.read_text() == (FOLDER / path.name).read_text(), f"{path.name}: run python examples/recipes.py"
    committed = (FOLDER / "README.md").read_text().splitlines()
    assert [line for line in (tmp_path / "README.md").read_text().splitlines() if line not in committed] == []
    monkeypatch.setattr(recipes, "GPUS", (8,))
    (instead,), (why,) = recipes.plan_all(["qwen3-32b"])
    assert instead.text() == (FOLDER / "qwen3-32b_16xh100.args").read_text()
    assert why in committed and "nothing fits" in why


def test_the_table_lists_every_file_and_what_it_expects() -> None:
    page = (FOLDER / "README.md").read_text()
    listed = re.findall(r"\[`(\S+\.args)`\]\(\1\)", page)
    assert sorted(listed) == [path.name for path in RECIPES] and len(listed) == 12
    for path in RECIPES:
        text = path.read_text()
        assert "GPU only; not run on a GPU yet." in text.splitlines()[0]
        (row,) = [line for line in page.splitlines() if f"({path.name})" in line]
        seconds = re.search(r"Expected: ([\d.]+) s a step instead of ([\d.]+) s, or of ([\d.]+) s", text)
        assert seconds and all(f" {float(each):,.2f} " in row for each in seconds.groups())


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_train_takes_its_flags(path: Path) -> None:
    given = parsed(path)
    _, gpus = model_and_gpus(path)
    sizes = ParallelSizes(tp=given["tp"], pp=given["pp"], cp=given["cp"], vpp=given["vpp"]).resolve(gpus)
    assert sizes.tp * sizes.pp * sizes.cp * (sizes.dp or 0) == gpus
    shown = re.search(r"nodes?\): (.+?)\. GPU only", path.read_text())
    assert shown and (f"dp {sizes.dp}" in shown[1].split(", ")) == ((sizes.dp or 0) > 1)
    assert given["use_te"] and given["distributed_optimizer"] and given["groups_per_step"] >= (sizes.dp or 0)


def check_all(rank: int, world_size: int, recipes: list[tuple[str, int, dict[str, Any]]]) -> list[str]:
    """Build megatron-core's configuration of each with that many ranks, of which this is one; what it has become."""
    from megatron.core import parallel_state

    from megatron_prefix.mcore.cpu import run_on_cpu
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
    from megatron_prefix.mcore.model import transformer_config

    destroy()
    run_on_cpu()
    seen = []
    for name, gpus, given in recipes:
        flags = ParallelFlags(**{each: given[each] for each in ("tp", "pp", "vpp", "cp", "cp_comm_type", "cp_a2a")})
        dist.init_process_group("fake", store=FakeStore(), rank=gpus - 1, world_size=gpus)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=flags.tp,
            pipeline_model_parallel_size=flags.pp,
            virtual_pipeline_model_parallel_size=flags.vpp if flags.vpp > 1 else None,
            context_parallel_size=flags.cp,
            create_gloo_process_groups=False,  # the group of ranks that are not there has none
        )
        made = transformer_config(
            PRESETS[name].config,
            dtype=DTYPES[given["dtype"]],
            sequence_parallel=given["sequence_parallel"],
            recompute=given["recompute"],
            overrides=flags.overrides,
        )
        prefix_gpt_layer_spec(made, impl=given["impl"])  # refuses what prefix groups cannot do
        shape = (made.tensor_model_parallel_size, made.pipeline_model_parallel_size, made.context_parallel_size)
        seen.append(f"{name} {gpus} {shape} dp {parallel_state.get_data_parallel_world_size()} {made.params_dtype}")
        destroy()
    return seen


def test_megatron_core_and_prefix_groups_take_model_and_sizes() -> None:
    """The checks that `train` runs before it builds a model, among as many ranks as the recipe has."""
    given = [(*model_and_gpus(path), parsed(path)) for path in OURS]
    kept = ("tp", "pp", "vpp", "cp", "cp_comm_type", "cp_a2a", "sequence_parallel", "recompute", "dtype", "impl")
    tasks = [(name, gpus, {each: values[each] for each in kept}) for name, gpus, values in given]
    (seen,) = run_distributed(check_all, 1, tasks)
    expected = []
    for name, gpus, values in tasks:
        shape = (values["tp"], values["pp"], values["cp"])
        expected.append(f"{name} {gpus} {shape} dp {gpus // (shape[0] * shape[1] * shape[2])} {torch.bfloat16}")
    assert seen == expected and len(seen) == 9


@pytest.mark.parametrize("path", MEGATRON_LM, ids=lambda path: path.name)
def test_megatron_lm_takes_its_flags(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parser and its own validation, told of an H100 and of as many ranks as the recipe has."""
    arguments = pytest.importorskip(
        "megatron.training.arguments", reason="this megatron-core ships no megatron.training"
    )
    name, gpus = model_and_gpus(path)
    here = ("--no-rope-fusion",)  # it is Transformer Engine's
    words = launched(path, "--seq-length", "12288", "--micro-batch-size", "1", *here, program="train_rl.py")
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *words])
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as the launcher sets it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    args = arguments.parse_args()
    arguments.validate_args(args)
    experts, config = PRESETS[name].experts, PRESETS[name].config
    assert experts is not None
    assert (args.num_experts, args.moe_router_topk) == (experts.num_experts, experts.experts_per_token)
    assert args.moe_ffn_hidden_size == config.ffn_hidden_size and args.num_layers == config.num_layers
    model_ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    assert model_ranks * args.data_parallel_size == gpus
    made = arguments.core_transformer_config_from_args(args)
    from megatron_prefix.mcore.support import refuse_unsupported

    refuse_unsupported(made)
    assert made.moe_ffn_hidden_size == config.ffn_hidden_size and not made.add_bias_linear
