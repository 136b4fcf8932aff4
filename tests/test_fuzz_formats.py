"""10,000 damaged files: each is refused with a place, or read as exactly what the plain rules allow."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow", reason="needs the cli extra")
pytest.importorskip("tokenizers", reason="needs the cli extra")
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_prefix.formats.assemble import Problems
from megatron_prefix.formats.read import RolloutReader
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.rollout_tree import RolloutTree
from tests import plain_formats as plain
from tests.plain_formats import Plain, Record
from tests.tokenizer_files import write_byte_tokenizer

pytestmark = pytest.mark.ci_newest

Rule = Callable[[dict[str, Any], int], Record]
Groups = dict[str | None, Counter[Plain]]

RESPONSE = {"tokens": [8, 9], "reward": 1.0, "log_probs": [-0.1, -2.3], "loss_mask": [1, 0]}
SAMPLE = {"group_id": "sé", "prompt": [1, 2], "response": [3, 4], "reward": 0.5, "text": "naïve"}
TRAJECTORY = {
    "group_id": "t", "tokens": [1, 2, 3, 4, 5], "generated": [0, 0, 1, 0, 1], "reward": 1,
    "log_probs": [None, 0, -0.5, 0, -1.5], "trajectory_id": "a",
}  # fmt: skip
NEMO = {
    "token_ids": [[5, 6, 7, 8, 0]], "input_lengths": [4], "token_loss_mask": [[0, 0, 1, 1, 0]], "rewards": [1.0],
    "generation_logprobs": [[0.0, 0.0, -0.5, -1.0, 0.0]], "sample_loss_mask": [1.0], "idx": 0,
}  # fmt: skip
MESSAGES = [
    {"role": "user", "token_ids": [5, 6]},
    {"role": "assistant", "token_ids": [7, 8], "generation_logprobs": [-0.5, -1.5]},
    {"role": "environment", "token_ids": [9]},
]
ROLLOUT = {
    "trajectory": [[5, 6, 7], [5, 6, 7, 9, 10]], "generation_mask": [[False, False, True], [False] * 4 + [True]],
    "logprobs": [[-0.5], [-0.75]], "reward": 1.0, "env_id": "sums", "problem_id": "17",
}  # fmt: skip
VERL = {"input": "user\nhow?", "output": "só", "gts": "so", "score": 1.0, "step": 3}
CHAT = {
    "group_id": "c", "reward": 0.5,
    "messages": [
        {"role": "user", "content": "how?"}, {"role": "assistant", "content": "só"},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"},
    ],
}  # fmt: skip

LINES: dict[str, list[dict[str, Any]]] = {
    "native": [
        {"group_id": "g", "prompt": [5, 6, 7], "responses": [RESPONSE, RESPONSE | {"reward": 0, "loss_mask": [1, 1]}]},
        SAMPLE,
        {"prompt": [5], "responses": [{"tokens": [3], "reward": 1.0}]},
        SAMPLE | {"response": [5], "loss_mask": [1], "reward": -2},
        TRAJECTORY,
        TRAJECTORY | {"tokens": [1, 2, 9, 9, 9], "trajectory_id": "b", "reward": 0},
    ],
    "nemo-rl": [
        NEMO,
        NEMO | {"token_ids": [[5, 6, 9, 9, 9]], "input_lengths": [5], "filtered_rewards": [0.0], "rewards": [3.0]},
        NEMO | {"sample_loss_mask": [0.0]},
        {"message_log": MESSAGES, "total_reward": 1.0, "loss_multiplier": 1.0, "group_id": "m"},
        {"message_log": MESSAGES[:2], "total_reward": 0.0, "group_id": "m"},
    ],
    "megatron-rl": [
        ROLLOUT,
        ROLLOUT | {"trajectory": [5, 6, 4], "generation_mask": [0, 0, 1], "logprobs": [0.0, 0.0, -3.0], "reward": [0]},
        {"rollouts": [ROLLOUT, ROLLOUT | {"reward": 0.0}], "batch_id": 0, "index_in_batch": 3},
    ],
    "verl": [VERL, VERL | {"output": "no", "score": 0}, VERL | {"uid": "u"}, VERL | {"step": 4}],
    "chat": [CHAT, CHAT | {"reward": 1}, CHAT | {"group_id": "d", "messages": CHAT["messages"][:2]}],  # type: ignore[index]
}
VALUES = (
    *(b"null", b"true", b"false", b"-1", b"0", b"1", b"2", b"1.5", b"NaN", b"-Infinity", b"1e400", b"-0.0"),
    *(b"9223372036854775807", b"9223372036854775808", b"1" + b"0" * 400, b"9" * 5000, b'"\\ud800"', b'"x"', b'""'),
    *(b"[]", b"[[1]]", b"[0]", b"[1, 2]", b"{}", b'{"tokens": 1}', b'"g"', b'"t"', b'"assistant"'),
)
KEYS = (
    b'"log_probs"',
    b'"logprobs"',
    b'"loss_mask"',
    b'"reward"',
    b'"response"',
    b'"generated"',
    b'"group_id"',
    b'"x"',
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three faults."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(FAULTS)(content, rng) if content else content
    return content


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _drop(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randrange(1, 40) :]


def _double(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[: at + rng.randrange(1, 40)] + content[at:]


def _byte(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.choice((0, 0xE9, 0xFF, 0x0A, rng.randrange(256)))]) + content[at + 1 :]


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(rng.choices(lines, k=len(lines) + rng.choice((-1, 0, 1))))


def _value(content: bytes, rng: random.Random) -> bytes:
    values = [match.span() for match in re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}|null', content)]
    if not values:
        return content
    start, end = rng.choice(values)
    return content[:start] + rng.choice(VALUES) + content[end:]


def _number(content: bytes, rng: random.Random) -> bytes:
    """An id, bit or reward that is as good as another, or just too large."""
    numbers = [match.span() for match in re.finditer(rb"(?<=[ \[])\d+(?=[,\]}])", content)]
    if not numbers:
        return content
    start, end = rng.choice(numbers)
    return content[:start] + rng.choice((b"0", b"1", b"3", b"9", b"9223372036854775808")) + content[end:]


def _key(content: bytes, rng: random.Random) -> bytes:
    keys = [match.span(1) for match in re.finditer(rb'("\w+"):', content)]
    if not keys:
        return content
    start, end = rng.choice(keys)
    return content[:start] + rng.choice(KEYS) + content[end:]


def _encoding(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    encodings = ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp500")
    return text.encode(rng.choice(encodings), "replace")


def _nothing(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", b"\n \n", b"\0" * 64, b"{}", b"[]\n"))


FAULTS = (_cut, _drop, _double, _byte, _flip, _lines, *[_value] * 6, *[_number] * 6, *[_key] * 2, _encoding, _nothing)


def read(path: Path, **options: Any) -> tuple[Groups, Problems]:
    problems = Problems()
    found: Groups = defaultdict(Counter)
    for placed in RolloutReader(**options).sequences(path, problems):
        group_id, sequences = plain.sequences_of(placed.group)
        found[group_id] += sequences
    return found, problems


def check(path: Path, records: Sequence[Record | None], **options: Any) -> str:
    """Strictly the file is read whole or refused; with skip_bad what is good of it is read, and nothing else."""
    good = [record for record in records if record is not None]
    torn = plain.conflicts(good)
    expected: Groups = defaultdict(Counter)
    for record in good:
        expected[record.group_id] += Counter(record.sequences)
    try:
        strict, _ = read(path, **options)
        assert len(good) == len(records), "a bad record was read"
        assert not torn, f"records that cannot be in one group were read: {torn}"
        assert strict == expected
        outcome = "read"
    except ValueError as error:
        assert re.match(re.escape(str(path)) + r"(:\d+|, (row|sample) \d+)?: \S", str(error)), error
        assert len(good) < len(records) or torn or not good, f"refused what is good: {error}"
        outcome = "refused"
    try:
        rest, problems = read(path, skip_bad=True, **options)
    except ValueError as error:
        assert all(record.group_id in torn for record in good), f"refused with skip_bad: {error}"
        return "nothing left"
    assert rest.keys() <= expected.keys() <= rest.keys() | torn
    for group_id, sequences in rest.items():
        if group_id in torn:
            assert sequences <= expected[group_id]
            assert len({each.log_probs is None for each in sequences}) == 1
        else:
            assert sequences == expected[group_id]
    _check_trees(path, rest, **options)
    assert problems.skipped >= len(records) - len(good)
    assert torn or problems.skipped == len(records) - len(good)
    return outcome


def _check_trees(path: Path, groups: Groups, **options: Any) -> None:
    try:
        found = RolloutReader(skip_bad=True, **options).load(path)
    except ValueError as error:
        assert "nothing is left" in str(error), error
        return
    for group in found.groups:
        if isinstance(group, RolloutTree):
            assert plain.is_tree_of(group, groups[group.group_id]), group.group_id


@pytest.mark.parametrize("name", LINES)
def test_damaged_json_lines(tmp_path: Path, name: str) -> None:
    tokenizer = ChatTokenizer(write_byte_tokenizer(tmp_path / "tokenizer"))
    rules: dict[str, Rule] = {"native": plain.native, "nemo-rl": plain.nemo_rl, "megatron-rl": plain.megatron_rl}
    rule = (rules | plain.texts(tokenizer.encode))[name]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES[name]).encode()
    path, rng = tmp_path / "fuzz.jsonl", random.Random(0)
    path.write_bytes(content)
    assert check(path, plain.records_of(content.split(b"\n"), rule), tokenizer=tokenizer) == "read"
    outcomes: Counter[str] = Counter()
    for _ in range(1500):
        bad = damaged(content, rng)
        path.write_bytes(bad)
        outcomes[check(path, plain.records_of(bad.split(b"\n"), rule), format=name, tokenizer=tokenizer)] += 1
    assert min(outcomes["read"], outcomes["refused"], outcomes["nothing left"]) > 40, outcomes


def sound(path: Path, records: Sequence[Record | None]) -> str:
    """As `check` where no plain reader says what is bad: all that is read stands in the file."""
    allowed: Groups = defaultdict(Counter)
    for record in records:
        if record is not None:
            allowed[record.group_id] += Counter(record.sequences)
    outcome = "nothing left"
    for skip_bad in (True, False):
        try:
            found, problems = read(path, skip_bad=skip_bad)
        except ValueError as error:
            assert re.match(re.escape(str(path)) + r"(, (row|sample) \d+)?: \S", str(error)), error
            continue
        for group_id, sequences in found.items():
            assert sequences <= allowed[group_id], group_id
        if not skip_bad:
            assert sum(map(Counter.total, found.values())) == sum(len(each.sequences) for each in records if each)
        outcome = "skipped" if problems.skipped else "read"
    return outcome


def _table(rows: Sequence[dict[str, Any]], **options: Any) -> bytes:
    out = BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out, row_group_size=2, **options)
    return out.getvalue()


def _plain_row(row: dict[str, Any]) -> Record | None:
    def there(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: there(each) for key, each in value.items() if each is not None}
        return [there(each) for each in value] if isinstance(value, list) else value

    try:
        return plain.native(there(row))
    except plain.BadError:
        return None


def _plain_rows(path: Path) -> Iterator[Record | None]:
    """What pyarrow's other reader gives, one row group at a time."""
    try:
        groups = pq.ParquetFile(path).num_row_groups
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return
    for i in range(groups):
        try:
            yield from map(_plain_row, pq.ParquetFile(path).read_row_group(i).to_pylist())
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            yield None


