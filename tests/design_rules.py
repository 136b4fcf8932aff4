"""The design rules of the package as functions: each takes a file and returns its offences, one line each.

A file is (path inside the repository, source). What a rule lets pass is written in the rule.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

PACKAGE = "megatron_prefix"
MAX_LINES = 450
MAX_PARAMETERS = 10
TOP_LEVEL = {
    *(PACKAGE, "patches", "examples", "tests"),
    *("setup.py", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"),
}
# Package of ours: top-level modules that only it imports.
FRAMEWORKS = {"ms_swift": {"swift", "mcore_bridge"}, "verl": {"verl", "tensordict"}}
COLLECTIVE = re.compile(
    r"(all_reduce|all_gather|reduce_scatter|broadcast|all_to_all|gather|scatter|reduce|barrier|monitored_barrier)"
    r"(_single|_object|_object_list|_into_tensor|_tensor|_coalesced)*"
    r"|i?send|i?recv|(send|recv)_object_list|batch_isend_irecv|P2POp"
)
READS_BACK = {"item", "tolist", "cpu", "numpy"}
MEGATRON_HOSTS = ("deepspeed", "megatron_rl", *FRAMEWORKS)
ON_HOST = {"reference.py", "sdpa.py", "calls.py"}  # CPU kernels, and the call plan, which is made on the host
MUTATORS = {
    *("append", "extend", "insert", "add", "update", "setdefault"),
    *("pop", "popitem", "clear", "remove", "discard", "sort", "reverse"),
}
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "ContextVar"}
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home/\w+|Users/\w+|tmp/(?:h|envs))/")


def megatron_only_in_host_modules(path: PurePosixPath, source: str) -> Iterator[str]:
    """Only mcore/, cli/, specs.py and the packages of frameworks built on it import megatron."""
    if _inside(path, "mcore", "cli", *MEGATRON_HOSTS) or _is(path, "specs.py"):
        return
    for line, name in _imports(ast.parse(source)):
        if name == "megatron" or name.startswith("megatron."):
            yield f"{path}:{line}: imports {name}"


def deepspeed_only_in_its_package(path: PurePosixPath, source: str) -> Iterator[str]:
    """Only deepspeed/ imports DeepSpeed, and cli/ its logger and that package, inside functions: it takes seconds."""
    if _inside(path, "deepspeed"):
        return
    tree = ast.parse(source)
    at_top = {line for statement in tree.body for line, _ in _imports(ast.Module([statement], []))
              if isinstance(statement, ast.Import | ast.ImportFrom)}  # fmt: skip
    for line, name in _imports(tree):
        of_package = name.startswith(f"{PACKAGE}.deepspeed")
        if not of_package and name.partition(".")[0] != "deepspeed":
            continue
        if not _inside(path, "cli") or line in at_top or not (of_package or name == "deepspeed.utils.logger"):
            yield f"{path}:{line}: imports {name}"


def frameworks_in_their_own_package(path: PurePosixPath, source: str) -> Iterator[str]:
    """A host framework is imported by the package of its name only: verl (and its tensordict) by verl/."""
    for line, name in _imports(ast.parse(source)):
        for package, modules in FRAMEWORKS.items():
            if name.partition(".")[0] in modules and not _inside(path, package):
                yield f"{path}:{line}: imports {name}"


def collectives_in_one_module(path: PurePosixPath, source: str) -> Iterator[str]:
    """torch.distributed's collectives are used in collectives.py only; asking for ranks and groups is free."""
    if _is(path, "collectives.py"):
        return
    tree = ast.parse(source)
    for line, name in _imports(tree):
        head, _, last = name.rpartition(".")
        whole_module = name.startswith(("torch.distributed._functional_collectives", "torch.distributed.nn"))
        if whole_module or (head.startswith("torch.distributed") and COLLECTIVE.fullmatch(last)):
            yield f"{path}:{line}: imports {name}"
    names = _names_of_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            full = _dotted(node, names)
            if full.startswith("torch.distributed") and COLLECTIVE.fullmatch(node.attr):
                yield f"{path}:{node.lineno}: uses {full}"
            if full.startswith("torch.ops.") and "c10d" in full:
                yield f"{path}:{node.lineno}: uses {full}"


