"""The benchmark command: what it reports, and that it refuses to report a speed-up of something else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall
from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.attention.sdpa import SdpaKernel
from megatron_prefix.bench import attention, peer
from megatron_prefix.bench.group import GroupSizes, ratios
from megatron_prefix.bench.report import ResultsDifferError, check_equal, relative_difference
from megatron_prefix.cli.main import main

pytestmark = pytest.mark.ci_oldest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--prefix-len", "24", "--response-len", "4", "--group-size", "3", "--repeats", "2"]
HEADS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
ROWS, REPEATED_ROWS = 24 + 3 * 4, 3 * (24 + 4)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.parametrize(
    ("p", "r", "g", "rho", "alpha"),
    [(16384, 1024, 8, 5.67, 4.45), (8192, 2048, 32, 4.44, 2.63), (1024, 8192, 8, 1.11, 1.01), (7, 3, 1, 1, 1)],
)
def test_bounds(p: int, r: int, g: int, rho: float, alpha: float) -> None:
    group = GroupSizes(p, r, g)
    assert (group.rho, group.alpha) == pytest.approx((rho, alpha), abs=5e-3)
    layout = group.layout()
    exact = ratios(layout, layout.repeated())
    assert exact["rows"] == pytest.approx(group.rho) and exact["area"] == pytest.approx(group.alpha, rel=0.02)


def test_rows_of_repeated_training_are_copies_of_the_groups() -> None:
    group = GroupSizes(2, 1, 3)
    assert group.repeated_rows().tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 4]
    positions = torch.tensor(group.layout().positions)[group.repeated_rows()]
    assert tuple(positions.tolist()) == group.layout().repeated().positions


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_attention_report(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = bench("attention", *TINY, *HEADS, "--dtype", dtype, "--json", "--out", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == report
    assert report["bench"] == "attention" and report["ok"] is True
    assert report["date"].startswith("20") and "commit" in report and report["machine"]["cpu"]
    assert {"python", "torch", "megatron-core"} <= report["versions"].keys()
    group, heads = {"prefix_len": 24, "response_len": 4, "group_size": 3}, {"heads": 4, "kv_heads": 2, "head_dim": 8}
    assert report["sizes"] == {**group, **heads, "dtype": dtype, "impl": "sdpa", "repeats": 2}
    repeated, grouped = report["results"]["repeated"], report["results"]["grouped"]
    assert (repeated["rows"], grouped["rows"]) == (REPEATED_ROWS, ROWS)
    own_area = 24 * 25 // 2 + 3 * 4 * 5 // 2
    assert (repeated["area"], grouped["area"]) == (3 * 28 * 29 // 2, own_area + 3 * 4 * 24)
    assert report["bound"] == {"name": "alpha", "value": GroupSizes(24, 4, 3).alpha, "rho": GroupSizes(24, 4, 3).rho}
    assert report["ratios"] == {"rows": REPEATED_ROWS / ROWS, "area": repeated["area"] / grouped["area"]}
    for name, path in report["results"].items():
        assert set(path["seconds"]) == {"forward", "backward", "total"}
        assert all(len(taken["all"]) == 2 and taken["median"] >= taken["min"] > 0 for taken in path["seconds"].values())
        assert set(report["differences"][name]) == {"out", "dq", "dk", "dv"}
        assert max(report["differences"][name].values()) <= report["tolerance"][name]
    # q, k, v, the output and its log-sum-exp are saved: each row once, nothing copied
    numbers = 2 * 4 * 8 + 2 * 2 * 8
    size, lse_size = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}[dtype]
    assert grouped["saved_bytes"] == ROWS * (numbers * size + 4 * lse_size)
    assert repeated["saved_bytes"] == REPEATED_ROWS * (numbers * size + 4 * lse_size)
    assert grouped["peak_bytes"] < repeated["peak_bytes"]
    medians = [path["seconds"]["total"]["median"] for path in (repeated, grouped)]
    assert report["speed_up"]["total"] == pytest.approx(medians[0] / medians[1])
    assert report["speed_up_over_bound"] == pytest.approx(report["speed_up"]["total"] / report["bound"]["value"])
    assert re.search(r"speed-up \d+\.\d\dx", result.stderr)


def test_the_peer_is_compared_where_it_is_installed() -> None:
    pytest.importorskip("prefix_grouper")
    report = json.loads(bench("attention", *TINY, *HEADS, "--dtype", "fp64", "--json").stdout)
    tuned, entry = report["results"]["prefix_grouper_tuned"], report["prefix_grouper"]
    assert entry["status"] == "compared" and entry["version"] and entry["speed_up"]["total"] > 0
    assert tuned["area"] == 24 * 25 // 2 + 3 * 4 * 28
    assert report["results"]["prefix_grouper"]["area"] == 24 * 24 + 3 * 4 * 28
    copies = 3 * 28 * 2 * 2 * 8 * 8  # keys and values of prefix and response, once per response, fp64
    assert tuned["saved_bytes"] > copies and entry["saved_bytes_ratio"] > 1


def test_the_peer_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "package_version", lambda name: None)
    result = bench("attention", *TINY, *HEADS, "--json")
    report = json.loads(result.stdout)
    assert report["prefix_grouper"] == {"status": "not installed"} and "prefix_grouper" not in report["results"]
    assert "prefix-grouper: not installed" in result.stderr


class WrongOutput(SdpaKernel):
    """Off by one part in a thousand over shared keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call, softmax_scale)
        return (out, lse) if call.causal else (out * 1.001, lse)


