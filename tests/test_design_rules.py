"""The repository keeps its design rules, and every rule can fail."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from tests import design_rules as rules

ROOT = Path(__file__).resolve().parents[1]
Rule = Callable[[PurePosixPath, str], Iterator[str]]

# (rule, path, offending source)
BAD: list[tuple[Rule, str, str]] = [
    (rules.megatron_only_in_host_modules, "packing.py", "import megatron.core"),
    (rules.megatron_only_in_host_modules, "attention/te.py", "def f():\n    from megatron.core import parallel_state"),
    (rules.megatron_only_in_host_modules, "loss.py", "x = import_module('megatron.core')"),
    (rules.deepspeed_only_in_its_package, "mcore/a.py", "import deepspeed"),
    (rules.deepspeed_only_in_its_package, "mcore/a.py", "def f():\n    import deepspeed.runtime"),
    (rules.deepspeed_only_in_its_package, "cli/a.py", "from megatron_prefix.deepspeed.mpu import MegatronMpu"),
    (rules.deepspeed_only_in_its_package, "cli/a.py", "def f():\n    from deepspeed.ops import adam"),
    (rules.frameworks_in_their_own_package, "mcore/a.py", "from swift.megatron import trainers"),
    (rules.frameworks_in_their_own_package, "cli/a.py", "def f():\n    import mcore_bridge"),
    (rules.frameworks_in_their_own_package, "mcore/a.py", "from verl.utils import device"),
    (rules.frameworks_in_their_own_package, "cli/a.py", "def f():\n    import tensordict"),
    (rules.collectives_in_one_module, "mcore/a.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
    (rules.collectives_in_one_module, "a.py", "import torch\ntorch.distributed.all_gather_into_tensor(x, y)"),
    (rules.collectives_in_one_module, "a.py", "from torch import distributed\nf = distributed.batch_isend_irecv"),
    (rules.collectives_in_one_module, "a.py", "from torch.distributed import barrier as wait"),
    (rules.collectives_in_one_module, "a.py", "import torch.distributed._functional_collectives as funcol"),
    (rules.collectives_in_one_module, "cli/a.py", "import torch.distributed as dist\ndist.broadcast_object_list(x)"),
    (rules.collectives_in_one_module, "a.py", "import torch\ntorch.ops._c10d_functional.all_reduce(x)"),
    (rules.environment_only_in_cli, "mcore/model.py", "import os\nx = os.environ['A']"),
    (rules.environment_only_in_cli, "a.py", "import os as system\nx = system.getenv('A')"),
    (rules.environment_only_in_cli, "a.py", "from os import environ"),
    (rules.no_module_level_state, "a.py", "cache = {}"),
    (rules.no_module_level_state, "a.py", "if True:\n    seen: set[int] = set()"),
    (rules.no_module_level_state, "a.py", "import collections\n_table = collections.defaultdict(list)"),
    (rules.no_module_level_state, "a.py", "x = 1\ndef f():\n    global x"),
    (rules.no_module_level_state, "a.py", "TABLE = {}\ndef f():\n    TABLE['a'] = 1"),
    (rules.no_module_level_state, "a.py", "NAMES = []\ndef f():\n    NAMES.append(1)"),
    (rules.no_broad_except, "a.py", "try:\n    f()\nexcept:\n    pass"),
    (rules.no_broad_except, "a.py", "try:\n    f()\nexcept Exception as e:\n    raise"),
    (rules.no_broad_except, "cli/a.py", "try:\n    f()\nexcept (ValueError, BaseException):\n    pass"),
    (rules.layout_stands_alone, "layout.py", "from megatron_prefix.packing import Pack"),
    (rules.layout_stands_alone, "layout.py", "from .packing import Pack"),
    (rules.files_are_short, "a.py", "x = 1\n" * 451),
    (rules.functions_have_few_parameters, "a.py", "def f(a, b, c, d, e, f, /, g, h, i, j, *, k): pass"),
    (rules.attention_reads_nothing_back, "attention/flash.py", "def f(x):\n    return x.sum().item()"),
    (rules.attention_reads_nothing_back, "attention/grouped.py", "g = lambda x: x.tolist()"),
    (rules.attention_reads_nothing_back, "attention/flash.py", "g = lambda x: x.cpu()"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (rules.megatron_only_in_host_modules, "packing.py", "from megatron_prefix import layout"),
    (rules.megatron_only_in_host_modules, "mcore/model.py", "import megatron.core"),
    (rules.megatron_only_in_host_modules, "specs.py", "from megatron.core import parallel_state"),
    (rules.megatron_only_in_host_modules, "deepspeed/mpu.py", "import megatron.core"),
    (rules.deepspeed_only_in_its_package, "deepspeed/a.py", "import deepspeed\nfrom deepspeed.ops import adam"),
    (rules.deepspeed_only_in_its_package, "cli/a.py", "def f():\n    from megatron_prefix.deepspeed import mpu"),
    (rules.deepspeed_only_in_its_package, "cli/a.py", "def f():\n    from deepspeed.utils import logger"),
    (rules.megatron_only_in_host_modules, "ms_swift/a.py", "from megatron.core import parallel_state"),
    (rules.frameworks_in_their_own_package, "ms_swift/a.py", "import swift.utils"),
    (rules.frameworks_in_their_own_package, "a.py", "import megatron_prefix.ms_swift.micro_batch"),
    (rules.megatron_only_in_host_modules, "verl/a.py", "from megatron.core import parallel_state"),
    (rules.frameworks_in_their_own_package, "verl/a.py", "import verl.utils"),
    (rules.frameworks_in_their_own_package, "cli/a.py", "import megatron_prefix.verl"),
    (rules.frameworks_in_their_own_package, "formats/a.py", "from megatron_prefix.formats import verl"),
    (rules.collectives_in_one_module, "collectives.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
    (rules.collectives_in_one_module, "a.py", "import torch.distributed as dist\nn = dist.get_world_size()"),
    (
        rules.collectives_in_one_module,
        "a.py",
        "import torch\ntorch.broadcast_to(x, y); x.scatter(0, i, y); d.gather(x)",
    ),
    (
        rules.collectives_in_one_module,
        "mcore/a.py",
        "from megatron_prefix.collectives import all_reduce\nall_reduce(x)",
    ),
    (rules.environment_only_in_cli, "cli/a.py", "import os\nx = os.environ['A']"),
    (rules.environment_only_in_cli, "mcore/cpu.py", "import os\nx = os.environ['A']"),
    (rules.no_module_level_state, "a.py", "__all__ = ['a']\nTABLE = {'a': 1}\n_NAMES: list[int] = [1]\nx = (1, 2)"),
    (rules.no_module_level_state, "a.py", "def f():\n    seen = {}\n    seen[1] = 2"),
    (rules.no_broad_except, "a.py", "try:\n    f()\nexcept (ValueError, KeyError):\n    pass"),
    (rules.layout_stands_alone, "layout.py", "import torch"),
    (rules.layout_stands_alone, "packing.py", "from megatron_prefix.layout import PrefixLayout"),
    (rules.files_are_short, "a.py", "x = 1\n" * 450),
    (rules.functions_have_few_parameters, "a.py", "def f(self, a, b, c, d, e, f, g, h, i, j): pass"),
    (rules.functions_have_few_parameters, "cli/a.py", "@click.command()\ndef f(a, b, c, d, e, f, g, h, i, j, k): pass"),
    (rules.attention_reads_nothing_back, "attention/calls.py", "g = lambda x: x.tolist()"),
    (rules.attention_reads_nothing_back, "packing.py", "g = lambda x: x.tolist()"),
]


def _case_id(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.fixture(scope="module")
def repository() -> list[PurePosixPath]:
    """Every file of the checkout that git does not ignore, committed or not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [PurePosixPath(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("rule", rules.PACKAGE_RULES, ids=_case_id)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    files = sorted((ROOT / rules.PACKAGE).rglob("*.py"))
    assert len(files) > 5
    offences = [
        offence
        for file in files
        for offence in rule(PurePosixPath(file.relative_to(ROOT).as_posix()), file.read_text(encoding="utf-8"))
    ]
    assert not offences, "\n".join([rule.__name__, *offences])


@pytest.mark.parametrize(("rule", "path", "source"), BAD, ids=_case_id)
def test_the_rule_can_fail(rule: Rule, path: str, source: str) -> None:
    assert list(rule(PurePosixPath(rules.PACKAGE, path), source))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD, ids=_case_id)
def test_the_rule_lets_pass_what_it_should(rule: Rule, path: str, source: str) -> None:
    assert list(rule(PurePosixPath(rules.PACKAGE, path), source)) == []


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _, _ in BAD} == set(rules.PACKAGE_RULES)


def test_no_file_names_a_path_of_one_machine(repository: list[PurePosixPath]) -> None:
    offences: list[str] = []
    for path in repository:
        try:
            source = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # an image
            continue
        offences += rules.no_machine_paths(path, source)
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize("path", ["/work" + "/x", "'/root" + "/.cache'", "cd /home" + "/me/", "(/tmp" + "/envs/e)"])
def test_a_machine_path_is_found(path: str) -> None:
    assert list(rules.no_machine_paths(PurePosixPath("a.sh"), path))


@pytest.mark.parametrize("text", ["$HOME/root/x", "a/root/b", "https://x.org/root/", "../root/x", "/usr/bin/env"])
def test_other_paths_are_not(text: str) -> None:
    assert not list(rules.no_machine_paths(PurePosixPath("a.sh"), text))


def test_the_top_level_is_small(repository: list[PurePosixPath]) -> None:
    assert not list(rules.top_level_is_small(repository))
    stray = [*repository, PurePosixPath("notes/plan.md"), PurePosixPath("run.py")]
    assert [line.split()[0] for line in rules.top_level_is_small(stray)] == ["notes", "run.py"]
