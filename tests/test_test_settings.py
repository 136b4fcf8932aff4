"""The test session's own settings: what conftest.py promises is really on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.ones(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3), like.resize_(6)[3:]):
        assert fresh.isnan().all()


def test_a_gpu_test_is_skipped_with_a_reason_where_there_is_no_gpu(tmp_path: Path) -> None:
    test = tmp_path / "test_gpu.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_gpu() -> None:\n    pass\n")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c"]
    run = subprocess.run(
        [*command, str(root / "pyproject.toml"), "--rootdir", str(tmp_path), str(test)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = "1 passed" if torch.cuda.is_available() else "needs an NVIDIA GPU"
    assert run.returncode == 0 and expected in run.stdout, run.stdout + run.stderr
