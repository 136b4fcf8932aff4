"""The patches for Megatron-LM: on the part that PyPI ships (megatron/training), and on checkouts given by path.

A checkout: `pytest --megatron-lm DIR` (several times for several), or MEGATRON_LM=DIR:DIR in the environment.
"""

import ast
import hashlib
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prefix.patching import (
    Patch,
    TreeState,
    all_patches,
    apply_patch,
    check_patch,
    find_patch,
    patches_folder,
    revert_patch,
)
from megatron_prefix.patching.tree import run_diffs

ROOT = Path(__file__).resolve().parents[1]
PATCHES = all_patches(patches_folder(), "megatron-lm")
ARGUMENTS = "megatron/training/arguments.py"
RL_NEEDS = ("wandb", "httpx", "openai", "fastapi", "uvicorn", "yaml")
NO_TREE = "no Megatron-LM checkout: give one by --megatron-lm DIR, or MEGATRON_LM=DIR"
WORLDS = {
    "one": (1, []),
    "dp": (2, []),
    "cp": (2, ["--context-parallel-size", "2"]),
    "pp": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
}


class WithoutFlag(ast.NodeTransformer):
    """Leaves out what runs only with the flag, and its definition."""

    def visit_If(self, node: ast.If) -> Any:
        if "rl_share_prefix" in ast.unparse(node.test) and not node.orelse:
            return None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return None if "'--rl-share-prefix'" in ast.unparse(node) else node


