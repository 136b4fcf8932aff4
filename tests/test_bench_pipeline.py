"""`bench step` and `bench split` in a pipeline: what they report of all stages, and that they refuse what differs."""

import json
from typing import Any

import pytest

from megatron_prefix.attention.kernels import KERNELS
from megatron_prefix.bench.group import GroupSizes, PipelineSizes
from megatron_prefix.bench.in_pipeline import PipelineBench
from megatron_prefix.bench.report import ResultsDifferError
from megatron_prefix.bench.split import SplitSettings
from megatron_prefix.bench.step import StepSettings
from megatron_prefix.pipeline_plan import even_bubble
from tests.cli_runs import Run, run_cli
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config
from tests.test_bench_split import ForgetsParts

pytestmark = pytest.mark.ci_oldest

P, R, G, GROUPS = 24, 4, 3, 3
GROUP = ["--prefix-len", f"{P}", "--response-len", f"{R}", "--group-size", f"{G}"]
MODEL = ["--layers", "4", "--hidden-size", "32", "--vocab-size", "64", "--repeats", "1"]
STEP, SPLIT = (["bench", name, *GROUP, *MODEL] for name in ("step", "split"))
RUNS = {
    "split groups": [*STEP, "--pp", "2", "--vpp", "2", "--groups", f"{GROUPS}", "--max-tokens-per-microbatch", f"{P}",
                     "--repeats", "2"],
    "whole groups": [*STEP, "--pp", "2", "--dtype", "bf16"],
    "split": [*SPLIT, "--pp", "2", "--groups", f"{GROUPS}", "--parts", "2", "--repeated"],
}  # fmt: skip


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    results = run_cli(*([*arguments, "--json"] for arguments in RUNS.values()), world_size=2)
    for ranks in results:
        assert [run.exit_code for run in ranks] == [0, 0], ranks[0].crash + ranks[0].stderr
        assert not ranks[1].stdout
    shown = {name: ranks[0] for name, ranks in zip(RUNS, results, strict=True)}
    for run in shown.values():
        check_shown(run)
    return {name: run.json for name, run in shown.items()}


def check_shown(run: Run) -> None:
    """The modelled bubble of every path stands in the table and in a line of its own."""
    text = " ".join(run.stderr.split())
    for result in run.json["results"].values():
        assert f"bubble {result['bubble']:.2f} (even micro-batches: {result['even_bubble']:.2f})" in text
        assert result["plan"] in text
    assert "even bubble" in text and "…" not in text