def _another_value(values: list[Any], rng: random.Random) -> list[Any]:
    """One value of a column replaced; of a column of lists, a value in one of them or a whole list."""
    changed = list(values)
    at = rng.randrange(len(changed))
    if isinstance(changed[at], list) and changed[at] and rng.random() < 0.6:
        changed[at] = _another_value(changed[at], rng)
    else:
        changed[at] = rng.choice((None, -1, 0, 2, 2**63 - 1, float("nan"), float("inf"), 0.5, "x", [], [1], True, "t"))
    return changed


def test_damaged_parquet(tmp_path: Path) -> None:
    samples = [{**row, "log_probs": [-1.0] * len(row["response"])} for row in LINES["native"] if "response" in row]
    trajectories = [{**row, "log_probs": [-1.0] * 5} for row in LINES["native"] if "generated" in row]
    tables = [samples * 2 + [samples[0] | {"group_id": "z"}], trajectories, LINES["native"][:1]]
    contents = [
        _table(tables[0], compression="none", use_dictionary=False),
        _table(tables[0], compression="zstd", write_page_checksum=True),
        _table(tables[1], compression="snappy"),
        _table(tables[2], compression="none"),
    ]
    path, rng = tmp_path / "fuzz.parquet", random.Random(0)
    outcomes: Counter[str] = Counter()
    for i in range(800):
        path.write_bytes(rng.choice((_cut, _drop, _double, _byte, _flip, _flip, _flip))(contents[i % 4], rng))
        outcomes[sound(path, list(_plain_rows(path)))] += 1
    assert min(outcomes["read"], outcomes["skipped"], outcomes["nothing left"]) > 20, outcomes
    outcomes.clear()
    while outcomes.total() < 500:
        rows = [dict(row) for row in rng.choice(tables[:2])]
        column = rng.choice(list(rows[0]))
        values = _another_value([row.get(column) for row in rows], rng)
        try:
            pq.write_table(pa.table({k: [row.get(k) for row in rows] for k in rows[0]} | {column: values}), path)
        except pa.ArrowException:
            continue  # no such column
        outcomes[check(path, [_plain_row(row) for row in pq.read_table(path).to_pylist()])] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 40, outcomes


