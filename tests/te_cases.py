"""Models with Transformer Engine's layer specs, on the CPU: `main` prints what it found as JSON.

A program of its own: Transformer Engine, for which a stand-in is on the path (see `tests/te_stand_in`), must be there
before megatron-core is imported, and nothing of it may reach other tests. The oracle is plain megatron-core on repeated
prefixes with megatron-core's own modules only: local layers, torch's final norm, its own attention.
"""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_prefix import RolloutGroup, pack_groups, prefix_gpt_layer_spec, response_log_probs, with_prefix_attention
from megatron_prefix.mcore.checkpoint import load_checkpoint, save_checkpoint
from megatron_prefix.mcore.model import (
    build_hybrid_model,
    build_model,
    hybrid_stack_spec,
    local_layer_spec,
    transformer_config,
)
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.model_config import ModelConfig
from tests.distributed import fill_fresh_memory_with_nan
from tests.mcore_helpers import start, tiny_config

GROUPS = [
    RolloutGroup([1, 2, 3, 4, 5], [[6, 7], [8], [9, 10, 11]], [1.0, 0.0, 0.5]),
    RolloutGroup([7], [[3, 2]], [1.0]),
    RolloutGroup([12, 13, 14], [[15, 16, 17, 18], [19]], [0.0, 1.0]),
]
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Parameters of Transformer Engine's layers and of local ones."""
DTYPE = torch.float64


def local_name(name: str) -> str:
    for fused, own in FUSED_NORMS.items():
        name = name.replace(fused, own)
    return name


def plain_model(config: ModelConfig, seed: int = 1) -> torch.nn.Module:
    """megatron-core without a module of Transformer Engine (whose norm its blocks end with, where it is installed)."""
    layers = [local_layer_spec(config)] * config.num_layers
    block: Any = TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)
    return unsettled(build_model(config, layer_spec=block, dtype=DTYPE, seed=seed))


def unsettled(model: torch.nn.Module) -> torch.nn.Module:
    """A plain model with biases away from 0 and norm weights away from 1, as in trained ones."""
    assert not any(is_stand_in(module) for module in model.modules())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def is_stand_in(module: torch.nn.Module) -> bool:
    return any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)


