"""PrefixLayout: refusals that name the segment, and every derived number against a brute-force mask."""

import dataclasses
import itertools

import pytest
from hypothesis import given

from megatron_prefix import PrefixLayout
from tests.strategies import forests


def brute_force_mask(layout: PrefixLayout) -> list[list[bool]]:
    """Row r sees row c, from the definition: c's segment lies on the way up from r's, or both share one and c <= r."""
    owner = [s for s, length in enumerate(layout.lengths) for _ in range(length)]
    mask = []
    for r, segment in enumerate(owner):
        above = set()
        up = layout.parents[segment]
        while up != -1:
            above.add(up)
            up = layout.parents[up]
        mask.append([owner[c] in above or (owner[c] == segment and c <= r) for c in range(len(owner))])
    return mask


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([], [], "at least one segment"),
        ([1, 2], [-1], "one entry per segment, got 2 and 1"),
        ([3, -1], [-1, 0], "segment 1: length must be 0 or more, got -1"),
        ([3, 2.0], [-1, 0], "segment 1: length must be an int, got 2.0"),
        ([3, True], [-1, 0], "segment 1: length must be an int, got True"),
        ([3, 2], [-1, None], "segment 1: parent must be an int, got None"),
        ([3], [0], r"segment 0: parent must be -1 .* got 0"),
        ([3, 2], [-1, 1], r"segment 1: parent must be -1 .* \(< 1\), got 1"),
        ([3, 2], [-1, -2], "segment 1: parent must be -1 .* got -2"),
        ([3, 2, 2, 2], [-1, 0, 0, 1], "segment 3: parent 1 is not on the current branch"),
        ([3, 2, 2], [-1, -1, 0], "segment 2: parent 0 is not on the current branch"),
    ],
)
def test_refusals_name_the_segment(lengths: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLayout(lengths, parents)


def test_a_group_of_two_responses() -> None:
    layout = PrefixLayout([3, 2, 1], [-1, 0, 0])
    assert len(layout) == 3
    assert layout.num_rows == 6
    assert layout.starts == (0, 3, 5, 6)
    assert layout.positions == (0, 1, 2, 3, 4, 3)
    assert layout.levels == (0, 1, 1)
    assert layout.subtree_ends == (6, 5, 6)
    assert layout.ancestor_levels == (((3, 6, 0, 3),),)
    assert layout.area == 6 + 3 + 1 + 3 * 3
    assert layout.leaves == (1, 2)
    assert layout.repeated() == PrefixLayout([5, 4], [-1, -1])


@given(forests())
def test_area_and_calls_are_the_mask(layout: PrefixLayout) -> None:
    """The causal segments and the ancestor ranges cover every pair of the mask exactly once, and nothing else."""
    mask = brute_force_mask(layout)
    times = [[0] * layout.num_rows for _ in range(layout.num_rows)]
    for start, end in itertools.pairwise(layout.starts):
        for r in range(start, end):
            for c in range(start, r + 1):
                times[r][c] += 1
    for level in layout.ancestor_levels:
        assert level, "a level without ranges would be an empty kernel launch"
        for q_start, q_end, k_start, k_end in level:
            assert q_start < q_end and k_start < k_end
            for r in range(q_start, q_end):
                for c in range(k_start, k_end):
                    times[r][c] += 1
        for before, after in itertools.pairwise(level):
            assert before.q_end <= after.q_start and before.k_end <= after.k_start
    assert times == [[int(seen) for seen in row] for row in mask]
    assert layout.area == sum(map(sum, mask))


@given(forests())
def test_positions_count_the_rows_before_in_the_sequence(layout: PrefixLayout) -> None:
    mask = brute_force_mask(layout)
    assert list(layout.positions) == [sum(row) - 1 for row in mask]
    assert layout.max_sequence_length == max((sum(row) for row in mask), default=0)


@given(forests())
def test_starts_levels_subtrees_and_branches(layout: PrefixLayout) -> None:
    def path(segment: int) -> list[int]:
        return [] if segment == -1 else [*path(layout.parents[segment]), segment]

    segments = range(len(layout))
    assert [layout.starts[s] for s in segments] == [sum(layout.lengths[:s]) for s in segments]
    assert layout.starts[-1] == layout.num_rows == sum(layout.lengths)
    assert [layout.branch(s) for s in segments] == [tuple(path(s)) for s in segments]
    assert list(layout.levels) == [len(path(s)) - 1 for s in segments]
    subtree = [[t for t in segments if s in path(t)] for s in segments]
    assert all(members == list(range(members[0], members[-1] + 1)) for members in subtree)
    rows = [sum(layout.lengths[t] for t in members) for members in subtree]
    assert list(layout.subtree_ends) == [layout.starts[s] + rows[s] for s in segments]
    assert list(layout.leaves) == [s for s in segments if len(subtree[s]) == 1]


@given(forests())
def test_repeated_has_one_causal_sequence_per_leaf(layout: PrefixLayout) -> None:
    repeated = layout.repeated()
    assert repeated.ancestor_levels == ()
    assert repeated.lengths == tuple(sum(layout.lengths[s] for s in layout.branch(leaf)) for leaf in layout.leaves)
    assert repeated.area >= layout.area


@given(forests(), forests())
def test_equality_hash_and_checksum_follow_the_content(one: PrefixLayout, other: PrefixLayout) -> None:
    copy = PrefixLayout(list(one.lengths), list(one.parents))
    assert copy == one and hash(copy) == hash(one) and copy.checksum == one.checksum
    same = (one.lengths, one.parents) == (other.lengths, other.parents)
    assert (one == other) is same
    assert (one.checksum == other.checksum) is same


def test_it_cannot_be_changed() -> None:
    lengths = [2, 1]
    layout = PrefixLayout(lengths, [-1, 0])
    lengths[0] = 9
    assert layout.lengths == (2, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.lengths = (1, 1)  # type: ignore[misc]


def test_deep_and_wide_layouts_are_quick() -> None:
    """No recursion limit and no quadratic work hides in the derived numbers."""
    chain = PrefixLayout([1] * 3000, list(range(-1, 2999)))
    assert chain.levels[-1] == 2999
    assert chain.positions[-1] == 2999
    assert len(chain.ancestor_levels) == 2999
    assert chain.area == 3000 * 3001 // 2
    star = PrefixLayout([7, *[2] * 20000], [-1, *[0] * 20000])
    assert star.area == 28 + 20000 * (3 + 14)
