"""`megatron-prefix train --engine deepspeed`: checkpoints, resuming, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prefix.checkpoint_folder import checkpoints
from tests.cli_runs import ROOT, TIMEOUT_S, Arguments, Run, one_line, run_cli, write_groups, write_model
from tests.test_cli_train import _leaves, in_two_parts, lines, tensors, train
from tests.test_deepspeed_config import EXAMPLES

DEEPSPEED = ("--engine", "deepspeed", "--ds-config")


def with_config(name: str) -> tuple[str, ...]:
    return (*DEEPSPEED, str(EXAMPLES / f"{name}.json"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_model(folder)
    write_groups(folder)
    for name, config in {"typo": {"zero_optimisation": {}}, "z3": {"zero_optimization": {"stage": 3}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


RESUMED = {
    "zero1_bf16_tp": ("--tp", "2", "--sequence-parallel", "--dtype", "bf16"),
    "cpu_zero2": ("--cp", "2", "--max-tokens-per-microbatch", "12"),
    "zero3": ("--save-every", "1", "--keep", "1", "--weight-decay", "0.1"),
}


@pytest.fixture(scope="module")
def two_processes(files: Path) -> dict[str, Run]:
    """Each example once in one run and once in two, then runs from their checkpoints."""
    invocations: dict[str, Arguments] = {}
    for name, options in RESUMED.items():
        runs = in_two_parts(files, files / "out", name, *with_config(name), *options, steps=2)
        invocations |= dict(zip((f"{name} whole", f"{name} first", f"{name} second"), runs, strict=True))
    save = files / "out" / "zero3-whole"
    again = ("--steps", "3", "--save", save, "--resume")
    invocations["another engine"] = train(files, *again)
    invocations["other sizes"] = train(files, *again, *with_config("zero3"), "--tp", "2")
    invocations["as a model"] = train(files, "--model", save / "step_000002", "--steps", "1")
    found = run_cli(*invocations.values(), world_size=2)
    for name, ranks in zip(invocations, found, strict=True):
        assert not any(run.crash for run in ranks), (name, [run.crash for run in ranks])
    return {name: ranks[0] for name, ranks in zip(invocations, found, strict=True)}


def states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of DeepSpeed's files of all ranks, by file and path."""
    found = {}
    for file in sorted((checkpoint / "deepspeed" / "state").glob("*optim_states.pt")):
        tree = torch.load(file, weights_only=False, map_location="cpu")
        found |= {f"{file.name}{path}": value for path, value in _leaves(tree, "")}
    return found


@pytest.mark.ci_oldest
@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_is_the_same_run(files: Path, two_processes: dict[str, Run], name: str) -> None:
    out = files / "out"
    runs = [two_processes[f"{name} {part}"] for part in ("whole", "first", "second")]
    assert [run.exit_code for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    assert runs[2].json["resumed_from"] == 1 and f"ZeRO-{re.findall('[0-9]', name)[0]}" in runs[0].stderr
    assert "collectives by gloo" in one_line(runs[0].stderr)
    assert lines(out / f"{name}-whole.jsonl") == lines(out / f"{name}-halves.jsonl")
    whole, halves = out / f"{name}-whole" / "step_000002", out / f"{name}-halves" / "step_000002"
    for read in (tensors, states):
        expected, found = read(whole), read(halves)
        assert expected.keys() == found.keys() and len(expected) >= 4
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key


@pytest.mark.ci_oldest
def test_old_checkpoints_go(files: Path, two_processes: dict[str, Run]) -> None:
    assert [path.name for path in checkpoints(files / "out" / "zero3-whole")] == ["step_000002"]


@pytest.mark.ci_oldest
def test_a_checkpoint_goes_on_with_what_wrote_it(two_processes: dict[str, Run]) -> None:
    run = two_processes["another engine"]
    assert run.exit_code == 2 and "was saved with engine deepspeed, this run has engine megatron" in one_line(
        run.stderr
    )
    run = two_processes["other sizes"]
    assert run.exit_code == 2 and "was saved with tp 1, this run has tp 2" in one_line(run.stderr)


@pytest.mark.ci_oldest
def test_a_checkpoint_is_a_model_for_every_command(two_processes: dict[str, Run]) -> None:
    assert two_processes["as a model"].exit_code == 0, two_processes["as a model"].stderr


def refusals(files: Path) -> dict[str, tuple[Arguments, str]]:
    zero2, zero3 = with_config("cpu_zero2"), (*DEEPSPEED, str(files / "z3.json"))
    return {
        "no configuration": (train(files, "--engine", "deepspeed"), "give both or neither"),
        "no engine": (train(files, "--ds-config", files / "z3.json"), "give both or neither"),
        "no file": (train(files, *DEEPSPEED, files / "none.json"), "name a DeepSpeed configuration"),
        "typo": (train(files, *DEEPSPEED, files / "typo.json"), "did you mean 'zero_optimization'?"),
        "needs a GPU": (train(files, *with_config("zero2_offload")), "without a GPU"),
        "pipeline": (train(files, *zero2, "--pp", "2"), "--engine deepspeed with --pp 2"),
        "optimizer": (train(files, *zero2, "--distributed-optimizer"), "--distributed-optimizer is of megatron-core's"),
        "dtype": (train(files, *zero2, "--dtype", "fp64"), "DeepSpeed trains in fp32 or bf16"),
        "compare": (train(files, *zero2, "--compare", "1"), "--compare with --engine deepspeed is not supported"),
        "async": (train(files, *zero2, "--save", files / "a", "--async-save"), "--async-save with --engine deepspeed"),
        "split": (train(files, *zero3, "--max-tokens-per-microbatch", "12"), "ZeRO-3 with split groups"),
        "on policy": (
            ("train", "--model", files / "model.json", "--on-policy", "--task", "chain_sum:4", *zero3),
            "--on-policy with --engine deepspeed at ZeRO-3",
        ),
    }


@pytest.mark.ci_oldest
def test_what_the_engine_cannot_do_is_refused_by_name(files: Path) -> None:
    table = refusals(files)
    for (name, (_, message)), (run,) in zip(table.items(), run_cli(*[w for w, _ in table.values()]), strict=True):
        assert run.exit_code == 2 and not run.crash, (name, run.crash or run.stdout)
        assert message in one_line(run.stderr), (name, run.stderr)
        assert not (files / "a").exists()


# ---- launch lines of examples/deepspeed/README.md that run without a GPU


def launched(*command: str, files: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.ci_oldest
def test_the_deepspeed_launcher_starts_the_command(files: Path) -> None:
    words = [str(word) for word in train(files, "--steps", "1", "--json", *with_config("cpu_zero2"))]
    out = launched(
        "deepspeed", "--num_gpus", "2", "--no_local_rank", "--module", "megatron_prefix", *words, files=files
    )
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(results) == 1 and results[0]["updated"] == 1.0


@pytest.mark.ci_newest
def test_torchrun_starts_the_ulysses_example(files: Path) -> None:
    out = launched("torchrun", "--nproc-per-node", "2", "examples/deepspeed/ulysses.py", "--steps", "2", files=files)
    assert re.findall(r"step (\d): loss", out) == ["1", "2"]
