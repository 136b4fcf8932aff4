"""JSONL, Parquet and tensors of verl: what is read of files built by hand, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="needs the cli extra")
pytest.importorskip("tokenizers", reason="needs the cli extra")
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_prefix.formats.read import load_rollouts
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.prefix_trie import share_prefixes
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import read_rollouts, write_rollouts
from megatron_prefix.trajectory import Trajectory
from tests.format_files import same, trajectories, write
from tests.tokenizer_files import write_byte_tokenizer

pytestmark = pytest.mark.ci_newest


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer(write_byte_tokenizer(tmp_path / "tokenizer"))


# Native trajectories.


TRAJECTORY = {"group_id": "g", "tokens": [1, 2, 3, 4], "generated": [0, 0, 1, 1], "reward": 1}


def test_trajectory_lines(tmp_path: Path) -> None:
    lines = [
        TRAJECTORY | {"log_probs": [None, 0, -1.5, -2], "text": "ignored"},
        {"group_id": "h", "tokens": [7, 8], "generated": [False, True], "reward": 0.5, "trajectory_id": "t"},
        TRAJECTORY | {"tokens": [1, 2, 5, 6], "generated": [0, 0, 1, 0], "log_probs": [0, 0, -3, 0], "reward": 0},
    ]
    (g, h), problems = trajectories(write(tmp_path / "t.jsonl", lines))
    assert problems.first == []
    nan = float("nan")
    assert same(
        g,
        [
            Trajectory([1, 2, 3, 4], [0, 0, 1, 1], 1.0, "g", [nan, nan, -1.5, -2.0]),
            Trajectory([1, 2, 5, 6], [0, 0, 1, 0], 0.0, "g", [nan, nan, -3.0, nan]),
        ],
    )
    assert h == [Trajectory([7, 8], [0, 1], 0.5, "h", None, "t")]
    trees = load_rollouts(tmp_path / "t.jsonl").groups
    assert repr(trees) == repr(share_prefixes([*g, *h]))
    assert [(tree.group_id, len(tree.nodes), tree.rewards) for tree in trees if isinstance(tree, RolloutTree)] == [
        ("g", 3, (1.0, 0.0)),
        ("h", 2, (0.5,)),
    ]
    with pytest.raises(ValueError, match="2 groups of the file are trajectories"):
        read_rollouts(tmp_path / "t.jsonl")


SAMPLE = {"group_id": "g", "prompt": [1, 2], "response": [3], "reward": 1}


@pytest.mark.parametrize(
    ("lines", "place", "message"),
    [
        ([TRAJECTORY, SAMPLE], 2, "group 'g' was given already on line 1; only sample lines"),
        ([TRAJECTORY, SAMPLE | {"response": [3], "generated": [1]}], 2, "either the key"),
        ([TRAJECTORY, TRAJECTORY | {"log_probs": [0, 0, -1, -1]}], 2, "only one of lines 1 and 2 has log_probs"),
        (
            [TRAJECTORY | {"trajectory_id": "t"}, TRAJECTORY | {"trajectory_id": "t", "reward": 0}],
            2,
            "'t' of group 'g' has the rewards 1.0 and 0.0; one trajectory has one reward",
        ),
        ([TRAJECTORY, TRAJECTORY | {"tokens": [1, 3, 3, 4]}], 1, "different prompts under one group 'g': position 1"),
        ([TRAJECTORY | {"logprobs": [0, 0, 0, 0]}], 1, "'logprobs' is not read here; write it as 'log_probs', one"),
        ([TRAJECTORY | {"loss_mask": [0, 0, 1, 1]}], 1, "'loss_mask' is not read here; write it as 'generated', one"),
        ([TRAJECTORY | {"group_id": None}], 1, "missing key 'group_id'"),
        ([TRAJECTORY | {"generated": [1, 1, 1, 1]}], 1, "the first token is generated"),
        ([TRAJECTORY | {"tokens": [1, 2, 3, 2**63]}], 1, "tokens, position 3: token id .* outside"),
        ([SAMPLE, SAMPLE | {"response": [2**63]}], 2, "response 0, position 0: token id .* outside"),
    ],
)
def test_bad_trajectory_lines_are_refused(
    tmp_path: Path, lines: list[dict[str, Any]], place: int, message: str
) -> None:
    path = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:{place}: .*{message}"):
        load_rollouts(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"group_id": "g", "prompt": [1], "response": [2], "reward": 1, "reward": 0}\n')
    with pytest.raises(ValueError, match=r"twice\.jsonl:1: the key 'reward' stands twice"):
        load_rollouts(path)


# What is skipped.


def test_bad_lines_are_skipped_and_named_and_groups_keep_the_rest(tmp_path: Path) -> None:
    response = {"tokens": [3], "reward": 1.0}
    lines = [
        {"group_id": "whole", "prompt": [1], "responses": [response, {"tokens": [-3], "reward": 1.0}]},
        SAMPLE,
        SAMPLE | {"reward": None},
        SAMPLE | {"prompt": [1, 3]},
        {"prompt": [5], "responses": [response]},
        SAMPLE | {"response": [4], "reward": 0},
        SAMPLE | {"group_id": "lost", "response": []},
    ]
    path = write(tmp_path / "some.jsonl", lines)
    found = load_rollouts(path, skip_bad=True)
    assert found.groups == [RolloutGroup([1, 2], [[3], [4]], [1.0, 0.0], "g"), RolloutGroup([5], [[3]], [1.0])]
    assert found.problems.skipped == 4
    assert [problem.place for problem in found.problems.first] == [f"{path}:{n}" for n in (1, 3, 4, 7)]
    assert "different prompts under one group 'g': position 1 is 2 in line 2 and 3" in found.problems.first[2].message
    with pytest.raises(ValueError, match=r"some\.jsonl:1: group 'whole', response 1, position 0: a token id must"):
        load_rollouts(path)


def test_trajectories_that_contradict_one_another_cost_their_group(tmp_path: Path) -> None:
    other = TRAJECTORY | {"tokens": [1, 3, 3, 4]}
    lines = [TRAJECTORY, {"prompt": [5], "responses": [{"tokens": [3], "reward": 1.0}]}, other]
    found = load_rollouts(write(tmp_path / "t.jsonl", lines), skip_bad=True)
    assert found.groups == [RolloutGroup([5], [[3]], [1.0])]
    ((place, message),) = found.problems.first
    assert place.endswith("t.jsonl:1")
    assert "different prompts under one group 'g'" in message
    with pytest.raises(ValueError, match="nothing is left of the file: 1 lines were skipped"):
        load_rollouts(write(tmp_path / "t.jsonl", lines[::2]), skip_bad=True)


def test_vocabulary_is_checked_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", [SAMPLE, SAMPLE | {"response": [9]}, TRAJECTORY | {"group_id": "t"}])
    assert load_rollouts(path, vocab_size=10).groups[0] == RolloutGroup([1, 2], [[3], [9]], [1.0, 1.0], "g")
    found = load_rollouts(path, vocab_size=4, skip_bad=True)
    assert found.groups == [RolloutGroup([1, 2], [[3]], [1.0], "g")]
    assert found.problems.first[0].message == (
        "response 0, position 0: token id 9 is outside the vocabulary of 4 tokens; tokenize with the tokenizer of this "
        "model"
    )
    with pytest.raises(ValueError, match=r"nothing is left of the file: 3 lines were skipped; the first: .*:1: prompt"):
        load_rollouts(path, vocab_size=1, skip_bad=True)


# Parquet.


def test_parquet_round_trip_and_columns(tmp_path: Path) -> None:
    groups = [
        RolloutGroup([1, 2], [[3], [4, 5]], [1.0, 0.0], "a", [[-1.0], [-2.0, -3.0]], [[1], [0, 1]]),
        RolloutGroup([7], [[8, 9]], [0.5]),
    ]
    path = tmp_path / "groups.parquet"
    write_rollouts(path, groups, [{"task": "sums"}, {"task": "words"}])
    assert read_rollouts(path) == groups
    assert pq.read_table(path).column_names == ["group_id", "prompt", "responses", "task"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="do not fit into columns"):
        write_rollouts(path, groups, [{"task": "sums"}, {"task": 3}])
    assert read_rollouts(path) == groups


def test_parquet_samples_and_trajectories_in_row_groups(tmp_path: Path) -> None:
    samples = pa.table(
        {
            "group_id": ["a", "b", "a"],
            "prompt": pa.array([[1, 2], [7], [1, 2]], pa.list_(pa.int32())),
            "response": pa.array([[3], [8], [4, 5]], pa.list_(pa.uint16())),
            "reward": pa.array([1, 0, 2], pa.int8()),
            "loss_mask": [None, None, [False, True]],
        }
    )
    path = tmp_path / "samples.parquet"
    pq.write_table(samples, path, row_group_size=2)
    assert load_rollouts(path).groups == [
        RolloutGroup([1, 2], [[3], [4, 5]], [1.0, 2.0], "a", None, [[1], [0, 1]]),
        RolloutGroup([7], [[8]], [0.0], "b"),
    ]
    bad = samples.set_column(3, "reward", pa.array([1.0, float("nan"), 2.0]))
    pq.write_table(bad, path, row_group_size=1)
    with pytest.raises(ValueError, match=r"samples\.parquet, row 2: group 'b', reward 0 must be finite, got nan"):
        load_rollouts(path)
    assert [group.group_id for group in load_rollouts(path, skip_bad=True).groups] == ["a"]
    lines = [TRAJECTORY | {"log_probs": [0.0, 0.0, -1.5, -2.0]}, TRAJECTORY | {"log_probs": [0.0, 0.0, -1.0, -2.0]}]
    pq.write_table(pa.Table.from_pylist(lines), path)
    write(tmp_path / "same.jsonl", lines)
    ((found,), _), ((expected,), _) = trajectories(path), trajectories(tmp_path / "same.jsonl")
    assert same(found, expected)
    assert len(found) == 2


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pa.Table.from_pylist([SAMPLE | {"group_id": f"g{i}", "prompt": list(range(i + 1, 90))} for i in range(8)])
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.parquet, row 1: row group 0 cannot be read from here: .*CRC"):
        load_rollouts(path)
    found = load_rollouts(path, skip_bad=True)
    assert [group.group_id for group in found.groups] == ["g4", "g5", "g6", "g7"]
    assert found.problems.skipped == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rollouts(tmp_path / "r.parquet", [RolloutGroup([1], [[2]], [0.0])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'megatron-prefix\[cli\]'"):
        load_rollouts(tmp_path / "r.parquet")
