"""The context-parallel plan against a brute-force mask: what is owned, computed, moved, and how well it is balanced."""

import json
import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_prefix import PrefixLayout
from megatron_prefix.context_parallel.comm_types import HeadSplit
from megatron_prefix.context_parallel.placement import PLACEMENTS, Piece, place
from megatron_prefix.context_parallel.plan import PAIRS_PER_ROW, CpPlan, Remote
from megatron_prefix.context_parallel.traffic import (
    AttentionShape,
    Moved,
    layer_traffic,
    plan_with_traffic,
    repeated_traffic,
)
from tests.strategies import forests

WORLD_SIZES = range(1, 7)
placements = st.sampled_from(PLACEMENTS)
world_sizes = st.sampled_from(WORLD_SIZES)
layouts = forests(max_segments=9, max_length=13)
DEEP = PrefixLayout([3, 2, 4, 1, 2, 0, 3, 5], [-1, 0, 1, 2, 3, 2, 5, 0])
GROUP = PrefixLayout([16384] + [1024] * 16, [-1] + [0] * 16)
ONE_LONG = PrefixLayout([100, 4000], [-1, 0])  # to be cut, and dual chunks do that better


def mask_of(layout: PrefixLayout) -> np.ndarray:
    """int [T, T]: 1 where row r reads row c, by walking up the tree from every row."""
    segment_of = [s for s, length in enumerate(layout.lengths) for _ in range(length)]
    mask = np.zeros((len(segment_of), len(segment_of)), dtype=int)
    for row, segment in enumerate(segment_of):
        mask[row, [c for c in range(row + 1) if segment_of[c] == segment]] = 1
        while (segment := layout.parents[segment]) >= 0:
            mask[row, [c for c, s in enumerate(segment_of) if s == segment]] = 1
    return mask


def buffer_of(remote: Remote, owned: list[int]) -> list[int]:
    """Rows of the pack in the order in which they travel."""
    return [owned[i] for start, end in remote.rows for i in range(start, end)]


def computed(plan: CpPlan) -> np.ndarray:
    """int [T, T]: how often each pair is computed, by all ranks' own calls and calls on what they receive."""
    layout = plan.layout
    counts = np.zeros((layout.num_rows, layout.num_rows), dtype=int)
    owned = [plan.rows(rank) for rank in range(plan.cp_size)]
    for rank, mine in enumerate(owned):
        counts[np.ix_(mine, mine)] += mask_of(plan.local_layouts[rank])
        for source in range(plan.cp_size):
            if source == rank:
                continue
            remote = plan.remote(rank, source)
            buffer = buffer_of(remote, owned[source])
            assert len(buffer) == remote.num_rows
            for call in remote.calls:
                queries: list[int] = []
                keys: list[int] = []
                for r in call:
                    assert r.q_start < r.q_end <= len(mine) and r.k_start < r.k_end <= len(buffer)
                    counts[np.ix_(mine[r.q_start : r.q_end], buffer[r.k_start : r.k_end])] += 1
                    queries += range(r.q_start, r.q_end)
                    keys += range(r.k_start, r.k_end)
                # One varlen launch takes disjoint, ascending ranges.
                for rows in (queries, keys):
                    assert all(a < b for a, b in pairwise(rows))
    return counts


@given(layouts, world_sizes, placements)
@example(DEEP, 3, "branch")
@example(DEEP, 5, "dual_chunk_swap")
def test_every_row_is_owned_once(layout: PrefixLayout, cp_size: int, placement: str) -> None:
    plan = CpPlan.build(layout, cp_size, placement)
    owned = [plan.rows(rank) for rank in range(cp_size)]
    assert all(rows == sorted(rows) for rows in owned)
    assert sorted(row for rows in owned for row in rows) == list(range(layout.num_rows))
    responses = [sum(layout.levels[s] > 0 for s, n in enumerate(layout.lengths) for _ in range(n))]
    assert sum(plan.response_rows(rank) for rank in range(cp_size)) == responses[0]