def gradients_of(model: torch.nn.Module, log_probs: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient, under local names, of a weighted sum of log-probs."""
    weights = torch.linspace(-1.0, 2.0, log_probs.numel(), dtype=log_probs.dtype)
    (log_probs * weights).sum().backward()
    found = {local_name(name): parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def compare(model: torch.nn.Module, plain: torch.nn.Module) -> dict[str, Any]:
    """``model`` on prefix groups against ``plain`` on repeated prefixes, after it was given its weights."""
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[local_name(name)])
    (pack,), (repeated,) = pack_groups(GROUPS), pack_groups(GROUPS, repeated=True)
    expected, result = repeated_log_probs(plain, repeated), response_log_probs(model, pack, chunk_rows=4)
    assert isinstance(result, Tensor)
    references, gradients = gradients_of(plain, expected), gradients_of(model, result)
    assert gradients.keys() == references.keys() == weights.keys()
    layer: Any = model.decoder.layers[0]  # type: ignore[union-attr, index]
    return {
        "log_probs": (result - expected).abs().max().item(),
        "gradients": {
            name: ((gradients[name] - value).norm() / value.norm()).item() for name, value in references.items()
        },
        "layer": {name: type(module).__name__ for name, module in layer.named_modules()},
    }


def compare_spec(spec: Any, config: ModelConfig, **settings: Any) -> dict[str, Any]:
    return compare(build_model(config, layer_spec=spec, dtype=DTYPE, seed=2, **settings), plain_model(config))


def equal_models() -> dict[str, dict[str, Any]]:
    """Every way to a spec, with every norm, bias and recompute once."""
    bare, qk = tiny_config(qkv_bias=True), tiny_config(qk_layernorm=True, tied_embeddings=True)
    layer_norm = tiny_config(norm="layernorm", activation="gelu", qk_layernorm=True)
    by_config = prefix_gpt_layer_spec(transformer_config(qk, dtype=DTYPE), use_te=True)
    own = with_prefix_attention(get_gpt_layer_with_transformer_engine_spec(), impl="reference")
    found = {
        "specs.te": compare_spec(by_megatron_lm("te"), bare),
        "specs.te_qk": compare_spec(by_megatron_lm("te_qk"), layer_norm, recompute="full"),
        "prefix_gpt_layer_spec": compare_spec(by_config, qk, recompute="selective"),
        "with_prefix_attention": compare_spec(own, bare),
        # Megatron-LM's default: the rotary kernel is given one angle per row
        "fused rotary": compare_spec(by_megatron_lm("te"), bare, overrides={"apply_rope_fusion": True}),
    }
    if find_spec("megatron.core.models.hybrid") is not None:
        hybrid = build_hybrid_model(qk, hybrid_stack_spec(by_config), dtype=DTYPE, seed=2)
        found["hybrid"] = compare(hybrid, unsettled(build_hybrid_model(qk, dtype=DTYPE, seed=1)))
    return found


def by_megatron_lm(name: str) -> ModuleSpec:
    """What Megatron-LM does with ``--spec megatron_prefix.specs NAME``."""
    return import_module(("megatron_prefix.specs", name))


def changed_parts(name: str, qk_layernorm: bool) -> dict[str, list[str]]:
    """Where a ready-made spec differs from megatron-core's own: {path: [its, ours]}."""
    own = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    return {path: [its, ours] for path, its, ours in _differences("", own, by_megatron_lm(name)) if its != ours}


def _differences(path: str, its: Any, ours: Any) -> list[tuple[str, str, str]]:
    if hasattr(its, "submodules") or hasattr(its, "__dataclass_fields__"):
        pairs = [_differences(f"{path}.{key}", value, vars(ours)[key]) for key, value in vars(its).items()]
        return [each for pair in pairs for each in pair]
    return [(path.removeprefix("."), _shown(its), _shown(ours))]


def _shown(value: Any) -> str:
    function = getattr(value, "func", value)  # of a partial
    name = getattr(function, "__qualname__", repr(function))
    return name if function is value else f"{name} {getattr(value, 'args', ())} {getattr(value, 'keywords', {})}"


def checkpoints() -> dict[str, float]:
    """Largest difference of log-probs after a checkpoint's way, in a layer spec and back."""
    config = tiny_config(qk_layernorm=True)
    plain, back = plain_model(config), plain_model(config, seed=3)
    model = build_model(config, layer_spec=by_megatron_lm("te_qk"), dtype=DTYPE, seed=2)
    (pack,), (repeated,) = pack_groups(GROUPS), pack_groups(GROUPS, repeated=True)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "local"), plain, config)
        load_checkpoint(Path(folder, "local"), model, config=config)
        save_checkpoint(Path(folder, "te"), model, config)
        load_checkpoint(Path(folder, "te"), back, config=config)
    expected = repeated_log_probs(plain, repeated)
    results = {"local to te": response_log_probs(model, pack), "te to local": repeated_log_probs(back, repeated)}
    return {name: (result - expected).abs().max().item() for name, result in results.items()}


def main() -> None:
    fill_fresh_memory_with_nan()
    torch.set_num_threads(1)
    assert Path(transformer_engine.__file__).is_relative_to(Path(__file__).parent), transformer_engine.__file__
    start()
    found = {
        "changed": {"te": changed_parts("te", False), "te_qk": changed_parts("te_qk", True)},
        "equal": equal_models(),
        "checkpoint": checkpoints(),
    }
    print(json.dumps(found))  # noqa: T201 - the answer to the parent


if __name__ == "__main__":
    main()
