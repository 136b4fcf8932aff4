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
from megatron_prefix.context_parallel.choice import FLOPS_PER_BYTE, CpLayers, choose_plan, predicted_cost
from megatron_prefix.context_parallel.comm_types import HeadSplit
from megatron_prefix.context_parallel.placement import PLACEMENTS, Piece, place
from megatron_prefix.context_parallel.plan import CpPlan, Remote
from megatron_prefix.context_parallel.traffic import (
    AttentionShape,
    Moved,
    computed_areas,
    layer_traffic,
    plan_with_traffic,
    untrimmed_traffic,
)
from tests.strategies import forests

pytestmark = pytest.mark.ci_oldest

WORLD_SIZES = range(1, 7)
placements = st.sampled_from(PLACEMENTS)
world_sizes = st.sampled_from(WORLD_SIZES)
layouts = forests(max_segments=9, max_length=13)
DEEP = PrefixLayout([3, 2, 4, 1, 2, 0, 3, 5], [-1, 0, 1, 2, 3, 2, 5, 0])
GROUP = PrefixLayout([16384] + [1024] * 16, [-1] + [0] * 16)


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
                pieces = plan.keys_read(rank, source)
                assert [row for p in pieces for row in range(layout.starts[p.segment] + p.start,
                                                             layout.starts[p.segment] + p.end)] == needed  # fmt: skip
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


def test_a_response_too_long_for_one_rank_is_cut_by_hand() -> None:
    """Dual chunks again: a rank's chunks are mirror images, so that it has an equal share of rows as well."""
    plan = CpPlan.build(PrefixLayout([400, 800], [-1, 0]), 2, "branch")
    assert plan.placement == (
        (Piece(0, 0, 100), Piece(0, 300, 400), Piece(1, 0, 200), Piece(1, 600, 800)),
        (Piece(0, 100, 300), Piece(1, 200, 600)),
    )
    # A short response takes no part; what it fills of its rank, the long one leaves free there.
    plan = CpPlan.build(PrefixLayout([10, 3, 1000, 50], [-1, 0, 0, 0]), 4, "branch")
    holders = [{rank for rank in range(4) for p in plan.placement[rank] if p.segment == s} for s in (1, 2, 3)]
    assert [len(ranks) for ranks in holders] == [1, 4, 1]


def test_no_more_ranks_than_needed_share_a_response() -> None:
    """Three equal responses on two ranks: one each, and only the third is cut. Ranks join in while there is room."""
    for count, cp_size in ((3, 2), (5, 4), (5, 8)):
        plan = CpPlan.build(PrefixLayout([100] + [3000] * count, [-1] + [0] * count), cp_size, "branch")
        shared = [sum(any(p.segment == s for p in mine) for mine in plan.placement) for s in range(1, count + 1)]
        assert count < sum(shared) <= count + cp_size - 1
    # Only the longest is too long, and one other rank is enough to relieve its own.
    plan = CpPlan.build(PrefixLayout([10, 4000, 4000, 4000, 4100], [-1, 0, 0, 0, 0]), 4, "branch")
    assert [sum(any(p.segment == s for p in mine) for mine in plan.placement) for s in range(1, 5)] == [1, 1, 1, 2]


FEW = st.tuples(
    st.one_of(st.sampled_from([0, 1]), st.integers(2, 5000)),
    st.lists(st.one_of(st.integers(1, 60), st.integers(300, 8000)), min_size=1, max_size=5).filter(
        lambda lengths: max(lengths) >= 300
    ),
)


@given(FEW, st.sampled_from([2, 3, 4, 8]))
@example((100, [100, 4000]), 4)
@example((100, [100, 4000]), 8)
@example((0, [300]), 8)
@example((1000, [35, 309]), 8)
def test_few_long_responses_are_balanced(sizes: tuple[int, list[int]], cp_size: int) -> None:
    prefix, lengths = sizes
    plan = CpPlan.build(PrefixLayout([prefix, *lengths], [-1] + [0] * len(lengths)), cp_size, "branch")
    areas = [plan.area(rank) for rank in range(cp_size)]
    assert max(areas) * cp_size <= 1.05 * sum(areas)
    assert sorted(row for rank in range(cp_size) for row in plan.rows(rank)) == list(range(plan.layout.num_rows))