@given(layouts, world_sizes, placements)
@example(DEEP, 3, "dual_chunk_swap")
@example(DEEP, 4, "branch")
def test_every_pair_of_the_mask_is_computed_once(layout: PrefixLayout, cp_size: int, placement: str) -> None:
    plan = CpPlan.build(layout, cp_size, placement)
    mask = mask_of(layout)
    assert (computed(plan) == mask).all()
    assert [plan.area(rank) for rank in range(cp_size)] == [mask[plan.rows(rank)].sum() for rank in range(cp_size)]


@given(layouts, st.sampled_from([(2, 2), (4, 2), (6, 2), (6, 3), (4, 4)]), placements)
def test_merged_ranks_compute_every_pair_once(layout: PrefixLayout, sizes: tuple[int, int], placement: str) -> None:
    cp_size, inner = sizes
    plan = CpPlan.build(layout, cp_size, placement)
    merged = plan.merged(inner)
    for group in range(cp_size // inner):
        together = [row for rank in range(group * inner, (group + 1) * inner) for row in plan.rows(rank)]
        assert merged.rows(group) == sorted(together)
    assert (computed(merged) == mask_of(layout)).all()


@given(layouts, world_sizes, placements)
@example(DEEP, 3, "branch")
def test_exactly_the_rows_that_are_read_travel(layout: PrefixLayout, cp_size: int, placement: str) -> None:
    """No fewer, no more: the minimum for this placement."""
    plan = CpPlan.build(layout, cp_size, placement)
    mask = mask_of(layout)
    owned = [plan.rows(rank) for rank in range(cp_size)]
    for rank in range(cp_size):
        read = mask[owned[rank]].any(axis=0)
        for source in range(cp_size):
            if source != rank:
                needed = [row for row in owned[source] if read[row]]
                assert buffer_of(plan.remote(rank, source), owned[source]) == needed
        outside = set(range(layout.num_rows)) - set(owned[rank])
        assert plan.rows_received(rank) == sum(bool(read[row]) for row in outside)
    assert sum(map(plan.rows_sent, range(cp_size))) == sum(map(plan.rows_received, range(cp_size)))


@given(layouts, world_sizes)
@example(GROUP, 5)
def test_branch_moves_only_keys_with_descendants(layout: PrefixLayout, cp_size: int) -> None:
    """Except keys of responses that were cut, and those only between the ranks that hold a part."""
    plan = CpPlan.build(layout, cp_size, "branch")
    holders = [{rank for rank in range(cp_size) for p in plan.placement[rank] if p.segment == s}
               for s in range(len(layout))]  # fmt: skip
    for rank in range(cp_size):
        for source in range(cp_size):
            if source == rank:
                continue
            theirs = plan.local_layouts[source]
            for start, _ in plan.remote(rank, source).rows:
                segment = max(s for s in range(len(layout)) if theirs.starts[s] <= start < theirs.starts[s + 1])
                if segment not in layout.parents:
                    assert {rank, source} <= holders[segment]


def test_whole_responses_stay_whole_where_they_fit() -> None:
    """16 equal responses on 8 ranks: two each, and a rank receives the prefix rows of the others and nothing else."""
    plan = CpPlan.build(GROUP, 8, "branch")
    for rank in range(8):
        responses = [piece for piece in plan.placement[rank] if piece.segment > 0]
        assert [(p.start, p.end) for p in responses] == [(0, 1024)] * 2
        assert plan.rows_received(rank) == 16384 * 7 // 8


def test_a_response_too_long_for_one_rank_is_cut() -> None:
    plan = CpPlan.build(PrefixLayout([10, 1000, 3], [-1, 0, 0]), 4, "branch")
    holders = [rank for rank in range(4) for p in plan.placement[rank] if p.segment == 1]
    assert len(set(holders)) == 4
    areas = [plan.area(rank) for rank in range(4)]
    assert max(areas) <= 1.05 * sum(areas) / 4


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64])
def test_balance(group_size: int, cp_size: int, placement: str) -> None:
    """Log-normal responses, mean 1000, sigma 0.8."""
    draw = random.Random(group_size * cp_size)
    for prefix in (512, 2048, 8192, 16384):
        for _ in range(5):
            lengths = [max(1, int(draw.lognormvariate(math.log(1000) - 0.32, 0.8))) for _ in range(group_size)]
            plan = CpPlan.build(PrefixLayout([prefix, *lengths], [-1] + [0] * group_size), cp_size, placement)
            areas = [plan.area(rank) for rank in range(cp_size)]
            assert max(areas) * cp_size <= 1.05 * sum(areas), (prefix, lengths)


