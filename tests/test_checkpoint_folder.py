"""Checkpoint folders as files: whole or not there, damage is found, the newest stay."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_prefix.checkpoint_folder import (
    MANIFEST_FILE,
    FileSum,
    checkpoints,
    complete,
    files_of,
    find_damage,
    incomplete_folder,
    keep_last,
    latest_checkpoint,
    remove_leftovers,
    step_folder,
    sums_of,
)

pytestmark = pytest.mark.ci_oldest

CONTENTS = {"model.json": b"{}\n", "weights/__0_0.distcp": bytes(range(256)) * 40, "weights/.metadata": b"meta"}


def make(path: Path) -> Path:
    """A checkpoint of `CONTENTS`."""
    beside = incomplete_folder(path)
    for name, contents in CONTENTS.items():
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        (beside / name).write_bytes(contents)
    complete(beside, path, sums_of(beside, files_of(beside)))
    return path


def test_a_completed_folder_has_its_files_and_no_damage(tmp_path: Path) -> None:
    path = make(step_folder(tmp_path, 7))
    assert path.name == "step_000007" and list(tmp_path.iterdir()) == [path]
    assert {name: (path / name).read_bytes() for name in files_of(path)} == CONTENTS
    assert files_of(path) == sorted(CONTENTS)
    sizes = {name: entry["bytes"] for name, entry in json.loads((path / MANIFEST_FILE).read_text()).items()}
    assert sizes == {name: len(contents) for name, contents in CONTENTS.items()}
    assert all(find_damage(path, part, 3) is None for part in range(3)) and find_damage(path) is None
    # CRC-32 of b"123456789" by its definition (ITU-T V.42)
    (tmp_path / "nine").write_bytes(b"123456789")
    assert FileSum.of(tmp_path / "nine") == FileSum(9, 0xCBF43926)


def damage(path: Path, how: str) -> None:
    shard = path / "weights/__0_0.distcp"
    if how == "bit":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    elif how == "missing":
        (path / "weights/.metadata").unlink()
    elif how == "no manifest":
        (path / MANIFEST_FILE).unlink()
    else:
        (path / MANIFEST_FILE).write_text(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bit", "weights/__0_0.distcp has other contents than were written"),
        ("cut", "weights/__0_0.distcp has 100 bytes, 10240 were written"),
        ("missing", "weights/.metadata cannot be read: No such file or directory"),
        ("no manifest", "it has no manifest.json"),
        ('{"model.json"', "its manifest.json cannot be read: "),
        ("[1]", "its manifest.json cannot be read: "),
        ('{"model.json": {"bytes": 3}}', "its manifest.json cannot be read: "),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, how: str, message: str) -> None:
    path = make(step_folder(tmp_path, 1))
    damage(path, how)
    found = [find_damage(path, part, 2) for part in range(2)]
    named = [each for each in found if each is not None]
    assert named and all(each.startswith(message) for each in named)
    # contents are read by one of the ranks, sizes are seen by all
    assert len(named) == (1 if how == "bit" else 2)


def test_the_newest_stay_and_leftovers_go(tmp_path: Path) -> None:
    for step in (8, 9, 10, 1000000):
        make(step_folder(tmp_path, step))
    left_over = incomplete_folder(step_folder(tmp_path, 11))
    half_removed = tmp_path / "step_000003.0123abcd.removed"
    others = [
        tmp_path / name for name in ("step_000012.mine.incomplete", "nonfinite", "step_12", "metrics.jsonl.removed")
    ]
    for path in (left_over, half_removed, *others):
        path.mkdir()
        (path / "file").touch()
    assert left_over != incomplete_folder(step_folder(tmp_path, 11)), "no two runs write to the same folder"
    steps = [step_folder(tmp_path, step) for step in (8, 9, 10, 1000000)]
    assert checkpoints(tmp_path) == steps and latest_checkpoint(tmp_path) == steps[-1]
    keep_last(tmp_path, 0)
    assert checkpoints(tmp_path) == steps
    keep_last(tmp_path, 2)
    assert checkpoints(tmp_path) == steps[2:]
    keep_last(tmp_path, 5)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*steps[2:], *others])
    remove_leftovers(tmp_path / "nowhere")


def test_removal_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, it leaves no half checkpoint under a checkpoint's name."""
    for step in (1, 2):
        make(step_folder(tmp_path, step))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_last(tmp_path, 1)
    assert checkpoints(tmp_path) == [step_folder(tmp_path, 2)]
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [step_folder(tmp_path, 2)]
