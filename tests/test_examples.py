"""Examples run, and the commands that the README and examples/ show exist with the options that they give them."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest

from megatron_prefix import PrefixLayout
from megatron_prefix.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {".md", ".sh", ".py"}
OF_OTHERS = {"train_rl.py"}  # Megatron-LM's; test_patch_megatron_lm.py lets it parse what the example gives it
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("patches/*.md"), *(p for p in ROOT.glob("examples/**/*") if p.suffix in TEXTS)]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_mask_writes_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pictures" / "mask.png"
    monkeypatch.setattr(sys, "argv", ["mask.py", "--out", str(path)])
    example("mask").main()
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_the_mask_is_the_one_that_attention_computes() -> None:
    mask = example("mask")
    # a - b, c: rows 0-1 | 2-4 | 5
    calls = mask.call_of_each_pair(PrefixLayout([2, 3, 1], [-1, 0, 0]))
    own, ancestor = mask.OWN, mask.ANCESTOR
    expected = np.zeros((6, 6), dtype=int)
    for start, end in ((0, 2), (2, 5), (5, 6)):
        for query in range(start, end):
            expected[query, start : query + 1] = own
    expected[2:, :2] = ancestor
    np.testing.assert_array_equal(calls, expected)


@pytest.mark.ci_newest
def test_packing_is_within_three_percent_of_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's table, with fewer groups: each kind of rollouts, budgets that split groups and that do not."""
    picture, table = tmp_path / "quality.png", tmp_path / "quality.json"
    words = ["packing_quality.py", "--groups", "64", "--large", "64", "--out", str(picture), "--json", str(table)]
    monkeypatch.setattr(sys, "argv", words)
    example("packing_quality").main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    steps = [each for each in json.loads(table.read_text())["steps"] if (each["dp"], each["pp"]) in ((1, 1), (8, 1))]
    assert {each["kind"] for each in steps} == {"math", "code", "documents", "agents"} and len(steps) == 16
    assert any(each["split"] for each in steps) and not all(each["split"] for each in steps)
    for each in steps:
        # Repeated prefixes are planned as well, and no better than perfectly: that may help by their last part.
        assert 0.97 <= each["share"] <= 1.01 and each["balance"] <= 1.03, each


def commands(text: str) -> list[list[str]]:
    """Command lines of this project in shell code (continued lines joined): the words from the program on."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip().removeprefix("$ ")
        if re.match(r"\w+=|bash |python|torchrun |deepspeed |megatron-prefix |GLOO", line):
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("megatron-prefix", "megatron_prefix", "bash")
                      or word.endswith(".py")]  # fmt: skip
            if starts:
                found.append(words[starts[0] :])
    return found


def shell_code(path: Path) -> str:
    """A script, or the shell blocks of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return text
    return "\n".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL))


def check(words: list[str]) -> None:
    """Assert that a command line names a file or command that exists, and options that it has."""
    program, *rest = words
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if program in OF_OTHERS:
        return
    if program == "bash" or program.endswith(".py"):
        script = ROOT / (rest[0] if program == "bash" else program)
        assert script.is_file(), f"{shlex.join(words)}: there is no {script}"
        source = script.read_text(encoding="utf-8")
        # A script with Megatron-LM's parser has hundreds more; test_pretrain_groups.py runs it.
        if program.endswith(".py") and "parse_and_validate_args" not in source:
            known = set(re.findall(r'add_argument\("(--[\w-]+)"', source))
            assert options <= known, f"{shlex.join(words)}: {sorted(options - known)} are no options of it"
        return
    if not rest or rest[0].startswith("-"):
        return
    assert rest[0] in COMMANDS, f"{shlex.join(words)}: there is no such command"
    command = main.get_command(click.Context(main), rest[0])
    assert isinstance(command, click.Command)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert options <= known, f"{shlex.join(words)}: {sorted(options - known)} are no options of it"


PAGES_WITH_COMMANDS = [path for path in PAGES if commands(shell_code(path))]


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS, ids=[str(path.relative_to(ROOT)) for path in PAGES_WITH_COMMANDS])
def test_commands_shown_exist(path: Path) -> None:
    for words in commands(shell_code(path)):
        check(words)


def test_the_quick_start_is_among_them() -> None:
    shown = commands(shell_code(ROOT / "examples" / "quickstart.sh"))
    assert {("megatron-prefix", "import"), ("megatron_prefix", "train")} <= {tuple(words[:2]) for words in shown}


@pytest.mark.parametrize(
    "line",
    ["megatron-prefix tune --steps 3", "megatron-prefix train --stops 3", "python -m megatron_prefix verify --small",
     "bash examples/none.sh", "python examples/mask.py --colour red"],
)  # fmt: skip
def test_a_wrong_command_is_found(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises(AssertionError, match=r"no such command|no options|there is no"):
        check(words)
