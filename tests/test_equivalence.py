"""Prefix groups against plain megatron-core on repeated prefixes: log-probs, loss, gradients, trained parameters."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_prefix import BatchTotals, LossConfig, Pack, PrefixLayout, pack_and_split
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.sdpa import SdpaKernel
from megatron_prefix.mcore import equivalence
from megatron_prefix.mcore.equivalence import TOLERANCE, Evaluation, differences
from megatron_prefix.mcore.packed import PrefixPackedSeqParams
from megatron_prefix.mcore.training import PolicyTrainer, TrainSettings
from tests import equivalence_cases as ec
from tests.distributed import run_distributed

TIMEOUT_S = 400  # for a busy machine; alone it is a tenth
CASES = ec.covering_cases()
WORLD_SIZES = sorted({case.tp * case.dp for case in CASES})


def test_the_cases_cover_every_pair_of_values() -> None:
    covered = set().union(*(ec.pairs_of_values({f: getattr(case, f) for f in ec.FACTORS}) for case in CASES))
    assert covered >= ec.all_pairs()
    assert len({case.name for case in CASES}) == len(CASES) < 40


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """Results of every case by rank: one start of processes per world size."""
    results: dict[str, list[dict[str, Any]]] = {}
    for world_size in WORLD_SIZES:
        cases = [case for case in CASES if case.tp * case.dp == world_size]
        ranks = run_distributed(ec.compare_all, world_size, cases, timeout_s=TIMEOUT_S)
        results |= {case.name: [rank[case.name] for rank in ranks] for case in cases}
    return results


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equal_to_plain_megatron_core(case: ec.Case, found: dict[str, list[dict[str, Any]]]) -> None:
    limit = TOLERANCE[case.torch_dtype]
    for result in found[case.name]:
        shown = {key: value for key, value in result.items() if not isinstance(value, dict)}
        assert result["max_log_prob_diff"] <= limit * 10, shown
        assert result["max_log_prob_rel_diff"] <= limit, shown
        assert result["loss_rel_diff"] <= limit, shown
        assert max(result["gradients"].values(), default=0.0) <= limit, result["gradients"]
        assert max(result["parameters"].values()) <= limit, result["parameters"]
        assert result["worst"] <= limit
        # and the comparison had something to compare
        assert bool(result["gradients"]) is ("distributed" not in case.optimizer)
        assert result["moved"] > 1e-4 and abs(result["loss"]) > 1e-4 and math.isfinite(result["loss"])
        assert (result["packs"] > 1) is (case.several_packs and case.dp == 1) or case.dp == 2


# ---- half precision

BF16 = {"tp1": ec.Case(trees=True), "tp1 recompute": ec.Case(recompute="full", qk_layernorm=True)}


def compare_bf16(rank: int, world_size: int) -> dict[str, Any]:
    return {name: ec.in_groups(1, 1, ec.compare_bf16, case) for name, case in BF16.items()}


def test_bf16_is_within_twice_the_plain_paths_own_error() -> None:
    (result,) = run_distributed(compare_bf16, 1, timeout_s=TIMEOUT_S)
    for name in BF16:
        for quantity in ("log_probs", "gradients", "loss"):
            mine, plain = result[name][quantity]
            assert 0 < mine <= 2 * plain, f"{name}: {quantity} {mine} against {plain}"


# ---- losses

FP64 = ec.Case()


def losses(rank: int, world_size: int) -> Any:
    return ec.in_groups(1, 1, ec.compare_losses, FP64)


def test_every_loss_setting() -> None:
    """GSPO, KL, entropy, truncated importance: against an oracle written in the test, entropy's gradient included."""
    (found,) = run_distributed(losses, 1, timeout_s=TIMEOUT_S)
    for name, result in found.items():
        assert result.worst <= 1e-10, f"{name}: {result}"


CUT_LOSSES = [LossConfig(), ec.LOSSES["gspo"], ec.LOSSES["kl and entropy"]]


def evaluate_cuts(rank: int, world_size: int, cuts: list[int | None]) -> list[Evaluation]:
    def all_cuts() -> list[Evaluation]:
        return [
            ec.loss_and_gradients(replace(FP64, dp=world_size), loss, max_tokens_per_pack=cut)
            for loss in CUT_LOSSES
            for cut in cuts
        ]

    return ec.in_groups(1, world_size, all_cuts)


