"""On a GPU: what `gpu-check` checks at its full sizes, stage by stage, and a step of a tiny megatron-core model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prefix.gpu_check.correctness import (
    check_context_parallel,
    check_correctness,
    check_determinism,
    check_split_groups,
)
from megatron_prefix.gpu_check.environment import ALL_IMPLS, describe
from megatron_prefix.gpu_check.program import PlainOutput
from megatron_prefix.gpu_check.report import Report

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [check_correctness, check_context_parallel, check_split_groups, check_determinism]
)  # fmt: skip
def test_every_implementation_that_does_not_refuse(stage: Callable[..., None], tmp_path: Path) -> None:
    """With NaN in fresh memory, as in all tests; `gpu-check` itself runs without that."""
    report = Report(describe("cuda", quick=False), PlainOutput(), tmp_path / "report.json", seconds=3600)
    stage(report, torch.device("cuda"), quick=False)
    assert not report.failures, "\n".join(f"{each.impl} {each.what}: {each.note}" for each in report.failures)
    seen = {record.impl for record in report.records} - {"oracle"}
    assert seen <= set(ALL_IMPLS) and report.counts["ok"] > 0 and report.counts["skipped"] == 0


def test_the_program_passes_quickly(tmp_path: Path) -> None:
    found = run("megatron_prefix.gpu_check", "--quick", "--out", str(tmp_path / "quick.json"))
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "quick.json").read_text())
    assert report["ok"] and report["machine"]["cuda"]["devices"] and report["speed"]["rows"]


@pytest.mark.parametrize("options", [(), ("--max-tokens-per-microbatch", "18")], ids=["whole groups", "split groups"])
def test_a_model_step_equals_repeated_prefixes(options: tuple[str, ...]) -> None:
    pytest.importorskip("megatron.core")
    found = run("megatron_prefix", "verify", "--tiny", "--dtype", "bf16", *options, "--json")
    assert found.returncode == 0, found.stdout + found.stderr