@pytest.mark.parametrize("lengths", [[4000], [500], [3000, 3000, 3000], [2000] * 5])
@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_long_responses_alone_have_equal_shares_of_rows(lengths: list[int], cp_size: int) -> None:
    plan = CpPlan.build(PrefixLayout([100, *lengths], [-1] + [0] * len(lengths)), cp_size, "branch")
    rows = [layout.num_rows for layout in plan.local_layouts]
    assert max(rows) * cp_size <= 1.05 * sum(rows)


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


SHAPE = AttentionShape(32, 8, 128)
KEY_ROW = 8 * 2 * 128 * 2  # bytes of a key and a value row
FLOPS_OF_A_PAIR = 14 * 32 * 128
UNEVEN = PrefixLayout([4096, 3000, 200, 200, 200], [-1, 0, 0, 0, 0])  # branch: even areas, uneven rows
NEARLY_EVEN = PrefixLayout([100, 41000, 40000], [-1, 0, 0])  # branch: whole responses, 2% off balance


@pytest.mark.parametrize(
    ("layout", "cp_size", "comm_types", "chosen"),
    [
        (GROUP, 8, ("p2p",), "branch"),
        (GROUP, 8, ("all_gather",), "branch"),
        (GROUP, 8, ("a2a+p2p",), "branch"),
        (UNEVEN, 4, ("p2p",), "branch"),
        (UNEVEN, 4, ("a2a",), "dual_chunk_swap"),
        (UNEVEN, 4, ("p2p", "a2a"), "branch"),
        (UNEVEN, 4, ("p2p", *["a2a"] * 40), "dual_chunk_swap"),
    ],
)
def test_auto_takes_the_lower_cost_of_all_layers(
    layout: PrefixLayout, cp_size: int, comm_types: tuple[str, ...], chosen: str
) -> None:
    layers = CpLayers(SHAPE, comm_types, 2)
    both = {name: CpPlan.build(layout, cp_size, name) for name in PLACEMENTS}
    costs = {name: predicted_cost(plan, layers) for name, plan in both.items()}
    assert choose_plan(layout, cp_size, "auto", layers) == both[chosen]
    assert costs[chosen] == min(costs.values()) < max(costs.values())
    assert choose_plan(layout, cp_size, "branch", layers) == both["branch"]


def test_auto_weighs_keys_against_balance() -> None:
    """With one key-value head, keys cost less than the 2% that whole responses are off balance; with eight, more."""
    for kv_heads, chosen in ((1, "dual_chunk_swap"), (8, "branch")):
        layers = CpLayers(AttentionShape(32, kv_heads, 128))
        assert choose_plan(NEARLY_EVEN, 2, "auto", layers).name == chosen


def test_predicted_cost_by_hand() -> None:
    """Of the slowest rank: its pairs, with p2p those of its rows and with a2a its heads of all pairs; and its bytes."""
    plan = CpPlan.build(UNEVEN, 4, "branch")
    p2p, a2a = (predicted_cost(plan, CpLayers(SHAPE, (name,))) for name in ("p2p", "a2a"))
    moved = [3 * KEY_ROW * (plan.rows_received(rank) + plan.rows_sent(rank)) for rank in range(4)]
    assert p2p == max(FLOPS_OF_A_PAIR * plan.area(rank) + FLOPS_PER_BYTE * moved[rank] for rank in range(4))
    moved = [sum(each.total) for each in layer_traffic(plan, SHAPE, "a2a")]
    assert a2a == FLOPS_OF_A_PAIR * UNEVEN.area / 4 + FLOPS_PER_BYTE * max(moved)
    assert predicted_cost(plan, CpLayers(SHAPE, ("p2p", "a2a", "p2p"))) == 2 * p2p + a2a


def test_computed_areas() -> None:
    plan = CpPlan.build(DEEP, 4, "branch")
    areas = [plan.area(rank) for rank in range(4)]
    assert computed_areas(plan, "p2p") == areas and computed_areas(plan, "a2a") == [sum(areas) / 4] * 4
    pairs = [sum(areas[:2]) / 2] * 2 + [sum(areas[2:]) / 2] * 2
    assert computed_areas(plan, "a2a+p2p", 2) == pairs


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown placement 'zigzag'; choose one of dual_chunk_swap, branch"):
        CpPlan.build(DEEP, 2, "zigzag")
    with pytest.raises(ValueError, match="cp_size must be at least 1, got 0"):
        CpPlan.build(DEEP, 0, "branch")
    with pytest.raises(ValueError, match="4 context-parallel ranks cannot be grouped by 3"):
        CpPlan.build(DEEP, 4, "branch").merged(3)
    with pytest.raises(ValueError, match="unknown placement 'auto'"):
        CpPlan.build(DEEP, 2, "auto")
    with pytest.raises(ValueError, match="unknown cp_comm_type 'ring'"):
        CpLayers(SHAPE, ("p2p", "ring"))
    with pytest.raises(ValueError, match="an entry for every layer"):
        CpLayers(SHAPE, ())


