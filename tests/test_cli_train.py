"""`megatron-prefix train`: resuming, packs, losses, the comparison, and what it prints and writes."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_prefix.checkpoint_folder import complete, files_of, sums_of
from megatron_prefix.epoch_order import EpochOrder
from megatron_prefix.mcore.checkpoint import load_config, load_state
from megatron_prefix.packing import pack_groups
from megatron_prefix.rollouts import read_rollouts
from megatron_prefix.splitting import plan_splits
from tests.cli_runs import MODEL, Arguments, Run, one_line, run_cli, write_groups, write_model

SPLIT = ("--max-tokens-per-microbatch", "12")  # as many rows as the longest prefix has, so that most groups are split
COMMON = ("--groups-per-step", "2", "--lr", "1e-2", "--seed", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_model(folder)
    write_groups(folder, log_probs=True)
    return folder


def train(files: Path, *arguments: str | Path) -> Arguments:
    return ("train", "--model", files / "model.json", "--rollouts", files / "rollouts.jsonl", *COMMON, *arguments)


def succeed(runs: Sequence[Sequence[Run]]) -> list[Run]:
    """Rank 0 of invocations of which none failed."""
    for ranks in runs:
        for run in ranks:
            assert run.exit_code == 0 and not run.crash, run.crash + run.stderr
    return [ranks[0] for ranks in runs]


PACKING = ("balance", "microbatches", "groups_split")  # how a batch is cut
MEASURED = ("step_seconds", "tokens_per_second", "memory_bytes")  # what no two runs have alike


def lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of every step, without those that depend on the machine."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop(name) > 0 for line in found for name in MEASURED)
    return found


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, optimizer state included, by its path."""
    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "weights", whole)
    return dict(_leaves(torch.load(whole, weights_only=False), ""))


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors."""
    parts = ("/embedding.", "/decoder.", "/output_layer.")
    found = {name: value for name, value in tensors(checkpoint).items() if name.startswith(parts)}
    assert len(found) == 9 and "/decoder.layers.self_attention.linear_qkv.weight" in found
    return found


def _leaves(tree: Any, path: str) -> Any:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}/{key}")


def in_two_parts(files: Path, out: Path, name: str, *arguments: str, steps: int = 4) -> list[Arguments]:
    """The command lines of a run of ``steps`` steps, and of one that is stopped in the middle and resumed."""
    common = (*arguments, "--json")
    halves = ("--save", out / f"{name}-halves", "--metrics", out / f"{name}-halves.jsonl")
    return [
        train(files, "--steps", f"{steps}", "--save", out / f"{name}-whole", "--metrics", out / f"{name}-whole.jsonl",
              *common),
        train(files, "--steps", f"{steps // 2}", *halves, *common),
        train(files, "--steps", f"{steps}", "--resume", *halves, *common),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(files: Path) -> dict[str, Run]:
    """Runs of one process, all in one new process."""
    out = files / "one"
    resumable = in_two_parts(files, out, "plain", "--kl-coef", "0.1")
    resumable += in_two_parts(files, out, "distributed", "--distributed-optimizer", "--weight-decay", "0.1", steps=2)
    invocations: dict[str, Arguments] = dict(zip(
        ("whole", "first half", "second half", "whole, distributed", "first, distributed", "second, distributed"),
        resumable, strict=True,
    ))  # fmt: skip
    base = ("--steps", "3", "--metrics")
    variants: dict[str, tuple[str, ...]] = {
        "base": (),
        "packs": ("--max-tokens-per-microbatch", "25"),
        "log entropy": ("--log-entropy",),
        "split": SPLIT,
        "split, kl": (
            *SPLIT,
            "--kl-coef",
            "0.5",
            "--kl-estimator",
            "k2",
            "--prefix-activations",
            "recompute",
            "--prefix-grad-dtype",
            "param",
        ),
        "chunks": ("--chunk-rows", "3", "--recompute", "full"),
        "kl": ("--kl-coef", "0.5", "--kl-estimator", "k2"),
        "gspo": ("--ratio", "sequence", "--aggregation", "sequence", "--clip-low", "3e-4", "--clip-high", "4e-4"),
        "constant": ("--aggregation", "constant", "--constant-length", "8"),
        "sequence": ("--aggregation", "sequence"),
        "importance": ("--importance-cap", "1.1"),
        "entropy": ("--entropy-coef", "0.2"),
        "temperature": ("--temperature", "0.5"),
        "sgd": ("--optimizer", "sgd"),
        "clipped": ("--clip-grad", "1e-3"),
    }
    for name, arguments in variants.items():
        invocations[name] = train(files, *base, out / f"{name}.jsonl", *arguments)
    settings = ("--temperature", "0.5", "--entropy-coef", "0.1", "--kl-coef", "0.1", "--importance-cap", "1.1")
    invocations["compare"] = train(
        files, "--steps", "1", "--compare", "3", "--plot", out / "pictures" / "plot.png", "--json", *settings
    )
    invocations["compare, distributed"] = train(
        files, "--steps", "0", "--compare", "1", "--json", "--distributed-optimizer"
    )
    return dict(zip(invocations, succeed(run_cli(*invocations.values())), strict=True))


@pytest.fixture(scope="module")
def two_processes(files: Path, one_process: dict[str, Run]) -> dict[str, Run]:
    """Runs of two processes, all in one new pair of them."""
    out = files / "two"
    trained = ("--model", files / "one" / "plain-whole" / "step_000004", "--steps", "3", "--kl-coef", "0.1")
    invocations = in_two_parts(files, out, "dp", "--dp", "2", "--distributed-optimizer", "--overlap-grad-reduce")
    invocations.append(train(files, "--steps", "2", "--save", out / "tp", "--kl-coef", "0.1", "--tp", "2",
                             "--sequence-parallel"))  # fmt: skip
    invocations.append(train(files, "--steps", "3", "--metrics", out / "dp.jsonl", "--compare", "1", "--json"))
    invocations += in_two_parts(files, out, "pp", "--pp", "2", *SPLIT, steps=2)
    invocations.append(train(files, *trained, "--metrics", out / "from-trained-dp.jsonl", "--dp", "2"))
    invocations.append(train(files, *trained, "--metrics", out / "from-trained-pp.jsonl", "--pp", "2", *SPLIT,
                             "--compare", "3", "--json"))  # fmt: skip
    runs = succeed(run_cli(*invocations, world_size=2))
    names = ("whole", "first half", "second half", "tp", "compare", "pp, whole", "pp, first", "pp, second", "dp", "pp")
    return dict(zip(names, runs, strict=True))


# ---- resume


def assert_same(whole: Path, halves: Path, step: str) -> None:
    """The same tensors and metrics, to the last bit."""
    expected, found = tensors(whole / step), tensors(halves / step)
    assert expected.keys() == found.keys() and len(found) >= 3 * 9  # the weights and Adam's two moments
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert lines(Path(f"{whole}.jsonl")) == lines(Path(f"{halves}.jsonl"))
    assert load_state(whole / step) == load_state(halves / step)
    assert load_config(whole / step) == load_config(halves / step)


def test_stopped_and_resumed_is_the_same_run(files: Path, one_process: dict[str, Run]) -> None:
    whole, halves = files / "one" / "plain-whole", files / "one" / "plain-halves"
    assert_same(whole, halves, "step_000004")
    assert [line["step"] for line in lines(Path(f"{halves}.jsonl"))] == [1, 2, 3, 4]
    assert sorted(path.name for path in halves.iterdir() if path.is_dir()) == ["step_000002", "step_000004"]
    assert one_process["second half"].json["resumed_from"] == 2
    # and the second half has moved the parameters
    before, after = weights(halves / "step_000002"), weights(halves / "step_000004")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_the_distributed_optimizer_resumes(files: Path, one_process: dict[str, Run]) -> None:
    assert_same(files / "one" / "distributed-whole", files / "one" / "distributed-halves", "step_000002")


def test_two_data_parallel_ranks_resume(files: Path, two_processes: dict[str, Run]) -> None:
    assert_same(files / "two" / "dp-whole", files / "two" / "dp-halves", "step_000004")
    assert two_processes["second half"].json["resumed_from"] == 2


def test_two_pipeline_stages_resume(files: Path, two_processes: dict[str, Run]) -> None:
    assert_same(files / "two" / "pp-whole", files / "two" / "pp-halves", "step_000002")
    assert two_processes["pp, second"].json["resumed_from"] == 1


def test_saved_at_tp_2_and_resumed_at_tp_1(files: Path, one_process: Any, two_processes: Any, tmp_path: Path) -> None:
    save = tmp_path / "tp"
    shutil.copytree(files / "two" / "tp", save)
    (run,) = succeed(run_cli(train(files, "--steps", "4", "--save", save, "--resume", "--kl-coef", "0.1", "--json")))
    assert run.json["resumed_from"] == 2
    before, found = weights(save / "step_000002"), weights(save / "step_000004")
    for name, value in weights(files / "one" / "plain-whole" / "step_000004").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert (before[name] - value).abs().max() > 1e-3, name


def test_saved_on_two_data_parallel_ranks_and_resumed_on_one(files: Path, two_processes: Any, tmp_path: Path) -> None:
    """In the middle of an epoch: the steps that are left have the same groups."""
    save, metrics = tmp_path / "dp", tmp_path / "metrics.jsonl"
    shutil.copytree(files / "two" / "dp-halves" / "step_000002", save / "step_000002")
    more = ("--save", save, "--resume", "--distributed-optimizer", "--metrics", metrics)
    succeed(run_cli(train(files, "--steps", "4", *more)))
    for name, value in weights(files / "two" / "dp-whole" / "step_000004").items():
        torch.testing.assert_close(weights(save / "step_000004")[name], value, rtol=1e-3, atol=1e-4, msg=name)
    whole = lines(files / "two" / "dp-whole.jsonl")[2:]
    assert [(line["step"], line["reward"]) for line in lines(metrics)] == [
        (line["step"], pytest.approx(line["reward"])) for line in whole
    ]


def old_checkpoint(save: Path) -> Path:
    """A folder with a copy of the checkpoint in ``save`` that does not say which model it began with."""
    copy = save.parent / "old" / "step_000002"
    shutil.copytree(save / copy.name, copy)
    state = json.loads((copy / "state.json").read_text())
    del state["model_fingerprint"]
    (copy / "state.json").write_text(json.dumps(state))
    beside = copy.rename(copy.with_name("beside"))
    complete(beside, copy, sums_of(beside, files_of(beside)))
    return copy.parent


def resume_refusals(files: Path, save: Path) -> dict[str, tuple[Arguments, str]]:
    other = write_groups(files, seed=9, name="other.jsonl")
    copy = files / "copy.jsonl"
    shutil.copyfile(files / "rollouts.jsonl", copy)
    again = ("--steps", "3", "--save", save, "--resume")
    start = train(files, *again)
    return {
        "seed": ((*start, "--seed", "4"), "was saved with seed 3, this run has seed 4; use the same"),
        "groups": ((*start, "--groups-per-step", "3"), "saved with groups_per_step 2, this run has groups_per_step 3"),
        "optimizer": ((*start, "--optimizer", "sgd"), "saved with optimizer adam, this run has optimizer sgd"),
        "distributed": (
            (*start, "--distributed-optimizer"),
            "saved with distributed_optimizer False, this run has distributed_optimizer True; use the same",
        ),
        "dtype": ((*start, "--dtype", "bf16"), "saved with dtype fp32, this run has dtype bf16; use the same"),
        "rollouts": (
            (*start, "--rollouts", other),
            f"was trained on {files / 'rollouts.jsonl'}, which had other contents than {other} has; give that file, or",
        ),
        "model": (
            (*start, "--model", save / "step_000002"),
            f"step_000002 began with --model {files / 'model.json'}, and --model {save / 'step_000002'} has other "
            "weights, so that old log-probs would be others; give the model that the run began with, or start anew "
            "with the checkpoint as --model and another --save",
        ),
        "before fingerprints": (
            train(files, "--steps", "3", "--save", old_checkpoint(save), "--resume"),
            "was not saved by this version of `train`, its state has no model_fingerprint; start anew",
        ),
        "not resumed": (
            train(files, "--steps", "3", "--save", save),
            "already holds step_000002; add --resume to go on, or name another folder",
        ),
        "same contents": ((*start, "--rollouts", copy, "--steps", "2"), "nothing to do"),
    }


def test_a_changed_run_is_not_resumed(files: Path, one_process: dict[str, Run], tmp_path: Path) -> None:
    save = tmp_path / "halves"
    shutil.copytree(files / "one" / "plain-halves" / "step_000002", save / "step_000002")
    cases = resume_refusals(files, save)
    runs = dict(zip(cases, (run for (run,) in run_cli(*(line for line, _ in cases.values()))), strict=True))
    for name, (_, message) in cases.items():
        run = runs[name]
        assert not run.crash, run.crash
        assert message in one_line(run.stderr), f"{name}: {run.stderr}"
        assert run.exit_code == (0 if name == "same contents" else 2)
        assert "━" not in run.stderr or name == "same contents", "refused before any work"
    assert [path.name for path in save.iterdir()] == ["step_000002"]


def test_a_resumed_run_uses_the_settings_that_it_is_given(files: Path, one_process: Any, tmp_path: Path) -> None:
    """The learning rate, among others, is in the saved optimizer state too."""
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "halves"
    shutil.copytree(files / "one" / "plain-halves" / "step_000002", save / "step_000002")
    line = train(files, "--steps", "3", "--save", save, "--resume", "--metrics", metrics, "--kl-coef", "0.1")
    succeed(run_cli((*line, "--lr", "0")))
    before, after = weights(save / "step_000002"), weights(save / "step_000003")
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


# ---- the loss


def metrics_of(files: Path, name: str) -> list[dict[str, Any]]:
    found = lines(files / "one" / f"{name}.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    return found


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(
    files: Path, one_process: dict[str, Run], two_processes: dict[str, Run]
) -> None:
    groups = read_rollouts(files / "rollouts.jsonl")
    batches = [[groups[i] for i in step] for step in EpochOrder(len(groups), 2, seed=3).upcoming(3)]
    assert any(len(pack_groups(batch, max_tokens_per_pack=25)) == 2 for batch in batches)
    base = metrics_of(files, "base")
    for name in ("packs", "chunks", "split"):
        assert_close(base, metrics_of(files, name))
    assert_close(metrics_of(files, "kl"), metrics_of(files, "split, kl"))
    assert_close(base, lines(files / "two" / "dp.jsonl"))


def assert_close(base: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> None:
    for expected, found in zip(base, other, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert name in PACKING or found[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (name, found["step"])


def test_the_loss_does_not_depend_on_the_pipeline(files: Path, two_processes: dict[str, Run]) -> None:
    """From a checkpoint: random weights would be others, as each stage draws its own."""
    two, groups = files / "two", read_rollouts(files / "rollouts.jsonl")
    assert_close(lines(two / "from-trained-dp.jsonl"), lines(two / "from-trained-pp.jsonl"))
    splits = [split for split in plan_splits(groups, max_tokens_per_pack=12) if split]
    parts = sum(len(split.parts) for split in splits)
    assert len(splits) >= 3 and parts >= 5
    text = one_line(two_processes["pp"].stderr)
    assert "tp 1, pp 2, vpp 1, dp 1;" in text
    assert f"{len(splits)} of 5 groups are split, into {parts} parts; their prefixes run once" in text
    bubble = r"bubble 0\.\d\d \(even micro-batches: 0\.\d\d\), at most \d"
    assert re.search(rf"pipeline 2 stages, \d+ micro-batches \(\d+ groups? in \d+ parts\), {bubble}", text)
    assert "are split" not in two_processes["dp"].stderr and "bubble" not in two_processes["dp"].stderr


def test_compare_of_split_groups_on_two_stages(two_processes: dict[str, Run]) -> None:
    found = two_processes["pp"].json
    assert found["max_log_prob_diff"] < 1e-5 and 0 < found["max_grad_rel_diff"] < 1e-5
    assert found["rows_repeated"] > found["rows_grouped"] > 0


def test_metrics_lines(files: Path, one_process: dict[str, Run]) -> None:
    groups = read_rollouts(files / "rollouts.jsonl")
    steps = EpochOrder(len(groups), 2, seed=3).upcoming(3)
    for step, line in zip(steps, metrics_of(files, "base"), strict=True):
        batch = [groups[i] for i in step]
        rewards = [reward for group in batch for reward in group.rewards]
        assert line["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert line["rollouts"] == len(rewards)
        assert line["tokens"] == sum(len(g.prompt) - 1 + sum(map(len, g.responses)) for g in batch)
        assert line["tokens_repeated"] == sum(len(g.prompt) - 1 + len(r) for g in batch for r in g.responses)
        assert line["pairs"] == sum(len(tokens) for g in batch for tokens in g.responses)
        assert line["updated"] == 1 and line["grad_norm"] > 0 and line["nonfinite"] == 0
    first, *later = metrics_of(files, "base")
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["old_kl"] < 1e-12
    assert all(line["ratio_max"] > 1.01 for line in later)  # the old policy is the one at the start


@pytest.mark.parametrize(
    "name",
    ["kl", "gspo", "constant", "sequence", "importance", "entropy", "temperature", "sgd", "clipped"],
)
def test_every_setting_reaches_the_training(files: Path, one_process: dict[str, Run], name: str) -> None:
    base, found = metrics_of(files, "base"), metrics_of(files, name)
    assert all(line["updated"] == 1 and line["nonfinite"] == 0 for line in found)
    assert found[-1]["loss"] != pytest.approx(base[-1]["loss"], rel=1e-5)
    extra = {"kl": "kl", "entropy": "entropy", "importance": "importance_capped"}.get(name)
    assert extra is None or (extra in found[0] and extra not in base[0])


def test_entropy_is_measured_on_request(files: Path, one_process: dict[str, Run]) -> None:
    """And trains nothing."""
    found = metrics_of(files, "log entropy")
    assert all(0 < line.pop("entropy") < math.log(MODEL["vocab_size"]) for line in found)
    assert_close(metrics_of(files, "base"), found)


def test_kl_is_to_the_policy_at_the_start(files: Path, one_process: dict[str, Run]) -> None:
    first, *later = metrics_of(files, "kl")
    assert first["kl"] < 1e-12 and all(line["kl"] > 1e-4 for line in later)


# ---- the comparison


def test_compare_prints_saves_and_reports_its_numbers(files: Path, one_process: dict[str, Run]) -> None:
    run, found = one_process["compare"], one_process["compare"].json
    groups = read_rollouts(files / "rollouts.jsonl")[:3]
    assert found["rows_grouped"] == sum(len(g.prompt) - 1 + sum(map(len, g.responses)) for g in groups)
    assert found["rows_repeated"] == sum(len(g.prompt) - 1 + len(r) for g in groups for r in g.responses)
    assert found["max_log_prob_diff"] < 1e-5 and 0 < found["max_grad_rel_diff"] < 1e-5
    assert min(found[f"{what}_{way}"] for what in ("seconds", "peak_bytes") for way in ("repeated", "grouped")) > 0
    text = one_line(run.stderr)
    assert "repeated prefixes vs grouped" in text and "5/5" in text
    row = r"tokens executed │ {rows_repeated} │ {rows_grouped} │ (\d+\.\d\d)x"
    ratio = re.search(row.format(**found), text)
    assert ratio and float(ratio[1]) == round(found["rows_repeated"] / found["rows_grouped"], 2)
    for name in ("attention area", "step time (s)", "peak memory (MiB)", "max |difference| of log-probs",
                 "relative gradient difference"):  # fmt: skip
        assert name in text
    assert (files / "one" / "pictures" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_compare_under_the_distributed_optimizer_names_what_it_cannot_compare(one_process: dict[str, Run]) -> None:
    run = one_process["compare, distributed"]
    assert run.json["max_log_prob_diff"] < 1e-5 and run.json["max_grad_rel_diff"] is None
    assert "sharded: see verify" in run.stderr


def test_compare_on_two_ranks_feeds_both(two_processes: dict[str, Run]) -> None:
    found = two_processes["compare"].json
    assert found["max_log_prob_diff"] < 1e-5 and found["max_grad_rel_diff"] < 1e-5
    assert found["rows_repeated"] > found["rows_grouped"] > 0


# ---- output


def test_progress_and_paths_are_shown(files: Path, one_process: dict[str, Run]) -> None:
    text = one_line(one_process["whole"].stderr)
    assert "old log-probs" in text and "4/4" in text
    assert re.search(r"[\d,]+ tokens/s", text)
    assert "2 layers, hidden 32, fp32 on cpu, impl sdpa, tp 1, pp 1, vpp 1, dp 1; 5 groups, steps 0 to 4" in text
    assert "checkpoint: " in text and "step_000004" in text.replace(" ", "")
    assert one_process["whole"].json["steps"] == 4 and len(one_process["whole"].stdout.splitlines()) == 1


def test_only_rank_0_speaks(files: Path) -> None:
    line = train(files, "--steps", "1", "--json", "--metrics", files / "speaks.jsonl")
    ((first, second),) = run_cli(line, world_size=2)
    succeed([[first, second]])
    assert second.stdout == second.stderr == "" and first.json["steps"] == 1
    assert len(lines(files / "speaks.jsonl")) == 1
