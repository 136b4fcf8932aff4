"""`megatron_prefix.patching` on made-up trees: to the byte, all or nothing, whatever happens in between."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.patching import (
    Patch,
    TreeState,
    apply_patch,
    check_patch,
    find_patch,
    inspect_tree,
    revert_patch,
)
from megatron_prefix.patching import tree as patching_tree
from megatron_prefix.patching.manifest import Target, all_patches
from tests.patch_trees import Tree, make_patch, read_tree, write_tree

pytestmark = pytest.mark.ci_oldest

BEFORE: Tree = {"a/one.py": b"1\n2\n3\n4\n5\n", "two.py": b"x\ny\nz", "left/alone.py": b"\r\n"}
AFTER: Tree = {"a/one.py": b"1\n2\nnew\n3\n4\n5\n", "two.py": b"x\nY\nz", "added.py": b"made\n"}
TOUCHED = sorted(AFTER)


@pytest.fixture
def frame(tmp_path: Path) -> tuple[Patch, Path]:
    root, tree = make_patch(tmp_path, BEFORE, AFTER)
    return find_patch("frame", tree, root=root), tree


lines = st.lists(st.sampled_from([b"a\n", b"b\n", b"\n", b" c\r\n", b"\xff\n"]), max_size=12)


@st.composite
def changes(draw: st.DrawFn) -> tuple[Tree, Tree]:
    """Files before, and those that differ after: at least one; some added, with and without a last line break."""
    before: Tree = {}
    after: Tree = {}
    for name in draw(st.lists(st.sampled_from(["a.py", "b/c.py", "b/d e.py", "f"]), min_size=1, unique=True)):
        new = b"".join(draw(lines)) + draw(st.sampled_from([b"end", b"end\n"]))
        if draw(st.booleans()):
            before[name] = b"".join(draw(lines)) + draw(st.sampled_from([b"old", b"old\n"]))
        after[name] = new
    return before, after


@settings(max_examples=10)
@given(changes(), st.data())
def test_apply_and_revert_are_exact_from_every_state(change: tuple[Tree, Tree], data: st.DataObject) -> None:
    """Also where a run was killed: some files patched, some not, some staged."""
    before, after = change
    with tempfile.TemporaryDirectory() as folder:
        root, tree = make_patch(Path(folder), before, after)
        patch, pristine = find_patch("frame", tree, root=root), read_tree(tree)
        patched = pristine | after
        assert check_patch(patch, tree) is TreeState.ORIGINAL
        assert apply_patch(patch, tree) is TreeState.ORIGINAL
        assert read_tree(tree) == patched
        assert check_patch(patch, tree) is TreeState.PATCHED
        for action, goal in ((revert_patch, pristine), (apply_patch, patched)):
            done = data.draw(st.sets(st.sampled_from(sorted(after))))
            shutil.rmtree(tree)
            write_tree(tree, pristine | {name: after[name] for name in done})
            write_tree(tree, {str(Path(name).with_name(f".{Path(name).name}.megatron-prefix")): b"?" for name in done})
            expected = {0: TreeState.ORIGINAL, len(after): TreeState.PATCHED}.get(len(done), TreeState.INTERRUPTED)
            assert check_patch(patch, tree) is expected
            assert action(patch, tree) is expected
            assert read_tree(tree) == goal


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
@pytest.mark.parametrize("then", [apply_patch, revert_patch])
def test_a_kill_between_renames_leaves_whole_files(
    frame: tuple[Patch, Path], renames: int, then: Callable[[Patch, Path], TreeState]
) -> None:
    patch, tree = frame
    pristine = read_tree(tree)
    patched = pristine | AFTER
    _run_and_kill(patch, tree, renames)
    halfway = {name: content for name, content in read_tree(tree).items() if not name.endswith(".megatron-prefix")}
    for name in TOUCHED:
        assert halfway.get(name) in (pristine.get(name), patched[name])
    assert sum(halfway.get(name) == patched[name] for name in TOUCHED) == renames
    then(patch, tree)
    assert read_tree(tree) == (patched if then is apply_patch else pristine)


def _run_and_kill(patch: Patch, tree: Path, renames: int) -> None:
    """Apply in a forked process that is killed when it wants to rename once more (or at its end)."""
    child = os.fork()
    if not child:
        rename, left = patching_tree._take_place, [None] * renames

        def rename_or_die(source: Path, tree: Path, name: str) -> None:
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left.pop()
            rename(source, tree, name)

        patching_tree._take_place = rename_or_die
        try:
            apply_patch(patch, tree)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("action", [check_patch, apply_patch, revert_patch, inspect_tree])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a/one.py", b"1\n2\n3\n4\n5\n# mine\n", r"a/one.py is neither that of Frame v1.2 nor the patched one"),
        ("a/one.py", b"1\n2\nnew\n3\n4\n5\n# mine\n", r"a/one.py is neither"),
        ("two.py", None, r"has no two.py, which frame/v1.2 changes"),
        ("a/one.py", b"1\r\n2\r\n3\r\n4\r\n5\r\n", r"a/one.py has CRLF line endings.*core.autocrlf=false"),
        ("added.py", b"somebody else's\n", r"added.py is neither"),
    ],
)
@pytest.mark.parametrize("patched_first", [False, True])
def test_changed_trees_are_refused_by_name_and_left_alone(
    frame: tuple[Patch, Path], action: Callable, name: str, content: bytes | None, message: str, patched_first: bool
) -> None:
    patch, tree = frame
    if patched_first:
        apply_patch(patch, tree)
    if content is None:
        (tree / name).unlink()
    else:
        (tree / name).write_bytes(content)
    found = read_tree(tree)
    with pytest.raises(ValueError, match=message):
        action(patch, tree)
    assert read_tree(tree) == found


def test_a_symbolic_link_is_refused(frame: tuple[Patch, Path]) -> None:
    patch, tree = frame
    (tree / "two.py").rename(tree / "real.py")
    (tree / "two.py").symlink_to("real.py")
    with pytest.raises(ValueError, match=r"two.py is a symbolic link"):
        apply_patch(patch, tree)


def test_a_staged_file_that_another_run_took_costs_no_file(
    frame: tuple[Patch, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, tree = frame
    pristine = read_tree(tree)
    stage = patching_tree._stage

    def stage_and_lose(source: Path, tree: Path, name: str) -> None:
        stage(source, tree, name)
        if name == "two.py":
            patching_tree._staged(tree, name).unlink()

    monkeypatch.setattr(patching_tree, "_stage", stage_and_lose)
    with pytest.raises(ValueError, match="cannot be changed, and is as it was"):
        apply_patch(patch, tree)
    assert read_tree(tree) == pristine


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_the_file_system_refuses_changes_nothing(
    frame: tuple[Patch, Path], failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bind-mounted file does, which cannot be renamed over."""
    patch, tree = frame
    pristine = read_tree(tree)
    rename, calls = patching_tree._take_place, []

    def refuse_one(source: Path, tree: Path, name: str) -> None:
        calls.append(name)
        if len(calls) == failing + 1:
            raise OSError("device or resource busy")
        rename(source, tree, name)

    monkeypatch.setattr(patching_tree, "_take_place", refuse_one)
    with pytest.raises(ValueError, match="cannot be changed, and is as it was: device or resource busy"):
        apply_patch(patch, tree)
    assert read_tree(tree) == pristine
    assert apply_patch(patch, tree) is TreeState.ORIGINAL
    assert read_tree(tree) == pristine | AFTER