def test_dual_chunk_swap_by_hand() -> None:
    """Transformer Engine's order, per segment: of 4 chunks rank 0 has the first and last, rank 1 the middle two."""
    placement = place(PrefixLayout([8, 4, 1], [-1, 0, 0]), 2, "dual_chunk_swap")
    assert placement == (
        (Piece(0, 0, 2), Piece(0, 6, 8), Piece(1, 0, 1), Piece(1, 3, 4), Piece(2, 0, 1)),
        (Piece(0, 2, 6), Piece(1, 1, 3)),
    )


@pytest.mark.parametrize(("layout", "cp_size", "chosen"), [(GROUP, 8, "branch"), (ONE_LONG, 4, "dual_chunk_swap")])
def test_auto_takes_the_lower_cost(layout: PrefixLayout, cp_size: int, chosen: str) -> None:
    both = {name: CpPlan.build(layout, cp_size, name) for name in PLACEMENTS}
    assert CpPlan.build(layout, cp_size, "auto") == both[chosen]
    assert both[chosen].cost == min(plan.cost for plan in both.values()) < max(plan.cost for plan in both.values())
    for plan in both.values():
        rows = [plan.rows_received(rank) + plan.rows_sent(rank) for rank in range(cp_size)]
        assert plan.cost == max(plan.area(rank) + PAIRS_PER_ROW * rows[rank] for rank in range(cp_size))


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown placement 'zigzag'; choose one of dual_chunk_swap, branch"):
        CpPlan.build(DEEP, 2, "zigzag")
    with pytest.raises(ValueError, match="cp_size must be at least 1, got 0"):
        CpPlan.build(DEEP, 0, "branch")
    with pytest.raises(ValueError, match="4 context-parallel ranks cannot be grouped by 3"):
        CpPlan.build(DEEP, 4, "branch").merged(3)


# ---- bytes; tests/test_cp_attention.py holds them to what really travels

SHAPE = AttentionShape(32, 8, 128)
KEY_ROW = 8 * 2 * 128 * 2  # bytes of a key and a value row


def most(plan: CpPlan, comm_type: str, a2a: int | None = None) -> tuple[int, int]:
    """Bytes received by the busiest rank: forward, both."""
    moved = [layer_traffic(plan, rank, SHAPE, comm_type, a2a) for rank in range(plan.cp_size)]
    return max(each.forward.received for each in moved), max(each.total.received for each in moved)


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_bytes_of_the_example_in_the_readme(comm_type: str) -> None:
    """P = 16384, R = 1024, G = 16, CP = 8: by hand."""
    branch, dual = (CpPlan.build(GROUP, 8, name) for name in ("branch", "dual_chunk_swap"))
    prefix = 16384 * 7 // 8 * KEY_ROW
    assert most(branch, comm_type) == (prefix, 3 * prefix)
    # Rank 0 holds the last chunk of everything and reads all other rows.
    assert most(dual, comm_type)[0] == 2 * prefix
    repeated = 16 * (16384 + 1024) * 7 // 8 * KEY_ROW
    assert repeated_traffic(GROUP, 8, SHAPE, comm_type).forward == Moved(repeated, repeated)
    assert repeated_traffic(GROUP, 8, SHAPE, comm_type).total == Moved(3 * repeated, 3 * repeated)


def test_bytes_of_swapped_heads_by_hand() -> None:
    """a2a: 7 of 8 heads of this rank's 4096 rows leave it, queries, output, keys and values."""
    for name in PLACEMENTS:
        forward, both = most(CpPlan.build(GROUP, 8, name), "a2a")
        assert forward == 4096 * 7 // 8 * (2 * 32 + 2 * 8) * 128 * 2
        assert both == 2 * forward
    # Fewer key-value heads than ranks: every rank gets one, so a head is sent more than once.
    shape = AttentionShape(32, 2, 128)
    moved = layer_traffic(CpPlan.build(GROUP, 8, "branch"), 0, shape, "a2a")
    assert moved.forward.received == 4096 * 7 * (4 + 4 + 2) * 128 * 2


