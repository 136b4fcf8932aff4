"""The GRPO family of losses on (row, rollout) pairs. Pure torch: no collectives, and nothing is read back to the host.

    N  rows of log-probs (response rows of a pack)   R  rollouts of the pack   M  trained (row, rollout) pairs

See `rollout_pairs` for what a pair is. The loss of a pack is the sum of its pairs' weighted terms: its share of the
mean over the GLOBAL batch (``BatchTotals``). Shares add up, over packs and over data-parallel ranks, to the same loss
and the same gradients however the batch is cut. A host that averages gradients over its ranks instead of adding them
must multiply the loss by the number of ranks.

Sources: PPO clipping (arXiv 1707.06347), GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476: token mean,
separate clip bounds), GSPO (2507.18071: sequence ratio), the KL estimators k1 to k3 (J. Schulman, "Approximating KL
Divergence", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_prefix.rollout_pairs import BatchTotals, RolloutPairs

KlEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]
Ratio = Literal["token", "sequence"]


@dataclass(frozen=True)
class LossConfig:
    """What loss to compute. The defaults are DAPO's token mean with symmetric clipping and no KL term.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: weight of the KL to the reference policy; above 0 it needs ``ref_log_probs``.
        kl_estimator: with d = ref - log_prob, "k1" is -d, "k2" is d^2 / 2 and "k3" is exp(d) - d - 1. The gradient is
            the plain derivative of the estimator: on policy that of "k2" is the reverse KL's, that of "k3" the forward
            KL's and that of "k1" has mean 0.
        aggregation: "token", the mean over all trained tokens of the batch (DAPO); "sequence", the mean over rollouts
            of each one's token mean (GRPO); "constant", the sum over tokens / (constant_length x rollouts) (Dr. GRPO).
        constant_length: tokens, for aggregation "constant" (usually the limit on the response length).
        ratio: "token", or "sequence": one ratio per rollout, exp of the mean log-ratio of its trained tokens (GSPO,
            which goes with aggregation "sequence" and much smaller clip bounds).
        importance_cap: None, or the bound of truncated importance weights min(exp(old - sampler), cap), which multiply
            the policy term (not KL or entropy) without gradient; needs ``sampler_log_probs``.
        entropy_coef: weight of the entropy bonus (subtracted from the loss); above 0 it needs ``entropy``.

    Raises:
        ValueError: a value out of range; names field, value and limit.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    ratio: Ratio = "token"
    importance_cap: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in (("clip_low", 1.0), ("clip_high", None), ("kl_coef", None), ("entropy_coef", None)):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (limit is not None and value > limit):
                bounds = "a finite number of 0 or more" if limit is None else f"a number from 0 to {limit:g}"
                raise ValueError(f"{name} must be {bounds}, got {value!r}")
        for name, choices in (("kl_estimator", KlEstimator), ("aggregation", Aggregation), ("ratio", Ratio)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.importance_cap is not None and not (_is_number(self.importance_cap) and self.importance_cap > 0):
            raise ValueError(
                "importance_cap must be None (no importance weights) or a finite number above 0, "
                f"got {self.importance_cap!r}"
            )
        if self.aggregation == "constant":
            if type(self.constant_length) is not int or self.constant_length < 1:
                raise ValueError(
                    "aggregation 'constant' needs constant_length, an int of 1 or more (usually the limit on the "
                    f"response length), got {self.constant_length!r}"
                )
        elif self.constant_length is not None:
            raise ValueError(
                f"constant_length {self.constant_length!r} is used by aggregation 'constant' only, "
                f"got aggregation {self.aggregation!r}; leave it out"
            )


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    pairs: RolloutPairs,
    totals: BatchTotals,
    *,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    config: LossConfig | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One pack's share of the loss: the sum of `grpo_loss_terms`, which has the arguments, the metrics and the errors.

    Returns:
        The loss (scalar, dtype of ``log_probs``) and the metrics.
    """
    terms, metrics = grpo_loss_terms(
        log_probs,
        old_log_probs,
        advantages,
        pairs,
        totals,
        ref_log_probs=ref_log_probs,
        sampler_log_probs=sampler_log_probs,
        entropy=entropy,
        config=config,
    )
    return terms.sum(), metrics


def grpo_loss_terms(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    pairs: RolloutPairs,
    totals: BatchTotals,
    *,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    config: LossConfig | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of every pair: weight x (policy term + kl_coef x KL - entropy_coef x entropy). Their sum is the loss.

    Gradients flow to ``log_probs`` and ``entropy`` only. Where a log-ratio is not finite the loss is what the formula
    gives; the metric ``nonfinite`` counts such pairs, since checking here would stall the device.

    Args:
        log_probs: [N] fp32 or fp64, of the policy being trained. The other tensors are cast to its dtype.
        old_log_probs: [N], of the policy at the start of the step (the one that PPO's ratio is against).
        advantages: [R], one per rollout of the pack.
        pairs: which row belongs to which rollout.
        totals: of the global batch, so never less than this pack's own.
        ref_log_probs: [N], of the reference policy. With ``kl_coef`` 0 it is measured only.
        sampler_log_probs: [M], one per pair, as the sampler reported them: rollouts that share a row were sampled one
            by one. With ``importance_cap`` None it is measured only.
        entropy: [N], of the policy's distribution at every row. With ``entropy_coef`` 0 it is measured only.
        config: what to compute; None for ``LossConfig()``.

    Returns:
        The weighted terms [M] in pair order (dtype of ``log_probs``), and the metrics: detached fp64 scalars that
        ``add_metrics`` adds over packs and ``summarize`` turns into means. Sums over pairs, except ``loss`` (the share
        itself), ``rollouts`` and the maxima, whose names end in ``_max``: a collective must reduce those with MAX and
        all others with SUM.

    Raises:
        ValueError: wrong shape, dtype or device, totals below the pack's, or a tensor that ``config`` needs missing.
    """
    config = config or LossConfig()
    _check_inputs(log_probs, pairs, totals, config)
    rows, owner = pairs.row, pairs.rollout

    def per_pair(name: str, values: Tensor) -> Tensor:
        _check_vector(name, values, len(log_probs), log_probs.device)
        return values.to(log_probs.dtype).index_select(0, rows)

    def need(name: str, values: Tensor | None, coefficient: str, needed: bool) -> None:
        if values is None and needed:
            raise ValueError(
                f"{coefficient} {getattr(config, coefficient)!r} needs {name}, got None; pass it or turn it off"
            )

    need("ref_log_probs", ref_log_probs, "kl_coef", config.kl_coef > 0)
    need("sampler_log_probs", sampler_log_probs, "importance_cap", config.importance_cap is not None)
    need("entropy", entropy, "entropy_coef", config.entropy_coef > 0)
    reference = None if ref_log_probs is None else per_pair("ref_log_probs", ref_log_probs)
    uncertainty = None if entropy is None else per_pair("entropy", entropy)
    if sampler_log_probs is not None:
        _check_vector("sampler_log_probs", sampler_log_probs, len(rows), log_probs.device)
    _check_vector("advantages", advantages, pairs.num_rollouts, log_probs.device)
    advantage = advantages.detach().to(log_probs.dtype).index_select(0, owner)
    current = per_pair("log_probs", log_probs)
    old = per_pair("old_log_probs", old_log_probs).detach()

    log_ratio = current - old
    ratio = torch.exp(_rollout_mean(log_ratio, pairs) if config.ratio == "sequence" else log_ratio)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    term = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    with torch.no_grad():
        metrics = {
            "pairs": torch.full((), len(rows), dtype=torch.float64, device=log_probs.device),
            "rollouts": torch.full((), pairs.totals.rollouts, dtype=torch.float64, device=log_probs.device),
            "nonfinite": _sum(~torch.isfinite(log_ratio)),
            "advantage": _sum(advantage),
            "ratio": _sum(ratio),
            "ratio_max": _max(ratio),
            "clip_low": _sum((ratio < low) & (advantage < 0)),
            "clip_high": _sum((ratio > high) & (advantage > 0)),
            "old_kl": _sum(_kl(current, old, "k3")),
        }
    if sampler_log_probs is not None:
        importance = torch.exp(old - sampler_log_probs.detach().to(log_probs.dtype))
        metrics |= {"importance": _sum(importance), "importance_max": _max(importance)}
        if config.importance_cap is not None:
            metrics["importance_capped"] = _sum(importance > config.importance_cap)
            term = term * importance.clamp(max=config.importance_cap)
    if reference is not None:
        kl = _kl(current, reference.detach(), config.kl_estimator)
        metrics["kl"] = _sum(kl.detach())
        if config.kl_coef > 0:
            term = term + config.kl_coef * kl
    if uncertainty is not None:
        metrics["entropy"] = _sum(uncertainty.detach())
        if config.entropy_coef > 0:
            term = term - config.entropy_coef * uncertainty
    weighted = _weighted(term, pairs, totals, config)
    metrics["loss"] = _sum(weighted.detach())
    return weighted, metrics


def add_metrics(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of two packs together: sums add, ``_max`` takes the larger. Nothing is read back to the host.

    Raises:
        ValueError: the packs were measured with different inputs, so their metrics have different names.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f"metrics {sorted(first.keys() ^ second.keys())} are in one pack only; "
            "give every pack the same inputs and config"
        )
    return {
        name: torch.maximum(value, second[name]) if name.endswith("_max") else value + second[name]
        for name, value in first.items()
    }


def summarize(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Host numbers from metrics added over packs (and ranks): means over pairs; counts, maxima and the loss as is.

    ``clip_low`` and ``clip_high`` become the share of pairs whose gradient the clip removes. Reads the device.
    """
    whole = {"loss", "pairs", "rollouts", "nonfinite"}
    values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
    count = max(values["pairs"], 1.0)
    return {name: value if name in whole or name.endswith("_max") else value / count for name, value in values.items()}


def _weighted(term: Tensor, pairs: RolloutPairs, totals: BatchTotals, config: LossConfig) -> Tensor:
    """[M]: every pair's term times its weight in the mean over the global batch (an empty batch counts as 1)."""
    if config.aggregation == "token":
        return term / max(totals.tokens, 1)
    if config.aggregation == "sequence":
        return term / pairs.lengths.index_select(0, pairs.rollout) / max(totals.rollouts, 1)
    assert config.constant_length is not None  # LossConfig saw to it
    return term / (config.constant_length * max(totals.rollouts, 1))


def _rollout_mean(values: Tensor, pairs: RolloutPairs) -> Tensor:
    """[M]: for every pair, the mean of ``values`` over all pairs of its rollout."""
    sums = values.new_zeros(pairs.num_rollouts).index_add(0, pairs.rollout, values)
    return (sums / pairs.lengths).index_select(0, pairs.rollout)


def _kl(log_probs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    difference = reference - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(difference) - difference


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _max(values: Tensor) -> Tensor:
    """The largest value, 0 of none (both maxima are of ratios, which are positive)."""
    return torch.cat([values.new_zeros(1), values.detach()]).max().double()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_inputs(log_probs: Tensor, pairs: RolloutPairs, totals: BatchTotals, config: LossConfig) -> None:
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_probs must be float32 (or float64), got {log_probs.dtype}; compute log-probs in float32")
    if config.ratio == "sequence" and pairs.counted is not None:
        raise ValueError(
            "ratio 'sequence' needs every rollout whole in one pack, but a tree was split below trained tokens; raise "
            "max_tokens_per_pack, or use ratio 'token'"
        )
    if pairs.row.device != log_probs.device:
        raise ValueError(f"pairs are on {pairs.row.device} but log_probs on {log_probs.device}; use pairs.to(device)")
    if totals.tokens < pairs.totals.tokens or totals.rollouts < pairs.totals.rollouts:
        raise ValueError(
            f"totals {totals} are smaller than this pack's own {pairs.totals}; pass the sum over all packs of all ranks"
        )


def _check_vector(name: str, values: Tensor, length: int, device: torch.device) -> None:
    if tuple(values.shape) != (length,) or not values.is_floating_point() or values.device != device:
        raise ValueError(
            f"{name} must be a floating-point vector of {length} on {device}, "
            f"got {values.dtype} {list(values.shape)} on {values.device}"
        )
