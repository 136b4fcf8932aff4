"""`megatron-prefix plan`: table, JSON, picture and the line to train with; bad input is refused by name."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from megatron_prefix.cli.main import main
from megatron_prefix.cli.train import train_command
from megatron_prefix.rollouts import RolloutGroup, write_rollouts

pytestmark = pytest.mark.ci_newest

SMALL = ["--groups-per-step", "16", "--group-size", "4", "--prompt-len", "3000", "--response-len", "uniform:200:900"]


def plan(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["plan", *map(str, arguments)])


def report(*arguments: str | Path) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_table_json_file_and_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    where = ["--num-gpus", "8", "--out", out, "--plot", picture, "--json"]
    result = plan("--model", "qwen3-8b", *SMALL, *where)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == data
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["model"]["parameters"] == 8_190_735_360 and data["groups"] == 16
    best = data["choices"][0]
    assert best["tp"] * best["cp"] * best["pp"] * best["dp"] == 8
    seconds = best["grouped"]["seconds"]
    assert sum(value for part, value in seconds.items() if part != "total") == pytest.approx(seconds["total"])
    assert best["speed_up"] == pytest.approx(best["repeated"]["seconds"]["total"] / seconds["total"])
    assert f"{seconds['total']:,.2f}" in result.stderr and f"{best['speed_up']:.2f}x" in result.stderr
    assert data["train"].split()[0] == "torchrun" and data["train"] in result.stderr.replace("\n", "")


def test_the_line_to_train_with_is_understood_by_train() -> None:
    data = report("--model", "qwen3-8b", *SMALL, "--num-gpus", "16", "--tp", "2", "--pp", "2", "--vpp", "2")
    words = shlex.split(data["train"])
    flags = words[words.index("train") + 1 :]
    known = {option for parameter in train_command.params for option in parameter.opts}
    assert {word for word in flags if word.startswith("--")} <= known
    for flag, value in (("--tp", "2"), ("--pp", "2"), ("--vpp", "2")):
        assert flags[flags.index(flag) + 1] == value
    assert words[words.index("--nnodes") + 1] == "2" and "--sequence-parallel" in flags


def test_experts_get_the_flags_of_megatron_lm() -> None:
    data = report("--model", "qwen3-30b-a3b", *SMALL, "--num-gpus", "64", "--gpu", "h200", "--ep", "8", "--top", "2")
    assert len(data["choices"]) == 2 and all(choice["ep"] == 8 for choice in data["choices"])
    assert "--expert-model-parallel-size 8" in data["train"] and "no experts yet" in data["train"]


def test_rollouts_give_the_groups(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [RolloutGroup([1] * 500, [[2] * 40, [3] * 30], [0.0, 1.0])] * 4)
    data = report("--model", "qwen3-8b", "--rollouts", path, "--num-gpus", "4")
    assert data["groups"] == 4 and data["rows"] == {"grouped": 4 * 569, "repeated": 4 * (539 + 529)}
    result = plan("--model", "qwen3-8b", "--rollouts", path, "--group-size", "4")
    assert result.exit_code == 2 and "--rollouts gives the groups; leave out --group-size" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "neither a file or folder nor one of"),
        (["--model", "qwen3-8b", "--gpu", "abacus"], "device 'abacus' is not known"),
        (["--model", "qwen3-8b", "--prompt-len", "long"], "lengths 'long' are not understood"),
        (["--model", "qwen3-8b", "--num-gpus", "12"], "12 GPUs are not whole nodes of 8"),
        (["--model", "qwen3-8b", "--network-gbps", "0"], "--network-gbps must be above 0"),
        (["--model", "qwen3-8b", "--plot", "nowhere/plan.png"], "the folder nowhere does not exist"),
        (["--model", "qwen3-8b", "--tp", "16"], "no parallel sizes with tp=16"),
        (["--model", "qwen3-32b", "--num-gpus", "4"], "nothing fits 67.1 GiB"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: list[str], message: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
