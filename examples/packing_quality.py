"""How near a planned step comes to the best that sharing prefixes can save, on three kinds of rollouts.

    python examples/packing_quality.py --out packing_quality.png --json packing_quality.json

Saving is modelled time of repeated prefixes over that of prefix groups (`CostModel` of Qwen3-8B on an H100, from its
data sheet). The bound gives both sides a perfect packing under the same token budget: all work even over the ranks, in
as few micro-batches as the rows ask for, and with pipeline stages the bubble of as many even micro-batches as the plan
has. "Achieved" has the planned step instead for the groups, and the perfect packing still for the repeated prefixes.

Lengths (lognormal, cut off at the longest):

- math: prompts of 80 to 300 tokens, 16 answers of median 4,096 up to 20,480 tokens, the setting of DAPO
  (arXiv 2503.14476: 512 prompts of 16 responses, at most 20,480 tokens, mean lengths of thousands).
- documents: questions on a document of 8k to 24k tokens, answers of median 400 up to 2,048, 16 each (prompts of 16k and
  short answers, the case of Prefix Grouper, arXiv 2506.05433).
- agents: a system prompt with tools of 3,000 tokens, a task of 200 to 2,000, then eight trajectories of up to six turns
  (a policy's turn of median 200 tokens, a tool's output of median 600) of which some fork after a shared turn, as tree
  search rollouts do (Tree-GRPO, arXiv 2509.21240).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_prefix import RolloutGroup, RolloutTree, TokenCount, TreeNode
from megatron_prefix.balanced_plan import Group, PipelineShape
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.hardware import DEVICES
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.pipeline_plan import even_bubble
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


def lognormal(draw: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * draw.lognormvariate(0, sigma))))


def math_group(draw: random.Random) -> RolloutGroup:
    responses = [TokenCount(lognormal(draw, 4096, 0.7, 20480)) for _ in range(16)]
    return RolloutGroup(TokenCount(draw.randint(80, 300)), responses, [0.0] * 16)


def document_group(draw: random.Random) -> RolloutGroup:
    responses = [TokenCount(lognormal(draw, 400, 0.6, 2048)) for _ in range(16)]
    return RolloutGroup(TokenCount(draw.randint(8192, 24576)), responses, [0.0] * 16)


def agent_tree(draw: random.Random) -> RolloutTree:
    """Depth first: what trajectories share, then each by itself; a tool's output after every turn but the last."""
    nodes = [TreeNode(TokenCount(3000 + draw.randint(200, 2000)), -1)]

    def grow(parent: int, rollouts: tuple[int, ...], turns: int) -> None:
        nodes.append(TreeNode(TokenCount(lognormal(draw, 200, 0.7, 2048)), parent, rollouts))
        if turns <= 1 and len(rollouts) == 1:
            return
        nodes.append(TreeNode(TokenCount(lognormal(draw, 600, 0.9, 8192)), len(nodes) - 1))
        below = len(nodes) - 1
        cut = draw.randint(1, len(rollouts) - 1) if len(rollouts) > 1 else 0
        for some in (rollouts[:cut], rollouts[cut:]):
            if some:
                grow(below, some, turns - 1)

    for first in range(0, 8, 2):
        grow(0, (first, first + 1), draw.randint(3, 6))
    return RolloutTree(tuple(nodes), (0.0,) * 8)


KINDS: dict[str, tuple[Callable[[random.Random], Group], tuple[int | None, ...]]] = {
    "math": (math_group, (32768, 131072)),
    "documents": (document_group, (28672, 65536)),
    "agents": (agent_tree, (24576, 65536)),
}
"""Of each kind, a group, and budgets of which the first makes the planner split groups."""


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


def perfect(planner: StepPlanner, works: list[Workload], microbatches: int | None) -> float:
    """Modelled seconds of the work, even over ranks, in as few micro-batches as the budget allows.

    With stages: the bubble of ``microbatches`` even ones, or of as few as the budget allows.
    """
    total = sum(works, Workload())
    fewest = -(-total.rows // ((planner.max_tokens_per_pack or total.rows) * planner.dp_size))
    cost = sum(planner.cost.cost(work) - planner.cost.level * work.levels for work in works)
    seconds = cost / planner.dp_size + fewest * planner.cost.microbatch
    stages = planner.pipeline.stages
    return seconds / stages / (1 - even_bubble(microbatches or fewest, stages))


def measure(kind: str, groups: list[Group], planner: StepPlanner) -> Quality:
    """Plan a step and hold it to the bound."""
    begun = time.process_time()
    plan = planner.plan(groups)
    seconds = time.process_time() - begun
    grouped, repeated = [Workload.of_group(g) for g in groups], [Workload.repeated(g) for g in groups]
    # The repeated rollouts fill more micro-batches under the budget; where the plan has more still, they may too.
    rows = sum(work.rows for work in repeated)
    asked = -(-rows // ((planner.max_tokens_per_pack or rows) * planner.dp_size))
    baseline = perfect(planner, repeated, max(asked, plan.num_microbatches))
    return Quality(
        kind=kind,
        budget=planner.max_tokens_per_pack or 0,
        dp=planner.dp_size,
        pp=planner.pipeline.stages,
        groups=len(groups),
        split=plan.num_splits,
        microbatches=plan.num_microbatches,
        rows_saved=rows / sum(work.rows for work in grouped),
        saving=baseline / plan.seconds,
        bound=baseline / perfect(planner, grouped, plan.num_microbatches),
        balance=plan.balance,
        seconds=seconds,
    )


def draw_picture(found: list[Quality], path: Path) -> None:
    """Achieved saving beside the bound, a panel per kind."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
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