def test_the_loss_is_the_same_however_the_batch_is_cut() -> None:
    """One pack, many packs, two data-parallel ranks: the same loss and gradients of the global batch."""
    (whole,) = run_distributed(evaluate_cuts, 1, [None, 23, 16], timeout_s=TIMEOUT_S)
    ranks = run_distributed(evaluate_cuts, 2, [None, 20], timeout_s=TIMEOUT_S)
    for i in range(len(CUT_LOSSES)):
        one_pack, *others = whole[3 * i : 3 * i + 3]
        others += [rank[2 * i + cut] for rank in ranks for cut in range(2)]
        assert abs(one_pack.loss) > 1e-4
        assert one_pack.terms.sum().item() == pytest.approx(one_pack.loss, rel=1e-10)
        for other in others:
            assert other.loss == pytest.approx(one_pack.loss, rel=1e-10)
            assert other.terms_size == pytest.approx(one_pack.terms_size, rel=1e-10)
            for name, gradient in one_pack.gradients.items():
                assert (other.gradients[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


# ---- the ratio of a policy to itself


SELF = {
    1: [ec.Case(dtype="float32", trees=True), ec.Case(dtype="float32", recompute="full", position="yarn")],
    2: [ec.Case(dtype="float32", tp=2, sequence_parallel=True, tied=True), ec.Case(dtype="float32", dp=2)],
}


def self_ratios(rank: int, world_size: int) -> list[dict[str, float]]:
    return [ec.in_groups(case.tp, case.dp, ec.self_ratio, case) for case in SELF[world_size]]


@pytest.mark.parametrize("world_size", SELF)
def test_the_ratio_of_a_policy_to_itself_is_1(world_size: int) -> None:
    for rank in run_distributed(self_ratios, world_size, timeout_s=TIMEOUT_S):
        for metrics in rank:
            assert abs(metrics["ratio"] - 1) <= 1e-6 and abs(metrics["ratio_max"] - 1) <= 1e-6
            assert metrics["old_kl"] <= 1e-12  # no ratio below 1 either
            assert metrics["clip_low"] == metrics["clip_high"] == metrics["nonfinite"] == 0


# ---- deliberate errors: the comparison must notice each


@contextmanager
def positions_off_by_one() -> Iterator[None]:
    """Responses start on the position of their parent's last row (RoPE does not see a whole sequence shifted)."""
    build = PrefixPackedSeqParams.build

    def wrong(layout: PrefixLayout, device: torch.device, **options: Any) -> PrefixPackedSeqParams:
        packed = build(layout, device, **options)
        positions = packed.row_positions.clone()
        for start, length, first in zip(layout.starts, layout.lengths, layout.first_positions, strict=False):
            if first > 0:
                positions[start : start + length] -= 1
        return replace(packed, row_positions=positions)

    with mock.patch.object(PrefixPackedSeqParams, "build", wrong):
        yield


@contextmanager
def changed_calls(change: Any) -> Iterator[None]:
    build = AttentionCalls.build
    with mock.patch.object(AttentionCalls, "build", lambda *args: change(build(*args))):
        yield


@contextmanager
def no_gradient_into_ancestors() -> Iterator[None]:
    backward = SdpaKernel.backward

    def wrong(self: SdpaKernel, grads: Any, dout: Any, qkv: Any, out: Any, lse: Any, call: Any, scale: float) -> None:
        spare = tuple(torch.zeros_like(grad) for grad in grads[1:])
        backward(self, grads if call.causal else (grads[0], *spare), dout, qkv, out, lse, call, scale)

    with mock.patch.object(SdpaKernel, "backward", wrong):
        yield


MUTANTS = {
    "none": (changed_calls, (lambda calls: calls,)),
    "positions off by one": (positions_off_by_one, ()),
    "no ancestors": (changed_calls, (lambda calls: replace(calls, ancestors=()),)),
    "missing last level": (changed_calls, (lambda calls: replace(calls, ancestors=calls.ancestors[:-1]),)),
    "rows see what follows": (changed_calls, (lambda calls: replace(calls, own=replace(calls.own, causal=False)),)),
    "no gradient into ancestors": (no_gradient_into_ancestors, ()),
}


def compare_mutants(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (mutant, args) in MUTANTS.items():
        for position in ("rope", "learned"):
            with mutant(*args):
                case = ec.Case(trees=True, position=position)
                found[f"{name}, {position}"] = ec.in_groups(1, 1, ec.compare, case)
    return found


def test_deliberate_errors_are_noticed() -> None:
    (found,) = run_distributed(compare_mutants, 1, timeout_s=TIMEOUT_S)
    for name, result in found.items():
        if name.startswith("none"):
            assert result["worst"] <= 1e-10
            continue
        assert result["worst"] > 1e-4, name
        assert max(result["gradients"].values()) > 1e-4, name
        if "no gradient" not in name:
            assert result["max_log_prob_diff"] > 1e-4, name


# ---- deliberate errors of the loss alone: every log-prob is right


@contextmanager
def one_token_too_many() -> Iterator[None]:
    count = PolicyTrainer._global_totals

    def wrong(self: PolicyTrainer, inputs: Any) -> BatchTotals:
        shared = any(parent != -1 for batch in inputs for parent in batch.pack.layout.parents)
        return count(self, inputs) + BatchTotals(int(shared), 0)

    with mock.patch.object(PolicyTrainer, "_global_totals", wrong):
        yield


@contextmanager
def swapped_advantages() -> Iterator[None]:
    def wrong(*args: Any, **options: Any) -> list[Pack]:
        return [replace(pack, advantages=pack.advantages.flip(0)) for pack in pack_and_split(*args, **options)]

    with mock.patch.object(equivalence, "pack_and_split", wrong):
        yield


LOSS_MUTANTS = {"none": nullcontext, "totals": one_token_too_many, "advantages": swapped_advantages}


def compare_loss_mutants(rank: int, world_size: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    found = {}
    for name, mutant in LOSS_MUTANTS.items():
        with mutant():
            found[name] = (ec.in_groups(1, 1, ec.compare, FP64), ec.in_groups(1, 1, ec.compare_bf16, FP64))
    return found


def test_a_loss_of_wrong_totals_or_advantages_is_noticed() -> None:
    """In bf16 too, where twice the plain path's own error is the limit."""
    (found,) = run_distributed(compare_loss_mutants, 1, timeout_s=TIMEOUT_S)
    for name, (exact, half) in found.items():
        assert exact["max_log_prob_rel_diff"] <= 1e-10, name
        mine, plain = half["loss"]
        if name == "none":
            assert exact["loss_rel_diff"] <= 1e-10 and 0 < mine <= 2 * plain
        else:
            assert exact["loss_rel_diff"] > 1e-3 and mine > 2 * plain, name


# ---- settings that cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0, got -0.001"),
        ({"clip_grad": math.nan}, "clip_grad must be at least 0, got nan"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"optimizer": "lion"}, "optimizer must be 'adam' or 'sgd', got 'lion'"),
        ({"optimizer": "sgd", "distributed_optimizer": True}, "optimizer='sgd': .* knows Adam only"),
    ],
)
def test_train_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)


