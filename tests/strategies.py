"""Hypothesis strategies that several tests share: forests of segments, rollout groups, rollout trees."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from megatron_prefix import PrefixLayout, RolloutGroup, RolloutTree, TreeNode
from megatron_prefix.layout import PartLayout

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def parent_lists(draw: Draw, max_segments: int = 8, one_root: bool = False) -> list[int]:
    """Parents of a forest in depth-first order: every next segment hangs on the current branch or is a new root."""
    parents = [-1]
    branch = [0]
    for segment in range(1, draw(st.integers(1, max_segments))):
        branch = branch[: draw(st.integers(1 if one_root else 0, len(branch)))]
        parents.append(branch[-1] if branch else -1)
        branch.append(segment)
    return parents


@st.composite
def forests(draw: Draw, max_segments: int = 8, max_length: int = 5) -> PrefixLayout:
    """Layouts of any depth and any number of roots; segments may have no rows."""
    parents = draw(parent_lists(max_segments))
    lengths = draw(st.lists(st.integers(0, max_length), min_size=len(parents), max_size=len(parents)))
    return PrefixLayout(lengths, parents)


@st.composite
def parts(draw: Draw, max_segments: int = 8, max_length: int = 5) -> PartLayout:
    """Parts of split groups: some subtrees of a forest whose ancestors' rows are in a cache, with gaps between them."""
    layout = draw(forests(max_segments, max_length))
    cached: list[bool] = []
    for parent in layout.parents:
        cached.append((parent < 0 or cached[parent]) and draw(st.booleans()))
    starts, end = [], 0
    for length, away in zip(layout.lengths, cached, strict=True):
        end += draw(st.integers(0, 2)) if away else 0
        starts.append(end if away else 0)
        end += length if away else 0
    lengths = [0 if away else length for length, away in zip(layout.lengths, cached, strict=True)]
    cached_lengths = [length if away else 0 for length, away in zip(layout.lengths, cached, strict=True)]
    return PartLayout(lengths, layout.parents, cached_lengths, starts)


def _tokens(vocab_size: int, max_length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=max_length)


@st.composite
def _masks(draw: Draw, length: int, trained: bool = True) -> list[bool]:
    """With at least one trained token, or not."""
    mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    if trained:
        mask[draw(st.integers(0, length - 1))] = True
    return mask


def _numbers(length: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-8, 0, width=32), min_size=length, max_size=length)


@st.composite
def rollout_groups(
    draw: Draw, vocab_size: int = 50, max_length: int = 6, max_responses: int = 5, log_probs: bool | None = None
) -> RolloutGroup:
    """Ragged groups: one-token prompts and responses and a single response among them, masks and log-probs or none."""
    sampled = draw(st.booleans()) if log_probs is None else log_probs
    responses = draw(st.lists(_tokens(vocab_size, max_length), min_size=1, max_size=max_responses))
    lengths = [len(tokens) for tokens in responses]
    rewards = draw(st.lists(st.integers(0, 3), min_size=len(responses), max_size=len(responses)))
    return RolloutGroup(
        prompt=draw(_tokens(vocab_size, max_length)),
        responses=responses,
        rewards=[float(reward) for reward in rewards],
        log_probs=[draw(_numbers(n)) for n in lengths] if sampled else None,
        loss_masks=[draw(_masks(n)) for n in lengths] if draw(st.booleans()) else None,
    )


@st.composite
def rollout_trees(
    draw: Draw, vocab_size: int = 50, max_length: int = 4, max_nodes: int = 7, log_probs: bool | None = None
) -> RolloutTree:
    """Multi-turn trees of one root or several: one rollout per leaf, whose nodes are owned by any of the rollouts that
    pass through them; some only children joined, some rollouts of one trajectory."""
    sampled = draw(st.booleans()) if log_probs is None else log_probs
    parents = draw(parent_lists(max_nodes))
    for root in [i for i, parent in enumerate(parents) if parent < 0][::-1]:
        if root + 1 == len(parents) or parents[root + 1] < 0:  # a prompt without a response
            parents = [p + (p > root) for p in parents]
            parents.insert(root + 1, root)
    leaves = [i for i in range(len(parents)) if i not in parents]
    through: list[set[int]] = [set() for _ in parents]
    for rollout, leaf in enumerate(leaves):
        node = leaf
        while node >= 0:
            through[node].add(rollout)
            node = parents[node]
    nodes = []
    for i, parent in enumerate(parents):
        tokens = draw(_tokens(vocab_size, max_length))
        owners = sorted(through[i])
        if i not in leaves:
            owners = draw(st.lists(st.sampled_from(owners), unique=True)) if parent >= 0 else []
        mask = draw(_masks(len(tokens), trained=i in leaves))
        nodes.append(
            TreeNode(
                tokens=tokens,
                parent=parent,
                rollouts=tuple(owners),
                loss_mask=mask if draw(st.booleans()) else None,
                log_probs=[draw(_numbers(len(tokens))) for _ in owners] if sampled else None,
                joined=parents.count(parent) == 1 and parent >= 0 and draw(st.booleans()),
            )
        )
    trajectories = draw(st.lists(st.integers(0, 2), min_size=len(leaves), max_size=len(leaves)))
    if draw(st.booleans()):
        return RolloutTree(tuple(nodes), tuple(float(t) for t in trajectories), "tree", tuple(trajectories))
    return RolloutTree(tuple(nodes), tuple(float(i) for i in range(len(leaves))))


def batches(max_size: int = 4) -> st.SearchStrategy[list[RolloutGroup | RolloutTree]]:
    """Plain groups and trees side by side, all with the sampler's log-probs or all without."""
    return st.booleans().flatmap(
        lambda sampled: st.lists(
            st.one_of(rollout_groups(log_probs=sampled), rollout_trees(log_probs=sampled)),
            min_size=1,
            max_size=max_size,
        )
    )
