"""What a damaged file may still be read as: the formats' rules once more, written down plainly for the fuzz tests.

Shares no code with `megatron_prefix.formats`. A record becomes sequences, whatever its form: a response is its prompt
and its tokens, of which those in the loss mask are generated.
"""

import hashlib
import json
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.trajectory import Trajectory


class Plain(NamedTuple):
    """One sequence; log-probs where it is generated, None elsewhere; the trajectory's name or None."""

    tokens: tuple[int, ...]
    generated: tuple[bool, ...]
    reward: float
    log_probs: tuple[float | None, ...] | None
    trajectory: str | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.generated.index(True)]


class Record(NamedTuple):
    """An acceptable record: its kind ("group", "sample", "trajectory"), its group_id and its sequences."""

    kind: str
    group_id: str | None
    sequences: tuple[Plain, ...]
    prompt: tuple[int, ...] | None = None


class BadError(Exception):
    """The record is not acceptable."""


class LeftOutError(Exception):
    """The record says itself that it is not trained."""


def need(condition: Any) -> None:
    if not condition:
        raise BadError


def ids(value: Any) -> tuple[int, ...]:
    need(isinstance(value, list) and value)
    need(all(type(token) is int and 0 <= token < 2**63 for token in value))
    return tuple(value)


def number(value: Any) -> float:
    need(type(value) in (int, float) and abs(value) <= 1.7976931348623157e308)
    return float(value)


def bits(value: Any, count: int) -> tuple[bool, ...]:
    need(isinstance(value, list) and len(value) == count)
    need(all(type(bit) in (int, bool) and bit in (0, 1) for bit in value))
    need(any(value))
    return tuple(map(bool, value))


def looks_like_a_mistake(key: str) -> bool:
    return key.lower().replace("_", "").replace("-", "").rstrip("s") in ("logprob", "lossmask")


def response(prompt: tuple[int, ...], record: dict[str, Any], key: str) -> Plain:
    need(not any(looks_like_a_mistake(k) for k in record.keys() - {"log_probs", "loss_mask"}))
    tokens = ids(record.get(key))
    reward = number(record.get("reward"))
    mask = (True,) * len(tokens)
    if record.get("loss_mask") is not None:
        mask = bits(record["loss_mask"], len(tokens))
    log_probs = None
    if record.get("log_probs") is not None:
        need(isinstance(record["log_probs"], list) and len(record["log_probs"]) == len(tokens))
        sampled = [number(value) for value in record["log_probs"]]
        log_probs = (None,) * len(prompt) + tuple(x if own else None for x, own in zip(sampled, mask, strict=True))
    return Plain(prompt + tokens, (False,) * len(prompt) + mask, reward, log_probs)


def name(value: Any) -> str:
    need(isinstance(value, str))
    return value


def trajectory(tokens: Any, generated: Any, reward: Any, log_probs: Any = None, called: Any = None) -> Plain:
    known = ids(tokens)
    own = bits(generated, len(known))
    need(not own[0])
    if log_probs is not None:
        need(isinstance(log_probs, list) and len(log_probs) == len(known))
        log_probs = tuple(number(x) if here else None for x, here in zip(log_probs, own, strict=True))
    return Plain(known, own, number(reward), log_probs, None if called is None else name(called))


def native(record: dict[str, Any], line: int = 0) -> Record:
    need(sum(key in record for key in ("responses", "response", "generated")) == 1)
    if "generated" in record:
        need(not any(looks_like_a_mistake(key) for key in record.keys() - {"log_probs"}))
        values = (record.get(key) for key in ("tokens", "generated", "reward", "log_probs", "trajectory_id"))
        return Record("trajectory", name(record.get("group_id")), (trajectory(*values),))
    prompt = ids(record.get("prompt"))
    if "response" in record:
        return Record("sample", name(record.get("group_id")), (response(prompt, record, "response"),), prompt)
    need(not any(map(looks_like_a_mistake, record)))
    need(isinstance(record["responses"], list) and record["responses"])
    need(all(isinstance(each, dict) for each in record["responses"]))
    found = tuple(response(prompt, each, "tokens") for each in record["responses"])
    need(len({each.log_probs is None for each in found}) == 1)
    group_id = None if record.get("group_id") is None else name(record["group_id"])
    return Record("group", group_id, found, prompt)