def test_padding_counts_in_repeated_prefixes() -> None:
    """Sequences of 5 and 4 rows are padded to 8 each on two ranks, which hold 4 of each."""
    layout = PrefixLayout([3, 2, 1], [-1, 0, 0])
    assert repeated_traffic(layout, 2, AttentionShape(1, 1, 1, 1, 1), "p2p").forward == Moved(12, 12)


@given(layouts, world_sizes, placements, st.sampled_from(["p2p", "all_gather", "a2a"]))
def test_what_is_sent_is_received(layout: PrefixLayout, cp_size: int, placement: str, comm_type: str) -> None:
    plan = CpPlan.build(layout, cp_size, placement)
    moved = [layer_traffic(plan, r, AttentionShape(60, 4, 8, 3), comm_type) for r in range(cp_size)]
    for part in ("forward", "backward"):
        assert sum(getattr(m, part).sent for m in moved) == sum(getattr(m, part).received for m in moved)
    if cp_size == 1:
        assert moved[0].total == Moved(0, 0)


def test_bad_shapes_and_ways_are_refused() -> None:
    plan = CpPlan.build(DEEP, 4, "branch")
    with pytest.raises(ValueError, match="unknown cp_comm_type 'ring'; choose one of p2p, all_gather, a2a, a2a"):
        layer_traffic(plan, 0, SHAPE, "ring")
    for size in (None, 3):
        with pytest.raises(ValueError, match=rf"needs an a2a size that divides cp=4, got {size}"):
            layer_traffic(plan, 0, SHAPE, "a2a+p2p", size)
    with pytest.raises(ValueError, match="query heads that divide by its 4 ranks, got 6; use p2p"):
        layer_traffic(plan, 0, AttentionShape(6, 2, 8), "a2a")
    with pytest.raises(ValueError, match="kv_heads must divide query_heads=6, got 4"):
        AttentionShape(6, 4, 8)
    with pytest.raises(ValueError, match="value_dim must be at least 1, got 0"):
        AttentionShape(6, 3, 8, 0)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_heads_of_each_rank_read_their_own_keys(ranks: int, each: int, groups: int, spread: int) -> None:
    """The kernel's even grouping of a rank's heads finds the key-value head that each query head has in the model."""
    key_heads = groups
    query_heads = math.lcm(ranks * each, key_heads) * spread
    split = HeadSplit.build(query_heads, key_heads, ranks)
    assert [head for heads in split.query_heads for head in heads] == list(range(query_heads))
    for queries, keys in zip(split.query_heads, split.key_heads, strict=True):
        assert len(queries) % len(keys) == 0
        for i, head in enumerate(queries):
            assert keys[i // (len(queries) // len(keys))] == head // (query_heads // key_heads)


@given(layouts, world_sizes, placements)
def test_the_plan_as_json(layout: PrefixLayout, cp_size: int, placement: str) -> None:
    plan = CpPlan.build(layout, cp_size, placement)
    data = json.loads(json.dumps(plan_with_traffic(plan, AttentionShape(2, 1, 4), "p2p")))
    assert PrefixLayout(data["lengths"], data["parents"]) == layout
    assert (data["cp_size"], data["placement"], data["cost"]) == (cp_size, placement, plan.cost)
    pieces = tuple(tuple(Piece(*piece) for piece in rank["pieces"]) for rank in data["ranks"])
    assert CpPlan(layout, pieces, placement) == plan
    for r, rank in enumerate(data["ranks"]):
        assert rank["rank"] == r and rank["rows"] == len(plan.rows(r)) and rank["area"] == plan.area(r)
        assert rank["rows_received"][r] == 0 and sum(rank["rows_received"]) == plan.rows_received(r)
        assert rank["bytes"]["forward"]["received"] == plan.rows_received(r) * 16
        assert rank["response_rows"] == plan.response_rows(r)
