"""What autograd keeps of one row in one layer until its backward, tensor by tensor.

Read off with `measure.track_saved_tensors` on the layers that `mcore.model` builds (no fused SwiGLU, RoPE or softmax),
with grouped attention, on the CPU; ``tests/test_estimator_memory.py`` holds the local list to the byte. Transformer
Engine's list is from its sources (LayerNormLinear keeps its input and the normed rows); it has not run on a GPU.
The counting is that of Korthikanti et al. (arXiv 2205.05198, section 4), without attention's quadratic terms, which
fused kernels do not keep. Heads and MLP widths are divided over tp, and so are rows between layers (sequence
parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_prefix.estimator.model import PlannedModel
from megatron_prefix.estimator.sizes import RunSettings

FP32 = 4


@dataclass(frozen=True)
class Saved:
    """One tensor.

    Attributes:
        name: of it.
        width: elements per row on one tensor-parallel rank.
        element: bytes of an element.
        core: whether it is kept by the core attention alone, which selective recompute computes again.
    """

    name: str
    width: float
    element: int
    core: bool = False

    @property
    def row_bytes(self) -> float:
        """Bytes per row."""
        return self.width * self.element


def key_tensors(model: PlannedModel, settings: RunSettings, tp: int = 1) -> list[Saved]:
    """Those of one layer up to its keys and values: all that the last layer keeps of a split group's prefix."""
    config, e = model.config, settings.element
    heads, groups = config.num_attention_heads / tp, config.groups / tp
    queries, keys = heads * config.channels, groups * config.channels
    hidden = config.hidden_size / tp  # rows between layers are divided
    found = [
        *norm_tensors("input norm", hidden, 1 / tp, model, settings),
        Saved("input of linear_qkv", hidden, e),
        Saved("output of linear_qkv (v is a view of it)", queries + 2 * keys, e),
    ]
    if config.qk_layernorm:
        found += norm_tensors("q norm", queries, heads, model, settings)
        found += _k_norm(keys, groups, model, settings)
    if config.position_embedding in ("rope", "yarn"):
        found.append(Saved("cos and sin, of q and of k", 4 * config.channels, e))
    return found


def layer_tensors(model: PlannedModel, settings: RunSettings, tp: int = 1) -> list[Saved]:
    """All tensors of one layer without recompute."""
    config, e = model.config, settings.element
    heads, hidden = config.num_attention_heads / tp, config.hidden_size / tp
    queries, keys = heads * config.channels, config.groups / tp * config.channels
    # Neither turned nor normed, k is a view as well.
    own_keys = config.qk_layernorm or config.position_embedding in ("rope", "yarn")
    return [
        *key_tensors(model, settings, tp),
        Saved("q", queries, e),
        Saved("k", keys if own_keys else 0, e),
        Saved("attention output, which linear_proj reads", queries, e),
        Saved("log-sum-exp", heads, FP32, core=True),
        *norm_tensors("norm before the MLP", hidden, 1 / tp, model, settings),
        Saved("normed rows before the MLP", hidden, e),
        *_mlp_tensors(model, settings, tp),
    ]


def norm_tensors(name: str, width: float, rows: float, model: PlannedModel, settings: RunSettings) -> list[Saved]:
    """Of one norm over ``width`` elements of a row, ``rows`` vectors of them, without its output."""
    e, numbers = settings.element, 1 if model.config.norm == "rmsnorm" else 2
    if settings.modules == "te":
        return [Saved(f"{name}: input", width, e), Saved(f"{name}: statistics", numbers * rows, FP32)]
    if model.config.norm == "layernorm":
        return [Saved(f"{name}: input", width, e), Saved(f"{name}: statistics", numbers * rows, e)]
    return [
        Saved(f"{name}: input in fp32", width, FP32),
        Saved(f"{name}: statistics", rows, FP32),
        Saved(f"{name}: normed in fp32", width, FP32),
    ]


@lru_cache(maxsize=256)
def row_bytes(model: PlannedModel, settings: RunSettings, tp: int, recompute: str, *, keys_only: bool = False) -> float:
    """Bytes that one row keeps in one layer; with ``keys_only`` in one that nothing follows but its keys and values."""
    if recompute == "full":
        return model.config.hidden_size / tp * settings.element
    tensors = (key_tensors if keys_only else layer_tensors)(model, settings, tp)
    return sum(tensor.row_bytes for tensor in tensors if not (tensor.core and recompute == "selective"))


def _k_norm(keys: float, groups: float, model: PlannedModel, settings: RunSettings) -> list[Saved]:
    tensors = norm_tensors("k norm", keys, groups, model, settings)
    # k is a view of linear_qkv's output, which is kept anyway; only another dtype or TE's contiguous copy is new.
    view = settings.modules == "local" and (settings.dtype == "fp32" or model.config.norm == "layernorm")
    return tensors[1:] if view else tensors


def _mlp_tensors(model: PlannedModel, settings: RunSettings, tp: int) -> list[Saved]:
    config, e = model.config, settings.element
    gated = config.activation == "swiglu"
    if model.experts is None:
        return _expert_tensors(config.ffn_hidden_size / tp, e, gated)
    # Rows are divided over tp here as well: experts are not cut.
    chosen = model.experts.experts_per_token
    return [
        Saved("router: logits, and whose rows go where", model.experts.num_experts / tp, e + 1),
        Saved("router: probabilities and places of the chosen", chosen / tp, 5 * FP32),
        Saved("rows sent to experts", chosen * config.hidden_size / tp, e),
        *_expert_tensors(chosen * config.ffn_hidden_size / tp, e, gated),
        Saved("weighted by the router", chosen * config.ffn_hidden_size / tp, e),
    ]


def _expert_tensors(width: float, e: int, gated: bool) -> list[Saved]:
    if not gated:
        return [Saved("output of linear_fc1", width, e), Saved("input of linear_fc2", width, e)]
    return [
        Saved("output of linear_fc1", 2 * width, e),
        Saved("SiLU of its gate", width, e),
        Saved("its other half (plus an offset of 0: a copy)", width, e),
        Saved("input of linear_fc2", width, e),
    ]