def refusals_of_a_trainer(rank: int, world_size: int) -> list[str]:
    def refusal(**settings: Any) -> str:
        try:
            PolicyTrainer(ec.models_of(FP64)[0], TrainSettings(**settings), LossConfig())
        except ValueError as error:
            return str(error)
        return ""

    def no_packs() -> str:
        try:
            PolicyTrainer(ec.models_of(FP64)[0], TrainSettings(clip_grad=0.0), LossConfig()).step([])
        except ValueError as error:
            return str(error)
        return ""

    return ec.in_groups(
        1, 1, lambda: [refusal(clip_grad=1.0), refusal(clip_grad=0.0, distributed_optimizer=True), no_packs()]
    )


def test_a_trainer_refuses_what_megatron_core_cannot_do_in_fp64() -> None:
    ((clip, distributed, empty),) = run_distributed(refusals_of_a_trainer, 1, timeout_s=TIMEOUT_S)
    assert "clip_grad=1.0: megatron-core clips fp32 gradients only" in clip
    assert "distributed_optimizer=True: megatron-core's takes no fp64 model" in distributed
    assert "no micro-batch; give every rank at least one group" in empty


# ---- the comparison itself


def evaluation(
    log_prob: float = -1.0, loss: float = 0.5, gradient: float = 2.0, terms: tuple[float, float] = (2.0, -1.5)
) -> Evaluation:
    return Evaluation(
        torch.tensor([-2.0, log_prob]),
        loss,
        torch.tensor(terms).double(),
        sum(map(abs, terms)),
        {"w": torch.tensor([gradient, 1.0])},
    )


