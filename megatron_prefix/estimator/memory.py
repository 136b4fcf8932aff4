"""Bytes that a training step needs on the fullest GPU.

At rest
    weights         of the stage: matrices / tp, norms whole; experts / ep
    gradients       megatron-core's DDP buffer, in fp32 (grad_reduce_in_fp32 for bf16 parameters)
    optimizer       Adam: two fp32 moments, and fp32 weights beside bf16 ones; the distributed optimizer divides them
                    over data- and context-parallel ranks (ZeRO stage 1, arXiv 1910.02054)

In a step
    activations     `saved_tensors` of every micro-batch under way. Stage 0 of 1F1B holds min(pp, micro-batches), the
                    last one 1 (arXiv 2104.04473, 2.2); interleaving holds 1 + (pp - 1) / (pp vpp) of all layers
                    (arXiv 2205.05198, 4.2.3)
    prefix cache    of every live prefix of a split group: K and V, their fp32 gradient sums, and the activations of the
                    prefix (``prefix_activations="keep"``)
    working         the most that a forward or backward adds for a moment: logits and their gradients, one layer's
                    backward, or the optimizer

Memory of the CUDA context, of NCCL and of cuDNN is outside of this; `search` leaves a share of the device for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_prefix.estimator.loads import RankLoad
from megatron_prefix.estimator.model import PlannedModel
from megatron_prefix.estimator.saved_tensors import FP32, norm_tensors, row_bytes
from megatron_prefix.estimator.sizes import RunSettings, Sizes

ADAM_COPIES = 2
"""Tensors of one parameter's size, in fp32, that torch's Adam needs while it updates it; fused ones need none."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU; `total` is the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    prefix_cache: float
    working: float

    @property
    def at_rest(self) -> float:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """The peak of a step."""
        return self.at_rest + self.activations + self.prefix_cache + self.working

    def to_dict(self) -> dict[str, Any]:
        """Bytes by part, and ``total``."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Parameters:
    """Parameters on one GPU of one stage: those of experts and the others, and the largest single one."""

    dense: float
    expert: float
    largest: float

    @classmethod
    def of(cls, model: PlannedModel, sizes: Sizes, first: bool, last: bool) -> Parameters:
        """Of the first, the last, or a stage between."""
        size, config = model.size, model.config
        layers = config.num_layers / sizes.pp
        experts = layers * model.expert_parameters / sizes.ep
        router = layers * model.router_parameters  # on every rank whole
        matrices = layers * (size.layer_parameters - model.expert_parameters - model.router_parameters) / sizes.tp
        norms = size.norm_parameters * layers / config.num_layers
        dense = matrices + router + norms
        if first:
            dense += size.embedding_parameters / sizes.tp
        if last and not (first and size.tied):  # a tied output layer on a stage of its own is a copy
            dense += size.head_parameters / sizes.tp
        words = size.head_parameters if first or last else 0
        wide = (2 if config.activation == "swiglu" else 1) * config.hidden_size * config.ffn_hidden_size
        return cls(dense, experts, max(words, wide) / sizes.tp)


def estimate_memory(
    model: PlannedModel, sizes: Sizes, load: RankLoad, settings: RunSettings, recompute: str
) -> MemoryEstimate:
    """Of the fullest stage: the first, or the last.

    Args:
        model: to be trained.
        sizes: parallel sizes.
        load: micro-batches of a data-parallel rank.
        settings: dtype, modules, optimizer.
        recompute: "none", "selective" or "full".
    """
    if sizes.pp == 1:
        return _of_stage(model, sizes, load, settings, recompute, (True, True))
    stages = [_of_stage(model, sizes, load, settings, recompute, at) for at in ((True, False), (False, True))]
    return max(stages, key=lambda stage: stage.total)


def live_prefixes(load: RankLoad, sizes: Sizes) -> int:
    """Prefixes of split groups that a stage holds at once, enough for later parts to fill the pipeline (a cap for
    ``max_live_prefixes``)."""
    if not load.split_groups:
        return 0
    return min(load.split_groups, 1 + -(-(sizes.pp - 1) // (load.parts + 1)))


def _of_stage(
    model: PlannedModel,
    sizes: Sizes,
    load: RankLoad,
    settings: RunSettings,
    recompute: str,
    at: tuple[bool, bool],
) -> MemoryEstimate:
    first, last = at
    e = settings.element
    held = Parameters.of(model, sizes, first, last)
    parameters = held.dense + held.expert
    layers = model.config.num_layers / sizes.pp
    per_row = row_bytes(model, settings, sizes.tp, recompute)
    rows = load.most_rows / sizes.cp
    activations = rows * per_row * layers * _under_way(sizes, load, first)
    whole_layers = layers - 1 if last else layers
    prefix_row = whole_layers * per_row + (layers - whole_layers) * row_bytes(
        model, settings, sizes.tp, recompute, keys_only=True
    )
    prefix_row += layers * _cache_row_bytes(model, settings, sizes.tp)
    cached = live_prefixes(load, sizes) * load.split_prefix / sizes.cp * prefix_row
    working = _layer_working(model, sizes, settings, recompute) * rows
    if last:
        head = _Head.of(model, sizes, load, settings)
        activations += head.saved + rows * head.norm_row_bytes
        # The final norm's backward comes first, while all is held; a layer's after it has let go of its own.
        working = max(head.working - head.freed, working - rows * head.norm_row_bytes - head.saved, 0.0)
    if sizes.tp > 1:  # sequence parallelism gathers a layer's rows into one buffer
        working += rows * model.config.hidden_size * e
    largest = 0.0 if settings.modules == "te" else ADAM_COPIES * FP32 * held.largest
    # The optimizer runs when the activations are gone.
    working = max(working, largest - activations - cached)
    return MemoryEstimate(
        weights=e * parameters,
        gradients=FP32 * parameters,
        optimizer=_optimizer_bytes(held, sizes, settings),
        activations=activations,
        prefix_cache=cached,
        working=working,
    )


def _optimizer_bytes(held: Parameters, sizes: Sizes, settings: RunSettings) -> float:
    each = 2 * FP32 + (FP32 if settings.dtype == "bf16" else 0)
    if not settings.distributed_optimizer:
        return each * (held.dense + held.expert)
    return each * (held.dense / (sizes.dp * sizes.cp) + held.expert / (sizes.stage_gpus / sizes.ep))


def _under_way(sizes: Sizes, load: RankLoad, first: bool) -> float:
    """Micro-batches whose activations of a stage's layers are held."""
    if sizes.pp == 1 or not (first or sizes.vpp > 1):
        return 1.0
    most = float(sizes.pp) if sizes.vpp == 1 else sizes.pp + (sizes.pp - 1) / sizes.vpp
    if not first:  # the last stage of an interleaved pipeline: all but its last chunk wait for the others
        most = 1 + (sizes.vpp - 1) * sizes.pp / sizes.vpp
    return min(most, float(load.microbatches))


