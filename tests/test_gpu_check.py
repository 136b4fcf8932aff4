"""`gpu-check` on the CPU: the whole program with torch alone, and what it says when something is wrong or missing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from megatron_prefix.attention import KERNELS
from megatron_prefix.attention.calls import VarlenCall
from megatron_prefix.attention.sdpa import SdpaKernel
from megatron_prefix.bench.attention import AttentionSizes
from megatron_prefix.bench.group import GroupSizes
from megatron_prefix.cli.main import main
from megatron_prefix.gpu_check import __main__ as program_main
from megatron_prefix.gpu_check import correctness, emulation, program, report, speed
from megatron_prefix.gpu_check.cases import LAYOUTS, SHAPES
from megatron_prefix.gpu_check.environment import check_can_run
from megatron_prefix.gpu_check.program import PlainOutput, Settings, run_all
from megatron_prefix.gpu_check.report import DeviceLostError, Record, Report

pytestmark = pytest.mark.ci_oldest

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NOT_THERE = ("click", "rich", "matplotlib", "megatron", "numpy", "psutil", "transformer_engine", "flash_attn")
STAGES = {"correctness", "context_parallel", "split_groups", "determinism", "speed"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The program in a process in which only torch and this package can be imported."""
    path = tmp_path_factory.mktemp("bare") / "new" / "check.json"
    hidden = "\n".join(f"sys.modules[{name!r}] = None" for name in NOT_THERE)
    code = f"import runpy, sys\n{hidden}\nrunpy.run_module('megatron_prefix.gpu_check', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", code, "--device", "cpu", "--quick", "--out", str(path)]
    command += ["--seconds", "3600"]  # a busy machine skips nothing
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300), path