def compare_with_nan(rank: int, world_size: int) -> list[float]:
    """The worst difference where only the last rank has a NaN."""
    nan = math.nan if rank == world_size - 1 else 1.0
    wrong = [evaluation(log_prob=-1.0 * nan), evaluation(loss=0.5 * nan), evaluation(gradient=2.0 * nan)]
    wrong.append(evaluation(terms=(2.0 * nan, -1.5)))
    return [differences(each, evaluation()).worst for each in [evaluation(), *wrong]]


def test_a_nan_on_any_rank_is_an_infinite_difference() -> None:
    for rank in run_distributed(compare_with_nan, 2):
        assert rank == [0.0, math.inf, math.inf, math.inf, math.inf]


def compare_numbers(rank: int, world_size: int) -> Any:
    found = [differences(evaluation(log_prob=-1.5), evaluation()), differences(evaluation(loss=0.25), evaluation()),
             differences(evaluation(gradient=3.0), evaluation())]  # fmt: skip
    try:
        differences(replace(evaluation(), gradients={"v": torch.ones(2)}), evaluation())
    except ValueError as error:
        return found, str(error)
    return found, ""


def test_differences_by_hand() -> None:
    ((found, refusal),) = run_distributed(compare_numbers, 1)
    assert found[0].max_log_prob_diff == 0.5 and found[0].max_log_prob_rel_diff == 0.25
    assert found[0].loss_rel_diff == found[2].loss_rel_diff == 0.0
    assert found[1].loss_rel_diff == found[1].worst == 0.25 / 3.5  # not over the loss, in which the terms cancel
    assert found[2].max_grad_rel_diff == pytest.approx(1 / math.sqrt(5))
    assert "different parameters: ['v', 'w']" in refusal


def compare_terms(rank: int, world_size: int) -> list[float]:
    """Loss differences where every rank has its own pairs; `terms_size` is of all of them."""
    reference = replace(evaluation(terms=((3.0, -4.0), (12.0, 0.0))[rank]), terms_size=19.0)
    nothing = evaluation(loss=0.0, terms=(0.0, 0.0))

    def moved(of: Evaluation, *by: float) -> float:
        return differences(replace(of, terms=of.terms + torch.tensor(by)), of).loss_rel_diff

    return [
        moved(reference, 0.0, 1.3 * (1 - rank)),  # one pair of one rank
        moved(reference, 1.0, -1.0),  # which the loss does not see
        differences(replace(reference, loss=0.5 + 19 / 4), reference).loss_rel_diff,  # which the terms do not see
        moved(nothing, 0.0, 0.0),
        moved(nothing, 0.0, 1e-30 * rank),
        differences(replace(nothing, loss=1e-30), nothing).loss_rel_diff,
    ]


def test_loss_differences_by_hand() -> None:
    """The norm of the reference's terms is sqrt(3^2 + 4^2 + 12^2) = 13, and they are 19 together."""
    for rank in run_distributed(compare_terms, 2):
        assert rank == pytest.approx([1.3 / 13, 2 / 13, 0.25, 0.0, math.inf, math.inf])


def compare_vanishing_gradients(rank: int, world_size: int) -> list[float]:
    """A gradient that is 0 but for rounding, beside a large one: rounding passes, a true difference does not."""
    reference = replace(evaluation(), gradients={"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-9])})
    return [
        differences(replace(reference, gradients=reference.gradients | {"b": torch.tensor([b])}), reference).worst
        for b in (-1e-9, 1e-3)
    ]


def test_gradients_that_vanish_are_measured_against_the_whole() -> None:
    (found,) = run_distributed(compare_vanishing_gradients, 1)
    assert found[0] == pytest.approx(2e-9 / 5e-3)
    assert found[1] == pytest.approx(1e-3 / 5e-3, rel=1e-5)