def one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def nemo_rl(record: dict[str, Any], line: int = 0) -> Record:
    kept = one(record.get("sample_loss_mask", record.get("loss_multiplier", 1)))
    need(kept in (0, 1))
    if not kept:
        raise LeftOutError
    if "message_log" in record:
        need(isinstance(record["message_log"], list))
        tokens, own, log_probs, complete = [], [], [], True
        for message in record["message_log"]:
            need(isinstance(message, dict) and isinstance(message.get("role"), str))
            part = message.get("token_ids")
            need(isinstance(part, list))
            mask = message.get("token_loss_mask", [int(message["role"] == "assistant")] * len(part))
            sampled = message.get("generation_logprobs")
            need(isinstance(mask, list) and len(mask) == len(part))
            need(sampled is None or (isinstance(sampled, list) and len(sampled) == len(part)))
            complete = complete and (sampled is not None or not any(mask))
            tokens, own, log_probs = tokens + part, own + mask, log_probs + (sampled or [None] * len(part))
        need("total_reward" in record)
        found = [tokens, own, one(record["total_reward"]), log_probs if complete else None]
    else:
        rows = []
        for key in ("token_ids", "token_loss_mask", "generation_logprobs"):
            row = one(record.get(key)) if isinstance(one(record.get(key)), list) else record.get(key)
            need(isinstance(row, list) or (key not in record and key == "generation_logprobs"))
            rows.append(row)
        length = one(record.get("input_lengths", len(rows[0])))
        need(type(length) is int and 0 < length <= len(rows[0]) == len(rows[1]))
        need(not any(rows[1][length:]) and (rows[2] is None or len(rows[2]) == len(rows[0])))
        reward = one(record.get("filtered_rewards", record.get("rewards")))
        found = [rows[0][:length], rows[1][:length], reward, rows[2][:length] if rows[2] else None]
    sequence = trajectory(*found)
    group_id = record.get("group_id")
    if group_id is None:
        digest = hashlib.sha256(",".join(map(str, sequence.prompt)).encode()).hexdigest()
        group_id = f"prompt-{digest[:16]}"
    need(type(group_id) in (str, int))
    return Record("trajectory", str(group_id), (sequence,))


def megatron_rl(record: dict[str, Any], line: int) -> Record:
    if "rollouts" in record:
        need(isinstance(record["rollouts"], list))
        keys = [record.get(key, 0) for key in ("batch_id", "index_in_batch")]
        need(all(type(key) in (str, int) for key in keys))
        group_id = f"{line}: batch {keys[0]}, group {keys[1]}"
        rollouts = [(each, f"{line}.{i}") for i, each in enumerate(record["rollouts"])]
    else:
        need(type(record.get("problem_id")) in (str, int))
        group_id = f"{record.get('env_id') or ''}/{record['problem_id']}"
        rollouts = [(record, str(line))]
    found = []
    for rollout, called in rollouts:
        need(isinstance(rollout, dict))
        turns, masks, sampled = (rollout.get(key) for key in ("trajectory", "generation_mask", "logprobs"))
        need(isinstance(turns, list) and isinstance(masks, list) and not any(isinstance(turn, str) for turn in turns))
        if turns and not isinstance(turns[0], list):
            turns, masks, sampled = [turns], [masks], None if sampled is None else [sampled]
        sampled = [None] * len(turns) if sampled is None else sampled
        need(isinstance(sampled, list) and len(turns) == len(masks) == len(sampled) and "reward" in rollout)
        need(not isinstance(rollout["reward"], list) or len(rollout["reward"]) == 1)
        for tokens, mask, values in zip(turns, masks, sampled, strict=True):
            if values is not None:
                need(isinstance(mask, list) and isinstance(values, list))
                count = sum(map(bool, mask))
                need(len(values) in (len(mask), count))
                if len(values) != len(mask):
                    rest = list(values)
                    values = [rest.pop(0) if own else None for own in mask]
            found.append(trajectory(tokens, mask, one(rollout["reward"]), values, called if len(turns) > 1 else None))
    if not found:
        raise LeftOutError
    return Record("trajectory", group_id, tuple(found))


def texts(encode: Callable[[str], list[int]]) -> dict[str, Callable[[dict[str, Any], int], Record]]:
    """The rules of the formats that hold text, for the template `tokenizer_files.CHATML` without tools."""

    def text(value: Any) -> str:
        need(isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value))
        return value

    def verl(record: dict[str, Any], line: int) -> Record:
        prompt = encode(text(record.get("input")))
        made = {"response": encode(text(record.get("output"))), "reward": record.get("score"), "prompt": prompt}
        group_id = record.get("uid")
        if group_id is None:
            digest = hashlib.sha256(record["input"].encode()).hexdigest()
            need("score" in record)
            return native({"group_id": f"{reprlib.repr(record.get('step'))}-{digest[:16]}", **made})
        need(type(group_id) in (str, int))
        return native({"group_id": str(group_id), **made})

    def chat(record: dict[str, Any], line: int) -> Record:
        need(isinstance(record.get("messages"), list))
        tokens: list[int] = []
        own: list[bool] = []
        for message in record["messages"]:
            need(isinstance(message, dict))
            head = encode(f"<s>{text(message.get('role'))}\n")
            body = encode(f"{text(message.get('content'))}</s>")
            tokens += head + body + encode("\n")
            own += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False]
        need(record.get("tools") is None or isinstance(record["tools"], list))
        found = trajectory(tokens, own, record.get("reward"), None, record.get("trajectory_id"))
        return Record("trajectory", name(record.get("group_id")), (found,))

    return {"verl": verl, "chat": chat}