def test_the_whole_program_needs_torch_alone(bare: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    run, path = bare
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(path.read_text())
    assert found["check"] == "gpu-check" and found["ok"] and found["finished"] and found["quick"]
    assert found["device"] == "cpu" and found["versions"]["torch"] and found["machine"]["cuda"] is None
    ran = {(record["stage"], record["impl"]) for record in found["records"] if record["status"] == "ok"}
    assert {stage for stage, _ in ran} == STAGES
    assert {impl for stage, impl in ran if stage == "correctness"} >= {"oracle", "reference", "sdpa"}
    assert set(found["counts"]) == {"ok", "refused"} and sum(found["counts"].values()) == len(found["records"])
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        for words in ("heads", "ranks", "in parts"):
            assert any(each["what"].startswith(dtype) and words in each["what"] for each in found["records"])
    rows = [row for row in found["speed"]["rows"] if row["impl"] == "sdpa"]
    assert len(rows) == len(speed.QUICK_GRID)
    for row in rows:
        assert row["speed_up"] == pytest.approx(row["seconds"]["repeated"] / row["seconds"]["grouped"])
        flops = 14 * row["rows"]["grouped"]
        assert row["flops"]["repeated"] > row["flops"]["grouped"] > flops
        assert row["tflops"]["grouped"] == pytest.approx(row["flops"]["grouped"] / row["seconds"]["grouped"] / 1e12)
        assert row["peak_bytes"]["grouped"] < row["peak_bytes"]["repeated"]
        assert max(row["differences"]["grouped"].values()) < 0.05
    assert [each.name for each in path.parent.iterdir()] == ["check.json"]


def test_what_it_shows(bare: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    run, path = bare
    refusals = [line for line in run.stdout.splitlines() if line.startswith("refused  flash ")]
    assert len(refusals) == 1 and refusals[0].endswith("use impl='sdpa'"), "a reason is shown once"
    how = f"on a machine that has it: megatron-prefix gpu-check --draw {path}\n"
    assert f"no picture: matplotlib is not installed; {how}" in run.stdout
    assert re.search(r"\n96, 16, 4 +sdpa +2\.23 ", run.stdout)
    assert re.search(r"\d+ ok, \d+ refused, \d+ s: all that ran is right; .*check.json\n$", run.stdout)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cases: what follows is about what happens around them."""
    monkeypatch.setattr(correctness, "SHAPES", SHAPES[:1])
    monkeypatch.setattr(correctness, "CP_RANKS", {"2 ranks": (2, 1)})
    monkeypatch.setattr(correctness, "DTYPES", {"bf16": torch.bfloat16, "fp64": torch.float64})
    monkeypatch.setattr(correctness, "HALVES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(speed, "QUICK_GRID", speed.QUICK_GRID[1:])
    for name in ("chain", "groups of one"):
        monkeypatch.delitem(LAYOUTS, name)


def check(tmp_path: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """The program in this process: its exit code and its report."""
    path = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(path), *options])
    code = program_main.main()
    return code, json.loads(path.read_text())


class WrongOutput(SdpaKernel):
    """Off by two parts in a hundred over shared keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call, softmax_scale)
        return (out, lse) if call.causal else (out * 1.02, lse)


class Raises(SdpaKernel):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        assert call.causal, "unsupported layout\nand more of it"
        return super().forward(q, k, v, call, softmax_scale)


class CannotLoad(SdpaKernel):
    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        raise OSError("libkernel.so: cannot open shared object file")


class Noisy(SdpaKernel):
    """Other numbers every time, within the limits."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call, softmax_scale)
        return out + torch.randn_like(out) * 1e-3 if out.dtype is torch.bfloat16 else out, lse


@pytest.mark.usefixtures("small")
def test_a_broken_kernel_is_named_and_gets_no_speed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", WrongOutput())
    code, found = check(tmp_path, monkeypatch=monkeypatch)
    assert code == 1 and not found["ok"] and found["finished"]
    failed = {(each["stage"], each["impl"]) for each in found["records"] if each["status"] == "failed"}
    assert failed == {(stage, "sdpa") for stage in ("correctness", "context_parallel", "split_groups")}
    assert not [row for row in found["speed"]["rows"] if row["impl"] == "sdpa"]
    shown = capsys.readouterr().out
    assert re.search(r"\nFAILED   sdpa       fp64, 8 heads.*: at most .* of the limit", shown)
    assert "sdpa       P 32, R 24, G 2: no speed-up is reported for what has failed a check above" in shown
    assert "NOT ALL RIGHT" in shown


@pytest.mark.usefixtures("small")
def test_an_unexpected_error_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", Raises())
    code, found = check(tmp_path, monkeypatch=monkeypatch)
    assert code == 1 and found["finished"]
    failed = [each for each in found["records"] if each["status"] == "failed"]
    assert {each["impl"] for each in failed} == {"sdpa"} and len(failed) >= 5
    for each in failed:
        assert each["note"] == "AssertionError: unsupported layout"
        assert "and more of it" in each["trace"] and "in forward" in each["trace"]
    assert {each["impl"] for each in found["records"] if each["status"] == "ok"} >= {"reference", "oracle"}
    assert "FAILED   correctness: sdpa bf16, 8 heads" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_library_that_cannot_be_loaded_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", CannotLoad())
    code, found = check(tmp_path, monkeypatch=monkeypatch)
    assert code == 1 and {each["stage"] for each in found["records"] if each["impl"] == "sdpa"} == STAGES
    assert all("libkernel.so" in each["note"] for each in found["records"] if each["status"] == "failed")


@pytest.mark.usefixtures("small")
def test_results_that_change_from_run_to_run_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", Noisy())
    found = Report({"device": "cpu"}, PlainOutput(), tmp_path / "check.json", 100)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    correctness.check_determinism(found, CPU, quick=True)
    (noisy,) = (each for each in found.records if each.impl == "sdpa")
    assert noisy.status == "failed" and "in torch's deterministic mode" in noisy.note
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


@pytest.mark.usefixtures("small")
def test_gradients_that_ranks_send_back_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation._LocalGradients, "send", lambda *_: None)
    found = Report({"device": "cpu"}, PlainOutput(), tmp_path / "check.json", 100)
    correctness.check_context_parallel(found, CPU, quick=True)
    assert {each.status for each in found.records if each.impl == "sdpa"} == {"failed"}
    assert all("(dk, " in each.note or "(dv, " in each.note for each in found.failures)


@pytest.mark.usefixtures("small")
def test_wrong_at_full_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right where an oracle fits, wrong beyond: prefix groups then differ from repeated prefixes."""
    timed = speed.time_paths

    def differs(*given: Any) -> dict[str, Any]:
        return timed(*given) | {"difference": float("nan")}

    monkeypatch.setattr(speed, "time_paths", differs)
    code, found = check(tmp_path, monkeypatch=monkeypatch)
    (failed,) = (each for each in found["records"] if each["status"] == "failed")
    assert code == 1 and failed["stage"] == "speed" and "no speed-up" in failed["note"]
    assert found["speed"]["rows"] == []


def test_no_time_is_not_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = check(tmp_path, "--seconds", "0", monkeypatch=monkeypatch)
    assert code == 1 and set(found["counts"]) == {"skipped"} and not found["ok"]
    assert capsys.readouterr().out.count("sdpa ") == 1


def test_one_implementation_cannot_take_the_time_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now))
    found = Report({"device": "cpu"}, PlainOutput(), tmp_path / "check.json", seconds=100)

    def slow() -> Record:
        nonlocal now
        now += 30
        return Record("correctness", "slow", "a case", "ok", "")

    for stage, impl in (("correctness", "slow"), ("correctness", "slow"), ("determinism", "other"), ("speed", "slow")):
        found.attempt(stage, impl, "a case", slow)
    assert [record.status for record in found.records] == ["ok", "skipped", "ok", "ok"]
    assert found.records[1].note == "slow has had its 20% of 100 s; give more --seconds"
    now = 101
    found.attempt("speed", "slow", "a case", slow)
    assert found.records[-1].note == "the 100 s are over; give more --seconds"


