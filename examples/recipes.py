"""Recipes: flags of `train` for public models on 8, 64 and 512 H100, and what sharing prefixes is expected to save.

    python examples/recipes.py

writes `examples/recipes/*.args` and the table in `examples/recipes/README.md`: for each model and cluster the quickest
choice of the estimator (what `megatron-prefix plan` shows first). A model that does not fit gets the smallest cluster,
doubled, that it fits. Qwen3-30B-A3B has experts, which `train` does not run: its recipes are flags of Megatron-LM.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_prefix.cli.plan import train_command_line
from megatron_prefix.estimator.cluster import Cluster
from megatron_prefix.estimator.lengths import Lengths, draw_groups
from megatron_prefix.estimator.model import PRESETS, PlannedModel
from megatron_prefix.estimator.search import GIB, Choice, Task, search
from megatron_prefix.hardware import find_device
from megatron_prefix.workload import Workload

FOLDER = Path(__file__).resolve().parent / "recipes"
MODELS = {
    "qwen3-8b": "Qwen3-8B",
    "qwen3-32b": "Qwen3-32B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "llama-3.1-8b": "Llama-3.1-8B",
}
GPUS = (8, 64, 512)
DEVICE = "h100"
PROMPT, RESPONSE, GROUP_SIZE, NUM_GROUPS = "4096", "lognormal:1024:0.5:8192", 16, 512
SIZES = ("tp", "cp", "pp", "vpp", "ep", "dp")


@dataclass(frozen=True)
class Recipe:
    """The best choice for a model on a cluster.

    Attributes:
        task: model, groups, cluster.
        choice: sizes, and both ways of training with them.
        best_repeated: seconds of a step of repeated prefixes with their own best sizes.
    """

    task: Task
    choice: Choice
    best_repeated: float

    @property
    def name(self) -> str:
        """Of its file."""
        host = ".megatron-lm" if self.task.model.experts else ""
        return f"{self.task.model.name}_{self.task.cluster.num_gpus}x{DEVICE}{host}.args"

    @property
    def sizes(self) -> str:
        """Such as "tp 2, pp 4, dp 8": those above 1."""
        return ", ".join(f"{each} {getattr(self.choice.sizes, each)}" for each in _shown(self.choice))

    def text(self) -> str:
        """The file: what it is for, then one flag a line."""
        grouped, repeated = self.choice.grouped, self.choice.repeated
        nodes = self.task.cluster.num_gpus // self.task.cluster.gpus_per_node
        cluster = f"{self.task.cluster.num_gpus} H100 ({nodes} node{'s' * (nodes > 1)})"
        lines = [
            f"# {MODELS[self.task.model.name]} on {cluster}: {self.sizes}. GPU only; not run on a GPU yet.",
            f"# Expected: {grouped.step.total:.2f} s a step instead of {repeated.step.total:.2f} s, or of "
            f"{self.best_repeated:.2f} s with other sizes; {grouped.memory.total / GIB:.1f} GiB a GPU.",
            "# Written by `python examples/recipes.py`, see README.md here.",
        ]
        if self.task.model.experts:
            lines.append("# For Megatron-LM's scripts (PROGRAM of torchrun_multinode.sh): `train` runs no experts yet.")
        return "\n".join([*lines, *self.flags()]) + "\n"

    def flags(self) -> list[str]:
        """Flags with their values."""
        line = train_command_line(self.task, "MODEL", self.choice)
        words = shlex.split(line.partition("ROLLOUTS.jsonl ")[2] or line.partition("script: ")[2])
        flags: list[str] = _architecture(self.task.model) if self.task.model.experts else []
        for word in words:
            if word.startswith("--"):
                flags.append(word)
            else:
                flags[-1] += f" {word}"
        return flags

    def row(self) -> list[str]:
        """Of the table."""
        grouped, same = self.choice.grouped.step.total, self.choice.repeated.step.total
        return [
            MODELS[self.task.model.name],
            str(self.task.cluster.num_gpus),
            self.sizes,
            f"{self.choice.max_tokens:,}",
            self.choice.recompute,
            f"{self.choice.grouped.memory.total / GIB:.1f}",
            f"{grouped:.2f}",
            f"{same:,.2f} ({same / grouped:.2f}x)",
            f"{self.best_repeated:,.2f} (**{self.best_repeated / grouped:.2f}x**)",
            f"{bounds(self.task)['FLOPs']:.2f}x",
            f"[`{self.name}`]({self.name})",
        ]


def bounds(task: Task) -> dict[str, float]:
    """What repeated prefixes take over what groups do, in rows, attention area and FLOPs."""
    grouped, repeated = (
        sum((count(group) for group in task.groups), Workload()) for count in (Workload.of_group, Workload.repeated)
    )
    flops = task.model.active_size.step_flops
    return {
        "rows": repeated.rows / grouped.rows,
        "attention": repeated.pairs / grouped.pairs,
        "FLOPs": flops(repeated) / flops(grouped),
    }


def plan(name: str, num_gpus: int) -> Recipe:
    """The estimator's quickest choice for a model on so many H100. Raises ValueError where nothing fits."""
    lengths = Lengths.parse(PROMPT), Lengths.parse(RESPONSE)
    groups = draw_groups(*lengths, group_size=GROUP_SIZE, num_groups=NUM_GROUPS, seed=0)
    task = Task(PRESETS[name], groups, Cluster(find_device(DEVICE), num_gpus))
    found = search(task)
    assert found.best_repeated is not None
    return Recipe(task, found.choices[0], found.best_repeated.repeated.step.total)


