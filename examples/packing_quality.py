"""How near a planned step comes to the best that sharing prefixes can save, on four kinds of rollouts.

    python examples/packing_quality.py --out packing_quality.png --json packing_quality.json

Saving is the modelled time of a step of repeated prefixes over that of prefix groups, both planned by `StepPlanner`
under the same token budget (`CostModel` of Qwen3-8B on an H100, from its data sheet). The bound gives both sides a
perfect packing instead: all work even over ranks and stages, in as few micro-batches as the rows ask for, and no
pipeline bubble.

Lengths are drawn from quantiles of published logs of real jobs, straight lines between them:

- math: GRPO of Qwen2.5-32B on DAPO's questions, 1,152 groups of eight (PolyTrace, arXiv 2509.25279, `verl/profile`).
- code: DeepCoder-14B, answers up to 16,000 tokens, 80 groups of eight (PolyTrace, `rllm/profile`): the case of short
  prompts and long answers. In both a group draws the median length of its answers, and each answer its ratio to that.
- documents: 3,928 requests of 8k to 24k tokens of the conversation trace of Mooncake (FAST '25): long prompts and short
  answers, the case of Prefix Grouper (arXiv 2506.05433). A trace of requests has no groups: 16 answers are drawn each.
- agents: 10,287 rollouts of Search-R1 with a 7B model (PolyTrace, `search_r1/profile`): turns of a rollout, tokens of a
  turn and of a search result. Trees as Tree-GRPO (arXiv 2509.21240) makes them: four chains of turns below a prompt,
  each with one more chain from a turn of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_prefix import RolloutGroup, RolloutTree, TokenCount, TreeNode
from megatron_prefix.balanced_plan import Group, PipelineShape, as_tree
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.hardware import DEVICES
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.rollout_tree import alone
from megatron_prefix.workload import Workload

QWEN3_8B = ModelConfig(
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    qk_layernorm=True,
)
RANKS, STAGES = (1, 8, 64), (1, 4)
COLUMNS = ("rollouts", "budget", "DP", "PP", "split", "micro-batches", "rows saved", "saving", "bound",
           "share of bound", "balance", "planned in")  # fmt: skip


AT = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
"""Where the quantiles below are taken."""

# fmt: off
MATH_PROMPT = (86, 100, 108, 120, 130, 141, 152, 161, 175, 193, 224, 250, 356, 617)
MATH_MEDIAN = (146, 278, 315, 393, 434, 478, 510, 549, 611, 670, 790, 883, 1124, 1640)
MATH_RATIO = (0.0, 0.2, 0.36, 0.56, 0.71, 0.85, 1.0, 1.0, 1.13, 1.37, 1.88, 2.52, 5.19, 19.16)
CODE_PROMPT = (76, 151, 176, 270, 337, 390, 440, 497, 568, 653, 823, 969, 1777, 1777)
CODE_MEDIAN = (648, 1445, 2554, 4138, 5473, 7551, 10952, 13205, 14113, 15164, 16000, 16000, 16000, 16000)
CODE_RATIO = (0.37, 0.68, 0.76, 0.84, 0.9, 0.96, 1.0, 1.0, 1.01, 1.08, 1.2, 1.31, 2.29, 3.45)
DOCUMENT = (8192, 8632, 9066, 10027, 11179, 12339, 13780, 15196, 16706, 18558, 20879, 22698, 24157, 24554)
ANSWER = (1, 11, 26, 124, 241, 310, 361, 405, 447, 499, 585, 689, 1065, 2000)
TASK = (316, 316, 316, 316, 317, 317, 317, 318, 318, 319, 320, 321, 326, 332)
TURN = (1, 28, 29, 31, 34, 40, 57, 70, 85, 105, 139, 172, 260, 3004)
RESULT = (33, 449, 464, 481, 495, 508, 521, 534, 549, 574, 911, 1035, 1467, 10349)
# fmt: on
TURNS = {1: 787, 2: 4405, 3: 3503, 4: 1090, 5: 502}
"""Rollouts with so many turns of the policy."""


def from_quantiles(draw: random.Random, quantiles: tuple[float, ...]) -> float:
    return float(np.interp(draw.random(), AT, quantiles))


def tokens(draw: random.Random, quantiles: tuple[float, ...]) -> TokenCount:
    return TokenCount(max(1, round(from_quantiles(draw, quantiles))))


def group_of_8(
    draw: random.Random, prompt: tuple[float, ...], median: tuple[float, ...], ratio: tuple[float, ...], longest: int
) -> RolloutGroup:
    middle = from_quantiles(draw, median)
    lengths = [min(longest, max(1, round(middle * from_quantiles(draw, ratio)))) for _ in range(8)]
    return RolloutGroup(tokens(draw, prompt), [TokenCount(n) for n in lengths], [0.0] * 8)


def math_group(draw: random.Random) -> RolloutGroup:
    return group_of_8(draw, MATH_PROMPT, MATH_MEDIAN, MATH_RATIO, longest=10112)


def code_group(draw: random.Random) -> RolloutGroup:
    return group_of_8(draw, CODE_PROMPT, CODE_MEDIAN, CODE_RATIO, longest=16000)


def document_group(draw: random.Random) -> RolloutGroup:
    return RolloutGroup(tokens(draw, DOCUMENT), [tokens(draw, ANSWER) for _ in range(16)], [0.0] * 16)


def agent_tree(draw: random.Random) -> RolloutTree:
    """Depth first: the turns that two rollouts share, then those of each; a result after every turn but the last."""
    nodes = [TreeNode(tokens(draw, TASK), -1)]

    def chain(parent: int, turns: int, rollouts: tuple[int, ...], *, ends: bool) -> int:
        for turn in range(turns):
            nodes.append(TreeNode(tokens(draw, TURN), parent, rollouts))
            parent = len(nodes) - 1
            if not ends or turn < turns - 1:
                nodes.append(TreeNode(tokens(draw, RESULT), parent))
                parent = len(nodes) - 1
        return parent

    for first in range(0, 8, 2):
        turns, other = draw.choices(list(TURNS), list(TURNS.values()), k=2)
        shared = draw.randint(0, turns - 1)
        fork = chain(0, shared, (first, first + 1), ends=False)
        chain(fork, turns - shared, (first,), ends=True)
        chain(fork, max(1, other - shared), (first + 1,), ends=True)
    return RolloutTree(tuple(nodes), (0.0,) * 8)


KINDS: dict[str, tuple[Callable[[random.Random], Group], tuple[int | None, ...]]] = {
    "math": (math_group, (16384, 65536)),
    "code": (code_group, (32768, 131072)),
    "documents": (document_group, (24576, 65536)),
    "agents": (agent_tree, (16384, 65536)),
}
"""Of each kind, a group, and a small and a large budget."""


@dataclass(frozen=True)
class Quality:
    """One row of the table."""

    kind: str
    budget: int
    dp: int
    pp: int
    groups: int
    split: int
    microbatches: int
    rows_saved: float
    saving: float
    bound: float
    balance: float
    seconds: float

    @property
    def share(self) -> float:
        """Of the bound."""
        return self.saving / self.bound


def perfect(planner: StepPlanner, works: list[Workload]) -> float:
    """Modelled seconds of the work, even over ranks and stages, in as few micro-batches as the budget allows."""
    total = sum(works, Workload())
    fewest = -(-total.rows // ((planner.max_tokens_per_pack or total.rows) * planner.dp_size))
    cost = sum(planner.cost.without_levels(work) for work in works)
    return (cost / planner.dp_size + fewest * planner.cost.microbatch) / planner.pipeline.stages


def repeated_rollouts(group: Group) -> list[RolloutTree]:
    """Every rollout as one segment by itself, its prefix encoded again."""
    tree = as_tree(group)
    singles = [alone(tree, rollout) for rollout in range(len(tree.rewards))]
    return [replace(t, nodes=tuple(replace(n, joined=n.parent >= 0) for n in t.nodes)) for t in singles]


def measure(kind: str, groups: list[Group], planner: StepPlanner) -> Quality:
    """Plan a step and hold it to the bound."""
    begun = time.process_time()
    plan = planner.plan(groups)
    seconds = time.process_time() - begun
    grouped, repeated = [Workload.of_group(g) for g in groups], [Workload.repeated(g) for g in groups]
    baseline = planner.plan([single for group in groups for single in repeated_rollouts(group)])
    return Quality(
        kind=kind,
        budget=planner.max_tokens_per_pack or 0,
        dp=planner.dp_size,
        pp=planner.pipeline.stages,
        groups=len(groups),
        split=plan.num_splits,
        microbatches=plan.num_microbatches,
        rows_saved=sum(work.rows for work in repeated) / sum(work.rows for work in grouped),
        saving=baseline.seconds / plan.seconds,
        bound=perfect(planner, repeated) / perfect(planner, grouped),
        balance=plan.balance,
        seconds=seconds,
    )


def draw_picture(found: list[Quality], path: Path) -> None:
    """Achieved saving beside the bound, a panel per kind."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        mine = [each for each in found if each.kind == kind]
        at = range(len(mine))
        axes.bar(at, [each.bound for each in mine], width=0.8, color="#b0b7c3", label="bound")
        axes.bar(at, [each.saving for each in mine], width=0.5, color="#76b900", label="planned")
        for n, each in enumerate(mine):
            axes.text(
                n, max(each.bound, each.saving), f"{each.share:.3f}", ha="center", va="bottom", fontsize=7, rotation=90
            )
        labels = [f"{each.budget // 1024}k, DP {each.dp}, PP {each.pp}" for each in mine]
        axes.set_xticks(at, labels, rotation=60, ha="right", fontsize=7)
        axes.set_ylim(0, 1.2 * max(each.bound for each in mine))
        axes.set_title(f"{kind}: repeated over grouped, modelled step", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """The table, its JSON and picture, and the time that planning 10,000 groups in one step takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512, help="of a step")
    parser.add_argument("--large", type=int, default=10000, help="groups of the step whose planning is timed")
    parser.add_argument("--out", type=Path, default=Path("packing_quality.png"), help="PNG to write")
    parser.add_argument("--json", type=Path, help="JSON to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cost = CostModel.of_device(QWEN3_8B, DEVICES["H100"])
    console = Console(width=150)
    table = Table(*COLUMNS, title=f"{args.groups} groups a step")
    found = []
    for kind, (make, budgets) in KINDS.items():
        draw = random.Random(f"{args.seed}/{kind}")
        groups = [make(draw) for _ in range(args.groups)]
        for budget in budgets:
            for dp in (dp for dp in RANKS if dp <= args.groups):
                for pp in STAGES:
                    each = measure(kind, groups, StepPlanner(cost, dp, budget, PipelineShape(pp)))
                    found.append(each)
                    table.add_row(
                        each.kind, f"{each.budget:,}", str(each.dp), str(each.pp), str(each.split),
                        str(each.microbatches), f"{each.rows_saved:.2f}x", f"{each.saving:.3f}x", f"{each.bound:.3f}x",
                        f"{each.share:.3f}", f"{each.balance:.4f}", f"{each.seconds:.2f} s",
                    )  # fmt: skip
    console.print(table)
    large: dict[str, float] = {}
    for kind, (make, budgets) in KINDS.items():
        draw = random.Random(f"{args.seed}/large {kind}")
        groups = [make(draw) for _ in range(args.large)]
        for budget in budgets:
            begun = time.process_time()
            plan = StepPlanner(cost, 8, budget).plan(groups)
            large[f"{kind} {budget}"] = taken = time.process_time() - begun
            console.print(f"{kind}, budget {budget:,}, DP 8: {plan.describe()}; planned in {taken:.2f} s of one core")
    draw_picture(found, args.out)
    if args.json:
        rows = [asdict(each) | {"share": each.share} for each in found]
        args.json.write_text(json.dumps({"steps": rows, "large_seconds": large}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
