"""Bad input to `train` and `verify`: exit code 2 and one clear message, before any work, with nothing half-written."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.mcore.checkpoint import load_config
from tests.cli_runs import MODEL, Arguments, Run, one_line, run_cli, torchrun, write_groups, write_model

pytestmark = pytest.mark.ci_newest

GROUP: dict[str, Any] = {
    "group_id": "g",
    "prompt": [1, 2, 3],
    "responses": [{"tokens": [4, 5], "reward": 1.0}, {"tokens": [6], "reward": 0.0}],
}


@dataclass(frozen=True)
class Folder:
    """Good files to make one thing wrong in."""

    path: Path

    def train(self, *arguments: str | Path, rollouts: Path | None = None, model: Path | None = None) -> Arguments:
        files = ("--model", model or self.path / "model.json", "--rollouts", rollouts or self.path / "rollouts.jsonl")
        save = ("--save", self.path / "out", "--metrics", self.path / "metrics.jsonl", "--steps", "1", "--json")
        return ("train", *files, *save, *arguments)

    def rollouts(self, *texts: str) -> Path:
        path = self.path / f"bad{len(list(self.path.glob('bad*')))}.jsonl"
        path.write_text("\n".join(texts))
        return path

    def group(self, **changes: Any) -> Path:
        """A rollouts file whose second line has ``changes``."""
        return self.rollouts(json.dumps(GROUP | {"group_id": "good"}), json.dumps(GROUP | changes))

    def sample(self, **changes: Any) -> str:
        return json.dumps({"group_id": "g", "prompt": [1, 2], "response": [3], "reward": 0.5} | changes)

    def checkpoint(self, **changes: Any) -> Path:
        """A copy of a good checkpoint whose model.json has ``changes``."""
        path = self.path / f"checkpoint{len(list(self.path.glob('checkpoint*')))}"
        shutil.copytree(self.path / "saved" / "step_000001", path)
        (path / "model.json").write_text(json.dumps(json.loads((path / "model.json").read_text()) | changes))
        return path

    def damaged(self) -> Path:
        path = self.checkpoint()
        shutil.rmtree(path / "weights")
        return path

    def wider_model(self) -> Path:
        """Another model's model.json."""
        (self.path / "wider").mkdir(exist_ok=True)
        return write_model(self.path / "wider", ffn_hidden_size=96)


