"""Dumps of verl, NeMo-RL and Megatron-RL, and chats: built by hand in their documented shapes, and what is read."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow", reason="needs the cli extra")
pytest.importorskip("tokenizers", reason="needs the cli extra")

from megatron_prefix.formats.data_proto import from_data_proto
from megatron_prefix.formats.read import load_rollouts
from megatron_prefix.generation.tokenizer import ChatTokenizer
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.trajectory import Trajectory
from tests.format_files import same, trajectories, write
from tests.tokenizer_files import CHATML, write_byte_tokenizer, write_smollm2_tokenizer

pytestmark = pytest.mark.ci_newest


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer(write_byte_tokenizer(tmp_path / "tokenizer"))


# verl.


def data_proto() -> dict[str, Any]:
    """Three samples, two uids. The pad id 0 is also a token of prompts and responses."""
    return {
        "prompts": torch.tensor([[0, 0, 5, 0], [0, 0, 5, 0], [1, 2, 3, 4]]),
        "responses": torch.tensor([[7, 0, 0], [8, 9, 0], [6, 0, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
        "response_mask": torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]]),
        "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.25], [0.5, 0.0, 0.0]]),
        "rollout_log_probs": torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -4.0], [-3.0, 0.0, 0.0]]),
        "old_log_probs": torch.zeros(3, 3),
        "uid": ["a", "a", "b"],
    }


EXPECTED = [
    RolloutGroup([5, 0], [[7, 0], [8, 9, 0]], [1.0, 0.25], "a", [[-1, -2], [-0.5, -0.25, -4]], [[1, 1], [1, 0, 1]]),
    RolloutGroup([1, 2, 3, 4], [[6]], [0.5], "b", [[-3.0]], [[1]]),
]


def test_data_proto_in_memory_and_in_a_file(tmp_path: Path) -> None:
    batch = data_proto()
    non_tensor = {"uid": batch.pop("uid")}
    assert from_data_proto(batch, non_tensor) == EXPECTED
    torch.save(batch | non_tensor, tmp_path / "flat.pt")
    torch.save({"batch": batch, "non_tensor_batch": non_tensor, "meta_info": {}}, tmp_path / "nested.pt")
    for name in ("flat.pt", "nested.pt"):
        assert load_rollouts(tmp_path / name).groups == EXPECTED


def test_data_proto_alternatives() -> None:
    batch = data_proto()
    del batch["rollout_log_probs"], batch["response_mask"]
    batch["loss_mask"] = torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 0, 0]])
    batch["rewards"] = batch.pop("token_level_scores").sum(1)
    uid = torch.tensor([3, 3, 4])
    a, b = from_data_proto(batch, {"uid": uid})  # type: ignore[dict-item]
    assert (a.group_id, b.group_id) == ("3", "4")
    assert a.loss_masks == EXPECTED[0].loss_masks
    assert a.rewards == EXPECTED[0].rewards
    assert a.log_probs is None
    batch["token_level_rewards"] = torch.tensor([[0.0, 2.0, 0.0]] * 3)
    assert from_data_proto(batch, {"uid": uid})[0].rewards == (2.0, 2.0)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "the tensor 'attention_mask' is missing"),
        ({"token_level_scores": None}, "there are no rewards: one of the tensors token_level_rewards"),
        ({"uid": ["a", "a"]}, "uid must be a list of 3 names, one per sample, got 2"),
        ({"uid": None}, "uid must be a list of 3 names, one per sample, got none"),
        ({"uid": ["a", "a", 1.5]}, "sample 3: uid must be a string or an integer, got 1.5"),
        ({"attention_mask": torch.ones(3, 6)}, r"attention_mask must have the shape \(3, 7\) beside .*got \(3, 6\)"),
        ({"prompts": torch.zeros(3, 4)}, "prompts must be a matrix of integers, got torch.float32"),
        ({"responses": torch.zeros(3, dtype=torch.long)}, "responses must be a matrix of integers"),
        (
            {"attention_mask": torch.tensor([[0, 1, 0, 1, 1, 1, 0]] * 3)},
            "sample 1: attention_mask: the padding of the prompt is not all on its left",
        ),
        (
            {"attention_mask": torch.tensor([[0, 0, 1, 1, 0, 1, 0]] * 3)},
            "sample 1: attention_mask: the padding of the response is not all on its right",
        ),
        ({"response_mask": torch.ones(3, 3)}, "response_mask is 1 at position 2, which attention_mask says is padding"),
        ({"response_mask": torch.full((3, 3), 0.5)}, "response_mask at position 0 must be 0 or 1, got 0.5"),
        ({"token_level_scores": torch.full((3, 3), torch.nan)}, "reward 0 must be finite, got nan"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    batch = {name: value for name, value in (data_proto() | change).items() if value is not None}
    torch.save(batch, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=rf"bad\.pt.*{message}"):
        load_rollouts(tmp_path / "bad.pt")


class Payload:
    """What a hostile pickle does."""

    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Payload.ran.append, ("ran",)


def test_pickles_do_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    for write_file in (
        lambda: torch.save({"prompts": Payload()}, path),
        lambda: path.write_bytes(pickle.dumps(Payload())),
    ):
        write_file()
        with pytest.raises(ValueError, match=r"evil\.pt: not a file of plain tensors, and pickles could run code"):
            load_rollouts(path)
    assert Payload.ran == []
    path.rename(tmp_path / "evil.pkl")
    with pytest.raises(ValueError, match=r"evil\.pkl: a pickle could run code and is not read"):
        load_rollouts(tmp_path / "evil.pkl")


def test_verl_text_dumps(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    line = {"input": "user\nhow?", "output": "so", "gts": "so", "score": 1.0, "step": 3, "acc": True}
    lines = [line, line | {"output": "no", "score": 0}, line | {"step": 4}, line | {"uid": "u"}, line | {"uid": "u"}]
    path = write(tmp_path / "3.jsonl", lines)
    by_step, other_step, by_uid = load_rollouts(path, tokenizer=tokenizer).groups
    prompt = tokenizer.encode("user\nhow?")
    assert list(by_step.prompt) == prompt
    assert [list(tokens) for tokens in by_step.responses] == [tokenizer.encode("so"), tokenizer.encode("no")]
    assert by_step.rewards == (1.0, 0.0)
    assert by_step.group_id.startswith("3-")  # type: ignore[union-attr]
    assert (len(other_step), len(by_uid), by_uid.group_id) == (1, 2, "u")
    with pytest.raises(ValueError, match=r"3\.jsonl: verl holds texts; name the folder of the tokenizer"):
        load_rollouts(path)
    write(path, [line, line | {"output": 7}])
    with pytest.raises(ValueError, match=r"3\.jsonl:2: verl dump: 'output' must be a string, got 7"):
        load_rollouts(path, tokenizer=tokenizer)


# NeMo-RL.


def nemo_line(tokens: list[int], mask: list[int], length: int, reward: float, **more: Any) -> dict[str, Any]:
    log_probs = [-float(token) if own else 0.0 for token, own in zip(tokens, mask, strict=True)]
    return {
        "content": [["text"]], "token_ids": [tokens], "input_lengths": [length], "token_loss_mask": [mask],
        "sample_loss_mask": [1.0], "generation_logprobs": [log_probs], "prev_logprobs": [log_probs],
        "rewards": [reward], "advantages": [[0.0] * len(tokens)], "idx": 0,
    } | more  # fmt: skip


def test_nemo_rl_training_data(tmp_path: Path) -> None:
    lines = [
        nemo_line([5, 6, 7, 8, 0, 0], [0, 0, 1, 1, 0, 0], 4, 1.0),
        nemo_line([5, 9, 7, 8, 3, 4], [0, 0, 1, 0, 0, 1], 6, 0.5, idx=1),
        nemo_line([5, 6, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], 3, 7.0, filtered_rewards=[0.0], idx=2),
        nemo_line([5, 6, 7, 7, 0, 0], [0, 0, 1, 1, 0, 0], 4, 1.0, sample_loss_mask=[0.0], idx=3),
    ]
    (first, second), problems = trajectories(write(tmp_path / "train_data_step1.jsonl", lines))
    assert (problems.left_out, problems.skipped) == (1, 0)
    assert first[0].group_id == first[1].group_id != second[0].group_id
    nan, name = float("nan"), first[0].group_id
    assert same(
        first,
        [
            Trajectory([5, 6, 7, 8], [0, 0, 1, 1], 1.0, name, [nan, nan, -7.0, -8.0]),
            Trajectory([5, 6, 0], [0, 0, 1], 0.0, name, [nan, nan, -0.0]),
        ],
    )
    assert second[0].generated == (False, False, True, False, False, True)


def test_nemo_rl_message_logs(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q", "token_ids": [5, 6]},
        {"role": "assistant", "content": "a", "token_ids": [7, 8], "generation_logprobs": [-0.5, -1.5]},
        {"role": "environment", "content": "e", "token_ids": [9]},
        {"role": "assistant", "content": "b", "token_ids": [4], "generation_logprobs": [-2.5]},
    ]
    masked = [messages[0], messages[1] | {"token_loss_mask": [0, 1]}]
    line = {"message_log": messages, "total_reward": 1.0, "task_name": "t", "loss_multiplier": 1.0, "group_id": "g"}
    lines = [line, line | {"message_log": masked, "total_reward": [0.0]}, line | {"message_log": messages[:2]}]
    ((found,), _) = trajectories(write(tmp_path / "log.jsonl", lines))
    nan = float("nan")
    assert same(
        found,
        [
            Trajectory([5, 6, 7, 8, 9, 4], [0, 0, 1, 1, 0, 1], 1.0, "g", [nan, nan, -0.5, -1.5, nan, -2.5]),
            Trajectory([5, 6, 7, 8], [0, 0, 0, 1], 0.0, "g", [nan, nan, nan, -1.5]),
            Trajectory([5, 6, 7, 8], [0, 0, 1, 1], 1.0, "g", [nan, nan, -0.5, -1.5]),
        ],
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (nemo_line([5, 6, 7], [0, 1, 1], 2, 1.0), "token_loss_mask trains padding"),
        (nemo_line([5, 6, 7], [0, 1, 1], 4, 1.0), "input_lengths must be 1 to 3, got 4"),
        (nemo_line([5, 6, 7], [0, 1, 1], 3, 1.0, token_loss_mask=[[0, 1]]), "has 2 values for 3 tokens"),
        (nemo_line([5, 6, 7], [0, 1, 1], 3, 1.0, generation_logprobs=[[0.0]]), "has 1 values for 3 tokens"),
        (nemo_line([5, 6, 7], [0, 1, 1], 3, 1.0, sample_loss_mask=[0.5]), "must be 0 or 1, got 0.5"),
        (nemo_line([5, 6, 7], [0, 0, 0], 3, 1.0), "none of 3 tokens is generated"),
        (nemo_line([5, -6, 7], [0, 1, 1], 3, 1.0), "token_ids, position 1: a token id must be an int"),
        ({"message_log": [{"role": "user"}], "total_reward": 1}, "message 0: missing key 'token_ids'"),
        ({"message_log": ["hello"], "total_reward": 1}, "message 0 must be an object with 'role'"),
        ({"message_log": {}, "total_reward": 1}, "message_log must be a list of messages"),
    ],
)
def test_bad_nemo_rl_lines_are_refused(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"n\.jsonl:1: .*{message}"):
        load_rollouts(write(tmp_path / "n.jsonl", [line]))


# Megatron-RL.


ROLLOUT: dict[str, Any] = {
    "trajectory": [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10]],
    "generation_mask": [[False, False, True, True], [False] * 5 + [True]],
    "logprobs": [[-0.5, -2.5], [-0.75]],
    "reward": 1.0, "env_id": "sums", "problem_id": "17", "policy_epoch": [[[0, 2]], [[0, 1]]],
}  # fmt: skip


def test_megatron_rl_rollouts(tmp_path: Path) -> None:
    flat = {"trajectory": [5, 6, 4], "generation_mask": [0, 0, 1], "logprobs": [0.0, 0.0, -3.0], "reward": [0.0]}
    ((found,), _) = trajectories(write(tmp_path / "r.jsonl", [ROLLOUT, ROLLOUT | flat]))
    nan, name = float("nan"), "sums/17"
    assert same(
        found,
        [
            Trajectory([5, 6, 7, 8], [0, 0, 1, 1], 1.0, name, [nan, nan, -0.5, -2.5], "1"),
            Trajectory([5, 6, 7, 8, 9, 10], [0] * 5 + [1], 1.0, name, [nan] * 5 + [-0.75], "1"),
            Trajectory([5, 6, 4], [0, 0, 1], 0.0, name, [nan, nan, -3.0]),
        ],
    )


def test_megatron_rl_groups_are_groups_whatever_their_ids(tmp_path: Path) -> None:
    group = {"rollouts": [ROLLOUT, ROLLOUT | {"reward": 0.0}], "batch_id": 0, "index_in_batch": 3}
    placeholder = {"rollouts": [ROLLOUT | {"trajectory": [], "generation_mask": [], "logprobs": []}]}
    found, problems = trajectories(write(tmp_path / "r.jsonl", [group, placeholder, group]))
    assert [len(each) for each in found] == [4, 4]  # the same ids in another iteration: another group
    assert [t.trajectory_id for t in found[1]] == ["3.0", "3.0", "3.1", "3.1"]
    assert (problems.left_out, problems.skipped) == (1, 0)
    trees = load_rollouts(tmp_path / "r.jsonl").groups
    assert [tree.rewards for tree in trees] == [(1.0, 0.0)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_id": None}, "problem_id must be a string or an integer, got None"),
        ({"generation_mask": None}, "generation_mask must be a list of turns"),
        ({"generation_mask": [[0, 0, 1, 1]]}, "generation_mask has 1 turns, trajectory has 2"),
        ({"logprobs": [[-0.5], [-0.75]]}, "turn 0 has 1 logprobs for 2 generated of 4 tokens"),
        ({"reward": [1.0, 0.0]}, "reward is a list of 2; a rollout needs one"),
        ({"trajectory": ["a", "b"]}, "trajectory holds text"),
    ],
)
def test_bad_megatron_rl_rollouts_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for line, where in ((ROLLOUT | change, ""), ({"rollouts": [ROLLOUT, ROLLOUT | change]}, "rollout 1: ")):
        if "problem_id" in change and where:
            continue  # not needed in a group
        with pytest.raises(ValueError, match=rf"r\.jsonl:1: {where}{message}"):
            load_rollouts(write(tmp_path / "r.jsonl", [line]), format="megatron-rl")


# Chat.


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how warm <is> it?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "warm", "arguments": {"at": "Ülm"}}]},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "21 degrees"},
]


def spans(tokenizer: ChatTokenizer, tokens: Sequence[int], generated: Sequence[bool]) -> list[str]:
    """Text of each run of generated tokens; its end-of-sequence token is shown as "|"."""
    eos, texts, run = tokenizer.encode("</s>")[0], [], []
    for token, own in [*zip(tokens, generated, strict=True), (0, False)]:
        if own:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run) + "|" * (run[-1] == eos))
            run = []
    return texts


def test_what_the_assistant_wrote_is_found(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    lines = [{"group_id": "g", "messages": CHAT, "reward": 1.0}, {"group_id": "g", "messages": CHAT[:3], "reward": 0}]
    ((found,), _) = trajectories(write(tmp_path / "chat.jsonl", lines), tokenizer=tokenizer)
    whole, cut = found
    call = '<call>{"name": "warm", "arguments": {"at": "Ülm"}}|'
    assert spans(tokenizer, whole.tokens, whole.generated) == [call, "21 degrees|"]
    assert spans(tokenizer, cut.tokens, cut.generated) == [call]
    text = "<s>system\nbe brief</s>\n<s>user\nhow warm <is> it?</s>\n<s>assistant\n"
    assert list(whole.tokens[: whole.generated.index(True)]) == tokenizer.encode(text)
    assert whole.tokens[: len(cut.tokens)] == cut.tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Reasoning of earlier turns is dropped when the conversation goes on.
        (CHATML.replace("m.content or ''", "(m.content or '') if loop.last else ''"), "message 2: .*not prefix-stable"),
        (
            CHATML.replace("m.tool_calls or []", "((m.tool_calls or []) if loop.last else [])"),
            "message 2: .*not prefix-stable",
        ),
        # The prompt for the answer is not how the answer is shown later.
        (CHATML.replace("<s>assistant\n{% endif", "answer: {% endif"), "message 2: .*not prefix-stable"),
        (CHATML + "{{ messages[0].nothing.at_all }}", "cannot take these messages: .*nothing"),
        ("{{ raise_exception('no tools') }}", "refuses this prompt: no tools"),
        ("{{ messages | sum }}", "cannot take these messages"),
        (None, "the tokenizer has no chat template"),
    ],
)
def test_templates_that_do_not_tell_are_refused(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = ChatTokenizer(write_byte_tokenizer(tmp_path / "other", template))
    path = write(tmp_path / "chat.jsonl", [{"group_id": "g", "messages": CHAT, "reward": 1.0}])
    with pytest.raises(ValueError, match=rf"chat\.jsonl:1: .*{message}"):
        load_rollouts(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "tokens is empty"),
        ("hello", "'messages' must be a list of messages"),
        ([{"role": "user", "content": "hm"}], "none of .* tokens is generated"),
        ([{"role": "user", "content": ["hm"]}], "message 0: 'content' must be a string"),
        ([{"role": "user"}], "message 0 has neither 'content' nor 'tool_calls'"),
        ([{"content": "x"}], "message 0: missing key 'role'"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
        (["hm"], "message 0 must be an object"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, tokenizer: ChatTokenizer, messages: Any, message: str) -> None:
    path = write(tmp_path / "chat.jsonl", [{"group_id": "g", "messages": messages, "reward": 1.0}])
    with pytest.raises(ValueError, match=rf"chat\.jsonl:1: .*{message}"):
        load_rollouts(path, tokenizer=tokenizer)


def test_smollm2_conversations_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_smollm2_tokenizer(tmp_path)
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    messages = [message for message in CHAT if "tool_calls" not in message and message["role"] != "tool"]
    messages[2:2] = [{"role": "assistant", "content": "Where?"}, {"role": "user", "content": "In Ulm — 東京?"}]
    tokens, generated = ChatTokenizer(folder).encode_messages(messages)
    expected = oracle.apply_chat_template(messages, chat_template=settings["chat_template"], tokenize=False)
    assert tokens == oracle.encode(expected, add_special_tokens=False)
    runs = oracle.decode(
        [t if own else oracle.convert_tokens_to_ids("<|im_start|>") for t, own in zip(tokens, generated, strict=True)]
    )
    assert [run for run in runs.split("<|im_start|>") if run] == ["Where?<|im_end|>", "21 degrees<|im_end|>"]


# Which format.


SAMPLE = {"group_id": "g", "prompt": [1, 2], "response": [3], "reward": 1}


def test_the_format_is_recognised_or_named(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("not json\n" + json.dumps({"strange": 1}) + "\n" + json.dumps(ROLLOUT) + "\n")
    found = load_rollouts(path, skip_bad=True)
    assert [group.group_id for group in found.groups] == ["sums/17"]
    assert found.problems.skipped == 2
    with pytest.raises(ValueError, match="nothing is left"):
        load_rollouts(path, skip_bad=True, format="nemo-rl")
    with pytest.raises(ValueError, match="format must be auto or one of native, chat, verl, nemo-rl, megatron-rl, got"):
        load_rollouts(path, format="csv")
    # Texts beside native keys do not change what the line is.
    write(path, [SAMPLE | {"messages": CHAT, "input": "i", "output": "o", "score": 1}])
    assert load_rollouts(path).groups == [RolloutGroup([1, 2], [[3]], [1.0], "g")]