def environment_only_in_cli(path: PurePosixPath, source: str) -> Iterator[str]:
    """Only cli/ and mcore/cpu.py read the environment."""
    if _inside(path, "cli") or _is(path, "mcore/cpu.py"):
        return
    tree = ast.parse(source)
    names = _names_of_modules(tree)
    forbidden = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
    found = [(node.lineno, _dotted(node, names)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for line, name in found + list(_imports(tree)):
        if name in forbidden:
            yield f"{path}:{line}: uses {name}"


def no_module_level_state(path: PurePosixPath, source: str) -> Iterator[str]:
    """Containers at module level are UPPER_CASE constants, which nothing changes; no `global`."""
    tree = ast.parse(source)
    constants: set[str] = set()
    for statement in _module_level(tree):
        for target, value in _assignments(statement):
            if not isinstance(target, ast.Name):
                continue
            if CONSTANT.fullmatch(target.id):
                constants.add(target.id)
            elif _is_mutable(value):
                yield f"{path}:{statement.lineno}: module-level state {target.id}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: global {', '.join(node.names)}"
        changed = _changed_name(node)
        if changed in constants and changed != "__all__":
            yield f"{path}:{node.lineno}: changes the constant {changed}"  # type: ignore[attr-defined]


def no_broad_except(path: PurePosixPath, source: str) -> Iterator[str]:
    """No bare except, Exception or BaseException: they turn defects into silence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [ast.unparse(each) if each else "everything" for each in caught]
            for name in names:
                if name.rpartition(".")[2] in {"everything", "Exception", "BaseException"}:
                    yield f"{path}:{node.lineno}: catches {name}"


def layout_stands_alone(path: PurePosixPath, source: str) -> Iterator[str]:
    """layout.py imports nothing of the package."""
    if not _is(path, "layout.py"):
        return
    for line, name in _imports(ast.parse(source)):
        if name.startswith((".", PACKAGE)):
            yield f"{path}:{line}: imports {name}"


def files_are_short(path: PurePosixPath, source: str) -> Iterator[str]:
    lines = source.count("\n") + 1
    if lines > MAX_LINES + 1:
        yield f"{path}: {lines - 1} lines, the limit is {MAX_LINES}"


def functions_have_few_parameters(path: PurePosixPath, source: str) -> Iterator[str]:
    """At most MAX_PARAMETERS besides self or cls; click commands have one per option."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if any(re.match(r"(\w+\.)?(command|option|argument|group)\(", ast.unparse(d)) for d in node.decorator_list):
            continue
        arguments = node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in {"self", "cls"}])
        if count > MAX_PARAMETERS:
            yield f"{path}:{node.lineno}: {node.name} has {count} parameters, the limit is {MAX_PARAMETERS}"


def attention_reads_nothing_back(path: PurePosixPath, source: str) -> Iterator[str]:
    """No device tensor is read on the host in attention/, except where tensors are on the host anyway."""
    if not _inside(path, "attention") or path.name in ON_HOST:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in READS_BACK:
            yield f"{path}:{node.lineno}: .{node.attr} reads a tensor back"


PACKAGE_RULES: tuple[Callable[[PurePosixPath, str], Iterator[str]], ...] = (
    megatron_only_in_host_modules,
    deepspeed_only_in_its_package,
    frameworks_in_their_own_package,
    collectives_in_one_module,
    environment_only_in_cli,
    no_module_level_state,
    no_broad_except,
    layout_stands_alone,
    files_are_short,
    functions_have_few_parameters,
    attention_reads_nothing_back,
)


def no_machine_paths(path: PurePosixPath, source: str) -> Iterator[str]:
    """No absolute path of somebody's machine, in any text file of the repository."""
    for number, line in enumerate(source.splitlines(), start=1):
        if match := MACHINE_PATH.search(line):
            yield f"{path}:{number}: names {match.group()}"


def top_level_is_small(paths: list[PurePosixPath]) -> Iterator[str]:
    for name in sorted({path.parts[0] for path in paths}):
        if name not in TOP_LEVEL and not name.startswith("."):
            yield f"{name} does not belong at the top level"


def _inside(path: PurePosixPath, *folders: str) -> bool:
    return path.parts[0] == PACKAGE and len(path.parts) > 2 and path.parts[1] in folders


def _is(path: PurePosixPath, name: str) -> bool:
    return path == PurePosixPath(PACKAGE, name)


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; relative imports keep their dots; import_module("x") counts too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func, {}).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, str(each.value)) for each in node.args if isinstance(each, ast.Constant))


def _names_of_modules(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for: {"dist": "torch.distributed"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full dotted name of an attribute chain, or "" for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import outside functions and classes."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.stmt):
            yield node
        pending += [each for each in ast.iter_child_nodes(node) if isinstance(each, (ast.stmt, ast.ExceptHandler))]


def _assignments(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(statement, ast.Assign):
        yield from ((target, statement.value) for target in statement.targets)
    elif isinstance(statement, ast.AnnAssign):
        yield statement.target, statement.value


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS


def _changed_name(node: ast.AST) -> str | None:
    """The plain name whose container this node changes, if it does."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        owner: ast.expr = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        owner = node.func.value
    else:
        return None
    return owner.id if isinstance(owner, ast.Name) else None