class WrongScale(SdpaKernel):
    """Wrong alike for repeated prefixes and groups."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, v, call, softmax_scale * 1.01)


class WrongBackward(SdpaKernel):
    """Forgets what the responses' rows owe to the shared keys."""

    def backward(
        self, grads: Any, dout: Tensor, qkv: Any, out: Tensor, lse: Tensor, call: VarlenCall, s: float
    ) -> None:
        dq, dk, dv = grads
        super().backward(grads if call.causal else (dq, dk.clone(), dv), dout, qkv, out, lse, call, s)


class NanOutput(SdpaKernel):
    """Not a number in one place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call, softmax_scale)
        out[-1, 0, 0] = torch.nan
        return out, lse


def assert_refused(result: Result, *named: str) -> None:
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"] is False
    assert all(any(name in failure for failure in report["failures"]) for name in named), report["failures"]
    assert not {"speed_up", "speed_up_over_bound", "results"} & report.keys()
    assert "results differ" in result.stderr and not re.search(r"\dx", result.stderr)


@pytest.mark.parametrize(
    ("kernel", "dtype", "named"),
    [
        (WrongOutput(), "fp32", ["grouped: out"]),
        (WrongScale(), "fp32", ["grouped: out", "repeated: dq"]),
        (WrongBackward(), "fp64", ["grouped: dk"]),
        (WrongBackward(), "bf16", ["grouped: dk"]),
        (NanOutput(), "fp32", ["grouped: out differs by nan"]),
        (NanOutput(), "bf16", ["grouped: out differs by nan"]),
    ],
)
def test_wrong_kernels_get_no_speed_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: SdpaKernel, dtype: str, named: list[str]
) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    out = tmp_path / "report.json"
    result = bench("attention", *TINY, *HEADS, "--dtype", dtype, "--json", "--out", str(out))
    assert_refused(result, *named)
    assert json.loads(out.read_text())["ok"] is False


def test_a_wrong_peer_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefix_grouper")
    right = peer.prefix_grouper_attention

    def wrong(sizes: GroupSizes, dtype: torch.dtype, *, tuned: bool) -> peer.Attend:
        attend = right(sizes, dtype, tuned=tuned)
        return lambda q, k, v: attend(q, k, v) + 0.01 * v[:, :1]

    monkeypatch.setattr(attention, "prefix_grouper_attention", wrong)
    assert_refused(bench("attention", *TINY, *HEADS, "--json"), "prefix_grouper: out", "prefix_grouper: dv")


def test_half_precision_is_judged_by_the_error_of_repeated_prefixes() -> None:
    report: dict[str, Any] = {}
    check_equal(report, {"repeated": {"out": 3e-3}, "grouped": {"out": 5e-3}}, torch.bfloat16)
    assert report["tolerance"] == {"repeated": 0.05, "grouped": 6e-3}
    for differences in ({"repeated": {"out": 3e-3}, "grouped": {"out": 7e-3}}, {"repeated": {"out": 6e-2}}):
        with pytest.raises(ResultsDifferError, match="out differs by"):
            check_equal({}, differences, torch.bfloat16)


def test_relative_difference() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_difference(exact, exact) == 0
    assert relative_difference(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_difference(exact, torch.zeros(2)) == float("inf")
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--prefix-len", "0"], "--prefix-len"),
        (["attention", "--group-size", "-1"], "--group-size"),
        (["attention", "--heads", "6", "--kv-heads", "4"], "kv_heads 4 must divide heads 6"),
        (["attention", "--dtype", "fp8"], "--dtype"),
        (["attention", "--impl", "magic"], "--impl"),
        (["attention", *TINY, "--impl", "flash"], "impl='flash' runs on CUDA"),
        (["attention", "--repeats", "0"], "--repeats"),
        (["attention", "--out", "no/such/folder/report.json"], "the folder no/such/folder does not exist"),
        (["step", "--layers", "0"], "--layers"),
        (["step", "--hidden-size", "250"], "hidden_size 250 is not a multiple of num_attention_heads"),
        (["step", "--model", "no-such-folder"], "--model"),
        (["step", "--model", ".", "--heads", "4"], "--model gives the shape; leave out --heads"),
        (["other"], "No such command"),
    ],
)
def test_bad_input_exits_2_before_any_work(arguments: list[str], message: str) -> None:
    if "flash" in arguments and torch.cuda.is_available():
        pytest.skip("flash runs here")
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""


def test_bench_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = bench("attention", *TINY)
    assert result.exit_code == 2 and "runs in 1 process(es), 2 run" in result.stderr


# megatron-core is imported, patched for the CPU and started in a process of its own.
STEP_SCRIPT = """
import json, sys
from click.testing import CliRunner
from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.cli.main import main
from megatron_prefix.model_config import ModelConfig
from tests.test_bench import TINY, WrongBackward
model = sys.argv[1] + "/model.json"
ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=64,
            max_position_embeddings=28, tied_embeddings=True).to_json(model)