def _cache_row_bytes(model: PlannedModel, settings: RunSettings, tp: int) -> float:
    """K and V of one row in one layer, and the fp32 sums of their gradients."""
    return 2 * model.config.groups * model.config.channels / tp * (settings.element + FP32)


def _layer_working(model: PlannedModel, sizes: Sizes, settings: RunSettings, recompute: str) -> float:
    """Bytes per row of one layer's backward beside what its forward kept: two gradients of the MLP's inner rows and one
    of the residual; under full recompute also what the forward kept, and the residual again."""
    e, hidden = settings.element, model.config.hidden_size / sizes.tp
    inner = 2 * model.active_config.ffn_hidden_size / sizes.tp * e
    if recompute != "full":
        return inner + hidden * e
    return inner + 2 * hidden * e + row_bytes(model, settings, sizes.tp, "none")


@dataclass(frozen=True)
class _Head:
    """The final norm, the output layer and the log-probs (`mcore.log_probs`), in bytes on one GPU.

    Attributes:
        saved: the response rows' hidden states, and their probabilities where logits are not computed again.
        norm_row_bytes: of one row, kept by the final norm.
        working: the most that exists for a moment.
        freed: of ``saved``, what is counted in ``working`` as well.
    """

    saved: float
    norm_row_bytes: float
    working: float
    freed: float

    @classmethod
    def of(cls, model: PlannedModel, sizes: Sizes, load: RankLoad, settings: RunSettings) -> _Head:
        """For the micro-batch with the most response rows."""
        e, config = settings.element, model.config
        rows, targets = load.most_rows / sizes.cp, load.most_targets / sizes.cp
        chunk = min(targets, float(settings.chunk_rows))
        logits, weight = chunk * config.vocab_size / sizes.tp, model.size.head_parameters / sizes.tp
        hidden = config.hidden_size
        recomputed = targets > settings.chunk_rows
        width = hidden / sizes.tp
        norm_tensor = norm_tensors("final norm", width, 1 / sizes.tp, model, settings)
        # Logits, scaled and probabilities in fp32; the final norm's rows are still there.
        forward = logits * (e + 2 * FP32) + rows * width * e
        # Probabilities, their gradient and its scaled copy; then it in the logits' dtype.
        backward = logits * (3 * FP32 + (e if e < FP32 else 0))
        product = (logits + chunk * hidden + weight) * e
        # Gradients of the weight add up over chunks.
        sums = weight * e if recomputed else 0.0
        norm = 4 * rows * width * FP32 if settings.modules == "local" else 2 * rows * width * e
        kept = 0.0 if recomputed else logits * FP32
        return cls(
            saved=targets * hidden * e + kept,
            norm_row_bytes=sum(tensor.row_bytes for tensor in norm_tensor),
            working=max(forward, backward + sums, product + sums, norm),
            freed=kept,
        )
