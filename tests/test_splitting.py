"""Splitting: every row and pair of the unsplit packs once, and the attention of parts with cached keys."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prefix import BatchTotals, PrefixLayout, RolloutGroup, RolloutTree, pack_groups
from megatron_prefix.attention import KERNELS
from megatron_prefix.layout import PartLayout
from megatron_prefix.packing import Pack
from megatron_prefix.splitting import pack_and_split
from tests.attention_oracle import CPU_KERNELS, TOLERANCE, errors, inputs, repeated_attention, run
from tests.split_cases import Group, limits, rows_in_tree, split_attention, split_or_skip
from tests.strategies import batches, rollout_groups, rollout_trees


def context(pack: Pack, cached: Pack | None) -> list[tuple[int, ...]]:
    """Of every row the tokens that it sees, itself last: what its hidden state depends on."""
    layout, found = pack.layout, []
    for segment, length in enumerate(layout.lengths):
        seen: list[int] = []
        for ancestor in layout.branch(segment)[:-1]:
            seen += pack.tokens[layout.starts[ancestor] : layout.starts[ancestor + 1]].tolist()
            if isinstance(layout, PartLayout):
                assert cached is not None or not layout.cached_lengths[ancestor]
                start, count = layout.cached_starts[ancestor], layout.cached_lengths[ancestor]
                seen += [] if cached is None else cached.tokens[start : start + count].tolist()
        own = pack.tokens[layout.starts[segment] : layout.starts[segment + 1]].tolist()
        found += [(*seen, *own[: i + 1]) for i in range(length)]
    return found


def rows_of(packs: list[Pack]) -> Counter[Any]:
    """(what it sees, target, position) of every row."""
    prefixes = {id(pack.prefix): pack for pack in packs if pack.is_prefix}
    return Counter(
        row
        for pack in packs
        for row in zip(
            context(pack, None if pack.is_prefix else prefixes.get(id(pack.prefix))),
            pack.targets.tolist(),
            pack.positions.tolist(),
            strict=True,
        )
    )


def pairs_of(packs: list[Pack]) -> Counter[Any]:
    """(what the row sees, target, advantage, reward, sampler log-prob, length of the rollout) of every trained pair."""
    prefixes = {id(pack.prefix): pack for pack in packs if pack.is_prefix}
    found: Counter[Any] = Counter()
    for pack in packs:
        seen = context(pack, None if pack.is_prefix else prefixes.get(id(pack.prefix)))
        for m, (number, rollout) in enumerate(zip(pack.pairs.row.tolist(), pack.pairs.rollout.tolist(), strict=True)):
            row = int(pack.response_rows[number])
            sampled = None if pack.sampler_log_probs is None else round(float(pack.sampler_log_probs[m]), 5)
            values = (float(pack.advantages[rollout]), float(pack.rewards[rollout]), sampled)
            values = (*values, int(pack.pairs.lengths[rollout]))
            found[(seen[row], int(pack.targets[row]), *values)] += 1
    return found


@given(batches(max_size=3), st.data())
def test_every_row_and_pair_of_the_unsplit_packs_once(groups: list[Group], data: st.DataObject) -> None:
    limit = data.draw(limits(groups))
    packs = split_or_skip(groups, limit, data.draw(st.integers(1, 4)))
    whole = pack_groups(groups)
    assert rows_of(packs) == rows_of(whole)
    assert pairs_of(packs) == pairs_of(whole)
    assert all(pack.layout.num_rows <= limit for pack in packs)
    assert sum((pack.totals for pack in packs), BatchTotals(0, 0)) == whole[0].totals
    # A prefix stands once, before its parts, and is as long as they say.
    open_prefixes: dict[int, int] = {}
    for pack in packs:
        if pack.is_prefix:
            assert pack.prefix is not None and id(pack.prefix) not in open_prefixes
            assert pack.prefix.num_rows == pack.layout.num_rows > 0
            open_prefixes[id(pack.prefix)] = 0
        elif pack.prefix is not None:
            assert isinstance(pack.layout, PartLayout)
            assert pack.layout.num_cached_rows <= pack.prefix.num_rows
            open_prefixes[id(pack.prefix)] += 1
    assert all(count > 0 for count in open_prefixes.values())


@settings(max_examples=25)
@given(batches(max_size=3))
def test_groups_that_fit_are_packed_as_ever(groups: list[Group]) -> None:
    whole = pack_groups(groups)
    (pack,) = pack_and_split(groups, max_tokens_per_pack=whole[0].layout.num_rows)
    assert pack.layout == whole[0].layout and pack.prefix is None
    assert pack.tokens.equal(whole[0].tokens) and pack.advantages.equal(whole[0].advantages)


# ---- attention of the parts


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@settings(max_examples=50)
@given(tree=st.one_of(rollout_groups().map(RolloutTree.from_group), rollout_trees()), data=st.data())
def test_attention_of_the_parts_equals_the_dense_oracle(kernel: str, tree: RolloutTree, data: st.DataObject) -> None:
    """Output and dQ, dK, dV in fp64; head dims of V unlike those of Q and K."""
    limit, num_parts = data.draw(limits([tree])), data.draw(st.integers(1, 4))
    packs = split_or_skip([tree], limit, num_parts)
    assume(len(packs) > 1)
    tensors = inputs(tree.layout.num_rows, (4, 2), data.draw(st.sampled_from([(8, 8), (8, 5), (5, 8)])))
    result = run(split_attention(KERNELS[kernel], packs, rows_in_tree(tree, limit, num_parts)), *tensors)
    expected = run(lambda q, k, v: repeated_attention(q, k, v, tree.layout), *tensors)
    found = errors(result, expected)
    assert all(error <= TOLERANCE[torch.float64] for error in found.values()), found


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_bf16_attention_of_the_parts_sums_gradients_in_fp32(kernel: str) -> None:
    """The error of dK and dV of the prefix does not grow with the number of parts."""
    group = RolloutGroup([1] * 9, [[2] * 4] * 64, [0.0] * 64)
    tree = RolloutTree.from_group(group)
    tensors = tuple(x.bfloat16() for x in inputs(tree.layout.num_rows))
    exact = run(lambda q, k, v: repeated_attention(q, k, v, tree.layout), *(x.double() for x in tensors))
    errors_by_limit = []
    for limit in (256, 8):
        packs = pack_and_split([tree], max_tokens_per_pack=limit)
        result = run(split_attention(KERNELS[kernel], packs, rows_in_tree(tree, limit, 1)), *tensors)
        errors_by_limit.append([float((result[n][:8].double() - exact[n][:8]).norm()) for n in ("dk", "dv")])
    for few, many in zip(*errors_by_limit, strict=True):
        assert many <= 1.2 * few, errors_by_limit


# ---- the layout of a part

PART = ([0, 2, 3], [-1, 0, 0], [4, 0, 0], [1, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: [4, 0]}, "one cached length and start per segment: 3 segments, 2 lengths, 3 starts"),
        ({3: [1, 0]}, "3 segments, 3 lengths, 2 starts"),
        ({2: [-1, 0, 0]}, "segment 0: cached length and start must be 0 or more, got -1 and 1"),
        ({3: [1, -2, 0]}, "segment 1: cached length and start must be 0 or more, got 0 and -2"),
        ({2: [4, 3, 0]}, "segment 1 has 2 rows here and 3 in the cache; it must be in one"),
        ({0: [0, 2, 0], 1: [-1, 0, 1], 2: [4, 0, 3]}, "segment 2 is cached, but its parent 1 has rows in this part"),
        ({0: [0, 2, -3]}, "segment 2: length must be 0 or more, got -3"),
        ({1: [-1, 0, 3]}, "segment 2: parent must be"),
    ],
)
def test_a_part_that_cannot_be_is_refused(change: dict[int, list[int]], message: str) -> None:
    PartLayout(*PART)
    with pytest.raises(ValueError, match=re.escape(message)):
        PartLayout(*(change.get(i, value) for i, value in enumerate(PART)))


def test_the_layout_of_a_part_by_hand() -> None:
    """A tree split at two levels: cached rows 0..2 are the root's, 5..6 those of the second of two cached turns."""
    layout = PartLayout([0, 2, 0, 3, 1], [-1, 0, 0, 2, 2], [3, 0, 2, 0, 0], [0, 0, 5, 0, 0])
    assert layout.positions == (3, 4, 5, 6, 7, 5)
    assert layout.cached_levels == (((0, 6, 0, 3),), ((2, 6, 5, 7),))
    assert layout.num_cached_rows == 7 and layout.num_rows == 6
    # own: 3 + 6 + 1; the root's keys: 6 * 3; the turn's: 4 * 2
    assert layout.area == 10 + 18 + 8
    assert layout.repeated() == PrefixLayout([5, 8, 6], [-1, -1, -1])
    plain = PrefixLayout(layout.lengths, layout.parents)
    others = [plain, PartLayout(layout.lengths, layout.parents, [3, 0, 2, 0, 0], [0, 0, 3, 0, 0])]
    assert len({layout.checksum, *(other.checksum for other in others)}) == 3


