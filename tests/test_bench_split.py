"""`bench split`: what it reports, and that it refuses to report ratios between steps that differ."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall
from megatron_prefix.attention.sdpa import SdpaKernel
from megatron_prefix.cli.main import main
from megatron_prefix.measure import track_memory

pytestmark = pytest.mark.ci_oldest

ROOT = Path(__file__).resolve().parents[1]
P, R, G, PARTS = 24, 4, 7, 3
GROUP = ["--prefix-len", str(P), "--response-len", str(R), "--group-size", str(G), "--parts", str(PARTS)]
MODEL = ["--layers", "2", "--hidden-size", "32", "--vocab-size", "64", "--head-dim", "8", "--group-sizes", "2,4"]


class ForgetsParts(SdpaKernel):
    """Keeps nothing of what a part's rows owe to the keys of the prefix."""

    def backward(
        self, grads: Any, dout: Tensor, qkv: Any, out: Tensor, lse: Tensor, call: VarlenCall, s: float
    ) -> None:
        dq, dk, dv = grads
        reads_cache = dk.shape[0] != dq.shape[0]
        super().backward((dq, dk.clone(), dv) if reads_cache else grads, dout, qkv, out, lse, call, s)


# megatron-core is imported, patched for the CPU and started in a process of its own.
SCRIPT = """
import json
from click.testing import CliRunner
from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.cli.main import main
from tests.test_bench_split import GROUP, MODEL, ForgetsParts
every = [word for name in ("keep", "recompute", "offload") for word in ("--prefix-activations", name)]
runs = {
    "fp32": [*GROUP, *MODEL, *every, "--repeated", "--repeats", "2"],
    "bf16": [*GROUP, *MODEL, "--dtype", "bf16", "--repeats", "1", "--group-sizes", "2"],
    "fp64": [*GROUP, *MODEL, "--dtype", "fp64", "--repeats", "1", "--group-sizes", ""],
    "too many parts": [*GROUP, *MODEL, "--parts", "8"],
    "odd sizes": [*GROUP, *MODEL, "--group-sizes", "4,7"],
    "small sizes": [*GROUP, *MODEL, "--group-sizes", "1,2"],
    "wrong": [*GROUP, *MODEL, "--repeats", "1"],
}
for name, arguments in runs.items():
    if name == "wrong":
        KERNELS["sdpa"] = ForgetsParts()
    result = CliRunner().invoke(main, ["bench", "split", *arguments, "--json"])
    print(json.dumps([name, result.exit_code, result.stdout, result.stderr]))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


def report_of(results: dict[str, list[Any]], name: str) -> dict[str, Any]:
    code, stdout, stderr = results[name]
    assert code == 0, stderr
    return json.loads(stdout)


def test_rows_flops_and_memory(results: dict[str, list[Any]]) -> None:
    report = report_of(results, "fp32")
    paths = report["results"]
    assert list(paths) == ["unsplit", "split_keep", "split_recompute", "split_offload", "re_encoded", "repeated"]
    responses = G * R
    rows = {name: path["layer_rows"] for name, path in paths.items()}
    assert rows["unsplit"] == {"qkv": [P + responses] * 2, "mlp": [P + responses] * 2}
    # once through every layer, and through the MLP of the last not at all
    once = {"qkv": [P + responses] * 2, "mlp": [P + responses, responses]}
    assert rows["split_keep"] == rows["split_offload"] == once
    assert rows["split_recompute"] == {"qkv": [2 * P + responses] * 2, "mlp": [2 * P + responses, responses]}
    assert rows["re_encoded"]["qkv"] == [PARTS * P + responses] * 2 and rows["repeated"]["qkv"] == [G * (P + R)] * 2
    assert [path["micro_batches"] for path in paths.values()] == [1, 4, 4, 4, 3, G]
    assert report["rows"]["re_encoded"] == (PARTS * P + responses) / (P + responses)

    # By hand: linear layers per row, vocabulary for response rows, attention per pair of the mask.
    qkv, rest, head = 2 * 32 * 64, 2 * (32 * 32 + 32 * 2 * 96 + 96 * 32), 2 * 32 * 64
    own_area, response_area = P * (P + 1) // 2, G * (R * (R + 1) // 2 + R * P)
    attention = 14 * 4 * 8
    unsplit = 3 * ((P + responses) * 2 * (qkv + rest) + responses * head) + attention * 2 * (own_area + response_area)
    assert paths["unsplit"]["flops"] == unsplit
    # Of the prefix, the last layer costs the projection alone.
    assert paths["split_keep"]["flops"] == unsplit - 3 * P * rest - attention * own_area
    again = P * (2 * qkv + rest) + 4 * 4 * 8 * own_area
    assert paths["split_recompute"]["flops"] == paths["split_keep"]["flops"] + again

    for name in ("split_keep", "split_recompute", "split_offload"):
        peaks = paths[name]["phase_peak_bytes"]
        assert set(peaks) == {"prefix_forward", "responses", "prefix_backward"}
        assert max(peaks.values()) == paths[name]["peak_bytes"] < paths["unsplit"]["peak_bytes"]
    held, dropped = (paths[name]["phase_peak_bytes"]["responses"] for name in ("split_keep", "split_recompute"))
    assert dropped < 0.7 * held
    assert report["memory_saved"]["split_keep"] == pytest.approx(
        1 - paths["split_keep"]["peak_bytes"] / paths["unsplit"]["peak_bytes"]
    )


def test_groups_of_any_size_take_the_same_memory(results: dict[str, list[Any]]) -> None:
    report = report_of(results, "fp32")
    assert [(entry["group_size"], entry["parts"]) for entry in report["by_group_size"]] == [(2, 2), (4, 4)]
    small, large = (entry["results"] for entry in report["by_group_size"])
    assert large["unsplit"]["peak_bytes"] > 1.1 * small["unsplit"]["peak_bytes"]
    assert set(report["response_phase_spread"]) == {"split_keep", "split_recompute", "split_offload"}
    assert all(0 <= spread < 0.02 for spread in report["response_phase_spread"].values())


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_report(results: dict[str, list[Any]], name: str) -> None:
    report = report_of(results, name)
    assert report["bench"] == "split" and report["ok"] is True and report["sizes"]["dtype"] == name
    assert report["date"].startswith("20") and "commit" in report and report["machine"]["cpu"]
    assert {"python", "torch", "megatron-core"} <= report["versions"].keys()
    assert report["sizes"]["parts"] == PARTS and report["sizes"]["impl"] == "sdpa"
    # log-probs, loss terms and every parameter's gradient
    for path, differences in report["differences"].items():
        assert {"log_probs", "loss_terms", "grad embedding.word_embeddings.weight"} <= differences.keys()
        assert len(differences) == 2 + 2 * 6 + 3
        assert max(differences.values()) <= report["tolerance"][path]
    seconds = {path: result["seconds"]["total"]["median"] for path, result in report["results"].items()}
    assert report["speed"]["over_unsplit"]["split_keep"] == pytest.approx(seconds["unsplit"] / seconds["split_keep"])
    assert report["speed"]["over_re_encoded"]["split_keep"] == pytest.approx(
        seconds["re_encoded"] / seconds["split_keep"]
    )
    assert set(report["results"]["split_keep"]["seconds"]) == {
        "prefix_forward", "responses", "prefix_backward", "total"
    }  # fmt: skip
    assert "of the speed of unsplit" in results[name][2]
    assert len(report["by_group_size"]) == {"fp32": 2, "bf16": 1, "fp64": 0}[name]


def test_steps_that_differ_are_refused(results: dict[str, list[Any]]) -> None:
    code, stdout, stderr = results["wrong"]
    report = json.loads(stdout)
    assert code == 1 and report["ok"] is False and "results differ" in stderr
    failures = report["failures"]
    assert any("split_keep: grad decoder.layers.0.self_attention.linear_qkv.weight" in line for line in failures)
    assert not any(line.startswith(("re_encoded", "unsplit")) for line in failures)
    assert not {"speed", "results", "memory_saved", "by_group_size"} & report.keys()


def bench_split(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "split", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "0"], "--parts"),
        (["--prefix-activations", "drop"], "--prefix-activations"),
        (["--group-sizes", "4,x"], "--group-sizes"),
        (["--group-sizes", "4,0"], "--group-sizes"),
        (["--hidden-size", "250"], "hidden_size 250 is not a multiple of num_attention_heads"),
        (["--model", ".", "--heads", "4"], "--model gives the shape; leave out --heads"),
        (["--out", "no/such/folder/report.json"], "the folder no/such/folder does not exist"),
    ],
)
def test_bad_input_exits_2_before_any_work(arguments: list[str], message: str) -> None:
    result = bench_split(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too many parts", "parts 8 are more than the 7 responses"),
        ("odd sizes", "group_sizes: 7 responses do not divide into parts of 2"),
        ("small sizes", "group_sizes must be at least 2"),
    ],
)
def test_sizes_that_cannot_be_split_so_exit_2(results: dict[str, list[Any]], name: str, message: str) -> None:
    code, stdout, stderr = results[name]
    assert code == 2 and stdout == "" and message in stderr


def test_memory_by_phase() -> None:
    with track_memory() as memory:
        first = torch.zeros(256)
        torch.zeros(512)
        memory.lap("a")
        second = torch.zeros(256)
        del first
        memory.lap("b")
        del second
        memory.lap("c")
    assert memory.phase_peaks == {"a": 3072, "b": 2048, "c": 1024}
    assert memory.peak_bytes == 3072