def plan_all(names: list[str]) -> tuple[list[Recipe], list[str]]:
    """The recipes, and a line for each cluster that is too small."""
    recipes, misfits = [], []
    for name in names:
        for gpus in GPUS:
            try:
                recipes.append(plan(name, gpus))
            except ValueError as error:
                misfits.append(f"{MODELS[name]} on {gpus} H100: {error}.")
                recipes.append(plan(name, 2 * gpus))
    return recipes, misfits


def page(recipes: list[Recipe], misfits: list[str]) -> str:
    """examples/recipes/README.md."""
    most = bounds(recipes[0].task)
    columns = ["model", "H100", "sizes", "rows", "recompute", "GiB", "step, s", "repeated, same sizes",
               "repeated, own best sizes", "bound", "recipe"]  # fmt: skip
    table = [columns, ["---"] * len(columns), *(recipe.row() for recipe in recipes)]
    lines = [
        "# Recipes",
        "",
        "Flags for public models on H100. **GPU only; not run on a GPU yet**: sizes are the quickest that the",
        "estimator fits into 90% of the memory, times are modelled from data sheets and were not measured.",
        "",
        f"A step has {NUM_GROUPS} prompts of {PROMPT} tokens, each with {GROUP_SIZE} responses of `{RESPONSE}`",
        f"tokens. Repeated prefixes have {most['rows']:.2f}x the rows and {most['attention']:.2f}x the attention area.",
        "The bound is the ratio of FLOPs; a step stays below it by what does not shrink with them: optimizer,",
        "communication, bubble.",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *(f"{line}\n" for line in misfits),
        "The launchers in [`examples/launch`](../launch) take any of these files as `RECIPE`. A response longer than",
        "the rows of a micro-batch is refused by `train`, with the size that it needs. `--use-te` needs Transformer",
        "Engine (`megatron-prefix[te]`). `train` runs no experts yet: `*.megatron-lm.args` are for a script of",
        "Megatron-LM, which wants its data and lengths besides; prefix groups with experts are untested.",
        "",
        "```bash",
        "python examples/recipes.py  # writes this page and the recipes anew",
        "megatron-prefix plan --model qwen3-8b --num-gpus 64 --groups-per-step 512  # one of them, with the next best",
        "```",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the recipes and their page."""
    parser = argparse.ArgumentParser(description="Write examples/recipes.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="Folder of the recipes.")
    out = parser.parse_args().out
    recipes, misfits = plan_all(list(MODELS))
    out.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        (out / recipe.name).write_text(recipe.text(), encoding="utf-8")
    (out / "README.md").write_text(page(recipes, misfits), encoding="utf-8")
    sys.stdout.write(f"{len(recipes)} recipes and their page are in {out}\n")


def _shown(choice: Choice) -> list[str]:
    sizes = asdict(choice.sizes)
    return [name for name in SIZES if sizes[name] > 1]


def _architecture(model: PlannedModel) -> list[str]:
    """Megatron-LM's flags of a model with experts; what prefix groups refuse (auxiliary loss, dropout) is off."""
    config, experts = model.config, model.experts
    assert experts is not None and config.norm == "rmsnorm" and config.activation == "swiglu" and config.qk_layernorm
    values = {
        "num-layers": config.num_layers,
        "hidden-size": config.hidden_size,
        "num-attention-heads": config.num_attention_heads,
        "num-query-groups": config.groups,
        "kv-channels": config.channels,
        "ffn-hidden-size": config.ffn_hidden_size * experts.experts_per_token,
        "moe-ffn-hidden-size": config.ffn_hidden_size,
        "num-experts": experts.num_experts,
        "moe-router-topk": experts.experts_per_token,
        "moe-router-load-balancing-type": "none",
        "moe-aux-loss-coeff": 0.0,
        "moe-token-dispatcher-type": "alltoall",
        "max-position-embeddings": config.max_position_embeddings,
        "position-embedding-type": "rope",
        "rotary-base": round(config.rope_base),
        "normalization": "RMSNorm",
        "norm-epsilon": config.norm_epsilon,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    switches = ["group-query-attention", "moe-grouped-gemm", "swiglu", "qk-layernorm", "disable-bias-linear"]
    switches += [] if config.tied_embeddings else ["untie-embeddings-and-output-weights"]
    return [*(f"--{name} {value}" for name, value in values.items()), *(f"--{name}" for name in switches), "--bf16"]


if __name__ == "__main__":
    main()
