"""Sequences of a framework's batch as packs: nothing lost, nothing mixed up, groups together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.packing import NO_TARGET
from megatron_prefix.sequence_packs import pack_sequences, plan_micro_batches

Sequences = tuple[list[list[int]], list[list[int]]]


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    """Up to 12 sequences of few prompts, in any order; some prompts extend others."""
    ids = st.integers(0, 15)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=4))
    prompts.append([*prompts[0], 3])
    chosen = draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=12))
    responses = [draw(st.lists(ids, min_size=1, max_size=6)) for _ in chosen]
    return chosen, responses


@given(sequences())
def test_every_value_comes_back_to_its_token(batch: Sequences) -> None:
    prompts, responses = batch
    packed = pack_sequences(prompts, [torch.tensor(r) for r in responses])
    pack = packed.pack
    assert pack.layout.num_rows == sum(len(p) - 1 for p in {tuple(p) for p in prompts}) + sum(map(len, responses))
    targets = pack.targets[pack.response_rows]
    assert (targets != NO_TARGET).all()
    assert [row.tolist() for row in packed.split(targets)] == responses
    width = max(map(len, responses)) + 1
    padded = packed.padded(targets, width, fill=-1)
    assert [[t for t in row if t >= 0] for row in padded.tolist()] == responses
    assert torch.equal(packed.gather(list(padded)), targets)
    # The row before a response's first one, in the sequence's own terms, is its prompt's last token.
    first = [row[0].item() for row in packed.split(pack.tokens[pack.response_rows])]
    assert first == [p[-1] for p in prompts]
    assert [row[0].item() for row in packed.split(pack.positions[pack.response_rows])] == [len(p) - 1 for p in prompts]


def _rows(prompts: list[list[int]], responses: list[list[int]], batch: list[int]) -> int:
    return sum(len(p) - 1 for p in {tuple(prompts[i]) for i in batch}) + sum(len(responses[i]) for i in batch)


@given(sequences(), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4))
def test_plans_keep_the_limit_the_count_and_every_sequence(
    batch: Sequences, extra: int, multiple: int, at_least: int
) -> None:
    prompts, responses = batch
    lengths = [len(r) for r in responses]
    limit = max(len(p) - 1 + n for p, n in zip(prompts, lengths, strict=True)) + extra
    try:
        plan = plan_micro_batches(prompts, lengths, limit, count_multiple_of=multiple, at_least=at_least)
    except ValueError as error:
        assert "cannot fill" in str(error)
        assert multiple > 1 or at_least > len(prompts)
        return
    assert sorted(i for b in plan for i in b) == list(range(len(prompts)))
    assert all(b and b == sorted(b) and _rows(prompts, responses, b) <= limit for b in plan)
    assert len(plan) % multiple == 0
    assert len(plan) >= at_least


@given(sequences())
def test_groups_that_fit_stay_whole(batch: Sequences) -> None:
    prompts, responses = batch
    limit = sum(map(len, prompts)) + sum(map(len, responses))
    assert plan_micro_batches(prompts, [len(r) for r in responses], limit) == [list(range(len(prompts)))]
    sizes = [_rows(prompts, responses, [i for i, q in enumerate(prompts) if q == p]) for p in prompts]
    plan = plan_micro_batches(prompts, [len(r) for r in responses], max(sizes))
    for prompt in prompts:
        assert sum(any(prompts[i] == prompt for i in b) for b in plan) == 1


@pytest.mark.parametrize(
    ("prompts", "responses", "words"),
    [
        ([], [], "no sequences"),
        ([[1]], [[1], [2]], "1 prompts for 2 responses"),
        ([[1], []], [[1], [2]], "the prompt of sequence 1 has 0 tokens"),
        ([[1], [2]], [[1], []], "the response of sequence 1 has 0 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(prompts: list, responses: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_sequences(prompts, responses)
    with pytest.raises(ValueError, match=words):
        plan_micro_batches(prompts, [len(r) for r in responses], 10)


def test_other_refusals() -> None:
    packed = pack_sequences([[1, 2], [1, 2]], [[3], [4, 5]])
    for call, words in [
        (lambda: packed.split(torch.zeros(4)), "4 values for a pack of 3 response rows"),
        (lambda: packed.padded(torch.zeros(3), 1), "width 1 is below the longest response, 2"),
        (lambda: packed.gather([torch.zeros(2)]), "values of 1 sequences for a pack of 2"),
        (lambda: packed.gather([torch.zeros(2), torch.zeros(1)]), "sequence 1 has 1 values for 2"),
        (lambda: plan_micro_batches([[1, 2]], [9], 9), "sequence 0 needs 10 rows, max_tokens_per_pack is 9"),
        (lambda: plan_micro_batches([[1], [1]], [1, 1], 9, at_least=3), "2 sequences cannot fill 3"),
        (lambda: plan_micro_batches([[1]], [1], 9, at_least=0), "must be at least 1, got 1 and 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
