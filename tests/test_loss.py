"""The loss against a definition written per rollout in plain Python, and its independence of how a batch is cut."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix.advantages import group_advantages
from megatron_prefix.loss import (
    BatchTotals,
    LossConfig,
    RolloutPairs,
    add_metrics,
    grpo_loss,
    grpo_loss_terms,
    summarize,
)

INPUTS = ("log_probs", "old_log_probs", "ref_log_probs", "sampler_log_probs", "entropy")


@dataclass
class Batch:
    """Rollouts as lists of rows into the [N] vectors; several may hold one row. The sampler's log-probs are [M]."""

    vectors: dict[str, Tensor]
    owned: list[list[int]]
    advantages: list[float]

    def pairs(self) -> RolloutPairs:
        row = [row for rows in self.owned for row in rows]
        rollout = [i for i, rows in enumerate(self.owned) for _ in rows]
        lengths = [len(rows) for rows in self.owned]
        return RolloutPairs(
            torch.tensor(row).long(), torch.tensor(rollout).long(), len(lengths), torch.tensor(lengths).long()
        )

    def loss(self, totals: BatchTotals, config: LossConfig, **change) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {**self.vectors, **change}
        advantages = torch.tensor(self.advantages, dtype=torch.float64)
        first = [inputs.pop("log_probs"), inputs.pop("old_log_probs"), advantages, self.pairs(), totals]
        return grpo_loss(*first, **inputs, config=config)


def make_batch(seed: int, *, tree: bool, num_rollouts: int = 5) -> Batch:
    """Random ragged rollouts, in ``tree`` with shared rows and interleaved ones; some rows are in no rollout."""
    rng = random.Random(seed)
    if tree:
        num_rows = 12
        owned = [rng.sample(range(num_rows), rng.randint(1, 8)) for _ in range(num_rollouts)]
    else:
        ends = list(itertools.accumulate(rng.randint(1, 6) for _ in range(num_rollouts)))
        owned = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
        owned = [[r for r in rows if r == rows[0] or rng.random() < 0.8] for rows in owned]  # some masked tokens
        num_rows = ends[-1]
    generator = torch.Generator().manual_seed(seed)
    base = -3 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    vectors = {name: base + 0.4 * torch.randn(num_rows, generator=generator, dtype=torch.float64) for name in INPUTS}
    vectors["entropy"] = vectors["entropy"].abs()
    of_pairs = base[[row for rows in owned for row in rows]]
    noise = torch.randn(len(of_pairs), generator=generator, dtype=torch.float64)
    vectors["sampler_log_probs"] = of_pairs + 0.4 * noise
    for name in ("log_probs", "entropy"):
        vectors[name].requires_grad_()
    return Batch(vectors, owned, [rng.choice([-1.3, 0.0, 0.7, 2.1]) for _ in owned])


def naive_loss(batch: Batch, config: LossConfig) -> Tensor:
    """The papers' formulas, one rollout and one token at a time; the batch is the global one."""
    v = batch.vectors
    sampled = iter(v["sampler_log_probs"].tolist())
    per_rollout = []
    for rows, advantage in zip(batch.owned, batch.advantages, strict=True):
        token_ratios = [torch.exp(v["log_probs"][r] - v["old_log_probs"][r].detach()) for r in rows]
        if config.ratio == "sequence":  # the geometric mean
            geometric = torch.stack(token_ratios).prod() ** (1 / len(rows))
            token_ratios = [geometric] * len(rows)
        terms = []
        for r, ratio in zip(rows, token_ratios, strict=True):
            bound = 1 + config.clip_high if advantage > 0 else 1 - config.clip_low
            outside = ratio > bound if advantage > 0 else ratio < bound
            term = -advantage * (torch.tensor(bound, dtype=torch.float64) if outside else ratio)
            weight = math.exp(v["old_log_probs"][r].item() - next(sampled))
            if config.importance_cap is not None:
                term = term * min(weight, config.importance_cap)
            odds = torch.exp(v["ref_log_probs"][r] - v["log_probs"][r])
            kl = {"k1": -odds.log(), "k2": odds.log() ** 2 / 2, "k3": odds - 1 - odds.log()}[config.kl_estimator]
            terms.append(term + config.kl_coef * kl - config.entropy_coef * v["entropy"][r])
        per_rollout.append(terms)
    if config.aggregation == "token":
        return torch.stack([t for terms in per_rollout for t in terms]).mean()
    if config.aggregation == "sequence":
        return torch.stack([torch.stack(terms).mean() for terms in per_rollout]).mean()
    assert config.constant_length is not None
    return torch.stack([torch.stack(terms).sum() / config.constant_length for terms in per_rollout]).mean()


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    inputs = [batch.vectors["log_probs"], batch.vectors["entropy"]]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def totals_of(batch: Batch) -> BatchTotals:
    return BatchTotals(sum(len(rows) for rows in batch.owned), len(batch.owned))