def test_a_lost_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Report({"device": "cuda"}, PlainOutput(), tmp_path / "check.json", 100)

    def illegal(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(report.torch, "zeros", illegal)
        with pytest.raises(DeviceLostError, match="after some, a case; nothing that follows was run"):
            found.attempt("correctness", "some", "a case", illegal)
    assert [record.status for record in found.failures] == ["failed"]

    def lost(*_: Any, **__: Any) -> None:
        raise DeviceLostError("gone")

    monkeypatch.setitem(program.STAGES, next(iter(program.STAGES)), lost)
    ended = run_all(Settings("cpu", out=tmp_path / "check.json"), PlainOutput())
    assert not ended.ok and not json.loads((tmp_path / "check.json").read_text())["finished"]


def test_groups_are_made_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, group = AttentionSizes(32, 8, 128, "bf16"), GroupSizes(8192, 2048, 32)
    monkeypatch.setattr(speed, "free_bytes", lambda device: 79 << 30)
    assert speed.fitting(group, sizes, CPU) == group
    monkeypatch.setattr(speed, "free_bytes", lambda device: 30 << 30)
    assert speed.fitting(group, sizes, CPU).group_size == 16
    monkeypatch.setattr(speed, "free_bytes", lambda device: 1)
    assert speed.fitting(group, sizes, CPU).group_size == 1


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "check.json")])
    assert program_main.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("Error: no CUDA GPU: torch ")
    run = CliRunner().invoke(main, ["gpu-check", "--out", str(tmp_path / "check.json")])
    assert run.exit_code == 2 and "no CUDA GPU" in run.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_an_old_torch_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_can_run("cpu")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match=re.escape(f"torch {version} is too old; install torch 2.11 or newer")):
        check_can_run("cpu")


@pytest.mark.usefixtures("small")
def test_the_command_is_the_same_program(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    run = CliRunner().invoke(main, ["gpu-check", "--device", "cpu", "--out", str(path), "--json"])
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout.splitlines()[-1])
    written = json.loads(path.read_text())
    assert shown["records"] == written["records"] and shown["ok"]
    assert "all that ran is right" in run.stderr and path.with_suffix(".png").is_file()


def test_a_report_is_drawn_later(bare: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path) -> None:
    copied = tmp_path / "copied.json"
    copied.write_bytes(bare[1].read_bytes())
    run = CliRunner().invoke(main, ["gpu-check", "--draw", str(copied)])
    assert run.exit_code == 0, run.output
    picture = copied.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not a report of gpu-check"),
        ('{"check": "gpu-check"}', "has no speeds to draw"),
    ],
)
def test_what_cannot_be_drawn(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    if text is not None:
        path.write_text(text)
    run = CliRunner().invoke(main, ["gpu-check", "--draw", str(path)])
    assert run.exit_code == 2 and said in run.stderr.replace("\n", " ")


def test_out_must_be_a_json_file_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.json"):
        run_all(Settings("cpu", out=tmp_path / "check.png"), PlainOutput())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run_all(Settings("cpu", out=tmp_path / "file" / "check.json"), PlainOutput())


def script(python: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "gpu_check.sh"), *options],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    run = script("no-such-python")
    assert run.returncode == 2 and "Set PYTHON to a newer one" in run.stderr
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # without site-packages there is no torch
    bare.chmod(0o755)
    run = script(str(bare))
    assert run.returncode == 2 and "cannot import torch: ModuleNotFoundError" in run.stderr
    if not torch.cuda.is_available():
        run = script(sys.executable)
        assert run.returncode == 2 and run.stderr.startswith("Error: no CUDA GPU")


def test_the_script_hands_options_on(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    run = script(sys.executable, "--device", "cpu", "--seconds", "0", "--out", str(path))
    assert run.returncode == 1 and json.loads(path.read_text())["finished"], run.stderr
