"""The proof on your own model: the same step on repeated prefixes by plain megatron-core, and on prefix groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_prefix.collectives import all_gather_object
from megatron_prefix.mcore.stages import whole_model_parameters
from megatron_prefix.mcore.training import PolicyTrainer, StepInput
from megatron_prefix.packing import repeated_packs
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split, pair_order

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest relative difference by dtype; half precision is judged against the plain path's own error instead."""

SMALLEST_SHARE = 1e-3
"""A parameter's gradient below this share of the whole gradient's norm is measured against that share: some gradients
are 0 but for rounding (a bias of all keys, without rotary embeddings, changes no attention)."""

OLD_POLICY_NOISE = 0.1
"""Spread of the made-up old log-probs around the policy's own, so that ratios differ from 1 and some are clipped."""


@dataclass(frozen=True)
class Evaluation:
    """One path's results.

    Attributes:
        log_probs: of this rank's pairs, in their order.
        loss: of the global batch.
        terms: fp64, what every pair of this rank adds to the loss, in their order.
        terms_size: the sum of their absolute values over the global batch: the loss without cancellation.
        gradients, parameters: of this rank's pipeline stages, by name in the whole model.
    """

    log_probs: Tensor
    loss: float
    terms: Tensor
    terms_size: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Differences:
    """Differences between two evaluations, over all ranks.

    Attributes:
        max_log_prob_diff: largest absolute difference, in nats.
        max_log_prob_rel_diff: the same over the largest absolute log-prob (at least 1).
        loss_rel_diff: the larger of two: the norm of the difference of the loss's terms, one per (row, rollout) pair,
            over the norm of the reference's terms; and the difference of the loss over the sum of their absolute
            values. The terms cancel in the loss, so that its own size says nothing of its rounding.
        gradients: per parameter, the norm of the difference over the norm of the reference, which counts as at least
            `SMALLEST_SHARE` of that of all gradients; empty with the distributed optimizer, which leaves each rank a
            shard of the sums.
        parameters: the norm of the difference over that of the reference, after optimizer steps; empty without steps.
    """

    max_log_prob_diff: float
    max_log_prob_rel_diff: float
    loss_rel_diff: float
    gradients: dict[str, float]
    parameters: dict[str, float]

    @property
    def max_grad_rel_diff(self) -> float:
        """The worst parameter's gradient; NaN where gradients are sharded."""
        return max(self.gradients.values(), default=math.nan)

    @property
    def worst(self) -> float:
        """The largest relative difference of all."""
        return _largest(
            [self.max_log_prob_rel_diff, self.loss_rel_diff, *self.gradients.values(), *self.parameters.values()]
        )


@dataclass(frozen=True)
class BothInputs:
    """One batch of this rank as micro-batches of both paths, with the same old log-probs.

    Attributes:
        grouped: shared prefixes, groups over the limit split.
        order: int64, where each pair of ``repeated`` stands among those of ``grouped``, see `pair_order`.
        repeated: every sequence by itself.
    """

    grouped: list[StepInput]
    order: Tensor
    repeated: list[StepInput]


def make_inputs(
    trainer: PolicyTrainer, groups: Sequence[RolloutGroup | RolloutTree], max_tokens_per_pack: int | None, seed: int = 0
) -> BothInputs:
    """The micro-batches of both paths.

    The old log-probs, which also stand for the reference policy's, are those of ``trainer`` with seeded noise.
    """
    generator = torch.Generator().manual_seed(seed)
    packs = pack_and_split(groups, max_tokens_per_pack=max_tokens_per_pack)
    grouped = []
    for pack, old in zip(packs, trainer.log_probs_of(packs), strict=True):
        old += OLD_POLICY_NOISE * torch.randn(old.shape, generator=generator).to(old)
        grouped.append(StepInput(pack, old, ref_log_probs=old))
    order = pair_order(groups, max_tokens_per_pack=max_tokens_per_pack)
    # One sequence a micro-batch bounds the plain path's memory.
    pair_old = torch.cat([batch.old_log_probs[batch.pack.pairs.row] for batch in grouped])[order]
    repeated = []
    for pack in repeated_packs(groups):
        old = torch.zeros(pack.response_rows.numel(), dtype=pair_old.dtype)
        old[pack.pairs.row] = pair_old[: pack.pairs.row.numel()]
        pair_old = pair_old[pack.pairs.row.numel() :]
        repeated.append(StepInput(pack, old, ref_log_probs=old))
    return BothInputs(grouped, order, repeated)