CONFIGS = [
    LossConfig(),
    LossConfig(clip_low=0.1, clip_high=0.3),
    LossConfig(aggregation="sequence", kl_coef=0.1),
    LossConfig(aggregation="constant", constant_length=7, kl_coef=0.1, kl_estimator="k1"),
    LossConfig(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.01),
    LossConfig(aggregation="sequence", ratio="sequence", clip_low=0.05, clip_high=0.08),
    LossConfig(ratio="sequence", kl_coef=0.1, importance_cap=1.2),
    LossConfig(importance_cap=0.9, kl_coef=0.2, entropy_coef=0.1),
]


@pytest.mark.parametrize("tree", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_loss_and_gradients_equal_the_definition(config, tree):
    for seed in range(5):
        batch = make_batch(seed, tree=tree)
        loss, _ = batch.loss(totals_of(batch), config)
        expected = naive_loss(batch, config)
        assert_same([loss, *gradients(loss, batch)], [expected, *gradients(expected, batch)])


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tree=st.booleans(),
    config=st.sampled_from(CONFIGS),
    packs=st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_any_cut_into_packs_gives_the_same_loss_and_gradients(seed, tree, config, packs):
    """``packs[i]`` is the pack of rollout i. Each pack has its own rows, as after an encoding of its own."""
    batch = make_batch(seed, tree=tree, num_rollouts=7)
    whole, metrics = batch.loss(totals_of(batch), config)
    parts, part_metrics, counted = [], [], BatchTotals(0, 0)
    for number in range(4):
        members = [i for i, pack in enumerate(packs) if pack == number]
        kept = sorted({row for i in members for row in batch.owned[i]})
        of_pairs = [packs[i] == number for i, rows in enumerate(batch.owned) for _ in rows]
        part = Batch(
            {name: values[of_pairs if name == "sampler_log_probs" else kept] for name, values in batch.vectors.items()},
            [[kept.index(row) for row in batch.owned[i]] for i in members],
            [batch.advantages[i] for i in members],
        )
        counted += part.pairs().totals
        loss, own = part.loss(totals_of(batch), config)
        parts.append(loss)
        part_metrics.append(own)
    assert counted == totals_of(batch)
    total = torch.stack(parts).sum()
    assert_same([total, *gradients(total, batch)], [whole, *gradients(whole, batch)])
    merged = part_metrics[0]
    for own in part_metrics[1:]:
        merged = add_metrics(merged, own)
    assert summarize(merged) == pytest.approx(summarize(metrics), abs=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_shared_row_counts_once_per_rollout_that_owns_it(config):
    """A tree equals the flat batch in which every rollout has its own copy of the shared rows."""
    for seed in range(5):
        tree = make_batch(seed, tree=True)
        rows = [row for owned in tree.owned for row in owned]
        ends = list(itertools.accumulate(len(owned) for owned in tree.owned))
        assert len(set(rows)) < len(rows)
        flat = Batch(
            {name: values if name == "sampler_log_probs" else values[rows] for name, values in tree.vectors.items()},
            [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)],
            tree.advantages,
        )
        loss, _ = tree.loss(totals_of(tree), config)
        unpacked, _ = flat.loss(totals_of(tree), config)
        assert_same([loss, *gradients(loss, tree)], [unpacked, *gradients(unpacked, tree)])


def test_one_per_row_leaves_masked_rows_out():
    pairs = RolloutPairs.one_per_row([3, 2, 1], [[1, 0, 1], None, [True]])
    assert pairs.row.tolist() == [0, 2, 3, 4, 5]
    assert pairs.rollout.tolist() == [0, 0, 1, 1, 2]
    assert pairs.lengths.tolist() == [2, 2, 1]
    assert pairs.totals + BatchTotals(1, 1) == BatchTotals(6, 4)
    plain = RolloutPairs.one_per_row([3, 2])
    assert plain.row.tolist() == list(range(5))
    with pytest.raises(ValueError, match="response 1 has 2 rows but a loss mask of 3"):
        RolloutPairs.one_per_row([1, 2], [None, [1, 1, 1]])
    with pytest.raises(ValueError, match="1 loss_masks for 2 responses"):
        RolloutPairs.one_per_row([1, 2], [None])
    with pytest.raises(ValueError, match="rollout 1 has 0 pairs"):
        RolloutPairs.one_per_row([1, 2], [None, [0, 0]])


def test_group_advantages():
    rewards = [1.0, 0.0, 0.25, 1.0]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert group_advantages(rewards) == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=1e-12)
    assert group_advantages(rewards, normalize_std=False) == pytest.approx([r - mean for r in rewards], abs=1e-12)
    assert group_advantages(rewards, eps=0.5) == pytest.approx([(r - mean) / (std + 0.5) for r in rewards], abs=1e-12)
    for normalize_std in (True, False):
        assert group_advantages([0.3], normalize_std=normalize_std) == [0.0]
        assert group_advantages([0.1] * 3, normalize_std=normalize_std) == [0.0] * 3  # fsum(0.1 * 3) / 3 is not 0.1
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="reward"):
            group_advantages(bad)
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        group_advantages(rewards, eps=-1.0)