def same_without_flag(original: Path, patched: Path) -> bool:
    """Whether the patched source, where the flag is off, is statement by statement the original."""
    after = WithoutFlag().visit(ast.parse(patched.read_text(encoding="utf-8")))
    return ast.dump(after) == ast.dump(ast.parse(original.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """megatron/training/arguments.py as installed from PyPI, and patched."""
    if find_spec("megatron.training") is None:
        pytest.skip("this megatron-core ships no megatron/training (0.19 does)")
    spec = find_spec(ARGUMENTS.removesuffix(".py").replace("/", "."))
    assert spec is not None and spec.origin is not None
    digest = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    (patch,) = (each for each in PATCHES if each.files[ARGUMENTS].before == digest)
    folder = tmp_path_factory.mktemp("shipped")
    (folder / ARGUMENTS).parent.mkdir(parents=True)
    shutil.copy(spec.origin, folder / ARGUMENTS)
    run_diffs(patch, folder, [ARGUMENTS])
    assert hashlib.sha256((folder / ARGUMENTS).read_bytes()).hexdigest() == patch.files[ARGUMENTS].after
    return Path(spec.origin), folder / ARGUMENTS


@pytest.mark.ci_newest
def test_without_the_flag_shipped_arguments_are_parsed_as_before(shipped: tuple[Path, Path]) -> None:
    assert same_without_flag(*shipped)


@pytest.mark.ci_newest
@pytest.mark.parametrize(
    "sizes",
    [{"SHARE": "0"}, {"SHARE": "1"}, {"SHARE": "1", "TP": "4", "CP": "2"}, {"SHARE": "1", "TP": "1", "PP": "2"}],
)
def test_the_recipe_parses_with_shipped_arguments(
    shipped: tuple[Path, Path], sizes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """examples/megatron_lm/grpo_qwen3_8b.sh, as far as it goes without a GPU: parsed and validated by Megatron-LM."""
    args = _parse(_module(shipped[1]), _recipe(sizes), monkeypatch)
    assert args.rl_share_prefix is (sizes["SHARE"] == "1")
    assert args.variable_seq_lengths is ("PP" in sizes)


@pytest.mark.ci_newest
def test_combinations_are_refused_while_arguments_are_validated(
    shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _recipe({"SHARE": "1"})
    words.remove("--calculate-per-token-loss")
    with pytest.raises(ValueError, match="add --calculate-per-token-loss"):
        _parse(_module(shipped[1]), words, monkeypatch)


def _recipe(environment: dict[str, str]) -> list[str]:
    """The arguments that the script gives train_rl.py."""
    script = ROOT / "examples" / "megatron_lm" / "grpo_qwen3_8b.sh"
    given = {**os.environ, "MEGATRON_LM": "m", "CHECKPOINT": "c", "DRY_RUN": "1", **environment}
    run = subprocess.run(["bash", str(script)], env=given, check=True, capture_output=True, text=True)
    words = run.stdout.splitlines()
    return words[words.index("train_rl.py") + 1 :]


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("patched_arguments", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse(module: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *words])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    args = module.parse_args()
    module.validate_args(args)
    return args


@pytest.fixture(scope="module")
def trees(checkout: Path | None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Patch]:
    """A pristine and a patched copy of a checkout, and the patch."""
    if checkout is None:
        pytest.skip(NO_TREE)
    folder = tmp_path_factory.mktemp("megatron_lm")
    for name in ("pristine", "patched"):
        shutil.copytree(checkout, folder / name, ignore=shutil.ignore_patterns(".git", "docs", "images", "tests"))
    patch = find_patch("megatron-lm", folder / "patched")
    apply_patch(patch, folder / "patched")
    return folder / "pristine", folder / "patched", patch


@pytest.mark.ci_newest
def test_a_checkout_is_patched_and_reverted_exactly(trees: tuple[Path, Path, Patch], tmp_path: Path) -> None:
    pristine, patched, patch = trees
    assert check_patch(patch, pristine) is TreeState.ORIGINAL
    for diff in patch.diffs:  # the plain way, which patches/README.md names
        subprocess.run(
            ["git", "apply", "--check", str(diff)], cwd=shutil.copytree(pristine, tmp_path / "p"), check=True
        )
    for name in patch.files:
        py_compile.compile(str(patched / name), cfile=str(tmp_path / "compiled"), doraise=True)
        assert same_without_flag(pristine / name, patched / name), name
    again = shutil.copytree(patched, tmp_path / "again")
    assert revert_patch(patch, again) is TreeState.PATCHED
    for name in patch.files:
        assert (again / name).read_bytes() == (pristine / name).read_bytes()


@pytest.fixture(scope="module")
def plain(trees: tuple[Path, Path, Patch], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Results of the pristine tree, whole sequences, one a micro-batch; and the folder of the weights."""
    missing = [name for name in RL_NEEDS if find_spec(name) is None]
    if missing or sys.version_info < (3, 12):
        pytest.skip(f"megatron/rl needs Python 3.12 and {', '.join(missing) or 'nothing else'}")
    folder = tmp_path_factory.mktemp("results")
    (result,) = _run(trees[0], folder, "plain")
    return folder, result


@pytest.mark.slow
@pytest.mark.ci_newest
def test_with_the_flag_off_results_are_equal_to_the_bit(
    trees: tuple[Path, Path, Patch], plain: tuple[Path, dict[str, Any]]
) -> None:
    (result,) = _run(trees[1], plain[0], "plain")
    for kind in ("log_probs", "losses", "gradients"):
        assert result[kind].keys() == plain[1][kind].keys()
        assert all(torch.equal(value, plain[1][kind][key]) for key, value in result[kind].items())


@pytest.mark.slow
@pytest.mark.ci_newest
@pytest.mark.parametrize("world", WORLDS)
def test_prefix_groups_give_upstreams_log_probs_losses_and_gradients(
    trees: tuple[Path, Path, Patch], plain: tuple[Path, dict[str, Any]], world: str
) -> None:
    """Old, reference and inference log-probs, every term that upstream reports (with clipping, KL, truncated importance
    sampling, entropy), and gradients as its schedule leaves them."""
    folder, expected = plain
    ranks = _run(trees[1], folder, "share", world)
    found = {key: value for rank in ranks for key, value in rank["log_probs"].items()}
    assert found.keys() == expected["log_probs"].keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected["log_probs"][key], rtol=1e-5, atol=2e-6)
    totals = [rank["losses"] for rank in ranks if rank["losses"]]
    for key, value in expected["losses"].items():
        both = sum(each[key] for each in totals) if world == "dp" else totals[0][key]
        torch.testing.assert_close(both[0] / both[1], value[0] / value[1], rtol=1e-5, atol=1e-6)
    for rank in ranks:
        if rank["first"]:  # before any update the policy is the old one
            ratios, tokens = rank["first"]["rl/pi_over_pi_old"]
            assert abs(ratios / tokens - 1) < 1e-6
    assert expected["losses"]["rl/truncated_from_above"][0] > 0  # both ways of clipping happen
    assert expected["losses"]["rl/truncated_from_below"][0] > 0
    compared = 0
    for rank in ranks:
        assert rank["micro_batches"] < expected["micro_batches"] / 2
        for name, gradient in rank["gradients"].items():
            wanted = expected["gradients"][name]
            if gradient.shape == wanted.shape:  # a tensor-parallel share is compared by the tests of the package
                compared += 1
                torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert compared >= 5


def _run(tree: Path, folder: Path, way: str, world: str = "one") -> list[dict[str, Any]]:
    """The results of every rank of `tests.megatron_rl_cases` on this tree."""
    count, words = WORLDS[world]
    path = os.pathsep.join([str(tree), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # megatron-core's fused functions, which would be compiled for minutes
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, "-W", "ignore", *launch, "-m", "tests.megatron_rl_cases", str(folder), way, *words]
    run = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"{way}-{rank}.pt", weights_only=False) for rank in range(count)]
