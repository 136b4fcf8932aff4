"""Micro-batches of ms-swift as packs: any groups, order, turns and padding. ms-swift itself is not needed."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix.ms_swift.arguments import refuse_arguments
from megatron_prefix.ms_swift.micro_batch import NO_LABEL, PackedMicroBatch

pytestmark = pytest.mark.ci_oldest


@dataclass(frozen=True)
class Sequence:
    """Token ids, and the label of each."""

    ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.ids[: self._labelled[0]])

    @property
    def response_length(self) -> int:
        return self._labelled[-1] + 1 - self._labelled[0]

    @property
    def _labelled(self) -> list[int]:
        return [i for i, label in enumerate(self.labels) if label != NO_LABEL]


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    """One to eight, of up to three prompts in any order; every token of the policy is another one."""
    prompts = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=3))
    fresh = itertools.count(100)
    found = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(prompts))
        policy = [True, *draw(st.lists(st.booleans(), max_size=5))]
        response = [next(fresh) for _ in policy]
        marked = [token if mine else NO_LABEL for token, mine in zip(response, policy, strict=True)]
        tail = draw(st.integers(0, 2))  # an end that the loss leaves out, or padding
        found.append(
            Sequence([*prompt, *response, *[4] * tail], [*[NO_LABEL] * len(prompt), *marked, *[NO_LABEL] * tail])
        )
    return found


def collated(batch: list[Sequence], padding_free: bool, unlabelled: int) -> dict[str, Any]:
    """As ms-swift's collator, with ``unlabelled`` tokens of padding more: in a packed frame, sequences of one token."""
    if padding_free:
        positions = [i for each in batch for i in range(len(each.ids))]
        return {
            "input_ids": torch.tensor([[t for each in batch for t in each.ids] + [0] * unlabelled]),
            "labels": torch.tensor([[t for each in batch for t in each.labels] + [NO_LABEL] * unlabelled]),
            "position_ids": torch.tensor([positions + [0] * unlabelled]),
        }
    width = max(len(each.ids) for each in batch) + unlabelled
    return {
        "input_ids": torch.tensor([each.ids + [0] * (width - len(each.ids)) for each in batch]),
        "labels": torch.tensor([each.labels + [NO_LABEL] * (width - len(each.labels)) for each in batch]),
        "position_ids": torch.tensor([[i if i < len(each.ids) else 0 for i in range(width)] for each in batch]),
        "seq_lens": [len(each.ids) for each in batch],
    }


def targets(batch: PackedMicroBatch) -> Tensor:
    """The token that each response row of the pack predicts, [N], as floats."""
    pack = batch.sequences.pack
    assert pack.ids is not None
    return pack.ids.targets[pack.response_rows].double()


@given(sequences(), st.booleans(), st.integers(0, 3))
def test_values_come_back_where_ms_swift_has_them(batch: list[Sequence], padding_free: bool, unlabelled: int) -> None:
    """The tokens that rows predict, taken for values, are ms-swift's labels rolled by one."""
    inputs = collated(batch, padding_free, unlabelled)
    packed = PackedMicroBatch.build(inputs)
    rolled = torch.roll(inputs["labels"], -1, dims=-1)
    assert torch.equal(packed.to_frame(targets(packed)), rolled.masked_fill(rolled == NO_LABEL, 0).double())


@given(sequences(), st.booleans(), st.integers(0, 3))
def test_every_prompt_is_encoded_once(batch: list[Sequence], padding_free: bool, unlabelled: int) -> None:
    packed = PackedMicroBatch.build(collated(batch, padding_free, unlabelled))
    prefixes = {each.prompt for each in batch}
    rows = sum(len(prompt) - 1 for prompt in prefixes) + sum(each.response_length for each in batch)
    assert packed.sequences.pack.layout.num_rows == rows


@given(sequences(), st.booleans())
def test_gradients_come_back_from_labelled_places_only(batch: list[Sequence], padding_free: bool) -> None:
    packed = PackedMicroBatch.build(collated(batch, padding_free, 1))
    values = targets(packed).requires_grad_()
    packed.to_frame(values).square().sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, 2 * values.detach() * packed.labelled)


def test_sequences_without_a_label_take_no_part() -> None:
    batch = [Sequence([1, 2, 3], [NO_LABEL] * 3), Sequence([1, 2, 100], [NO_LABEL, NO_LABEL, 100])]
    for padding_free in (True, False):
        assert targets(PackedMicroBatch.build(collated(batch, padding_free, 0))).tolist() == [100]


def test_positions_of_text_go_before_those_of_images() -> None:
    inputs = collated([Sequence([1, 100], [NO_LABEL, 100]), Sequence([1, 101], [NO_LABEL, 101])], True, 0)
    inputs["text_position_ids"], inputs["position_ids"] = inputs["position_ids"], torch.zeros(3, 1, 4, dtype=torch.long)
    assert targets(PackedMicroBatch.build(inputs)).tolist() == [100, 101]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_values": torch.zeros(1)}, "'pixel_values', and prefix groups are made of token ids only"),
        ({"labels": None}, "no labels"),
        ({"labels": torch.full((1, 2), NO_LABEL)}, "no token of the micro-batch has a label"),
        ({"labels": torch.tensor([[1, 100]])}, "row 0, token 0 has a label on its first token"),
    ],
)
def test_what_is_no_text_with_responses_is_refused(change: dict[str, Any], said: str) -> None:
    inputs = collated([Sequence([1, 100], [NO_LABEL, 100])], True, 0) | change
    with pytest.raises(ValueError, match=said):
        PackedMicroBatch.build(inputs)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("task_type", "seq_cls", "set task_type='causal_lm'"),
        ("bridge_backend", "megatron-bridge", "set bridge_backend='mcore-bridge'"),
        ("router_replay_mode", "R3", "set router_replay_mode='disabled'"),
        ("virtual_pipeline_model_parallel_size", 2, "set virtual_pipeline_model_parallel_size=None"),
        ("fp8_format", "hybrid", "set fp8_format=None"),
        ("fp4_format", "e2m1", "set fp4_format=None"),
        ("mlp_padding_free", True, "set mlp_padding_free=False"),
    ],
)
def test_arguments_are_refused_by_name(name: str, value: Any, remedy: str) -> None:
    args = SimpleNamespace(tuner_type="full", micro_batch_size=8, num_generations=8)
    refuse_arguments(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name}={value!r} is not supported with prefix groups: .*; {remedy}"):
        refuse_arguments(args)


def test_dropout_of_adapters_is_refused() -> None:
    args = SimpleNamespace(tuner_type="full", lora_dropout=0.05, micro_batch_size=8, num_generations=8)
    refuse_arguments(args)
    args.tuner_type = "lora"
    with pytest.raises(ValueError, match=r"lora_dropout=0\.05 is not supported .* set lora_dropout=0\.0"):
        refuse_arguments(args)
    args.lora_dropout = 0.0
    refuse_arguments(args)


@pytest.mark.parametrize(("size", "generations"), [(1, 8), (4, 8), (8, 8), (16, 8), (8, 1)])
def test_whole_groups_and_even_parts_are_taken(size: int, generations: int) -> None:
    refuse_arguments(SimpleNamespace(tuner_type="full", micro_batch_size=size, num_generations=generations))


@pytest.mark.parametrize(("size", "generations"), [(3, 8), (12, 8), (6, 4)])
def test_groups_cut_unevenly_are_refused(size: int, generations: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch_size {size} and num_generations {generations}"):
        refuse_arguments(SimpleNamespace(tuner_type="full", micro_batch_size=size, num_generations=generations))
