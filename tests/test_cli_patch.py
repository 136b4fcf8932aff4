"""`megatron-prefix patch` on a made-up tree, and the patches inside an installed package."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from megatron_prefix.cli.main import main
from megatron_prefix.patching import all_patches, patches_folder
from megatron_prefix.patching.manifest import target_names
from tests.patch_trees import make_patch, read_tree

pytestmark = pytest.mark.ci_oldest
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root, tree = make_patch(tmp_path, {"one.py": b"1\n2\n"}, {"one.py": b"1\n2\n3\n", "two.py": b"2\n"})
    monkeypatch.setattr("megatron_prefix.patching.manifest.patches_folder", lambda: root)
    return tree


def _patch(tree: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["patch", "--target", "frame", "--path", str(tree), *words])


def test_the_command_checks_applies_and_reverts(tree: Path) -> None:
    pristine = read_tree(tree)
    said = []
    for words in ([], ["--apply"], ["--apply"], ["--check"], ["--revert"], ["--revert"], ["--check"]):
        result = _patch(tree, *words)
        assert result.exit_code == 0, result.output
        said.append(result.stderr.splitlines()[-1])
    assert said == [
        "not applied; it applies cleanly",
        "applied",
        "already applied",
        "applied",
        "reverted",
        "not applied, nothing to revert",
        "not applied; it applies cleanly",
    ]
    assert read_tree(tree) == pristine


def test_json_says_what_was_found_and_done(tree: Path) -> None:
    result = _patch(tree, "--apply", "--json")
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "target": "frame",
        "release": "v1.2",
        "source": "commit 0123456789abcdef0123456789abcdef01234567",
        "found": "original",
        "action": "apply",
        "files": ["one.py", "two.py"],
    }


def test_bad_input_exits_with_two_and_one_line(tree: Path) -> None:
    (tree / "one.py").write_text("mine\n")
    for words in ([], ["--apply"], ["--revert"]):
        result = _patch(tree, *words)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "one.py is neither that of Frame v1.2 nor the patched one" in result.stderr
    (tree / "version.txt").write_text("9\n")
    result = _patch(tree)
    assert result.exit_code == 2
    assert "frame 9, for which there is no patch. Known: v1.2 (says 1.2)" in result.stderr


@pytest.mark.parametrize(
    ("target", "file", "text", "words"),
    [
        ("verl", "verl/version/version", "0.9.1\n", "verl 0.9.1 needs no patch: set actor_rollout_ref.actor._target_="),
        (
            "ms-swift",
            "swift/version.py",
            "__version__ = '4.6.0'\n",
            "ms-swift 4.6.0 needs no patch: add --external_plug",
        ),
    ],
)
def test_a_version_that_needs_no_patch(tmp_path: Path, target: str, file: str, text: str, words: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"# ...\n{text}" if file.endswith(".py") else text)
    for action in ("--check", "--apply", "--revert"):
        result = CliRunner().invoke(main, ["patch", "--target", target, "--path", str(tmp_path), action, "--json"])
        assert result.exit_code == 0 and words in result.stderr, result.output
        assert json.loads(result.stdout.splitlines()[-1])["found"] == "needs no patch"
    (tmp_path / file).write_text(text.replace("0", "7"))
    result = CliRunner().invoke(main, ["patch", "--target", target, "--path", str(tmp_path)])
    assert result.exit_code == 2 and "(needs none)" in result.stderr


def test_no_version_has_two_patches() -> None:
    for target in target_names(patches_folder()):
        versions = [version for patch in all_patches(patches_folder(), target) for version in patch.versions]
        assert len(versions) == len(set(versions))


SHOW = """
from megatron_prefix.patching import all_patches, patches_folder
from megatron_prefix.patching.manifest import target_names
import megatron_prefix
root = patches_folder()
print(megatron_prefix.__file__, root)
for target in target_names(root):
    for patch in all_patches(root, target):
        print(patch, *(diff.name for diff in patch.diffs))
"""


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_the_patches_come_along_with_an_install(build: str, tmp_path: Path) -> None:
    """Build as pip does, put the wheel on the path, and ask from elsewhere; an editable one leads to the checkout."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests", "examples")
    shutil.copytree(ROOT, checkout, ignore=ignore)
    command = [sys.executable, "-c", f"from setuptools import build_meta as b; print(b.{build}({str(tmp_path)!r}))"]
    built = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True, timeout=120)
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], site, "zip")
    if build == "build_wheel":
        shutil.rmtree(checkout)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S: the environment of the tests may have an editable install of its own, which would come first.
    start = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({sysconfig.get_path('purelib')!r})\n"
    command = [sys.executable, "-S", "-c", start + SHOW]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    where, *patches = shown.stdout.splitlines()
    assert where.split() == (
        [f"{site}/megatron_prefix/__init__.py", f"{site}/megatron_prefix/patches"]
        if build == "build_wheel"
        else [f"{checkout}/megatron_prefix/__init__.py", f"{checkout}/patches"]
    )
    assert patches == [
        " ".join([str(patch), *(diff.name for diff in patch.diffs)])
        for target in target_names(patches_folder())
        for patch in all_patches(patches_folder(), target)
    ]
