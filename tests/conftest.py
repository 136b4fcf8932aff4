"""Settings of every test: few threads, NaN in fresh memory, repeatable hypothesis runs, GPU tests only with a GPU."""

import os
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when torch and numpy are imported, so before them
    os.environ.setdefault(_name, "1")

import pytest
import torch
from hypothesis import settings

from tests.distributed import fill_fresh_memory_with_nan

# A shared machine is slow at times, so no deadline; CI draws the same examples every time.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    given = [Path(name) for name in os.environ.get("MEGATRON_LM", "").split(os.pathsep) if name]
    parser.addoption(
        "--megatron-lm",
        action="append",
        type=Path,
        metavar="DIR",
        help="a Megatron-LM checkout to test its patch on (several times for several); or MEGATRON_LM=DIR:DIR",
        default=given,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each Megatron-LM checkout, or once with None."""
    if "checkout" in metafunc.fixturenames:
        checkouts = metafunc.config.getoption("--megatron-lm")
        metafunc.parametrize("checkout", checkouts or [None], scope="module", ids=lambda c: c.name if c else "none")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> None:
    """Reading memory that nobody wrote must show, also after a test that changed the setting."""
    fill_fresh_memory_with_nan()