# ---- bytes; tests/test_cp_attention.py holds them to what really travels


def most(plan: CpPlan, comm_type: str, a2a: int | None = None) -> tuple[int, int]:
    """Bytes received by the busiest rank: forward, both."""
    moved = layer_traffic(plan, SHAPE, comm_type, a2a)
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
    for layout, bytes_each in ((GROUP.repeated(), repeated), (GROUP, 2 * prefix)):
        moved = untrimmed_traffic(layout, 8, SHAPE, comm_type)
        assert (moved.forward, moved.total) == (Moved(bytes_each, bytes_each), Moved(3 * bytes_each, 3 * bytes_each))


def test_bytes_of_swapped_heads_by_hand() -> None:
    """a2a: 7 of 8 heads of this rank's 4096 rows leave it, queries, output, keys and values."""
    for name in PLACEMENTS:
        forward, both = most(CpPlan.build(GROUP, 8, name), "a2a")
        assert forward == 4096 * 7 // 8 * (2 * 32 + 2 * 8) * 128 * 2
        assert both == 2 * forward
    # Fewer key-value heads than ranks: every rank gets one, so a head is sent more than once.
    shape = AttentionShape(32, 2, 128)
    moved = layer_traffic(CpPlan.build(GROUP, 8, "branch"), shape, "a2a")[0]
    assert moved.forward.received == 4096 * 7 * (4 + 4 + 2) * 128 * 2


def test_padding_counts_in_repeated_prefixes() -> None:
    """Sequences of 5 and 4 rows are padded to 8 each on two ranks, which hold 4 of each."""
    layout = PrefixLayout([3, 2, 1], [-1, 0, 0])
    assert untrimmed_traffic(layout.repeated(), 2, AttentionShape(1, 1, 1, 1, 1), "p2p").forward == Moved(12, 12)


@given(layouts, world_sizes, placements, st.sampled_from(["p2p", "all_gather", "a2a"]))
def test_what_is_sent_is_received(layout: PrefixLayout, cp_size: int, placement: str, comm_type: str) -> None:
    plan = CpPlan.build(layout, cp_size, placement)
    moved = layer_traffic(plan, AttentionShape(60, 4, 8, 3), comm_type)
    for part in ("forward", "backward"):
        assert sum(getattr(m, part).sent for m in moved) == sum(getattr(m, part).received for m in moved)
    if cp_size == 1:
        assert moved[0].total == Moved(0, 0)


def test_bad_shapes_and_ways_are_refused() -> None:
    plan = CpPlan.build(DEEP, 4, "branch")
    with pytest.raises(ValueError, match="unknown cp_comm_type 'ring'; choose one of p2p, all_gather, a2a, a2a"):
        layer_traffic(plan, SHAPE, "ring")
    for size in (None, 3):
        with pytest.raises(ValueError, match=rf"needs an a2a size that divides cp=4, got {size}"):
            layer_traffic(plan, SHAPE, "a2a+p2p", size)
    with pytest.raises(ValueError, match="query heads that divide by its 4 ranks, got 6; use p2p"):
        layer_traffic(plan, AttentionShape(6, 2, 8), "a2a")
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
    assert (data["cp_size"], data["placement"]) == (cp_size, placement)
    pieces = tuple(tuple(Piece(*piece) for piece in rank["pieces"]) for rank in data["ranks"])
    assert CpPlan(layout, pieces, placement) == plan
    for r, rank in enumerate(data["ranks"]):
        assert rank["rank"] == r and rank["rows"] == len(plan.rows(r)) and rank["area"] == plan.area(r)
        assert [tuple(Piece(*piece) for piece in read) for read in rank["keys_read"]] == [
            plan.keys_read(r, source) for source in range(cp_size)
        ]
        assert rank["computed_area"] == rank["area"]
        assert rank["rows_received"][r] == 0 and sum(rank["rows_received"]) == plan.rows_received(r)
        assert rank["bytes"]["forward"]["received"] == plan.rows_received(r) * 16
        assert rank["response_rows"] == plan.response_rows(r)
