"""`megatron-prefix inspect`, and `verify` on files of other formats."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow", reason="needs the cli extra")
pytest.importorskip("matplotlib", reason="needs the cli extra")
from matplotlib.image import imread

from megatron_prefix.cost_model import CostModel
from megatron_prefix.layout import PrefixLayout
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_stats import RolloutStats, quantiles
from megatron_prefix.rollouts import write_rollouts
from megatron_prefix.workload import Workload
from tests.cli_runs import MODEL, groups, one_line, run_cli, run_one, write_groups, write_model
from tests.test_fuzz_formats import BATCH, LINES, damaged
from tests.tokenizer_files import write_byte_tokenizer

pytestmark = pytest.mark.ci_newest

GROUPS = [
    RolloutGroup([1, 2, 3, 4, 5], [[6, 7], [8, 9, 10], [6, 7]], [1, 0, 1], "a", None, [[1, 1], [1, 0, 1], None]),
    RolloutGroup([1, 2, 3], [[4], [5]], [0.5, 0.5], "b"),
    RolloutGroup([1, 2, 3], [[9] * 12], [0.25], "c"),
]  # fmt: skip


def test_numbers_are_those_of_the_masks(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.jsonl", GROUPS)
    result = run_one("inspect", tmp_path / "r.jsonl", "--json").json
    assert result["groups"] == 3
    assert result["responses"] == 6
    assert result["prompt_length"] == {"min": 3, "median": 3, "p90": 5, "max": 5}
    assert result["response_length"] == {"min": 1, "median": 2, "p90": 12, "max": 12}
    assert result["group_size"] == {"min": 1, "median": 2, "p90": 3, "max": 3}
    assert result["trained_share"] == 20 / 21
    assert result["reward"]["mean"] == pytest.approx(np.mean([1, 0, 1, 0.5, 0.5, 0.25]))
    layouts = [PrefixLayout([len(g.prompt) - 1, *map(len, g.responses)], [-1] + [0] * len(g.responses)) for g in GROUPS]
    pairs = sum(int(_mask(layout).sum()) for layout in layouts)
    assert result["rows"] == {"shared": 4 + 7 + 2 + 2 + 2 + 12, "repeated": 3 * 4 + 7 + 2 * 2 + 2 + 2 + 12}
    assert result["pairs"]["shared"] == pairs
    lengths = [len(g.prompt) - 1 + len(tokens) for g in GROUPS for tokens in g.responses]
    assert result["pairs"]["repeated"] == sum(n * (n + 1) // 2 for n in lengths)
    assert result["rho"] == result["rows"]["repeated"] / result["rows"]["shared"]
    assert result["prefix_ratio"] == pytest.approx(1 - 1 / result["rho"])
    ratios = sorted([result["rho"], result["alpha"]])
    assert result["saving"] == {"least": ratios[0], "most": ratios[1], "modelled": False}
    assert result["group_rho"]["max"] == pytest.approx(19 / 11)


def _mask(layout: PrefixLayout) -> np.ndarray:
    """Brute force: a row sees the rows before it in its segment, and the whole segments above."""
    segment = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    above = [set() if parent < 0 else {parent} for parent in layout.parents]
    seen = [[k <= q and (segment[k] == s or segment[k] in above[s]) for k in range(len(segment))]
            for q, s in enumerate(segment)]  # fmt: skip
    return np.array(seen)


def test_findings_and_skipped_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [*GROUPS, RolloutGroup([7] * 30, [[1], [2]], [0.0, 1.0], "d", [[0.5], [-1.0]])])
    with path.open("a") as out:
        out.write('{"group_id": "bad"}\n{"prompt": [99], "responses": [{"tokens": [1], "reward": 0}]}\nnot json\n')
    model = write_model(tmp_path, max_position_embeddings=16)
    run, refused = (
        each[0]
        for each in run_cli(
            ["inspect", path, "--skip-bad", "--model", model, "--max-tokens-per-microbatch", 20, "--json"],
            ["inspect", path, "--model", model],
        )
    )
    assert run.exit_code == 0, run.crash
    found = {what: (each["count"], each["places"]) for what, each in run.json["findings"].items()}
    assert found == {
        "two groups have the same prompt": (1, ["'b' (line 2) and 'c' (line 3)"]),
        "a group has one response: no advantage, nothing to share": (1, ["'c' (line 3)"]),
        "all rewards of a group are equal: no advantage": (1, ["'b' (line 2)"]),
        "a response is the same as another of its group": (1, ["'a' (line 1)"]),
        "log_probs are above 0: no log-probabilities": (1, ["'d' (line 4)"]),
        "a sequence is longer than the model's 16 positions": (1, ["'d' (line 4)"]),
        "a prefix or response does not fit a micro-batch of 20 rows": (1, ["'d' (line 4)"]),
    }
    assert run.json["skipped"] == 3
    assert [problem["place"] for problem in run.json["problems"]] == [f"{path}:{n}" for n in (5, 6, 7)]
    text = one_line(run.stderr)
    assert f"3 bad records skipped; the first: {path}:5: a line must have" in text
    assert f"{path}:6: prompt, position 0: token id 99 is outside the vocabulary of 64 tokens" in text
    assert refused.exit_code == 2
    assert f"{path}:5: a line must have" in one_line(refused.stderr)


def test_the_modelled_saving_is_the_cost_models(tmp_path: Path) -> None:
    path, model = write_groups(tmp_path, 6), write_model(tmp_path)
    result = run_one("inspect", path, "--model", model, "--json").json
    cost, given = CostModel.of_model(ModelConfig(**MODEL)), groups(6)
    repeated = sum(cost.cost(Workload.repeated(group)) for group in given)
    assert result["saving"]["modelled"] is True
    assert result["saving"]["most"] == pytest.approx(repeated / sum(cost.cost(Workload.of_group(g)) for g in given))


def test_the_picture(tmp_path: Path) -> None:
    path = write_groups(tmp_path, 6)
    runs = run_cli(
        ["inspect", path, "--plot", tmp_path / "r.png"],
        ["inspect", path, "--model", write_model(tmp_path), "--plot", tmp_path / "m.png"],
        ["inspect", path, "--plot", tmp_path / "absent" / "r.png"],
    )
    assert [run.exit_code for (run,) in runs] == [0, 0, 2]
    for name in ("r.png", "m.png"):
        picture = imread(tmp_path / name)[..., :3]
        assert picture.shape[:2] == (455, 1430)
        colours = {tuple(colour) for colour in (picture.reshape(-1, 3) * 255).round().astype(int).tolist()}
        assert {(0xB0, 0xB7, 0xC3), (0x76, 0xB9, 0x00)} <= colours, "grey and green bars"


def test_every_format_is_inspected_and_verified(tmp_path: Path) -> None:
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    model = write_model(tmp_path, vocab_size=300, max_position_embeddings=128)
    files = []
    for name, lines in LINES.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(BATCH, tmp_path / "batch.pt")
    write_rollouts(tmp_path / "r.parquet", GROUPS)
    files += [tmp_path / "batch.pt", tmp_path / "r.parquet"]
    runs = run_cli(*(["inspect", file, "--tokenizer", tokenizer, "--json"] for file in files))
    counts = {file.stem: (run.json["groups"], run.json["responses"], run.json["left_out"]) for file, (run,) in
              zip(files, runs, strict=True)}  # fmt: skip
    assert counts == {
        "native": (4, 7, 0), "chat": (2, 3, 0), "verl": (3, 4, 0), "nemo-rl": (2, 4, 1), "megatron-rl": (2, 4, 0),
        "batch": (2, 3, 0), "r": (3, 6, 0),
    }  # fmt: skip
    agent = tmp_path / "agent.jsonl"  # trees of several levels, through a whole training step both ways
    agent.write_text("".join(json.dumps(line) + "\n" for line in LINES["megatron-rl"]))
    run = run_one("verify", "--rollouts", agent, "--model", model, "--dtype", "fp64", "--json")
    assert run.exit_code == 0, run.stderr
    assert run.json["rows_grouped"] < run.json["rows_repeated"]


def test_damaged_files_end_with_a_line_or_a_result(tmp_path: Path) -> None:
    rng, calls = random.Random(1), []
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    for i in range(30):
        name = rng.choice(list(LINES))
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(damaged("".join(json.dumps(line) + "\n" for line in LINES[name]).encode(), rng))
        calls.append(["inspect", path, "--tokenizer", tokenizer, *(["--skip-bad"] if i % 2 else [])])
    codes = []
    for (run,), call in zip(run_cli(*calls), calls, strict=True):
        assert not run.crash, run.crash
        assert run.exit_code in (0, 2)
        if run.exit_code == 2:
            assert str(call[1]) in one_line(run.stderr)
            assert "Traceback" not in run.stderr
        codes.append(run.exit_code)
    assert 4 < sum(codes) / 2 < 26


def test_quantiles_are_values() -> None:
    assert quantiles([4]) == {"min": 4, "median": 4, "p90": 4, "max": 4}
    assert quantiles(range(1, 11)) == {"min": 1, "median": 5, "p90": 9, "max": 10}


def test_a_group_over_the_limit_is_split() -> None:
    stats = RolloutStats(max_tokens=8)
    stats.add("here", GROUPS[0])
    assert stats.findings["a group has more than 8 rows and will be split"].count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "native.jsonl: cannot read rollouts: No such file"),
        (["--tokenizer", "."], "has no tokenizer.json"),
        (["--format", "csv"], "'csv' is not one of"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    run = run_one("inspect", tmp_path / "native.jsonl", *options)
    assert run.exit_code == 2
    assert message in one_line(run.stderr)