Case = tuple[Callable[[Folder], Arguments], str]
CASES: dict[str, Case] = {
    # ---- what to run
    "unknown impl": (
        lambda f: f.train("--impl", "fast"), "'fast' is not one of 'auto', 'reference', 'flex', 'sdpa', 'te', "
    ),
    "no files": (lambda f: ("verify",), "give either --tiny, or --rollouts and --model"),
    "tiny and files": (
        lambda f: ("verify", "--tiny", "--rollouts", f.path / "rollouts.jsonl"),
        "give either --tiny, or --rollouts and --model",
    ),
    "no model": (
        lambda f: ("verify", "--rollouts", f.path / "rollouts.jsonl"),
        r"--model is missing: a checkpoint folder \(from `import` or `train`\) or a model.json",
    ),
    "missing model": (lambda f: f.train(model=f.path / "none"), r"Path '\S+none' does not exist"),
    "missing rollouts": (lambda f: f.train(rollouts=f.path / "none"), "none: cannot read rollouts: No such file"),
    "no checkpoint folder": (lambda f: f.train(model=f.path), "has no state.json: it is damaged or none, make"),
    "tolerance": (lambda f: ("verify", "--tiny", "--tolerance", "0"), "--tolerance must be above 0, got 0.0"),
    "tolerance NaN": (lambda f: ("verify", "--tiny", "--tolerance", "nan"), "--tolerance must be above 0, got nan"),
    "bf16 steps": (
        lambda f: ("verify", "--tiny", "--dtype", "bf16", "--steps", "1"),
        "bf16 is judged against the plain path's own error: leave out --steps and --tolerance",
    ),
    "resume without save": (
        lambda f: ("train", "--model", f.path / "model.json", "--rollouts", f.path / "rollouts.jsonl", "--resume"),
        "--resume, --save-every and --async-save need --save, the folder",
    ),
    "plot alone": (lambda f: f.train("--plot", f.path / "x.png"), "--plot draws the comparison: add --compare 1"),
    # ---- rollouts
    "empty prompt": (
        lambda f: f.train(rollouts=f.group(prompt=[])),
        r"bad\d+.jsonl:2: group 'g', prompt is empty; it needs at least one token",
    ),
    "empty response": (
        lambda f: f.train(rollouts=f.group(responses=[{"tokens": [], "reward": 1.0}])),
        r"jsonl:2: group 'g', response 0 is empty; it needs at least one token",
    ),
    "no responses": (lambda f: f.train(rollouts=f.group(responses=[])), r"jsonl:2: group 'g' has no responses; drop"),
    "token outside": (
        lambda f: f.train(rollouts=f.group(prompt=[1, 64])),
        r"bad3\.jsonl:2: prompt, position 1: token id 64 is outside the vocabulary of 64 tokens; tokenize with",
    ),
    "negative token": (
        lambda f: f.train(rollouts=f.group(prompt=[1, -2])),
        r"jsonl:2: group 'g', prompt, position 1: a token id must be an int of 0 or more, got -2; pass",
    ),
    "reward missing": (
        lambda f: f.train(rollouts=f.group(responses=[{"tokens": [4]}])), r"jsonl:2: response 0: missing key 'reward'"
    ),
    "reward NaN": (
        lambda f: f.train(rollouts=f.group(responses=[{"tokens": [4], "reward": float("nan")}])),
        r"jsonl:2: NaN is not a number that JSON knows; rewards and log_probs must be finite",
    ),
    "reward text": (
        lambda f: f.train(rollouts=f.group(responses=[{"tokens": [4], "reward": "1"}])),
        r"jsonl:2: group 'g', reward 0 must be a number, got '1'; score the response again or drop it",
    ),
    "two prompts": (
        lambda f: f.train(rollouts=f.rollouts(f.sample(), f.sample(prompt=[1, 9]))),
        r"jsonl:2: different prompts under one group 'g': position 1 is 2 in line 1 and 9 in line 2 .* own group_id",
    ),
    "truncated line": (
        lambda f: f.train(rollouts=f.rollouts(f.sample(), f.sample()[:-20])),
        r"bad\d+.jsonl:2: not JSON: .* the line is cut short \(truncated\?\): write it again",
    ),
    "empty file": (lambda f: f.train(rollouts=f.rollouts("")), r"jsonl:1: the file holds no rollouts; write at least"),
    "log-probs of some": (
        lambda f: f.train(rollouts=f.rollouts(
            json.dumps(GROUP), f.sample(group_id="s", log_probs=[-1.0]))),
        r"group 0 \('g'\) lacks sampler log_probs that others have; give them for all rollouts or for none",
    ),
    "response larger than a micro-batch": (
        lambda f: f.train("--max-tokens-per-microbatch", "1", rollouts=f.group()),
        r"group 0 \('good'\): node 1 has 2 tokens, --max-tokens-per-microbatch is 1; raise it to at least 2, or",
    ),
    "prefix larger than a micro-batch": (
        lambda f: ("verify", "--tiny", "--max-tokens-per-microbatch", "8"),
        r"group 0: its prefix has 11 rows, --max-tokens-per-microbatch is 8; raise it to at least 11",
    ),
    "too long": (
        lambda f: f.train(rollouts=f.group(prompt=[1] * 63)),
        r"group 1 \('g'\) has a sequence of 65 tokens, the model takes 64; shorten or drop it",
    ),
    "too long, verify": (
        lambda f: ("verify", "--model", f.path / "model.json", "--rollouts", f.group(prompt=[1] * 63)),
        "has a sequence of 65 tokens, the model takes 64",
    ),
    # ---- sizes
    "tp": (lambda f: f.train("--tp", "2"), r"tp=2 .* does not divide the world size 1: start a multiple of 2 proc"),
    "dp": (lambda f: f.train("--dp", "3"), r"dp=3 needs 3 processes, but the world size is 1: start 3 .* set dp=1"),
    "dp, verify": (lambda f: ("verify", "--tiny", "--dp", "2"), "dp=2 needs 2 processes, but the world size is 1"),
    "pp": (lambda f: f.train("--pp", "2"), "pp=2 .* does not divide the world size 1: start a multiple of 2 proc"),
    "vpp": (lambda f: f.train("--vpp", "2"), "vpp=2 needs pp > 1; got pp=1: leave vpp out or raise pp"),
    "cp": (lambda f: f.train("--cp", "2"), "cp=2 .* does not divide the world size 1: start a multiple of 2 proc"),
    "sequence parallel": (lambda f: f.train("--sequence-parallel"), "--sequence-parallel needs --tp of 2 or more"),
    "tp 0": (lambda f: f.train("--tp", "0"), "0 is not in the range x>=1"),
    # ---- checkpoints
    "edited checkpoint": (
        lambda f: f.train(model=f.checkpoint(ffn_hidden_size=96)),
        r"checkpoint \S+: tensor \S+linear_fc1\S* has shape \(2, 96, 32\), expected \(2, 192, 32\)",
    ),
    "fewer layers": (
        lambda f: f.train(model=f.checkpoint(num_layers=1)),
        r"checkpoint \S+: tensor \S+ has shape \(2, .* expected \(1, ",
    ),
    "damaged checkpoint": (
        lambda f: f.train(model=f.damaged()), "holds no megatron-core weights: .* damaged, make it again"
    ),
    "unknown key": (
        lambda f: f.train(model=f.checkpoint(layers=3)), r"model.json: unknown keys \['layers'\], missing keys none"
    ),
    "resume into another shape": (
        lambda f: ("train", "--model", f.wider_model(), "--rollouts", f.path / "rollouts.jsonl", "--save",
                   f.path / "saved", "--resume"),
        r"step_000001 is of another model: ffn_hidden_size is 48 there, expected 96",
    ),
    # ---- settings
    "clip": (lambda f: f.train("--clip-low", "1.5"), "clip_low must be a number from 0 to 1, got 1.5"),
    "clip NaN": (lambda f: f.train("--clip-high", "nan"), "clip_high must be a finite number of 0 or more, got nan"),
    "KL": (lambda f: f.train("--kl-coef", "-1"), "kl_coef must be a finite number of 0 or more, got -1.0"),
    "estimator": (lambda f: f.train("--kl-estimator", "k4"), "'k4' is not one of 'k1', 'k2', 'k3'"),
    "constant": (
        lambda f: f.train("--aggregation", "constant"),
        "aggregation 'constant' needs constant_length, an int of 1 or more .* got None",
    ),
    "constant length alone": (
        lambda f: f.train("--constant-length", "8"),
        "constant_length 8 is used by aggregation 'constant' only, .* leave it out",
    ),
    "cap": (
        lambda f: f.train("--importance-cap", "0"),
        "importance_cap must be None .* or a finite number above 0, got 0.0",
    ),
    "cap without log-probs": (
        lambda f: f.train("--importance-cap", "2"),
        "--importance-cap 2.0 needs the sampler's log_probs, .*rollouts.jsonl has none; leave it out",
    ),
    "learning rate": (lambda f: f.train("--lr", "-1"), "learning_rate must be at least 0, got -1.0"),
    "learning rate NaN": (lambda f: f.train("--lr", "nan"), "learning_rate must be at least 0, got nan"),
    "temperature": (lambda f: f.train("--temperature", "0"), "temperature must be above 0, got 0.0"),
    "fp64 clipping": (
        lambda f: f.train("--dtype", "fp64"),
        "clip_grad=1.0: megatron-core clips fp32 gradients only; set it to 0 for fp64",
    ),
    "flash on the CPU": (
        lambda f: f.train("--impl", "flash"),
        "impl='flash' runs on CUDA, the tensors are on cpu; use impl='sdpa'",
    ),
    "flash on the CPU, verify": (
        lambda f: ("verify", "--tiny", "--impl", "flash"), "impl='flash' runs on CUDA, the tensors are on cpu"
    ),
    "flash on the CPU, rollout": (
        lambda f: ("rollout", "--model", f.path / "model.json", "--task", "chain_sum:1", "--out", f.path / "out.jsonl",
                   "--impl", "flash"),
        "impl='flash' runs on CUDA, the tensors are on cpu",
    ),
    "flash on the CPU, bench step": (
        lambda f: ("bench", "step", "--impl", "flash"), "impl='flash' runs on CUDA, the tensors are on cpu"
    ),
    "flash on the CPU, bench attention": (
        lambda f: ("bench", "attention", "--impl", "flash"), "impl='flash' runs on CUDA, the tensors are on cpu"
    ),
    "flex on the CPU": (
        lambda f: f.train("--impl", "flex"),
        "impl='flex' has no backward on the CPU, because torch has none; use impl='sdpa'",
    ),
    "flex on the CPU, bench attention": (
        lambda f: ("bench", "attention", "--impl", "flex"), "impl='flex' has no backward on the CPU"
    ),
    "flex in parts, bench split": (
        lambda f: ("bench", "split", "--impl", "flex"), "impl='flex' holds the whole mask and cannot be split"
    ),
    "reference, bench attention": (
        lambda f: ("bench", "attention", "--impl", "reference"), "'reference' is not one of 'auto', 'flex', 'sdpa'"
    ),
    "reference over ranks": (
        lambda f: f.train("--impl", "reference", "--cp", "2"),
        "impl='reference' holds the whole mask and cannot be split over ranks or parts; use 'auto'",
    ),
    "reference in parts": (
        lambda f: f.train("--impl", "reference", "--max-tokens-per-microbatch", "4", rollouts=f.group()),
        "impl='reference' holds the whole mask and cannot be split over ranks or parts; use 'auto'",
    ),
    # ---- outputs
    "save in a file": (
        lambda f: f.train("--save", f.path / "model.json" / "out"),
        r"--save: cannot write to the folder \S+ \(Not a directory\); name one that can be written",
    ),
    "save is a file": (lambda f: f.train("--save", f.path / "model.json"), "is a file"),
    "metrics in a file": (
        lambda f: f.train("--metrics", f.path / "model.json" / "m.jsonl"), "--metrics: cannot write to the folder"
    ),
    "plot in a file": (
        lambda f: f.train("--compare", "1", "--plot", f.path / "model.json" / "p.png"),
        "--plot: cannot write to the folder",
    ),
}  # fmt: skip
if find_spec("transformer_engine") is None:
    CASES["te"] = (
        lambda f: f.train("--use-te"),
        r"--use-te needs Transformer Engine: pip install 'megatron-prefix\[te\]', or leave it out",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("errors")
    write_model(path)
    write_groups(path)
    return Folder(path)


@pytest.fixture(scope="module")
def runs(folder: Folder) -> dict[str, Run]:
    """A good run, then every case, in one new process."""
    good = folder.train("--save", folder.path / "saved", "--metrics", folder.path / "good.jsonl")
    ((saved,),) = run_cli(good)
    assert saved.exit_code == 0, saved.crash + saved.stderr
    results = run_cli(*(make(folder) for make, _ in CASES.values()))
    return dict(zip(CASES, (run for (run,) in results), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_clear_message(name: str, folder: Folder, runs: dict[str, Run]) -> None:
    run = runs[name]
    assert not run.crash, run.crash
    assert run.exit_code == 2 and run.stdout == "", run.stderr
    assert run.stderr.count("Error: ") == 1 and "Traceback" not in run.stderr
    message = one_line(run.stderr).partition("Error: ")[2]
    assert re.search(CASES[name][1], message), message


def test_refused_before_any_work(runs: dict[str, Run]) -> None:
    """No progress bar, no model shown: nothing had begun."""
    for name, run in runs.items():
        assert "━" not in run.stderr and "layers, hidden" not in run.stderr, name


def test_nothing_is_half_written(folder: Folder, runs: dict[str, Run]) -> None:
    assert not (folder.path / "metrics.jsonl").exists() and not (folder.path / "x.png").exists()
    assert not (folder.path / "out").exists() and not (folder.path / "out.jsonl").exists()
    assert [path.name for path in (folder.path / "saved").iterdir()] == ["step_000001"]
    assert load_config(folder.path / "saved" / "step_000001").to_dict().items() >= MODEL.items()
    assert not list(folder.path.rglob("*.incomplete"))


def test_ranks_leave_the_message_to_rank_0(folder: Folder) -> None:
    """What torchrun shows: the message once, and a code that is not 0. Rank 1 is ended while it waits."""
    run = torchrun(2, *folder.train("--tp", "3"))
    assert run.returncode != 0
    assert one_line(run.stderr).count("does not divide the world size 2: start a multiple of 3 processes") == 1
    assert run.stdout == "" and not (folder.path / "metrics.jsonl").exists()


def test_a_rank_alone_with_its_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from megatron_prefix.cli import main as frame

    waited: list[float] = []
    monkeypatch.setattr(frame.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(frame.main, ["verify"])
    assert waited == [frame.PATIENCE_S] and result.exit_code == 2
    assert "give either --tiny, or --rollouts and --model" in result.stderr