def evaluate(
    trainer: PolicyTrainer, inputs: Sequence[StepInput], steps: int = 0, order: Tensor | None = None
) -> Evaluation:
    """Log-probs, loss and gradients of a batch, then the parameters after ``steps`` optimizer steps on it.

    order: int64, where each pair of the result stands among those of the micro-batches; None leaves them as they are.
    """
    found = trainer.log_probs_of([batch.pack for batch in inputs])
    log_probs = torch.cat([x[batch.pack.pairs.row] for x, batch in zip(found, inputs, strict=True)])
    metrics, terms = trainer.gradients_and_terms(inputs)
    terms = terms.double().cpu()
    if order is not None:
        log_probs, terms = log_probs[order], terms[order]
    terms_size = sum(all_gather_object(terms.abs().sum().item(), trainer.dp_group))
    gradients: dict[str, Tensor] = {}
    if not trainer.settings.distributed_optimizer:
        gradients = {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}
    for _ in range(steps):
        trainer.step(inputs)
    parameters: dict[str, Tensor] = {}
    if steps:
        parameters = {name: x.detach().clone() for name, x in whole_model_parameters(trainer.model).items()}
    return Evaluation(log_probs, metrics["loss"], terms, terms_size, gradients, parameters)


def differences(result: Evaluation, reference: Evaluation) -> Differences:
    """How far ``result`` is from ``reference``, the same on every rank.

    A rank compares the parameters that it has of ``result``, a stage's for instance; all together must have those of
    ``reference``.

    Raises:
        ValueError: they have not, or have others.
    """
    diff = (result.log_probs.double() - reference.log_probs.double()).abs().max().item()
    scale = max(1.0, reference.log_probs.abs().max().item())
    mine = {
        "log_probs": (diff, scale),
        "loss": _ratio(abs(result.loss - reference.loss), reference.terms_size),
        "terms": _squares({"terms": result.terms}, {"terms": reference.terms}),
        "gradients": _squares(result.gradients, reference.gradients),
        "parameters": _squares(result.parameters, reference.parameters),
        "names": (set(result.gradients | result.parameters), set(reference.gradients | reference.parameters)),
    }
    ranks = all_gather_object(mine, torch.distributed.group.WORLD)
    found, expected = (set().union(*names) for names in zip(*(rank["names"] for rank in ranks), strict=True))
    if found != expected:
        raise ValueError(f"the two models have different parameters: {sorted(found ^ expected)}")
    terms = _relative([rank["terms"] for rank in ranks])
    return Differences(
        max_log_prob_diff=_largest(rank["log_probs"][0] for rank in ranks),
        max_log_prob_rel_diff=_largest(d / s for d, s in (rank["log_probs"] for rank in ranks)),
        loss_rel_diff=_largest([*(rank["loss"] for rank in ranks), *terms.values()]),
        gradients=_relative([rank["gradients"] for rank in ranks], SMALLEST_SHARE),
        parameters=_relative([rank["parameters"] for rank in ranks]),
    )


Squares = dict[str, tuple[float, float]]


def _squares(result: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Squares:
    return {
        name: (_square_sum(value.double() - reference[name].double()), _square_sum(reference[name].double()))
        for name, value in result.items()
        if name in reference
    }


def _largest(values: Iterable[float]) -> float:
    """The maximum, with NaN as infinite: Python's max() passes over a NaN that does not come first."""
    return max(math.inf if math.isnan(value) else value for value in values)


def _square_sum(x: Tensor) -> float:
    return x.square().sum().item()


def _relative(ranks: Sequence[Squares], smallest_share: float = 0.0) -> dict[str, float]:
    """Norm of the difference over norm of the reference, shards of all ranks taken together; NaN as infinite.

    A norm below ``smallest_share`` of that of all tensors together counts as that share.
    """
    result = {}
    floor = smallest_share**2 * sum(square for rank in ranks for _, square in rank.values())
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        diff = sum(rank[name][0] for rank in ranks if name in rank)
        norm = max(floor, sum(rank[name][1] for rank in ranks if name in rank))
        result[name] = _largest([math.sqrt(_ratio(diff, norm))])
    return result


def _ratio(diff: float, size: float) -> float:
    """``diff / size``, both 0 or more; no difference from nothing is 0, any other is infinite."""
    return diff / size if size > 0 else (0.0 if diff == 0 else math.inf)
