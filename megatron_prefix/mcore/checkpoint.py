"""Checkpoint folders: written beside and renamed, loaded at any tensor, pipeline and data parallel size.

Layout of a folder:
    model.json             the ModelConfig
    state.json             plain values of the caller, such as the step
    tokenizer.json, tokenizer_config.json   where known
    weights/               megatron-core dist_checkpointing: model weights; optimizer and generator states where saved
    manifest.json          size and CRC-32 of every other file

A folder that exists under its final name was written completely, see `checkpoint_folder`.
"""

import errno
import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.checkpoint_folder import FileSum, complete, files_of, incomplete_folder, sums_of
from megatron_prefix.collectives import all_gather_object, on_all_ranks
from megatron_prefix.mcore.optimizer_state import load_optimizer, make_adam_state
from megatron_prefix.mcore.rng_state import sharded_rng_state
from megatron_prefix.model_config import ModelConfig

CONFIG_FILE = "model.json"
STATE_FILE = "state.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
WEIGHTS = "weights"

_SHARD_OF_RANK = re.compile(r"weights/__(\d+)_\d+\.distcp")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_HASHED_AT_ONCE = 2**17  # values: they stay in a CPU core's cache

Model = torch.nn.Module | Sequence[torch.nn.Module]


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


def save_checkpoint(path: str | Path, model: Model, config: ModelConfig, **options: Any) -> None:
    """Write a checkpoint folder; every rank calls this, on a file system that all of them share.

    Arguments and errors are those of `start_save`.
    """
    start_save(path, model, config, **options).finish()


def start_save(
    path: str | Path,
    model: Model,
    config: ModelConfig,
    *,
    optimizer: Any | None = None,
    state: Mapping[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
    with_rng: bool = False,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> "PendingSave":
    """Begin a checkpoint folder; every rank calls this, on a file system that all of them share.

    model: one module or the list of virtual pipeline chunks, wrapped in DDP or not.
    optimizer: a megatron-core optimizer; its state is saved so that it can be loaded at other parallel sizes.
    state: JSON values, such as {"step": 3}.
    tokenizer_from: a folder whose tokenizer files are copied, where it has them.
    with_rng: save the states of every rank's random generators, see `rng_state`.
    write_more: called on all ranks with the folder that becomes the checkpoint, for further files in it.

    Everything is written to a folder beside and renamed at the end, so an interrupted save leaves no half checkpoint.
    Raises ValueError on all ranks when `path` exists already, `state` holds what JSON does not, there is not enough
    room, or a file cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"checkpoint {path} exists already: choose another folder or remove it")
    try:
        state_text = json.dumps(dict(state or {}), indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"checkpoint state must hold JSON values only: {error}") from error
    _gather_parameters(model)
    sharded = _sharded_state(model, optimizer, is_loading=False)
    apply_factories(sharded)
    num_bytes = sum(x.data.nbytes for x in _tensors(sharded) if is_main_replica(x.replica_id))
    if with_rng:
        sharded["rng_state"] = sharded_rng_state()
    beside: Path = all_gather_object(incomplete_folder(path), dist.group.WORLD)[0]
    total = sum(all_gather_object(num_bytes, dist.group.WORLD))

    def begin() -> None:
        if dist.get_rank() != 0:
            return
        (beside / WEIGHTS).mkdir(parents=True)
        free = shutil.disk_usage(beside).free
        if free < total:
            raise OSError(errno.ENOSPC, f"it takes {total / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free")
        config.to_json(beside / CONFIG_FILE)
        (beside / STATE_FILE).write_text(state_text, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, beside / name)

    # 0.19 would ask for nvidia-resiliency-ext otherwise.
    new = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    strategy: dict[str, Any] = {"async_strategy": "mcore"} if new else {}
    with _named_errors(path, beside):
        on_all_ranks(begin, dist.group.WORLD)
        write_more(beside)
        request = dist_checkpointing.save(sharded, str(beside / WEIGHTS), async_sharded_save=True, **strategy)
    request.add_finalize_fn(lambda: _complete(beside, path))
    return PendingSave(path, beside, request)


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint whose tensors are still to be written.

    Attributes:
        path: of the checkpoint, when it is complete.
        beside: where it is until then.
        request: megatron-core's AsyncRequest, which writes and then completes it.
    """

    path: Path
    beside: Path
    request: Any

    def finish(self) -> None:
        """Write it now. Raises as `start_save`."""
        with self.named_errors():
            self.request.execute_sync()

    def named_errors(self) -> Any:
        """A context in which what goes wrong with this save becomes a ValueError, and its files are removed."""
        return _named_errors(self.path, self.beside)


def _complete(beside: Path, path: Path) -> None:
    """All files are written: sum them up, each rank its own, and give the folder its name."""
    rank = dist.get_rank()

    def writer(name: str) -> int:
        match = _SHARD_OF_RANK.fullmatch(name)
        return int(match[1]) if match else 0

    def sum_mine() -> dict[str, FileSum]:
        return sums_of(beside, [name for name in files_of(beside) if writer(name) == rank])

    parts = on_all_ranks(sum_mine, dist.group.WORLD)
    sums = {name: file_sum for part in parts for name, file_sum in part.items()}
    on_all_ranks(lambda: complete(beside, path, sums) if rank == 0 else None, dist.group.WORLD)


@contextmanager
def _named_errors(path: Path, beside: Path) -> Iterator[None]:
    """What torch and megatron-core raise where a file cannot be written, also on the other ranks, as one ValueError.

    A rank that fails alone inside of them ends, and its closed connections end the others: a RuntimeError there.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        failures = getattr(error, "failures", {})
        reason = "; ".join(str(each) for each, _ in failures.values()) if failures else str(error)
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        raise ValueError(
            f"checkpoint {path} could not be written: {reason} ({free / 2**20:,.1f} MiB are free there). The "
            "checkpoints before it are as they were; make room or name another folder, then go on from the last one"
        ) from error


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
    weights = path / WEIGHTS
    if not dist_checkpointing.check_is_distributed_checkpoint(str(weights)):
        raise ValueError(f"{weights} holds no megatron-core weights: the checkpoint is damaged, make it again")
    if not _compare_tensors(path, model) and optimizer is not None:
        raise ValueError(f"checkpoint {path} holds no optimizer state: load it without optimizer")
    if optimizer is not None:
        make_adam_state(optimizer)
    expected = _sharded_state(model, optimizer, is_loading=True)
    chunks = _chunks(model)
    absent = {name: _take_absent_extra_state(expected[name], weights) for name, _ in chunks}
    loaded = dist_checkpointing.load(expected, str(weights))
    for name, chunk in chunks:
        chunk.load_state_dict(loaded[name] | dict.fromkeys(absent[name]))
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
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
        for key, tensor in dist_checkpointing.load_tensors_metadata(str(path / WEIGHTS)).items()
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