BATCH: dict[str, Any] = {
    "prompts": torch.tensor([[0, 0, 5, 0], [0, 0, 5, 0], [1, 2, 3, 4]]),
    "responses": torch.tensor([[7, 0, 0], [8, 9, 0], [6, 0, 0]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
    "response_mask": torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]]),
    "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.25], [0.5, 0.0, 0.0]]),
    "rollout_log_probs": torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -4.0], [-3.0, 0.0, 0.0]]),
    "uid": ["a", "a", "b"],
}


def _plain_samples(path: Path) -> list[Record | None]:
    """The rules for tensors, sample by sample; nothing where the tensors themselves do not fit."""
    try:
        batch = torch.load(path, weights_only=True)
        wide = batch["prompts"].shape[1]
        for name in ("prompts", "responses"):
            plain.need(batch[name].ndim == 2 and batch[name].dtype in (torch.int64, torch.int32))
        count, rewards = len(batch["prompts"]), batch.get("token_level_scores")
        plain.need(batch["attention_mask"].shape == (count, wide + batch["responses"].shape[1]))
        plain.need(rewards is not None and len(batch["uid"]) == count)
        for name in ("response_mask", "token_level_scores", "rollout_log_probs"):
            plain.need(name not in batch or batch[name].shape == batch["responses"].shape)
    except Exception:  # noqa: BLE001 - torch.load raises what it likes on a damaged file
        return []
    found: list[Record | None] = []
    for i in range(count):
        own = batch["attention_mask"][i]
        steps = torch.diff(own.double())
        try:
            plain.need(set(own.tolist()) <= {0, 1} and (steps[: wide - 1] >= 0).all() and (steps[wide:] <= 0).all())
            here = own[wide:].bool()
            record = {
                "group_id": batch["uid"][i],
                "prompt": batch["prompts"][i][own[:wide].bool()].tolist(),
                "response": batch["responses"][i][here].tolist(),
                "reward": rewards[i].double().sum().item(),
            }
            for name, key in (("response_mask", "loss_mask"), ("rollout_log_probs", "log_probs")):
                if name in batch:
                    record[key] = batch[name][i][here].tolist()
            if "response_mask" in batch:
                plain.need(
                    set(batch["response_mask"][i].tolist()) <= {0, 1} and not batch["response_mask"][i][~here].any()
                )
                record["loss_mask"] = [int(bit) for bit in record["loss_mask"]]
            plain.need(type(record["group_id"]) in (str, int))
            found.append(plain.native(record | {"group_id": str(record["group_id"])}))
        except plain.BadError:
            found.append(None)
    return found


