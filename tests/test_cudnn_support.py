"""What `TeSupport` lets pass is what cuDNN itself accepts on an A100, H100, B200 or RTX PRO 6000, asked without."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_prefix.attention.te_library import TeSupport

ROOT = Path(__file__).resolve().parents[1]
ARCHS = {"a100": (8, 0), "h100": (9, 0), "b200": (10, 0), "rtx": (12, 0)}
DIMS = [(64, 64), (128, 128), (64, 96), (136, 136), (192, 128), (192, 192), (256, 256), (60, 60)]


def cudnn_folder() -> Path | None:
    spec = find_spec("nvidia")
    folders = [Path(place, "cudnn", "lib") for place in spec.submodule_search_locations or []] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


MISSING = [
    name
    for name, there in {
        "the package nvidia-cudnn-frontend": find_spec("cudnn") is not None,
        "cuDNN (a CUDA build of torch brings it)": cudnn_folder() is not None,
        "a C compiler": shutil.which("cc") is not None,
    }.items()
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"cuDNN is asked without a GPU, which needs {', '.join(MISSING)}")


def write_driver_stub(folder: Path) -> None:
    """A ``libcuda.so.1`` with every function of the driver that cuDNN looks up; all but the version fail, so that no
    GPU is found."""
    names: set[str] = set()
    for library in sorted(cudnn_folder().glob("libcudnn*.so.9")):  # type: ignore[union-attr]
        names |= {name.decode() for name in re.findall(rb"(?<=\0)cu[A-Z][A-Za-z0-9_]{3,}(?=\0)", library.read_bytes())}
    names -= {"cuDriverGetVersion", "cuGetProcAddress", "cuGetProcAddress_v2"}
    lines = [f"int {name}(void) {{ return 100; }}" for name in sorted(names)]
    lines.append("int cuDriverGetVersion(int *version) { *version = 13000; return 0; }")
    source = folder / "driver.c"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True, timeout=60)


def test_cudnn_accepts_what_is_let_pass(tmp_path: Path) -> None:
    """Forward, backward and deterministic backward of own and ancestor calls with grouped-query heads."""
    write_driver_stub(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.cudnn_graphs", json.dumps(DIMS)],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    version = found["cudnn"]
    cudnn = (version // 10000, version // 100 % 100, version % 100)
    assert len(found["graphs"]) == len(ARCHS) * len(DIMS) * 2 * 3
    wrong = []
    for graph in found["graphs"]:
        if graph["step"] == "forward":
            assert graph["accepted"] or graph["dims"] == [60, 60], graph  # training is what needs more
            continue
        support = TeSupport((2, 20), cudnn, ARCHS[graph["device"]])
        refusal = support.refusal(torch.bfloat16, *graph["dims"], deterministic=graph["step"] == "deterministic")
        if graph["accepted"] != (refusal is None):
            wrong.append((graph, refusal))
    assert not wrong, (cudnn, wrong)
