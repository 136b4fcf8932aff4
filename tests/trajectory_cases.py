"""Random trajectories that share tokens, and a definition of their loss that follows each of them by itself."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from megatron_prefix import LossConfig, Trajectory

Draw = Callable[[st.SearchStrategy[Any]], Any]
TOKENS = st.integers(0, 2)  # so few that much is shared by chance


@st.composite
def trajectory_batches(draw: Draw, with_ids: bool = True) -> list[Trajectory]:
    """Groups of trajectories of one call, of several that extend one another, and of some whose context is rewritten.

    In any order, but that of a trajectory's calls. Log-probs for all or none.
    """
    sampled = draw(st.booleans())
    found: list[list[Trajectory]] = []
    for g in range(draw(st.integers(1, 3))):
        prompt = [g if not with_ids else draw(TOKENS), *draw(st.lists(TOKENS, max_size=3))]
        for t in range(draw(st.integers(1, 5))):
            found.append(draw(_trajectory(prompt, f"g{g}" if with_ids else None, f"{g} {t}", sampled)))
    order = draw(st.permutations([i for i, calls in enumerate(found) for _ in calls]))
    return [found[i].pop(0) for i in order]


@st.composite
def _trajectory(draw: Draw, prompt: list[int], group: str | None, name: str, sampled: bool) -> list[Trajectory]:
    written = draw(st.lists(TOKENS, min_size=1, max_size=7))
    tokens = [*prompt, *written]
    more = len(written) - 1
    generated = [0] * len(prompt) + [1, *draw(st.lists(st.booleans(), min_size=more, max_size=more))]
    reward = float(draw(st.integers(0, 2)))

    def call(tokens: list[int], generated: list[Any], name: str | None) -> Trajectory:
        log_probs = draw(st.lists(st.floats(-4, 0, width=32), min_size=len(tokens), max_size=len(tokens)))
        return Trajectory(tokens, generated, reward, group, log_probs if sampled else None, name)

    calls = draw(st.integers(1, 3))
    if calls == 1:
        return [call(tokens, generated, draw(st.sampled_from([None, name])))]
    ends = sorted(draw(st.sets(st.integers(len(prompt) + 1, len(tokens)), min_size=1, max_size=calls)) | {len(tokens)})
    result, start = [], 0
    repeats = draw(st.booleans()) or group is None  # later calls say again what earlier ones generated
    for end in ends:
        mine = [own and (repeats or t >= start) for t, own in enumerate(generated[:end])]
        if any(mine):
            result.append(call(tokens[:end], mine, name))
        start = end
    if draw(st.booleans()) and group is not None:
        other = [7, *draw(st.lists(TOKENS, max_size=2))]  # no sequence extends this one
        result.append(call([*other, 1], [0] * len(other) + [1], name))
    return result


Context = tuple[int, ...]


@dataclass
class NaiveRollout:
    """What a rollout trains: the tokens before each trained one, the token, and the sampler's log-prob."""

    group: Any
    trajectory: Any
    reward: float
    tokens: tuple[int, ...]
    trained: list[tuple[Context, int, float | None]]


def naive_rollouts(trajectories: Sequence[Trajectory]) -> list[NaiveRollout]:
    """By the words of `share_prefixes`, one token at a time; where no call is extended in two ways."""
    rollouts = []
    prompts = {}
    for i, each in enumerate(trajectories):
        key = (each.group_id, each.trajectory_id if each.trajectory_id is not None else i)
        same = [t for j, t in enumerate(trajectories)
                if i == j or (t.trajectory_id is not None and (t.group_id, t.trajectory_id) == key)]  # fmt: skip
        ahead = [t for t in same if t.tokens[: len(each.tokens)] == each.tokens and len(t.tokens) > len(each.tokens)]
        if ahead:
            continue
        parts = sorted((t for t in same if each.tokens[: len(t.tokens)] == t.tokens), key=lambda t: len(t.tokens))
        trained: list[tuple[Context, int, float | None]] = []
        for position, token in enumerate(each.tokens):
            writers = [t for t in parts if position < len(t.tokens) and t.generated[position]]
            if writers:
                log_probs = writers[0].log_probs
                trained.append((each.tokens[:position], token, None if log_probs is None else log_probs[position]))
        prompts.setdefault(key, trained[0][0])
        group = each.group_id if each.group_id is not None else prompts[key]
        rollouts.append(NaiveRollout(group, key, each.reward, each.tokens[: len(trained[-1][0]) + 1], trained))
    return rollouts


def naive_advantages(rollouts: Sequence[NaiveRollout]) -> list[float]:
    rewards: dict[Any, dict[Any, float]] = {}
    for r in rollouts:
        rewards.setdefault(r.group, {})[r.trajectory] = r.reward
    found = []
    for r in rollouts:
        mine = list(rewards[r.group].values())
        same = len(set(mine)) == 1
        found.append(0.0 if same else (r.reward - statistics.mean(mine)) / (statistics.stdev(mine) + 1e-6))
    return found


def policy_log_prob(before: Context, token: int) -> float:
    """A made-up policy: any function of the context and the token."""
    return -1.5 + math.sin(hash((before, token)) % 1009)


def naive_weights(rollouts: Sequence[NaiveRollout], config: LossConfig) -> Counter[tuple[Context, int]]:
    """On policy, what the loss's derivative by each log-prob is: summed over the rollouts, one token at a time."""
    tokens = sum(len(r.trained) for r in rollouts)
    weights: Counter[Any] = Counter()
    for r, advantage in zip(rollouts, naive_advantages(rollouts), strict=True):
        for before, token, sampled in r.trained:
            size = {"token": tokens, "sequence": len(r.trained) * len(rollouts),
                    "constant": (config.constant_length or 0) * len(rollouts)}[config.aggregation]  # fmt: skip
            weight = -advantage / size
            if config.importance_cap is not None and sampled is not None:
                weight *= min(math.exp(policy_log_prob(before, token) - sampled), config.importance_cap)
            weights[before, token] += weight
    return weights