def test_a_read_only_folder_changes_nothing(frame: tuple[Patch, Path]) -> None:
    """The folder of the first file lets nobody write: run as somebody whom permissions bind."""
    patch, tree = frame
    temporary = Path(tempfile.gettempdir())
    for folder in (tree, *(parent for parent in tree.parents if temporary in parent.parents)):
        folder.chmod(0o755)
    (tree / "a").chmod(0o555)
    pristine = read_tree(tree)
    child = os.fork()
    if not child:
        code = 2
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            apply_patch(patch, tree)
        except ValueError as error:
            code = 1 if "cannot be changed, and is as it was" in str(error) else 3
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 1
    assert read_tree(tree) == pristine


def test_modes_are_kept(frame: tuple[Patch, Path]) -> None:
    patch, tree = frame
    (tree / "two.py").chmod(0o751)
    apply_patch(patch, tree)
    assert (tree / "two.py").stat().st_mode & 0o777 == 0o751
    revert_patch(patch, tree)
    assert (tree / "two.py").stat().st_mode & 0o777 == 0o751


def test_a_tree_inside_a_repository_is_patched_as_any_other(
    frame: tuple[Patch, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git apply` in a subfolder of a repository takes paths for the repository's, and skips them without a word."""
    patch, tree = frame
    outer = tree.parent / "repository" / "vendored"  # a git repository with a tree of the same names
    shutil.copytree(tree, outer)
    (outer / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(outer / "temporary"))
    apply_patch(patch, outer)
    (outer / "temporary").rmdir()
    assert read_tree(outer) == read_tree(tree) | AFTER


def test_unknown_versions_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    root, tree = make_patch(tmp_path, BEFORE, AFTER)
    (tree / "version.txt").write_text("1.3\n")
    with pytest.raises(ValueError, match=r"is frame 1.3, for which there is no patch. Known: v1.2 \(says 1.2\)"):
        find_patch("frame", tree, root=root)
    with pytest.raises(ValueError, match="no patches for 'farm': there are some for frame"):
        find_patch("farm", tree, root=root)
    with pytest.raises(ValueError, match=r"has no version.txt: it is not the root of a Frame source tree"):
        find_patch("frame", tmp_path, root=root)
    with pytest.raises(ValueError, match="is not a folder"):
        find_patch("frame", tmp_path / "nothing", root=root)
    (tree / "version.txt").write_text("\n")
    with pytest.raises(ValueError, match="does not say a version"):
        find_patch("frame", tree, root=root)


def test_a_version_is_made_of_the_groups_of_the_pattern(tmp_path: Path) -> None:
    file = tmp_path / "info.py"
    target = Target("t", "T", "info.py", r'^MAJOR = (\d+)\nMINOR = (\d+)\nPRE = "(\w*)"')
    file.write_text('# c\nMAJOR = 0\nMINOR = 19\nPRE = ""\n')
    assert target.version_of(tmp_path) == "0.19"
    file.write_text('# c\nMAJOR = 0\nMINOR = 19\nPRE = "rc1"\n')
    assert target.version_of(tmp_path) == "0.19.rc1"


def test_a_wrong_manifest_is_found_out(tmp_path: Path) -> None:
    root, tree = make_patch(tmp_path, BEFORE, AFTER)
    (found,) = all_patches(root, "frame")
    pins = {name: pin._replace(after="0" * 64) for name, pin in found.files.items()}
    wrong = Patch(**{**vars(found), "files": pins})
    pristine = read_tree(tree)
    with pytest.raises(ValueError, match=r"neither that of Frame v1.2"):
        apply_patch(wrong, tree)
    assert read_tree(tree) == pristine