def test_a_step_of_split_groups(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["split groups"]
    repeated, grouped = report["results"]["repeated"], report["results"]["grouped"]
    assert (repeated["micro_batches"], repeated["rows"]) == (GROUPS * G, GROUPS * G * (P + R))
    assert (grouped["micro_batches"], grouped["rows"]) == (2 * GROUPS, GROUPS * (P + G * R))  # a prefix and one part
    assert grouped["area"] == GROUPS * (P * (P + 1) // 2 + G * (R * (R + 1) // 2 + R * P))
    assert 1 <= grouped["live_prefixes"] <= GROUPS and repeated["live_prefixes"] == 0
    for result in (repeated, grouped):
        assert 0 < result["even_bubble"] <= result["bubble"] < 0.5
        assert len(result["stages"]) == 2 and result["peak_bytes"] == max(s["peak_bytes"] for s in result["stages"])
        assert len(result["seconds"]["total"]["all"]) == 2
        assert result["seconds"]["total"]["median"] >= max(stage["seconds"] for stage in result["stages"]) > 0
    # The last layer computes only keys of a prefix, which is the last stage's.
    first, last = (stage["flops"] for stage in grouped["stages"])
    assert last < first
    medians = [result["seconds"]["total"]["median"] for result in (repeated, grouped)]
    assert report["speed_up"]["total"] == pytest.approx(medians[0] / medians[1])
    assert report["sizes"]["groups"] == GROUPS and report["sizes"]["max_tokens_per_microbatch"] == P
    # log-probs, loss terms and the gradients of all stages
    found = report["differences"]["grouped"]
    assert len(found) == 2 + 4 * 6 + 3 and max(found.values()) <= report["tolerance"]["grouped"] == 1e-5


def test_a_step_of_whole_groups_in_half_precision(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["whole groups"]
    grouped = report["results"]["grouped"]
    assert report["sizes"]["groups"] == grouped["micro_batches"] == 2 and grouped["live_prefixes"] == 0
    assert grouped["bubble"] == pytest.approx(even_bubble(2, 2)) == pytest.approx(grouped["even_bubble"])
    assert report["sizes"]["max_tokens_per_microbatch"] == P + G * R
    assert set(report["differences"]) == {"repeated", "grouped"}  # both from fp32


def test_the_paths_of_bench_split(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["split"]
    rows = {name: result["rows"] for name, result in report["results"].items()}
    once, recomputed = GROUPS * (P + G * R), GROUPS * (2 * P + G * R)
    assert rows == {
        "unsplit": once, "split_keep": once, "split_recompute": recomputed, "re_encoded": recomputed,
        "repeated": GROUPS * G * (P + R),
    }  # fmt: skip
    counts = {name: result["micro_batches"] for name, result in report["results"].items()}
    assert list(counts.values()) == [GROUPS, 3 * GROUPS, 3 * GROUPS, 2 * GROUPS, GROUPS * G]
    assert report["speed"]["over_unsplit"]["unsplit"] == 1 and report["by_group_size"] == []
    assert max(max(found.values()) for found in report["differences"].values()) <= 1e-5


def refused_when_one_stage_is_wrong(rank: int, world_size: int) -> list[dict[str, Any]]:
    start(pp=world_size)
    if rank == 0:
        KERNELS["sdpa"] = ForgetsParts()
    bench = PipelineBench(GroupSizes(P, R, G), tiny_config(), StepSettings(), PipelineSizes(pp=2, groups=2))
    reports = []
    for run in (lambda: bench.step(max_tokens=P, repeats=1), lambda: bench.split(SplitSettings(2, ("keep",), ()))):
        with pytest.raises(ResultsDifferError) as error:
            run()
        reports.append(error.value.report)
    return reports


def test_no_times_where_a_stage_is_wrong() -> None:
    first, second = run_distributed(refused_when_one_stage_is_wrong, 2)
    assert json.dumps(first) == json.dumps(second)
    for report, path in zip(first, ("grouped", "split_keep"), strict=True):
        assert report["ok"] is False and not {"results", "speed_up", "speed"} & report.keys()
        named = f"{path}: grad decoder.layers.0.self_attention.linear_qkv.weight differs"
        assert any(named in line for line in report["failures"])
        assert not any("layers.1" in line for line in report["failures"])


def test_bad_input_is_refused() -> None:
    cases = {
        "runs in 2 process(es), 1 run; start it with torchrun --nproc-per-node 2": [*STEP, "--pp", "2"],
        "--vpp 2 needs a pipeline of 2 ranks or more, --pp is 1; raise --pp": [*SPLIT, "--vpp", "2"],
        "4 layers do not divide into --pp 3 x --vpp 1 = 3 stages": [*STEP, "--pp", "3"],
        "a pipeline, got --cp 2 and --groups; leave one of them out": [*STEP, "--cp", "2", "--groups", "2"],
        f"its prefix has {P} rows, --max-tokens-per-microbatch is 20; raise it to at least {P}":
            [*STEP, "--max-tokens-per-microbatch", "20"],
        "the stages of a pipeline (--pp) are in different ones": [*SPLIT, "--pp", "2", "--group-sizes", "2,4"],
        "whatever runs it; leave out --groups": [*SPLIT, "--dry-run", "--groups", "2"],
    }  # fmt: skip
    for (run,), (message, arguments) in zip(run_cli(*cases.values()), cases.items(), strict=True):
        assert run.exit_code == 2 and message in " ".join(run.stderr.split()), (arguments, run)
        assert not run.stdout and not run.crash