shape = ["--layers", "2", "--hidden-size", "32", "--vocab-size", "64"]
runs = {
    "fp32": [*TINY, *shape],
    "bf16": [*TINY, *shape, "--dtype", "bf16"],
    "model": [*TINY, "--model", model, "--dtype", "fp64"],
    "long": [*TINY, "--model", model, "--response-len", "5"],
    "wrong": [*TINY, *shape],
    "wrong bf16": [*TINY, *shape, "--dtype", "bf16"],
}
for name, arguments in runs.items():
    if name.startswith("wrong"):
        KERNELS["sdpa"] = WrongBackward()
    result = CliRunner().invoke(main, ["bench", "step", *arguments, "--json"])
    print(json.dumps([name, result.exit_code, result.stdout, result.stderr]))
"""


def test_step(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", STEP_SCRIPT, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}

    for name in ("fp32", "bf16", "model"):
        code, stdout, stderr = results[name]
        assert code == 0, stderr
        report = json.loads(stdout)
        assert report["bench"] == "step" and report["ok"] is True
        assert report["model"]["num_layers"] == 2 and report["model"]["tied_embeddings"] is (name == "model")
        repeated, grouped = report["results"]["repeated"], report["results"]["grouped"]
        assert (repeated["rows"], grouped["rows"]) == (REPEATED_ROWS, ROWS)
        assert report["bound"]["name"] == "rho" and report["bound"]["value"] == GroupSizes(24, 4, 3).rho
        assert report["ratios"]["rows"] == REPEATED_ROWS / ROWS
        assert report["ratios"]["flops"] == repeated["flops"] / grouped["flops"] < report["ratios"]["rows"]
        # every parameter's gradient, and the log-probs
        differences = report["differences"]["grouped"]
        expected = {"log_probs", "grad embedding.word_embeddings.weight", "grad decoder.final_layernorm.weight"}
        assert expected <= differences.keys() and len(differences) == 1 + 2 * 6 + 2 + (name != "model")
        assert max(differences.values()) <= report["tolerance"]["grouped"]
        assert grouped["peak_bytes"] < repeated["peak_bytes"]
        assert report["speed_up_over_bound"] == pytest.approx(report["speed_up"]["total"] / report["bound"]["value"])

    # Linear layers of the fp32 model by hand: per row QKV, projection, gated MLP; vocabulary for response rows only.
    numbers = 2 * (32 * 64 + 32 * 32 + 32 * 2 * 96 + 96 * 32)
    area = json.loads(results["fp32"][1])["results"]["grouped"]["area"]
    flops = 6 * (ROWS * numbers + 12 * 32 * 64) + 14 * 2 * 4 * 8 * area
    assert json.loads(results["fp32"][1])["results"]["grouped"]["flops"] == flops

    code, stdout, stderr = results["long"]
    assert code == 2 and stdout == "" and "over the model's max_position_embeddings 28" in stderr
    for name in ("wrong", "wrong bf16"):
        code, stdout, stderr = results[name]
        report = json.loads(stdout)
        assert code == 1 and report["ok"] is False and "results differ" in stderr
        assert any("grad decoder.layers.0.self_attention.linear_qkv.weight" in line for line in report["failures"])
        assert not {"speed_up", "results"} & report.keys()
