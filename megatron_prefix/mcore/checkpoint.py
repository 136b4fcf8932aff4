"""Checkpoint folders: written beside and renamed, loaded at any tensor, pipeline and data parallel size.

Layout of a folder:
    model.json             the ModelConfig
    state.json             plain values of the caller, such as the step
    tokenizer.json, tokenizer_config.json   where known
    weights/               megatron-core dist_checkpointing: model weights, and optimizer state where saved

A folder that exists under its final name is complete.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_prefix.collectives import all_gather_object, barrier
from megatron_prefix.model_config import ModelConfig

CONFIG_FILE = "model.json"
STATE_FILE = "state.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_WEIGHTS = "weights"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_HASHED_AT_ONCE = 2**17  # values: they stay in a CPU core's cache

Model = torch.nn.Module | Sequence[torch.nn.Module]


def step_folder(directory: str | Path, step: int) -> Path:
    """The folder of a step: `directory/step_NNNNNN`."""
    return Path(directory) / f"step_{step:06d}"


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `directory`, or None; partly written folders are not seen."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return max(found)[1] if found else None


def load_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises ValueError when `path` is no checkpoint folder."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"{path} is not a checkpoint folder: it has no {CONFIG_FILE} (make one with `import` or `train`)"
        )
    return ModelConfig.from_json(file)


def load_state(path: str | Path, *, config: ModelConfig | None = None) -> dict[str, Any]:
    """The plain values saved as `state`; reads no weights, so a run can refuse a checkpoint before any work.

    Raises ValueError as `load_checkpoint` does: no checkpoint folder, or a model of another config.
    """
    path = Path(path)
    saved = load_config(path)
    if config is not None:
        _compare_configs(path, saved, config)
    if not (path / STATE_FILE).is_file():
        raise ValueError(f"checkpoint {path} has no {STATE_FILE}: it is damaged or none, make it again")
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / STATE_FILE} is not JSON ({error}): checkpoint damaged, make it again") from error
    assert isinstance(state, dict)
    return state


def save_checkpoint(
    path: str | Path,
    model: Model,
    config: ModelConfig,
    *,
    optimizer: Any | None = None,
    state: Mapping[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a checkpoint folder; every rank calls this, on a file system that all of them share.

    model: one module or the list of virtual pipeline chunks, wrapped in DDP or not.
    optimizer: a megatron-core optimizer; its state is saved so that it can be loaded at other parallel sizes.
    state: JSON values, such as {"step": 3}.
    tokenizer_from: a folder whose tokenizer files are copied, where it has them.

    Everything is written to a folder beside and renamed at the end, so an interrupted save leaves no half checkpoint.
    Raises ValueError when `path` exists already, or `state` holds what JSON does not.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"checkpoint {path} exists already: choose another folder or remove it")
    try:
        state_text = json.dumps(dict(state or {}), indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"checkpoint state must hold JSON values only: {error}") from error
    beside = path.with_name(path.name + ".incomplete")
    first = dist.get_rank() == 0
    barrier(dist.group.WORLD)  # every rank has checked before rank 0 creates anything
    if first:
        shutil.rmtree(beside, ignore_errors=True)
        (beside / _WEIGHTS).mkdir(parents=True)
    barrier(dist.group.WORLD)
    _gather_parameters(model)
    dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False), str(beside / _WEIGHTS))
    if first:
        config.to_json(beside / CONFIG_FILE)
        (beside / STATE_FILE).write_text(state_text, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, beside / name)
        beside.replace(path)
    barrier(dist.group.WORLD)


def load_checkpoint(
    path: str | Path, model: Model, *, config: ModelConfig | None = None, optimizer: Any | None = None
) -> dict[str, Any]:
    """Load weights (and optimizer state) in place, at whatever parallel sizes now run; return the saved plain state.

    config: when given, must equal the saved one in all that shapes or changes the computation.
    optimizer: built on `model` already; without it, load first and build the optimizer afterwards, so that its
        full-precision copies start from the loaded weights.
    Weights are converted to the model's dtype.

    Raises ValueError before anything is changed: no checkpoint folder; a config field or a tensor that differs, named
    with what was expected and what was found; a tensor that is missing or left over; no optimizer state in the file.
    """
    path = Path(path)
    state = load_state(path, config=config)
    weights = path / _WEIGHTS
    if not dist_checkpointing.check_is_distributed_checkpoint(str(weights)):
        raise ValueError(f"{weights} holds no megatron-core weights: the checkpoint is damaged, make it again")
    if not _compare_tensors(path, model) and optimizer is not None:
        raise ValueError(f"checkpoint {path} holds no optimizer state: load it without optimizer")
    if optimizer is not None:
        _make_adam_state(optimizer)
    expected = _sharded_state(model, optimizer, is_loading=True)
    chunks = _chunks(model)
    absent = {name: _take_absent_extra_state(expected[name], weights) for name, _ in chunks}
    loaded = dist_checkpointing.load(expected, str(weights))
    for name, chunk in chunks:
        chunk.load_state_dict(loaded[name] | dict.fromkeys(absent[name]))
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    return state


def fingerprint(model: Model) -> str:
    """64 hex digits of the model's weights, to the last bit: the same at any parallel sizes, others in another dtype.

    Every rank calls this. A weight tensor counts by the multiset of its values, which no cut over ranks changes: it is
    the sum of their hashes, each value on one rank. That reads every weight once and sends one number per tensor.
    """
    state = _sharded_state(model, None, is_loading=False)
    apply_factories(state)
    mine: dict[str, int] = {}
    for tensor in _tensors(state):
        if is_main_replica(tensor.replica_id):
            mine[tensor.key] = mine.get(tensor.key, 0) + _sum_of_hashes(tensor.data)
    sums: dict[str, int] = {}
    for rank in all_gather_object(mine, dist.group.WORLD):
        for key, value in rank.items():
            sums[key] = (sums.get(key, 0) + value) % 2**64
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()


def _sum_of_hashes(values: torch.Tensor) -> int:
    """Sum of splitmix64 (Steele et al., OOPSLA 2014) of every value's bits, in 64-bit integers that wrap around."""
    bits = values.detach().flatten().view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_HASHED_AT_ONCE):
        mixed = part.long() + (0x9E3779B97F4A7C15 - 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> shift)) * (factor - 2**64)
        total += (mixed ^ (mixed >> 31)).sum()
    return int(total)