def records_of(lines: Iterable[bytes], rule: Callable[[dict[str, Any], int], Record]) -> list[Record | None]:
    """What every line that is not blank may be read as; None where it is bad. Those that are left out are not there."""
    found: list[Record | None] = []
    for line, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=no_number)
            need(isinstance(record, dict))
            found.append(rule(record, line))
        except LeftOutError:
            pass
        except (BadError, ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
            found.append(None)
    return found


def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len(dict(found)) == len(found))
    return dict(found)


def no_number(text: str) -> None:
    raise BadError


def conflicts(records: Sequence[Record]) -> set[str]:
    """Group ids under which records stand that cannot all be in one group."""
    by_id: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.group_id is not None:
            by_id[record.group_id].append(record)
    found = set()
    for group_id, members in by_id.items():
        sequences = [sequence for record in members for sequence in record.sequences]
        scores = {(each.trajectory, each.reward) for each in sequences if each.trajectory is not None}
        if (
            len({record.kind for record in members}) > 1
            or (members[0].kind == "group" and len(members) > 1)
            or len({record.prompt for record in members}) > 1
            or len({sequence.log_probs is None for sequence in sequences}) > 1
            or len({called for called, _ in scores}) != len(scores)
        ):
            found.add(group_id)
    return found


def sequences_of(group: RolloutGroup | list[Trajectory]) -> tuple[str | None, Counter[Plain]]:
    """What was read, in the plain form: its group_id and its sequences."""
    if isinstance(group, list):
        return group[0].group_id, Counter(
            Plain(each.tokens, each.generated, each.reward, _there(each.log_probs, each.generated), each.trajectory_id)
            for each in group
        )
    found: Counter[Plain] = Counter()
    for i, tokens in enumerate(group.responses):
        prompt = (False,) * len(group.prompt)
        own = prompt + (group.loss_masks[i] if group.loss_masks else (True,) * len(tokens))
        sampled = None if group.log_probs is None else (0.0,) * len(prompt) + group.log_probs[i]
        found[Plain((*group.prompt, *tokens), own, group.rewards[i], _there(sampled, own))] += 1
    return group.group_id, found


def is_tree_of(tree: RolloutTree, sequences: Iterable[Plain]) -> bool:
    """Whether the tree trains what the sequences generated, all of it and nothing else, behind the same tokens."""
    paths = [_path(tree, rollout) for rollout in range(len(tree.rewards))]
    wanted = {(s.reward, *step) for s in sequences for step in _steps(s)}
    return {(path.reward, *step) for path in paths for step in _steps(path)} == wanted


def _steps(sequence: Plain) -> Iterator[tuple[tuple[int, ...], float | None]]:
    """Of each generated token: all tokens up to it, and its log-prob."""
    for t, own in enumerate(sequence.generated):
        if own:
            yield sequence.tokens[: t + 1], None if sequence.log_probs is None else sequence.log_probs[t]


def _path(tree: RolloutTree, rollout: int) -> Plain:
    at = max(i for i, node in enumerate(tree.nodes) if rollout in node.rollouts)
    nodes = []
    while at >= 0:
        nodes.insert(0, tree.nodes[at])
        at = nodes[0].parent
    tokens, own, log_probs = [], [], []
    for node in nodes:
        mine = rollout in node.rollouts
        tokens += node.tokens
        own += [mine] * len(node.tokens)
        known = mine and node.log_probs is not None
        log_probs += node.log_probs[node.rollouts.index(rollout)] if known else [None] * len(node.tokens)  # type: ignore[index]
    return Plain(tuple(tokens), tuple(own), tree.rewards[rollout], tuple(log_probs))


def _there(values: Sequence[float] | None, own: Sequence[bool]) -> tuple[float | None, ...] | None:
    return None if values is None else tuple(x if here else None for x, here in zip(values, own, strict=True))
