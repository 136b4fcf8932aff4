"""How groups are split before any pack is built: parts, their sizes, what is refused, and the order of the pairs."""

import random
from collections.abc import Sequence

import pytest
import torch

from megatron_prefix import RolloutGroup, RolloutTree, TreeNode
from megatron_prefix.packing import Pack, pack_groups, repeated_packs
from megatron_prefix.splitting import Split, pack_and_split, pair_order, plan_splits

pytestmark = pytest.mark.ci_oldest

PROMPT, RESPONSE, SIZE = 16385, 1024, 16  # P = 16384 rows, R = 1024, G = 16


def group(prompt: int, *responses: int, seed: int = 0, log_probs: bool = False) -> RolloutGroup:
    draw = random.Random(f"{seed}/{prompt}/{responses}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(64) for _ in range(count)]

    sampled = [[-1.0] * n for n in responses] if log_probs else None
    return RolloutGroup(ids(prompt), [ids(n) for n in responses], [draw.random() for _ in responses], "g", sampled)


def trained_in_the_prefix() -> RolloutTree:
    """Rollout 1 owns a turn that others do not read, and one below it; rollout 0 shares the first with rollout 2."""
    nodes = (
        TreeNode([1, 2, 3], -1),
        TreeNode([4, 5, 6, 7], 0, (0, 2), loss_mask=[True, False, True, True]),
        TreeNode([8] * 7, 1, (2,)),
        TreeNode([9] * 6, 1, (0,)),
        TreeNode([10, 11], 0, (1,)),
        TreeNode([12], 4),
        TreeNode([13, 14], 5, (1,)),
    )
    return RolloutTree(nodes, (0.1, 0.5, 0.9))


BATCH: list[RolloutGroup | RolloutTree] = [
    group(4, 3),
    group(11, 3, 5, 1, 2, 7, 6, 4),
    trained_in_the_prefix(),
    group(3, 2, 2),
    group(1, 9, 9),
]


def sizes(splits: Sequence[Split | None]) -> list[list[int]]:
    """Tokens of each part."""
    return [[sum(len(s.tree.nodes[i].tokens) for i in part) for part in s.parts] if s else [] for s in splits]


def test_groups_that_fit_are_not_split() -> None:
    assert plan_splits(BATCH, max_tokens_per_pack=None) == [None] * 5
    assert sizes(plan_splits(BATCH, max_tokens_per_pack=16)) == [[], [11, 13, 4], [7 + 6, 5], [], [9, 9]]


def test_parts_to_aim_at() -> None:
    long = group(PROMPT, *[RESPONSE] * SIZE)
    for parts in (2, 4, 8, 16):
        (split,) = plan_splits([long], max_tokens_per_pack=PROMPT + 3 * RESPONSE, num_parts=parts)
        assert sizes([split]) == [[SIZE // parts * RESPONSE] * parts]
    assert sizes(plan_splits([long], max_tokens_per_pack=PROMPT)) == [[RESPONSE * SIZE]]
    ragged = group(11, 3, 5, 1, 2, 7, 6, 4)
    assert sizes(plan_splits([ragged], max_tokens_per_pack=27, num_parts=3)) == [[9, 9, 10]]
    assert sizes(plan_splits([ragged], max_tokens_per_pack=27, num_parts=100)) == [[3, 6, 2, 7, 6, 4]]
    # Never more than the limit holds.
    assert sizes(plan_splits([ragged], max_tokens_per_pack=11, num_parts=2)) == [[11, 7, 10]]


@pytest.mark.parametrize(
    ("batch", "limit", "message"),
    [
        ([], 5, "there is nothing to pack"),
        (BATCH, 0, "max_tokens_per_pack must be at least 1, got 0"),
        ([group(3, 9, 2)], 8, r"group 0 \('g'\): node 1 has 9 tokens, .* is 8; raise it to at least 9"),
        ([group(12, 2, 2)], 10, r"group 0 \('g'\): its prefix has 11 rows, .* is 10; raise it to at least 11"),
        ([group(9, 9), group(12, 5, 5, log_probs=True)], 12, r"group 0 \('g'\) lacks sampler log_probs"),
    ],
)  # fmt: skip
def test_refused(batch: list[RolloutGroup], limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_and_split(batch, max_tokens_per_pack=limit)
    with pytest.raises(ValueError, match="num_parts must be at least 1, got 0"):
        plan_splits(BATCH, max_tokens_per_pack=9, num_parts=0)


def pair_tokens(packs: Sequence[Pack]) -> torch.Tensor:
    """What identifies a pair: its token and its advantage, which is its rollout's."""
    return torch.cat(
        [
            torch.stack(
                [pack.targets[pack.response_rows][pack.pairs.row].double(),
                 pack.positions[pack.response_rows][pack.pairs.row].double(),
                 pack.advantages[pack.pairs.rollout].double()], 1
            )
            for pack in packs
        ]
    )  # fmt: skip


@pytest.mark.parametrize("limit", [None, 1000, 24, 17, 16])
def test_pair_order_is_that_of_the_groups(limit: int | None) -> None:
    packs = pack_and_split(BATCH, max_tokens_per_pack=limit)
    order = pair_order(BATCH, max_tokens_per_pack=limit)
    expected = pair_tokens(repeated_packs(BATCH))
    assert torch.equal(pair_tokens(packs)[order], expected)
    assert torch.equal(pair_tokens(pack_groups(BATCH)), expected)
    assert torch.equal(pair_tokens(packs), expected) == (limit in (None, 1000))