def _chunks(model: Model) -> list[tuple[str, Any]]:
    """(key in the state dict, bare module) of every virtual chunk."""
    models = [model] if isinstance(model, torch.nn.Module) else list(model)
    bare: list[Any] = []
    module: Any
    for module in models:
        while hasattr(module, "module"):  # DDP
            module = module.module
        bare.append(module)
    return [("model", bare[0])] if len(bare) == 1 else [(f"model{i}", module) for i, module in enumerate(bare)]


def _gather_parameters(model: Model) -> None:
    """Bring every weight up to date: with overlapped gathering that happens only in the next forward."""
    for module in [model] if isinstance(model, torch.nn.Module) else model:
        if isinstance(module, DistributedDataParallel) and module.ddp_config.overlap_param_gather:
            module.start_param_sync(force_sync=True)


def _sharded_state(model: Model, optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The only format that can be loaded at another tensor or data parallel size.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    state: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(model)}
    if optimizer is not None:
        weights = state["model"] if "model" in state else dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


def _take_absent_extra_state(expected: dict[str, Any], weights: Path) -> list[str]:
    """Take away the FP8 state that the file does not have, and return its keys; without FP8 that state is empty.

    Every module of Transformer Engine asks for its own, norms too; where it is not installed, norms write none.
    """
    stored = load_sharded_metadata(str(weights)).keys()
    absent = [
        key
        for key, value in expected.items()
        if isinstance(value, ShardedObject) and key.endswith("_extra_state") and value.unique_key not in stored
    ]
    for key in absent:
        del expected[key]
    return absent


def _torch_adams(optimizer: Any) -> Iterator[tuple[Any, torch.optim.Adam]]:
    """(DistributedOptimizer, its torch Adam): what runs where neither Transformer Engine nor apex is installed."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.Adam):
            yield part, inner


def _make_adam_state(optimizer: Any) -> None:
    """Give a fresh torch Adam its state tensors: DistributedOptimizer reads their step before it loads into them."""
    for _, inner in _torch_adams(optimizer):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_optimizer(optimizer: Any, state: Any) -> None:
    """Load, with two corrections for torch Adam in DistributedOptimizer.

    It sets Adam's step first and then looks for it among the loaded tensors, where it is not; and it sets one step
    tensor for all parameters, which each of them would then advance.
    """
    name = "_set_main_param_and_optimizer_states"
    adams = list(_torch_adams(optimizer))
    for part, inner in adams:

        def with_step(model_param: Any, tensors: dict[str, Any], part: Any = part, inner: Any = inner) -> None:
            group, order = part.model_param_group_index_map[model_param]
            main_param = inner.param_groups[group]["params"][order]
            getattr(type(part), name)(part, model_param, tensors | {"step": inner.state[main_param]["step"]})

        setattr(part, name, with_step)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part, _ in adams:
            delattr(part, name)
    for _, inner in adams:
        for values in inner.state.values():
            values["step"] = values["step"].clone()


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _compare_configs(path: Path, saved: ModelConfig, config: ModelConfig) -> None:
    found, wanted = saved.to_dict(), config.to_dict()
    different = [name for name in wanted if name != "eos_token_ids" and wanted[name] != found[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"checkpoint {path} is of another model: {name} is {found[name]} there, expected {wanted[name]}"
            + (f" (also different: {', '.join(different[1:])})" if different[1:] else "")
        )


def _compare_tensors(path: Path, model: Model) -> bool:
    """Compare the model's tensors with the checkpoint's; True when the checkpoint also holds optimizer state."""
    stored = {
        key: tuple(tensor.global_shape)
        for key, tensor in dist_checkpointing.load_tensors_metadata(str(path / _WEIGHTS)).items()
    }
    expected = _sharded_state(model, None, is_loading=True)
    apply_factories(expected)  # the two halves of a gated MLP's first layer are one tensor in the file
    wanted = {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(expected)}
    for key, shape in wanted.items():
        if key not in stored:
            raise ValueError(f"checkpoint {path} has no tensor {key} (expected shape {shape})")
        if stored[key] != shape:
            raise ValueError(f"checkpoint {path}: tensor {key} has shape {stored[key]}, expected {shape}")
    optimizer_keys = {key for key in stored if key.startswith(("optimizer.", "chained_"))}
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        left_over = sorted(set(stored) - set(wanted) - optimizer_keys)
        if left_over:
            raise ValueError(f"checkpoint {path} holds tensor {left_over[0]}, which the model does not have")
    return bool(optimizer_keys)