def _another_tensor(rng: random.Random) -> dict[str, Any]:
    batch = dict(BATCH)
    name = rng.choice(list(batch))
    value = batch[name]
    if rng.random() < 0.15:
        del batch[name]
    elif name == "uid":
        batch["uid"] = rng.choice(
            (["a"], ["a", "b", "b"], [1, 1, 2], ["a", None, "b"], ["a", 1.5, "b"], "abc", [[], "a", "b"])
        )
    elif rng.random() < 0.3:
        batch[name] = rng.choice(
            (value[:2], value[:, :2], value.double(), value.T, value > 0, value.flatten(), value.int())
        )
    else:
        changed = value.clone()
        fills: tuple[float, ...] = (-1, 0, 1, 2, 2**62)
        if value.is_floating_point():
            fills = (torch.nan, torch.inf, 0.5, -3e38)
        elif name.endswith("mask"):
            fills = (0, 0, 0, 1, 1, 1, 2)
        changed[rng.randrange(3), rng.randrange(value.shape[1])] = rng.choice(fills)
        batch[name] = changed
    return batch


def test_damaged_tensors(tmp_path: Path) -> None:
    path, rng = tmp_path / "fuzz.pt", random.Random(0)
    torch.save(BATCH, path)
    content = path.read_bytes()
    assert sound(path, _plain_samples(path)) == "read"
    outcomes: Counter[str] = Counter()
    for _ in range(700):
        path.write_bytes(rng.choice((_cut, _drop, _double, _byte, _byte, _flip, _flip, _flip))(content, rng))
        outcomes[sound(path, _plain_samples(path))] += 1
    assert min(outcomes["read"], outcomes["nothing left"]) > 20, outcomes
    outcomes.clear()
    for _ in range(500):
        torch.save(_another_tensor(rng), path)
        outcomes[check(path, _plain_samples(path))] += 1
    assert min(outcomes["read"], outcomes["refused"], outcomes["nothing left"]) > 40, outcomes
