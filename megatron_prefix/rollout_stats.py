"""What a file of rollouts is like: lengths, how much its groups share, what that saves, and what looks wrong in it.

Groups are added one after another and not kept: counts and one number per group, response or prompt are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_prefix.cost_model import CostModel
from megatron_prefix.rollout_group import RolloutGroup
from megatron_prefix.rollout_tree import RolloutTree, TreeNode, path_of
from megatron_prefix.splitting import plan_splits
from megatron_prefix.workload import Workload

MOST_PLACES = 3
"""Places that a finding names."""

LOG_PROB_SLACK = 1e-3
"""Log-probs may be above 0 by so much: rounding of a softmax in bf16."""


@dataclass
class Finding:
    """Something that is allowed and probably not meant: how often, and the first places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        """Counts ``count`` more, at ``place``."""
        self.count += count
        if len(self.places) < MOST_PLACES:
            self.places.append(place)


def sequence_lengths(group: RolloutGroup | RolloutTree) -> list[int]:
    """Tokens of each rollout with its prompt."""
    if isinstance(group, RolloutGroup):
        return [len(group.prompt) + len(tokens) for tokens in group.responses]
    return [sum(len(node.tokens) for node in path_of(group, r)) for r in range(len(group.rewards))]


class RolloutStats:
    """Statistics of the groups that were added.

    Args:
        cost: models what sharing saves; without it savings are between those of rows and of pairs.
        max_positions: tokens of the longest sequence that the model takes.
        max_tokens: rows of a micro-batch.

    Attributes:
        prompts, responses, sizes, levels: one number per group (prompt and size in tokens and responses, levels of the
            tree), or per response (tokens).
        row_ratios, pair_ratios, savings: per group, repeated over shared: rho, alpha and modelled cost.
        shared, repeated: the work of all groups in both ways.
        trained: response tokens that are trained.
        rewards: one per response.
        findings: by what they are.
    """

    def __init__(
        self, cost: CostModel | None = None, *, max_positions: int | None = None, max_tokens: int | None = None
    ) -> None:
        self.cost, self.max_positions, self.max_tokens = cost, max_positions, max_tokens
        self.prompts, self.responses, self.sizes, self.levels = (array("q") for _ in range(4))
        self.row_ratios, self.pair_ratios, self.savings, self.rewards = (array("d") for _ in range(4))
        self.shared, self.repeated = Workload(), Workload()
        self.trained = 0
        self.findings: dict[str, Finding] = {}
        self._prompts: dict[int, str] = {}

    def add(self, place: str, group: RolloutGroup | RolloutTree) -> None:
        """Counts a group; ``place`` is where it began."""
        if group.group_id is not None:
            place = f"{group.group_id!r} ({place})"
        shared, repeated = Workload.of_group(group), Workload.repeated(group)
        lengths, prompt = sequence_lengths(group), _prompt(group)
        self.prompts.append(len(prompt))
        self.responses.extend(length - len(prompt) for length in lengths)
        self.sizes.append(len(lengths))
        self.levels.append(shared.levels + 1)
        self.rewards.extend(group.rewards)
        self.trained += repeated.target_rows if isinstance(group, RolloutTree) else sum(group.trained_lengths)
        self.shared += shared
        self.repeated += repeated
        self.row_ratios.append(repeated.rows / shared.rows)
        self.pair_ratios.append(repeated.pairs / shared.pairs)
        if self.cost is not None:
            self.savings.append(self.cost.cost(repeated) / self.cost.cost(shared))
        self._look_at(place, group, lengths, shared.rows)

    def _look_at(self, place: str, group: RolloutGroup | RolloutTree, lengths: Sequence[int], rows: int) -> None:
        prompt = hash(tuple(_prompt(group)))
        if prompt in self._prompts:
            self._found("two groups have the same prompt", f"{self._prompts[prompt]} and {place}")
        self._prompts.setdefault(prompt, place)
        if len(lengths) == 1:
            self._found("a group has one response: no advantage, nothing to share", place)
        elif len(set(group.rewards)) == 1:
            self._found("all rewards of a group are equal: no advantage", place)
        if copies := len(lengths) - len(set(_responses(group))):
            self._found("a response is the same as another of its group", place, copies)
        if any(value > LOG_PROB_SLACK for value in _log_probs(group)):
            self._found("log_probs are above 0: no log-probabilities", place)
        if self.max_positions is not None and max(lengths) > self.max_positions:
            self._found(f"a sequence is longer than the model's {self.max_positions:,} positions", place)
        if self.max_tokens is not None and rows > self.max_tokens:
            try:
                plan_splits([group], max_tokens_per_pack=self.max_tokens)
                self._found(f"a group has more than {self.max_tokens:,} rows and will be split", place)
            except ValueError:
                self._found(f"a prefix or response does not fit a micro-batch of {self.max_tokens:,} rows", place)

    def _found(self, what: str, place: str, count: int = 1) -> None:
        self.findings.setdefault(what, Finding()).add(place, count)

    @property
    def rho(self) -> float:
        """Rows with prefixes repeated over rows with them shared, of all groups."""
        return self.repeated.rows / self.shared.rows

    @property
    def alpha(self) -> float:
        """As `rho`, of pairs of the attention mask."""
        return self.repeated.pairs / self.shared.pairs

    @property
    def prefix_ratio(self) -> float:
        """Share of the repeated rows that sharing does away with."""
        return 1 - self.shared.rows / self.repeated.rows

    @property
    def saving(self) -> tuple[float, float]:
        """Least and most that a step costs with repeated prefixes over shared ones; the same where there is a model."""
        if self.cost is None:
            return min(self.rho, self.alpha), max(self.rho, self.alpha)
        ratio = self.cost.cost(self.repeated) / self.cost.cost(self.shared)
        return ratio, ratio

    def to_dict(self) -> dict[str, Any]:
        """All of it but the single values, for JSON."""
        low, high = self.saving
        return {
            "groups": len(self.sizes),
            "responses": len(self.responses),
            "prompt_length": quantiles(self.prompts),
            "response_length": quantiles(self.responses),
            "group_size": quantiles(self.sizes),
            "levels": quantiles(self.levels),
            "trained_share": self.trained / sum(self.responses),
            "rows": {"repeated": self.repeated.rows, "shared": self.shared.rows},
            "pairs": {"repeated": self.repeated.pairs, "shared": self.shared.pairs},
            "prefix_ratio": self.prefix_ratio,
            "rho": self.rho,
            "alpha": self.alpha,
            "group_rho": quantiles(self.row_ratios),
            "group_alpha": quantiles(self.pair_ratios),
            "saving": {"least": low, "most": high, "modelled": self.cost is not None},
            "reward": {"mean": float(np.mean(self.rewards)), "std": float(np.std(self.rewards))},
            "findings": {what: {"count": each.count, "places": each.places} for what, each in self.findings.items()},
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Least, median, 90th percentile and most: values that are there, none in between."""
    found = np.percentile(np.asarray(values), [0, 50, 90, 100], method="inverted_cdf")
    return dict(zip(("min", "median", "p90", "max"), found.tolist(), strict=True))


def _prompt(group: RolloutGroup | RolloutTree) -> Sequence[int]:
    return group.prompt if isinstance(group, RolloutGroup) else group.nodes[0].tokens


def _responses(group: RolloutGroup | RolloutTree) -> Iterator[Sequence[int]]:
    """What tells responses of a group apart: their tokens, or the nodes that they own."""
    if isinstance(group, RolloutGroup):
        yield from group.responses
    else:
        for rollout in range(len(group.rewards)):
            yield tuple(i for i, node in enumerate(group.nodes) if rollout in node.rollouts)


def _log_probs(group: RolloutGroup | RolloutTree) -> Iterator[float]:
    nodes: Sequence[TreeNode] = () if isinstance(group, RolloutGroup) else group.nodes
    known = group.log_probs or () if isinstance(group, RolloutGroup) else ()
    for values in (*known, *(values for node in nodes for values in node.log_probs or ())):
        yield from values
