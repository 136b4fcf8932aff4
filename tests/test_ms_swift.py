"""ms-swift with the prefix-sharing plugin against ms-swift itself, on the same sequences (`tests.ms_swift_cases`)."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.downloads import installed_beside
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[1]
HASHES = {
    "4.6.0": "8888ca2b88681aeabffc981f289ffc3e4fa6e4da7f83e885114ec0edbe8d99ea",
    "4.5.3": "6064ab6bb27bd62a4510546e64257e7366fa63a9e728274613710b3f1ecc2571",
}
"""ms-swift's wheels: the newest on PyPI on 2026-11-28 and the one before."""
BRIDGE = "mcore-bridge==1.6.5 --hash=sha256:0930d9905f4fbf4b3bcbf92b38a1ffa65fafe78b483eb03f0ac71f37710eeceb"
# What importing the Megatron GRPO trainer takes beside the test environment; no model code.
SUPPORT = (
    *("accelerate==1.15.0", "peft==0.21.2", "trl==0.29.1", "datasets==4.8.4", "pandas==3.1.1", "dill==0.4.1"),
    *("multiprocess==0.70.19", "xxhash==4.1.0", "httpx==0.28.1", "modelscope==1.40.2", "modelscope-hub==0.5.1"),
    *("cryptography==50.0.2", "cffi==2.1.1", "dacite==1.9.2", "json-repair==0.64.6", "zstandard==0.25.0"),
    *("msgspec==0.22.0", "aiohttp==3.14.5", "multidict==7.2.1", "yarl==1.25.1", "propcache==0.5.4", "attrs==26.1.0"),
    *("aiosignal==1.4.0", "frozenlist==1.8.0", "aiohappyeyeballs==2.7.1"),
)
pytestmark = [
    pytest.mark.ci_newest,
    pytest.mark.skipif(sys.version_info < (3, 12), reason="pinned for megatron-core 0.19, which needs Python 3.12"),
    pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="the stand-in would hide the real one"),
]
TOLERANCES = {"old": 2e-6, "ref": 2e-6, "loss": 1e-6, "entropy/entropy_mean": 1e-12, "gradients": 2e-6}
"""ms-swift's log-probs are fp32 (megatron-core's cross entropy) of a model in fp64; its entropies are fp64."""


def in_rank(rank: int, world_size: int, names: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Runs in a program of its own: importing ms-swift changes megatron-core."""
    from tests.ms_swift_cases import compare

    return compare(names, Path(folder))


def main(*names: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_distributed(in_rank, 2, names, folder, timeout_s=300)
    print(json.dumps(found))  # noqa: T201 - the answer to the parent


def found_by(version: str, *names: str) -> list[dict[str, Any]]:
    """What each rank of `main` found with that version of ms-swift."""
    swift = installed_beside(f"ms-swift-{version}", f"ms-swift=={version} --hash=sha256:{HASHES[version]}", BRIDGE)
    support = installed_beside("ms-swift-support", *SUPPORT)
    path = [ROOT / "tests" / "te_stand_in", ROOT, swift, support]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.test_ms_swift import main; main(*{names})"],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join(map(str, path)), HF_HUB_OFFLINE=1),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


EQUAL = ("packed", "losses", "pipeline", "context", "tensor", "lora")


@pytest.fixture(scope="module", params=sorted(HASHES))
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return found_by(request.param, *EQUAL, "refused", "script")


@pytest.mark.parametrize("name", EQUAL)
def test_log_probs_losses_and_gradients_are_ms_swifts_own(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        for what, value in rank[name].items():
            assert value <= TOLERANCES[what], (what, value)
    assert set().union(*(rank[name] for rank in ranks)) == set(TOLERANCES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plugin", "micro_batch_size 3 and num_generations 2"),
        ("moe", "moe_z_loss_coeff=0.1 is not supported"),
        ("mtp", "mtp_num_layers=1 is not supported"),
        ("model type", "knows no model type 'no such type'"),
        ("model", "'other' is a OtherModel"),
        ("twice", "1"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(ranks: list[dict[str, Any]], name: str, said: str) -> None:
    assert all(said in rank["refused"][name] for rank in ranks)


def test_the_examples_options_are_ms_swifts(ranks: list[dict[str, Any]]) -> None:
    assert [rank["script"]["unknown"] for rank in ranks] == [[], []]


def test_nothing_of_ms_swift_is_in_this_process(ranks: list[dict[str, Any]]) -> None:
    assert not {"swift", "mcore_bridge", "transformer_engine"} & set(sys.modules)
