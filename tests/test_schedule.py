"""What `forward_backward_prefix_groups` refuses, what stages tell each other, and losses averaged over packs."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prefix import LossConfig, Pack, RolloutGroup, pack_groups
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
from megatron_prefix.mcore.step_plan import plan_step
from megatron_prefix.mcore.training import PolicyTrainer
from megatron_prefix.splitting import pack_and_split
from tests import pipeline_cases as pc
from tests.distributed import run_distributed
from tests.mcore_helpers import start
from tests.pipeline_cases import Case

TIMEOUT_S = 120
ONE = RolloutGroup([3] * 9, [[t] * n for t, n in enumerate((12, 11, 6))], [0.0, 1.0, 0.5])
OTHER = RolloutGroup([4] * 9, [[9] * 12, [8] * 11], [0.0, 1.0])
LONGER = RolloutGroup([5] * 12, [[9] * 12, [8] * 11], [0.0, 1.0])
LIMIT = 13


def packs_of(*groups: RolloutGroup) -> list[Pack]:
    """Of each split group its prefix and a part per response."""
    return pack_and_split(list(groups), max_tokens_per_pack=LIMIT)


def run_schedule(model: Any, packs: Sequence[Pack], forward_step: Any, **settings: Any) -> list[Any]:
    iterators = [iter(packs) for _ in model]
    return forward_backward_prefix_groups(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model,
        num_microbatches=settings.pop("num_microbatches", len(packs)),
        seq_length=1,
        micro_batch_size=1,
        **settings,
    )


def refuse_all(iterator: Iterator[Pack], model: Any) -> Any:
    raise AssertionError("no work may be done")


# ---- orders that cannot be


def refusals(rank: int, world_size: int) -> dict[str, str]:
    start()
    model = pc.build(Case(layers=2))
    one, longer = packs_of(ONE), packs_of(LONGER)
    prefix, *parts = one
    messages = {}
    for name, packs in {
        "part first": [parts[0], prefix, *parts[1:]],
        "no prefix": parts,
        "twice": [prefix, *parts, prefix],
        "no parts": [prefix, *longer],
        "nothing": [],
        "foreign": [prefix, *parts, longer[0], *longer[1:-1], replace(longer[-1], prefix=prefix.prefix)],
    }.items():
        try:
            run_schedule(model, packs, refuse_all)
        except ValueError as error:
            messages[name] = str(error)
        assert all(pack.prefix is None or pack.prefix.cache is None for pack in packs)
    try:
        run_schedule(model, one, refuse_all, num_microbatches=5)
    except ValueError as error:
        messages["too few"] = str(error)
    for name, pack in {"prefix outside": prefix, "part outside": parts[0]}.items():
        try:
            response_log_probs(model[0], pack)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_cannot_run_is_refused_by_name_before_any_work() -> None:
    (messages,) = run_distributed(refusals, 1, timeout_s=TIMEOUT_S)
    expected = {
        "part first": "micro-batch 0 is a part without its prefix before it; keep the order of pack_and_split",
        "no prefix": "micro-batch 0 is a part without its prefix before it",
        "twice": "micro-batch 4 is a prefix that came before; give every prefix once a step",
        "no parts": "a prefix of 8 rows has no part in this step; keep pack_and_split's packs together",
        "nothing": "none of the 0 micro-batches has a response; give at least one",
        "foreign": "micro-batch 6 reads 11 rows of a prefix that has 8; keep pack_and_split's packs together",
        "too few": "the data iterator ended after 4 of 5 micro-batches",
        "prefix outside": "this pack is part of a split group, whose prefix has no keys here",
        "part outside": "this pack is part of a split group, whose prefix has no keys here",
    }
    for name, message in expected.items():
        assert message in messages.get(name, "(no error)"), f"{name}: {messages.get(name)}"


def interleaved(rank: int, world_size: int) -> bool:
    """Gradients of two groups of equal layouts, one after the other and part by part in turn."""
    start()
    trainer = PolicyTrainer(pc.build(Case(layers=2)), pc.settings_of(Case()), LossConfig())
    a, b = packs_of(ONE)[:3], packs_of(OTHER)
    found = []
    for packs in ([*a, *b], [a[0], b[0], b[1], a[1], b[2], a[2]]):
        trainer.gradients(pc.inputs_of(packs))
        found.append([gradient.clone() for gradient in trainer.named_gradients().values()])
    return all(torch.allclose(x, y, rtol=1e-11, atol=1e-14) for x, y in zip(*found, strict=True))


def test_a_part_reads_the_keys_of_its_own_group() -> None:
    assert run_distributed(interleaved, 1, timeout_s=TIMEOUT_S) == [True]


# ---- stages that disagree


def disagreeing(rank: int, world_size: int) -> dict[str, str]:
    start(pp=2)
    model = pc.build(Case(layers=2))
    one, other = packs_of(ONE), packs_of(OTHER)
    prefix, *parts = one
    seen = {
        "another part": ([*one, *other], [prefix, parts[1], parts[0], parts[2], *other]),
        "one less": (one, one[:-1]),
        "no prefix": (one, [*parts, prefix]),
        "another group's parts": (
            [prefix, other[0], parts[0], other[1], *parts[1:], other[2]],
            [prefix, other[0], other[1], parts[0], *parts[1:], other[2]],
        ),
        "one gives out": (one, one[:-1]),
    }
    assert other[1].layout == parts[0].layout
    messages = {}
    for name, packs in seen.items():
        count = {"num_microbatches": len(one)} if name == "one gives out" else {}
        try:
            run_schedule(model, packs[rank], refuse_all, **count)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_stages_with_different_micro_batches_raise_on_every_stage() -> None:
    ranks = run_distributed(disagreeing, 2, timeout_s=TIMEOUT_S)
    firsts = {"another part": 1, "one less": 3, "no prefix": 0, "another group's parts": 2, "one gives out": 3}
    for messages in ranks:
        for name, first in firsts.items():
            assert "pipeline stages 0 and 1 have different micro-batches" in messages.get(name, "(no error)"), name
            assert f"number {first} is the first that differs" in messages[name], messages[name]


# ---- errors in a step in which prefixes share turns


def failing_everywhere(rank: int, world_size: int) -> dict[str, Any]:
    """Steps that fail in each call of each stage's forward step, the shared turn of a trained prefix among them."""
    case = Case(pp=2, steps=0)
    start(pp=2)
    trainer = PolicyTrainer(pc.build(case), pc.settings_of(case), LossConfig())
    packs = pc.packs_of_rank(trainer, case)
    inputs, plain = pc.inputs_of(packs), trainer.log_probs_fn
    caches: list[weakref.ref[Any]] = []
    calls, fails_at = 0, -1

    def log_probs(model: Any, pack: Pack, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if pack.prefix is not None:
            caches.append(weakref.ref(pack.prefix.cache))
        if calls == fails_at:
            raise KeyError(f"call {calls}")
        return plain(model, pack, **settings)

    def gradients(failing: int = -1) -> list[Tensor]:
        nonlocal calls, fails_at
        calls, fails_at = 0, failing
        trainer.gradients(inputs)
        return [p.main_grad.clone() for chunk in trainer.chunks for p in chunk.parameters()]

    trainer.log_probs_fn = log_probs
    gc.disable()
    before = gradients()
    held = sum(cache() is not None for cache in caches)
    gc.enable()
    errors = []
    for stage, call in product(range(2), range(1, calls + 1)):
        try:
            gradients(call if rank == stage else -1)
        except (KeyError, RuntimeError) as error:
            errors.append(f"call {call}" in str(error) and isinstance(error, KeyError) is (rank == stage))
        assert all(pack.prefix is None or pack.prefix.cache is None for pack in packs)
    after = gradients()
    shared = [job for job in plan_step(packs, trainer.config).jobs if job.ends is not None]
    return {
        "calls": calls, "errors": errors, "held": held, "shared": len(shared),
        "equal": all(a.equal(b) for a, b in zip(before, after, strict=True)),
    }  # fmt: skip


def test_an_error_ends_a_step_with_shared_turns_and_the_next_one_works() -> None:
    for found in run_distributed(failing_everywhere, 2, timeout_s=TIMEOUT_S):
        assert found["shared"] > 0 and found["calls"] >= 14
        assert found["errors"] == [True] * 2 * found["calls"]
        assert found["held"] == 0 and found["equal"]


# ---- losses that megatron-core averages over micro-batches


def weights_of(pack: Pack) -> Tensor:
    """Of each response row, by what stands there, however it is packed."""
    rows = pack.response_rows
    return torch.cos(pack.targets[rows] * 1.7 + pack.positions[rows] * 0.9).double()


def legacy_step(per_token: bool, iterator: Iterator[Pack], model: Any) -> Any:
    pack = next(iterator)

    def loss(log_probs: Tensor) -> Any:
        total = (log_probs * weights_of(pack)).sum()
        count = torch.tensor(len(log_probs), dtype=torch.int)
        return (total, count, {"packs": 1}) if per_token else (total, {"packs": 1})

    return response_log_probs(model, pack), loss


def averaged(rank: int, world_size: int, case: Case, weights: pc.Whole | None) -> Any:
    """Gradients of each kind of loss. Without ``weights``: the oracle's, the mean of autograd over unsplit packs."""
    start(pp=case.pp, **({"vpp": case.vpp} if case.vpp else {}))
    chunks = pc.build(case)
    for chunk in chunks:
        chunk.config.calculate_per_token_loss = False
    if weights is None:
        weights = pc.whole_of(chunks[0])
    pc.set_weights(chunks, weights)
    groups = [ONE, OTHER, RolloutGroup([7, 8], [[5, 6], [4]], [0.0, 1.0])]
    packs = packs_of(*groups)
    found = []
    for per_token in (False, True):
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.grad = None
        results = run_schedule(chunks, packs, lambda it, model, kind=per_token: legacy_step(kind, it, model))
        last = chunks[-1].post_process
        assert results == ([{"packs": 1}] * sum(not pack.is_prefix for pack in packs) if last else [])
        found.append([parameter.grad.clone() for chunk in chunks for parameter in chunk.parameters()])
    # A part alone is the group of its responses, unsplit.
    alone = [RolloutGroup(g.prompt, [r], [0.0]) for g in groups[:2] for r in g.responses]
    expected = []
    if world_size == 1:
        unsplit = [pack for group in [*alone, groups[2]] for pack in pack_groups([group])]
        for per_token in (False, True):
            for parameter in chunks[0].parameters():
                parameter.grad = None
            for pack in unsplit:
                count = len(pack.response_rows) if per_token else 1
                log_probs = response_log_probs(chunks[0], pack)
                ((log_probs * weights_of(pack)).sum() / (count * len(unsplit))).backward()
            expected.append([parameter.grad.clone() for parameter in chunks[0].parameters()])
    return found, expected, weights


@pytest.fixture(scope="module")
def averages() -> Any:
    return run_distributed(averaged, 1, Case(), None, timeout_s=TIMEOUT_S)[0]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("per_token", [False, True], ids=["2-tuple", "3-tuple"])
def test_the_mean_is_over_packs_with_responses(per_token: bool, averages: Any) -> None:
    found, expected, _ = averages
    assert worst(found[per_token], expected[per_token]) <= 1e-10


def test_the_mean_is_the_same_in_an_interleaved_pipeline(averages: Any) -> None:
    """Whose number of micro-batches is rounded up."""
    expected, _, weights = averages
    ranks = run_distributed(averaged, 2, Case(pp=2, vpp=2), weights, timeout_s=TIMEOUT_S)
    for per_token in (False, True):
        pipeline = sum(float(x.square().sum()) for found, *_ in ranks for x in found[per_token])
        assert pipeline == pytest.approx(sum(float(x.square().sum()) for x in expected[per_token]), rel=1e-10)