def test_metrics_equal_counts_made_by_hand():
    config = LossConfig(importance_cap=1.1)
    batch = make_batch(3, tree=True)
    loss, metrics = batch.loss(totals_of(batch), config)
    v = {name: values.tolist() for name, values in batch.vectors.items()}
    each = [(a, r) for rows, a in zip(batch.owned, batch.advantages, strict=True) for r in rows]
    ratios = [math.exp(v["log_probs"][r] - v["old_log_probs"][r]) for _, r in each]
    weights = [math.exp(v["old_log_probs"][r] - x) for (_, r), x in zip(each, v["sampler_log_probs"], strict=True)]
    odds = [v["ref_log_probs"][r] - v["log_probs"][r] for _, r in each]
    moved = [v["old_log_probs"][r] - v["log_probs"][r] for _, r in each]
    expected = {
        "loss": loss.item(),
        "pairs": len(each),
        "rollouts": len(batch.owned),
        "nonfinite": 0,
        "advantage": statistics.fmean(a for a, _ in each),
        "ratio": statistics.fmean(ratios),
        "ratio_max": max(ratios),
        "clip_low": sum(x < 0.8 and a < 0 for x, (a, _) in zip(ratios, each, strict=True)) / len(each),
        "clip_high": sum(x > 1.2 and a > 0 for x, (a, _) in zip(ratios, each, strict=True)) / len(each),
        "old_kl": statistics.fmean(math.exp(d) - 1 - d for d in moved),
        "importance": statistics.fmean(weights),
        "importance_max": max(weights),
        "importance_capped": sum(w > 1.1 for w in weights) / len(each),
        "kl": statistics.fmean(math.exp(d) - 1 - d for d in odds),
        "entropy": statistics.fmean(v["entropy"][r] for _, r in each),
    }
    assert 0 < expected["clip_low"] < 1
    assert 0 < expected["clip_high"] < 1
    assert 0 < expected["importance_capped"] < 1
    assert summarize(metrics) == pytest.approx(expected, abs=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    with pytest.raises(ValueError, match=r"'kl'.* in one pack only"):
        add_metrics(metrics, batch.loss(totals_of(batch), config, ref_log_probs=None)[1])


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (LossConfig(), [1 / 6] * 3),
        (LossConfig(aggregation="sequence"), [1 / 2 / 4, 1 / 2 / 4, 1 / 4]),
        (LossConfig(aggregation="constant", constant_length=5), [1 / 20] * 3),
    ],
)
def test_terms_by_hand(config, weights):
    """Ratios 1, 1.5 (clipped to 1.2) and 0.5 (clipped to 0.8) of a rollout of two tokens and one of one token."""
    ratios = torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)
    pairs = RolloutPairs.one_per_row([2, 2], [None, [0, 1]])
    log_probs = torch.stack([ratios[0], ratios[1], torch.tensor(7.0), ratios[2]]).log()
    inputs = (log_probs, torch.zeros(4), torch.tensor([2.0, -1.0]), pairs, BatchTotals(6, 4))
    terms, metrics = grpo_loss_terms(*inputs, config=config)
    expected = [weight * term for weight, term in zip(weights, [-2.0, -2.4, 0.8], strict=True)]
    assert terms.tolist() == pytest.approx(expected, abs=1e-6) and terms.dtype == torch.float64
    loss, same = grpo_loss(*inputs, config=config)
    assert loss.item() == pytest.approx(sum(expected), abs=1e-6)
    assert summarize(metrics) == summarize(same) and summarize(same)["loss"] == pytest.approx(sum(expected), abs=1e-6)