# ---- refusals


@pytest.mark.parametrize(
    ("groups", "asked", "message"),
    [
        ([], {"max_tokens_per_pack": 5}, "no rollout groups"),
        ([RolloutGroup([1], [[2]], [0.0])], {"max_tokens_per_pack": 0}, "max_tokens_per_pack must be at least 1"),
        (
            [RolloutGroup([1, 2], [[3] * 3, [4] * 8], [0.0, 1.0], group_id="long")],
            {"max_tokens_per_pack": 7},
            "group 0 ('long'): node 2 has 8 tokens, max_tokens_per_pack is 7; raise it to at least 8",
        ),
        (
            [RolloutGroup([1] * 9, [[3] * 3, [4] * 2], [0.0, 1.0])],
            {"max_tokens_per_pack": 7},
            "group 0: its prefix has 8 rows, max_tokens_per_pack is 7; raise it to at least 8",
        ),
        ([RolloutGroup([1], [[2]], [0.0])], {"max_tokens_per_pack": 5, "num_parts": 0}, "num_parts must be at least 1"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(groups: list[Group], asked: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_and_split(groups, **asked)


def test_parts_are_as_even_as_their_order_allows() -> None:
    group = RolloutGroup([1] * 5, [[2] * n for n in (4, 4, 4, 4, 4, 4)], [float(i) for i in range(6)])
    rows = [pack.layout.num_rows for pack in pack_and_split([group], max_tokens_per_pack=20)]
    assert rows == [4, 20, 4]
    rows = [pack.layout.num_rows for pack in pack_and_split([group], max_tokens_per_pack=20, num_parts=3)]
    assert rows == [4, 8, 8, 8]
