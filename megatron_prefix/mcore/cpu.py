"""Run megatron-core on the CPU with gloo, for tests and small experiments.

megatron-core (0.16.1, 0.19.2) names the CUDA device in many places and has no CPU switch. `run_on_cpu` replaces the
few functions those places call. It is applied explicitly (by the CLI and by tests, never at import) and refuses to run
where a GPU is present. It is one-way: a patched process stays patched.

Every patch is a small named function below; its first line says why it is needed. Models must be built with
`use_cpu_initialization=True` (`mcore.model.transformer_config` sets it).
"""

import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MARK = "megatron_prefix_cpu_patch"
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like")


def run_on_cpu() -> tuple[str, ...]:
    """Apply every patch once and return the patch names; calling it again changes nothing.

    Raises RuntimeError, naming the GPU, when CUDA is available: the patches would silently move its work to the CPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            f"run_on_cpu() redirects CUDA calls to the CPU, but a GPU is present ({torch.cuda.get_device_name()}): "
            "run without it, or hide the GPU with CUDA_VISIBLE_DEVICES= before starting"
        )
    patches = (
        current_device_is_cpu,
        cuda_rng_is_cpu_rng,
        cuda_factories_make_cpu_tensors,
        synchronize_is_noop,
        tensor_type_names_cuda,
        dispatcher_splits_as_numpy,
        torch_norm_allows_sequence_parallel,
        streams_are_stubs,
        fp8_state_is_off,
        moves_to_cuda_are_identity,
        recompute_restores_by_copy,
        hybrid_final_norm_is_torch_norm,
    )
    for patch in patches:
        patch()
    return tuple(patch.__name__ for patch in patches)


def current_device_is_cpu() -> None:
    """P1. megatron-core allocates on `torch.cuda.current_device()` everywhere."""
    _replace(torch.cuda, "current_device", lambda: torch.device("cpu"))


def cuda_rng_is_cpu_rng() -> None:
    """P2. The RNG tracker saves and restores the CUDA generator, which does not exist here; the CPU one stands in."""
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        torch.manual_seed(value)

    _replace(torch.cuda, "get_rng_state", get_state)
    _replace(torch.cuda, "set_rng_state", set_state)
    _replace(torch.cuda, "manual_seed", seed)
    _replace(mcore_random, "_get_cuda_rng_state", get_state)
    _replace(mcore_random, "_set_cuda_rng_state", set_state)


def cuda_factories_make_cpu_tensors() -> None:
    """P3. Schedules, optimizer and checkpointing create tensors with `device="cuda"` (and pinned memory, P10)."""

    def redirected(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = torch.device("cpu")
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return original(*args, **kwargs)

        return factory

    for name in _FACTORIES:
        _replace(torch, name, redirected(getattr(torch, name)))


def synchronize_is_noop() -> None:
    """P4. Point-to-point communication and checkpointing call `torch.cuda.synchronize()`."""
    _replace(torch.cuda, "synchronize", lambda device=None: None)


def tensor_type_names_cuda() -> None:
    """P5. The optimizer and gradient clipping accept only the type strings `torch.cuda.*Tensor`."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            answer = original(self, *args, **kwargs)
            if isinstance(answer, str) and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
                return "torch.cuda." + answer.removeprefix("torch.")
            return answer

        return tensor_type

    _replace(torch.Tensor, "type", wrap(torch.Tensor.type))


def dispatcher_splits_as_numpy() -> None:
    """P6. The expert dispatcher wants split sizes as numpy, but converts only tensors that were on a GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", move)


def torch_norm_allows_sequence_parallel() -> None:
    """P7. WrappedTorchNorm refuses sequence parallel; all it lacks is the mark that sums its gradient over TP.

    The class itself is changed, so every spec and block that has already imported it (final norm included) gets this.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def wrap(original: Callable[..., torch.nn.Module]) -> Any:
        def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
            if not config.sequence_parallel:
                return original(cls, config, *args, **kwargs)
            plain = copy.copy(config)
            plain.sequence_parallel = False
            norm = original(cls, plain, *args, **kwargs)
            for parameter in norm.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
            return norm

        return build

    _replace(WrappedTorchNorm, "__new__", wrap(WrappedTorchNorm.__new__))


def streams_are_stubs() -> None:
    """P8. Overlapped gradient reduction orders work on CUDA streams; on the CPU everything is already in order."""
    stubs: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "stream": _in_stream,
        "current_stream": _current_stream,
        "default_stream": _current_stream,
    }
    for name, stub in stubs.items():
        _replace(torch.cuda, name, stub)


def fp8_state_is_off() -> None:
    """P9. Output-less recompute asks Transformer Engine's FP8 state even without FP8 (it tests `fp8 is not None`)."""
    from megatron.core.tensor_parallel import random as mcore_random

    if getattr(mcore_random, "HAVE_TE", False):
        return
    mcore_random.FP8GlobalStateManager = _Fp8Off
    mcore_random.activation_recompute_forward = lambda *args, **kwargs: contextlib.nullcontext()
    mcore_random.fp8_autocast = lambda *args, **kwargs: contextlib.nullcontext()


def moves_to_cuda_are_identity() -> None:
    """P10. Batches and checkpoints are moved with `.cuda()` and pinned; there is nowhere to move them."""

    def identity(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    _replace(torch.Tensor, "cuda", identity)
    _replace(torch.Tensor, "pin_memory", identity)
    _replace(torch.nn.Module, "cuda", identity)


def recompute_restores_by_copy() -> None:
    """P11. 0.19 compiles a C++ extension to share storage in output-less recompute; a copy needs no compiler."""
    from megatron.core.tensor_parallel import random as mcore_random

    def share(destination: torch.Tensor, source: torch.Tensor) -> None:
        storage = source.untyped_storage()
        destination.untyped_storage().resize_(storage.size())
        destination.untyped_storage().copy_(storage)

    if hasattr(mcore_random, "_get_share_storage"):
        _replace(mcore_random, "_get_share_storage", lambda: share)


def hybrid_final_norm_is_torch_norm() -> None:
    """P12. 0.19's HybridModel always builds its final norm from Transformer Engine, which needs a GPU."""
    name = "megatron.core.models.hybrid.hybrid_block"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # 0.16 has no hybrid package
        return
    if found is None:
        return
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    importlib.import_module(name).TENorm = WrappedTorchNorm  # type: ignore[attr-defined]


def _replace(owner: Any, name: str, replacement: Any) -> None:
    """Set owner.name to `replacement`, once: a second call finds the mark and leaves it."""
    if not getattr(getattr(owner, name), _MARK, False):
        setattr(replacement, _MARK, True)
        setattr(owner, name, replacement)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """Stands in for torch.cuda.Stream: work is already in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """Stands in for torch.cuda.Event: always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _in_stream(stream: Any) -> Iterator[Any]:
    yield stream


def _current_stream(device: Any = None) -> _Stream:
    return _Stream()


class _Fp8Off:
    """Stands in for Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False