def test_a_log_ratio_that_is_not_finite_is_counted():
    log_probs = torch.tensor([-1.0, -math.inf, math.nan], requires_grad=True)
    pairs = RolloutPairs.one_per_row([3])
    _, metrics = grpo_loss(log_probs, torch.full((3,), -1.0), torch.ones(1), pairs, pairs.totals)
    assert summarize(metrics)["nonfinite"] == 2


def test_gradients_reach_log_probs_and_entropy_only():
    batch = make_batch(0, tree=False)
    config = LossConfig(kl_coef=0.1, entropy_coef=0.1, importance_cap=1.0)
    for name in INPUTS:
        batch.vectors[name] = batch.vectors[name].detach().requires_grad_()
    loss, _ = batch.loss(totals_of(batch), config)
    loss.backward()
    reached = [name for name in INPUTS if batch.vectors[name].grad is not None]
    assert reached == ["log_probs", "entropy"]


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    pairs = RolloutPairs.one_per_row([2, 1])
    loss, metrics = grpo_loss(log_probs, log_probs.detach(), torch.tensor([2.0, -1.0]), pairs, pairs.totals)
    assert loss.dtype == torch.float32
    assert summarize(metrics)["ratio"] == 1.0
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, -2.0, 1.0]) / 3)


def test_a_pack_without_rollouts_has_loss_zero_and_zero_gradients():
    log_probs = torch.zeros(0, requires_grad=True)
    pairs = RolloutPairs.one_per_row([])
    for totals in (BatchTotals(0, 0), BatchTotals(9, 2)):
        for config in CONFIGS[:1] + CONFIGS[5:6]:
            loss, metrics = grpo_loss(log_probs, log_probs.detach(), torch.zeros(0), pairs, totals, config=config)
            loss.backward()
            assert loss.item() == 0.0
            assert summarize(metrics)["loss"] == 0.0
    assert log_probs.grad is not None


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_nothing_is_read_back_to_the_host(config):
    """Meta tensors have no values, so any read of one would raise."""
    batch = make_batch(0, tree=True)
    inputs = {name: values.detach().to("meta") for name, values in batch.vectors.items()}
    log_probs = inputs.pop("log_probs").requires_grad_()
    pairs = batch.pairs().to("meta")
    advantages = torch.zeros(len(batch.owned), device="meta")
    loss, metrics = grpo_loss(
        log_probs, inputs.pop("old_log_probs"), advantages, pairs, totals_of(batch), **inputs, config=config
    )
    loss.backward()
    assert add_metrics(metrics, metrics)["loss"].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": -0.1}, "clip_low must be a number from 0 to 1, got -0.1"),
        ({"clip_low": 1.5}, "clip_low must be a number from 0 to 1, got 1.5"),
        ({"clip_high": math.nan}, "clip_high must be a finite number of 0 or more, got nan"),
        ({"kl_coef": math.inf}, "kl_coef must be a finite"),
        ({"entropy_coef": "0"}, "entropy_coef must be .* got '0'"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
        ({"aggregation": "mean"}, "aggregation must be one of token, sequence, constant, got 'mean'"),
        ({"ratio": "group"}, "ratio must be one of token, sequence"),
        ({"importance_cap": 0}, "importance_cap must be None .* or a finite number above 0, got 0"),
        ({"aggregation": "constant"}, "needs constant_length, an int of 1 or more .* got None"),
        ({"aggregation": "constant", "constant_length": 0}, "needs constant_length, .* got 0"),
        ({"constant_length": 5}, "constant_length 5 is used by aggregation 'constant' only, got aggregation 'token'"),
    ],
)
def test_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.tensor([0, 1])}, "one entry per pair, got 2 and 3"),
        ({"row": torch.tensor([0.0, 1.0, 2.0])}, "row must be an int64 vector"),
        ({"row": torch.tensor([0, -1, 2])}, "row must be 0 or more, got -1"),
        ({"row": torch.tensor([0, 0, 2])}, "pair is given twice"),
        ({"rollout": torch.tensor([0, 0, 2])}, r"rollout must be in \[0, 2\), got 2"),
        ({"lengths": torch.tensor([1, 1])}, "rollout 0 has 2 pairs but length 1"),
        ({"lengths": torch.tensor([2])}, "lengths must have num_rollouts = 2 entries, got 1"),
        ({"num_rollouts": 3, "lengths": torch.tensor([2, 1, 0])}, "rollout 2 has 0 pairs but length 0"),
        ({"lengths": torch.tensor([2, 1], device="meta")}, "lengths must be .* on the device of row"),
    ],
)
def test_bad_pairs_are_refused(change, message):
    good = RolloutPairs.one_per_row([2, 1])
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(3, dtype=torch.bfloat16)}, "log_probs must be float32"),
        ({"log_probs": torch.zeros(3, device="meta")}, "pairs are on cpu but log_probs on meta"),
        ({"old_log_probs": torch.zeros(2)}, "old_log_probs must be a floating-point vector of 3"),
        ({"advantages": torch.zeros(3)}, "advantages must be a floating-point vector of 2"),
        ({"advantages": torch.tensor([1, 2])}, "advantages must be a floating-point vector of 2 .* torch.int64"),
        ({"totals": BatchTotals(2, 2)}, "smaller than this pack's own"),
        ({"totals": BatchTotals(3, 1)}, "smaller than this pack's own"),
        ({"config": LossConfig(kl_coef=0.1)}, "kl_coef 0.1 needs ref_log_probs, got None"),
        ({"config": LossConfig(importance_cap=2)}, "importance_cap 2 needs sampler_log_probs, got None"),
        ({"sampler_log_probs": torch.zeros(2)}, "sampler_log_probs must be a floating-point vector of 3"),
        ({"config": LossConfig(entropy_coef=0.1)}, "entropy_coef 0.1 needs entropy, got None"),
        ({"ref_log_probs": torch.zeros(4)}, "ref_log_probs must be a floating-point vector of 3"),
    ],
)
def test_bad_loss_inputs_are_refused(change, message):
    pairs = RolloutPairs.one_per_row([2, 1])
    good = {
        "log_probs": torch.zeros(3),
        "old_log_probs": torch.zeros(3),
        "advantages": torch.zeros(2),
        "pairs": pairs,
        "totals": pairs.totals,
    }
    grpo_loss(**good)
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**good, **change})
    with pytest.raises(ValueError, match="tokens must be an int of 0 or more, got -1"):
        BatchTotals(-1, 0)
