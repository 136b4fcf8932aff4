"""NVIDIA's apex and the other package of that name, told apart by their files; whose kernels a run says it uses."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prefix.apex import find_apex

pytestmark = pytest.mark.ci_oldest

ROOT = Path(__file__).resolve().parents[1]
FUSED_ADAM = "import torch\nclass FusedAdam(torch.optim.AdamW): pass\nclass FusedSGD(torch.optim.SGD): pass\n"
NVIDIA = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam, FusedSGD\n",
    "apex/optimizers/fused_adam.py": FUSED_ADAM,
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n",
}
PYRAMID = {
    "apex/__init__.py": "raise RuntimeError('imported')\n",
    "apex/views.py": "",
    "apex-0.9.10.dist-info/METADATA": "Metadata-Version: 1.1\nName: apex\nVersion: 0.9.10.dev0\n",
}


def install(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        ({}, "none", "not installed (it is not needed)"),
        (NVIDIA | {"amp_C.py": ""}, "nvidia", "NVIDIA apex 0.1 with its CUDA extensions"),
        (NVIDIA, "nvidia without extensions", "there is no amp_C"),
        (PYRAMID, "another project", "apex` 0.9.10.dev0 that is installed is not NVIDIA's"),
    ],
    ids=["none", "nvidia", "without extensions", "PyPI's"],
)
def test_which_apex_is_installed(
    files: dict[str, str], kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(files, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_apex()
    assert found.kind == kind and said in found.note
    assert "apex" not in sys.modules, "finding out must not import it"


def describe(folder: Path) -> str:
    """What a run's banner would say with the packages of ``folder`` installed."""
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch\n"
        "from types import SimpleNamespace\n"
        "from megatron.core.optimizer import Adam\n"
        "from megatron_prefix.mcore.fused import describe_implementations\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))\n"
        "optimizer = SimpleNamespace(optimizer=Adam(model.parameters()))\n"
        "print(describe_implementations(optimizer, [model]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]\n{program}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (NVIDIA | {"amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = None"}, "NVIDIA apex's FusedAdam"),
        (PYRAMID | {"apex/__init__.py": "import pyramid_mailer\n"}, "torch's AdamW"),
    ],
    ids=["nvidia", "PyPI's"],
)
def test_the_banner_names_what_megatron_core_chose(files: dict[str, str], said: str, tmp_path: Path) -> None:
    install(files, tmp_path)
    line = describe(tmp_path)
    assert line.startswith(f"optimizer: {said}; norms: torch's LayerNorm")
    assert ("is not NVIDIA's" in line) == (files["apex/__init__.py"] != "")
