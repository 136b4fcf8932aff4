"""Rollout groups and their files: what is accepted comes back unchanged, all else is a ValueError that says where."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.rollouts import RolloutGroup, check_vocabulary, read_rollouts, write_rollouts

pytestmark = pytest.mark.ci_newest

FULL = {
    "group_id": "g",
    "prompt": [1, 2],
    "responses": [[3, 4], [5]],
    "rewards": [1.0, 0.0],
    "log_probs": [[-0.5, -1.0], [-2.0]],
    "loss_masks": [[1, 0], [True]],
}


def test_group_keeps_its_values_as_tuples():
    group = RolloutGroup(**FULL)
    assert group.prompt == (1, 2)
    assert group.responses == ((3, 4), (5,))
    assert group.rewards == (1.0, 0.0)
    assert group.log_probs == ((-0.5, -1.0), (-2.0,))
    assert group.loss_masks == ((True, False), (True,))
    assert group.trained_lengths == (1, 1)
    assert len(group) == 2
    plain = RolloutGroup([1], [[2, 3]], [1])
    assert plain.log_probs is None
    assert plain.loss_masks is None
    assert plain.trained_lengths == (2,)
    assert RolloutGroup([1], [[2], [3, 4]], [0, 0], loss_masks=[None, [0, 1]]).loss_masks == ((True,), (False, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "group 'g', prompt is empty"),
        ({"prompt": "hello"}, "group 'g', prompt must be a list, got str 'hello'"),
        ({"prompt": [1, True]}, "group 'g', prompt, position 1: a token id must be an int of 0 or more, got True"),
        ({"prompt": [1, 2.0]}, "prompt, position 1: .* got 2.0"),
        ({"responses": []}, "group 'g' has no responses"),
        ({"responses": None}, "group 'g', responses must be a list, got NoneType"),
        ({"responses": [[3, 4], []]}, "group 'g', response 1 is empty"),
        ({"responses": [[3, -4], [5]]}, "group 'g', response 0, position 1: .* got -4"),
        ({"responses": [[3, 4], ["5"]]}, "response 1, position 0: .* got '5'"),
        ({"rewards": [1.0]}, "group 'g' has 1 rewards for 2 responses"),
        ({"rewards": [1.0, math.nan]}, "group 'g', reward 1 must be finite, got nan"),
        ({"rewards": [-math.inf, 0]}, "reward 0 must be finite, got -inf"),
        ({"rewards": [10**400, 0]}, "reward 0 must be finite, got 1000"),
        ({"rewards": [True, 0]}, "reward 0 must be a number, got True"),
        ({"rewards": [None, 0]}, "reward 0 must be a number, got None"),
        ({"log_probs": [[-0.5, -1.0]]}, "group 'g' has 1 log_probs for 2 responses"),
        ({"log_probs": [[-0.5], [-2.0]]}, "group 'g', response 0 has 2 tokens but 1 log_probs"),
        ({"log_probs": [[-0.5, -1.0], [math.nan]]}, "response 1, log_probs at position 0 must be finite, got nan"),
        ({"log_probs": [[-0.5, -1.0], None]}, "response 1 has no log_probs but others have"),
        ({"loss_masks": [[1, 0], [1, 1]]}, "response 1 has 1 tokens but 2 loss_masks"),
        ({"loss_masks": [[0, 0], [1]]}, "response 0, loss_mask has no trained token"),
        ({"loss_masks": [[1, 2], [1]]}, "response 0, loss_mask at position 1 must be 0 or 1, got 2"),
        ({"group_id": 7}, "group_id must be a string or None, got 7"),
    ],
)
def test_bad_group_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        RolloutGroup(**{**FULL, **change})


def test_from_samples():
    group = RolloutGroup.from_samples([[1, 2], (1, 2)], [[3, 4], [5]], [1.0, 0.0], group_id="g")
    assert group == RolloutGroup([1, 2], [[3, 4], [5]], [1.0, 0.0], group_id="g")
    message = "different prompts under one group 'g': position 1 is 2 in sample 0 and 9 in sample 1"
    with pytest.raises(ValueError, match=message):
        RolloutGroup.from_samples([[1, 2], [1, 9]], [[3], [5]], [1.0, 0.0], group_id="g")
    with pytest.raises(ValueError, match="position 2 is no token in sample 0 and 3 in sample 1"):
        RolloutGroup.from_samples([[1, 2], [1, 2, 3]], [[3], [5]], [1.0, 0.0])
    with pytest.raises(ValueError, match="1 prompts for 2 responses"):
        RolloutGroup.from_samples([[1, 2]], [[3], [5]], [1.0, 0.0])
    with pytest.raises(ValueError, match="no responses"):
        RolloutGroup.from_samples([], [], [])


def test_check_vocabulary():
    groups = [RolloutGroup([1], [[2]], [0.0]), RolloutGroup([3], [[4], [5, 10]], [0.0, 1.0], group_id="b")]
    check_vocabulary(groups, 11)
    with pytest.raises(
        ValueError, match=r"group 1 \('b'\), response 1, position 1: token id 10 is outside .* 10 tokens"
    ):
        check_vocabulary(groups, 10)
    with pytest.raises(ValueError, match=r"group 1 .*, prompt, position 0: token id 3"):
        check_vocabulary(groups, 3)


@st.composite
def rollout_groups(draw: st.DrawFn, group_id: str | None) -> RolloutGroup:
    tokens = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)
    responses = draw(st.lists(tokens, min_size=1, max_size=4))
    number = st.floats(allow_nan=False, allow_infinity=False)
    log_probs = [[draw(number) for _ in r] for r in responses] if draw(st.booleans()) else None
    masks = None
    if draw(st.booleans()):
        masks = [[1, *(draw(st.integers(0, 1)) for _ in r[1:])] for r in responses]
    return RolloutGroup(draw(tokens), responses, [draw(number) for _ in responses], group_id, log_probs, masks)


@given(data=st.data())
def test_write_then_read_gives_the_same_groups(tmp_path_factory, data):
    names = data.draw(st.lists(st.one_of(st.none(), st.text()), min_size=1, max_size=4))
    names = [name for i, name in enumerate(names) if name is None or name not in names[:i]]
    groups = [data.draw(rollout_groups(name)) for name in names]
    path = tmp_path_factory.mktemp("rollouts") / "groups.jsonl"
    write_rollouts(path, groups)
    assert read_rollouts(path) == groups
    assert [file.name for file in path.parent.iterdir()] == ["groups.jsonl"]


def test_sample_lines_merge_by_group_id(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [
        {"group_id": "a", "prompt": [1, 2], "response": [3], "reward": 1, "log_probs": [-1], "text": "ignored"},
        {"group_id": "b", "prompt": [7], "response": [8, 9], "reward": 0.5},
        {"prompt": [5], "responses": [{"tokens": [6], "reward": 0.0, "text": "ignored"}]},
        {
            "group_id": "a",
            "prompt": [1, 2],
            "response": [4, 5],
            "reward": 0,
            "log_probs": [-2, -3],
            "loss_mask": [0, 1],
        },
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_rollouts(path) == [
        RolloutGroup([1, 2], [[3], [4, 5]], [1.0, 0.0], "a", [[-1.0], [-2.0, -3.0]], [[1], [0, 1]]),
        RolloutGroup([7], [[8, 9]], [0.5], "b"),
        RolloutGroup([5], [[6]], [0.0]),
    ]


GROUP = '{"group_id": "g", "prompt": [1, 2], "responses": [{"tokens": [3, 4], "reward": 1.0, "log_probs": [-1, -2]}]}'
SAMPLE = '{"group_id": "s", "prompt": [1, 2], "response": [3, 4], "reward": 1.0}'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "holds no rollouts"),
        ("\n\n", 1, "holds no rollouts"),
        (GROUP + "\n" + GROUP[:60], 2, "not JSON.*cut short"),
        (GROUP + "\n" + GROUP + "\n", 2, "group 'g' was given already on line 1"),
        (SAMPLE + "\n" + GROUP.replace('"g"', '"s"'), 2, "group 's' was given already on line 1"),
        (GROUP + "\n" + SAMPLE.replace('"s"', '"g"'), 2, "group 'g' was given already on line 1"),
        (
            SAMPLE + "\n" + GROUP + "\n" + SAMPLE.replace("[1, 2]", "[1, 5]"),
            3,
            "different prompts .* 2 in line 1 and 5 in line 3",
        ),
        (
            SAMPLE + "\n" + SAMPLE.replace("1.0", '1.0, "log_probs": [-1, -2]'),
            2,
            "only one of lines 1 and 2 has log_probs",
        ),
        (SAMPLE.replace('"group_id": "s", ', ""), 1, "missing key 'group_id'"),
        (SAMPLE.replace('"s"', "7"), 1, "group_id must be a string"),
        (SAMPLE.replace("reward", "score"), 1, "missing key 'reward'"),
        (SAMPLE.replace('"prompt"', '"query"'), 1, "missing key 'prompt'"),
        (SAMPLE.replace('"response"', '"answer"'), 1, "either the key 'responses'"),
        (SAMPLE.replace("1.0", "NaN"), 1, "NaN is not a number"),
        (SAMPLE.replace("1.0", "1e999"), 1, "reward 0 must be finite"),
        (SAMPLE.replace("1.0", "9" * 5000), 1, "Exceeds the limit"),
        (SAMPLE.replace("1.0", '"1.0"'), 1, "reward 0 must be a number"),
        (SAMPLE.replace("[3, 4]", '"3 4"'), 1, "response 0 must be a list, got str"),
        (SAMPLE.replace("1.0", '1.0, "logprobs": [-1, -2]'), 1, "key 'logprobs' is not read here"),
        (GROUP.replace('"log_probs"', '"Loss-Masks"'), 1, "key 'Loss-Masks' is not read here; write it as 'loss_mask'"),
        (
            GROUP.replace('"prompt"', '"log_probs": [[-1, -2]], "prompt"'),
            1,
            "group line: key 'log_probs' is not read here",
        ),
        (GROUP.replace('"tokens"', '"token_ids"'), 1, "response 0: missing key 'tokens'"),
        ('{"prompt": [1], "responses": {"tokens": [3]}}', 1, "'responses' must be a list"),
        ('{"prompt": [1], "responses": [[3, 4]]}', 1, "response 0 must be an object"),
        ('{"prompt": [1], "responses": []}', 1, "has no responses"),
        ("[1, 2]", 1, "must be a JSON object"),
        ("[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_bad_line_is_refused_with_file_and_line(tmp_path, content, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line}: (?s:.*){message}"):
        read_rollouts(path)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot read rollouts: No such file"):
        read_rollouts(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="cannot read rollouts: Is a directory"):
        read_rollouts(tmp_path)
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(f"{GROUP}\n".encode() + SAMPLE.replace("s", "é").encode("latin1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: not UTF-8: byte 0xe9 at column"):
        read_rollouts(path)


def test_write_refuses_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "groups.jsonl"
    write_rollouts(path, [RolloutGroup(**FULL)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two groups have the id 'g'"):
        write_rollouts(path, [RolloutGroup(**FULL), RolloutGroup(**FULL)])
    with pytest.raises(ValueError, match="no groups"):
        write_rollouts(path, [])
    with pytest.raises(AttributeError):  # fails half way: the first group is written by then
        write_rollouts(path, [RolloutGroup(**FULL), type("Broken", (), {"group_id": None})()])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _corrupt(content: bytes, rng: random.Random) -> bytes:
    """One random fault: bytes cut, dropped, doubled, overwritten or swapped for a JSON value of another type."""
    kind = rng.choice(["cut", "drop", "double", "byte", "value", "lines"])
    at, width = rng.randrange(len(content)), rng.randrange(1, 40)
    if kind == "cut":
        return content[:at]
    if kind == "drop":
        return content[:at] + content[at + width :]
    if kind == "double":
        return content[: at + width] + content[at:]
    if kind == "byte":
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == "lines":
        lines = content.splitlines(keepends=True)
        return b"".join(rng.choices(lines, k=len(lines)))
    values = [match.span() for match in re.finditer(rb'-?\d+(\.\d+)?|"\w*"|\[[^\[\]]*\]|\{[^{}]*\}', content)]
    start, end = rng.choice(values)
    other = [b"null", b"true", b"-1", b"0", b"NaN", b"1e400", b'"x"', b'""', b"[]", b"[[1]]", b"{}", b'{"tokens": 1}']
    return content[:start] + rng.choice(other) + content[end:]


def test_corrupt_files_never_raise_anything_else(tmp_path):
    path = tmp_path / "fuzz.jsonl"
    write_rollouts(path, [RolloutGroup(**FULL), RolloutGroup([1], [[2], [3]], [0.0, 1.0])])
    samples = [SAMPLE, SAMPLE.replace("1.0", "0.0"), SAMPLE.replace("1.0", '2, "loss_mask": [0, 1]')]
    content = path.read_bytes() + "\n".join(samples).encode()
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(800):
        path.write_bytes(_corrupt(content, rng))
        try:
            assert all(isinstance(group, RolloutGroup) for group in read_rollouts(path))
            outcomes["read"] += 1
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error)), error
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300, outcomes
    assert outcomes["read"] > 50, outcomes


def test_notes_stand_beside_the_group(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    group = RolloutGroup([1, 2], [[3]], [0.5], "a")
    write_rollouts(file, [group], [{"task": "sums", "answer": "3"}])
    assert json.loads(file.read_text())["task"] == "sums"
    assert read_rollouts(file) == [group]


@pytest.mark.parametrize(
    ("notes", "message"),
    [([], "0 notes for 1 groups"), ([{"prompt": "text"}], "uses the key 'prompt' of the group itself")],
)
def test_notes_that_do_not_fit_are_refused(tmp_path: Path, notes: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rollouts(tmp_path / "r.jsonl", [RolloutGroup([1, 2], [[3]], [0.5])], notes)
    assert not any(tmp_path.iterdir())
