"""Prefix-grouped attention over real context-parallel ranks: exact, bytes as planned, in the order that overlaps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix import PrefixLayout
from megatron_prefix.attention import KERNELS
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.collectives import Group, Pending, Traffic
from megatron_prefix.context_parallel import ring
from megatron_prefix.context_parallel.attention import CpShare, context_parallel_attention
from megatron_prefix.context_parallel.comm_types import COMM_TYPES
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape, layer_traffic
from tests.attention_oracle import DEEP, FLAT, TOLERANCE, TWO_GROUPS, inputs, repeated_attention, run
from tests.distributed import run_distributed

TIMEOUT_S = 300  # for a busy machine
CPU = torch.device("cpu")
LAYOUTS = {
    "flat": FLAT,
    "two groups": TWO_GROUPS,
    "deep": DEEP,
    "one response": PrefixLayout([17, 6], [-1, 0]),
    "one-token responses": PrefixLayout([6, 1, 1, 1], [-1, 0, 0, 0]),
    "one-token prompt": PrefixLayout([0, 9, 4, 12], [-1, 0, 0, 0]),
    "a response to cut": PrefixLayout([5, 2, 60, 3], [-1, 0, 0, 0]),
    "a rank without rows": PrefixLayout([1, 1], [-1, 0]),
    "a rank without prefix rows": PrefixLayout([2, 7, 6, 9], [-1, 0, 0, 0]),
    "ragged": PrefixLayout([40, 3, 31, 8, 11, 1, 19, 12, 0, 5], [-1, 0, 0, 0, 0, -1, 5, 6, 6, 5]),
}
# (query heads, key-value heads): fewer key-value heads than ranks among them, and heads that no split shares evenly
HEADS = {"mha": (12, 12), "gqa": (12, 4), "few keys": (12, 2), "one key": (12, 1), "uneven": (12, 3)}


@dataclass(frozen=True)
class Case:
    layout: str
    heads: str = "gqa"
    dims: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float64


CASES = [
    *(Case(layout) for layout in LAYOUTS),
    *(Case("ragged", heads) for heads in HEADS if heads != "gqa"),
    Case("deep", "few keys"),
    Case("flat", dims=(8, 5)),
    Case("deep", "mha", dims=(4, 8)),
    Case("ragged", dtype=torch.float32),
    Case("deep", "few keys", dtype=torch.float32),
]


def two_levels(rank: int, world_size: int) -> tuple[Group, Group]:
    """Groups of two neighbours, and of their counterparts, as megatron-core makes them for [2, 2]."""
    inner: Group = None
    outer: Group = None
    if world_size == 4:
        for ranks in ([0, 1], [2, 3]):
            group = dist.new_group(ranks)
            inner = group if rank in ranks else inner
        for ranks in ([0, 2], [1, 3]):
            group = dist.new_group(ranks)
            outer = group if rank in ranks else outer
    return inner, outer


def ways(world_size: int) -> list[tuple[str, str]]:
    return [(comm, name) for comm in COMM_TYPES for name in PLACEMENTS if comm != "a2a+p2p" or world_size == 4]


def on_this_rank(
    share: CpShare, comm_type: str, tensors: tuple[Tensor, ...], kernel: Kernel = KERNELS["sdpa"]
) -> dict[str, Tensor]:
    """Output and gradients of this rank's rows."""
    rows = share.plan.rows(share.rank)
    scale = tensors[0].shape[-1] ** -0.5
    attention: Callable[..., Tensor] = partial(
        context_parallel_attention, share=share, comm_type=comm_type, softmax_scale=scale, kernel=kernel
    )
    q, k, v, dout = (x[rows] for x in tensors)
    return run(attention, q, k, v, dout)


def against_the_oracle(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    """(case, comm type, placement, worst error, bytes counted, bytes planned) of every case and way."""
    inner, outer = two_levels(rank, world_size)
    found = []
    for case in CASES:
        layout = LAYOUTS[case.layout]
        tensors = inputs(layout.num_rows, HEADS[case.heads], case.dims, case.dtype)
        exact = [x.double() for x in tensors]
        expected = run(partial(repeated_attention, layout=layout), exact[0], exact[1], exact[2], exact[3])
        for comm_type, placement in ways(world_size):
            plan = CpPlan.build(layout, world_size, placement)
            share = CpShare(plan, dist.group.WORLD, CPU, inner, outer, Traffic())
            result = on_this_rank(share, comm_type, tensors)
            rows = plan.rows(rank)
            errors = [0.0]
            for name, value in result.items():
                assert value.dtype == case.dtype and value.shape == expected[name][rows].shape
                difference = (value.double() - expected[name][rows]).abs()
                errors.append(difference.max().item() if difference.numel() else 0.0)
                assert not value.isnan().any(), (case, comm_type, placement, name)
            # The CPU's kernel wants one head dim, so the wider one travels.
            shape = AttentionShape(*HEADS[case.heads], max(case.dims), bytes_per_element=case.dtype.itemsize)
            planned = layer_traffic(plan, shape, comm_type, 2)[rank].total
            assert share.traffic is not None
            counted = (share.traffic.sent, share.traffic.received)
            found.append((case, comm_type, placement, max(errors), counted, tuple(planned)))
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def found(request: pytest.FixtureRequest) -> list[list[tuple[Any, ...]]]:
    return run_distributed(against_the_oracle, request.param, timeout_s=TIMEOUT_S)


def test_equal_to_repeated_prefixes(found: list[list[tuple[Any, ...]]]) -> None:
    assert {(comm, name) for _, comm, name, *_ in found[0]} == set(ways(len(found)))
    for rank, results in enumerate(found):
        assert len(results) == len(CASES) * len(ways(len(found)))
        for case, comm_type, placement, error, *_ in results:
            assert error <= TOLERANCE[case.dtype], (rank, case, comm_type, placement, error)


def test_bytes_are_those_of_the_plan(found: list[list[tuple[Any, ...]]]) -> None:
    moved = 0
    for rank, results in enumerate(found):
        for case, comm_type, placement, _, counted, planned in results:
            assert counted == planned, (rank, case, comm_type, placement)
            moved += counted[1]
    assert moved > 0


def test_the_layouts_have_empty_shares() -> None:
    """The cases hold what they are meant to: ranks without any row, without a prefix row, and cut responses."""
    for placement in PLACEMENTS:
        plan = CpPlan.build(LAYOUTS["a rank without rows"], 4, placement)
        assert min(len(plan.rows(rank)) for rank in range(4)) == 0
        plan = CpPlan.build(LAYOUTS["a rank without prefix rows"], 4, placement)
        assert any(all(p.segment for p in pieces) for pieces in plan.placement if pieces)
    plan = CpPlan.build(LAYOUTS["a response to cut"], 3, "branch")
    assert sum(p.segment == 2 for pieces in plan.placement for p in pieces) >= 3


# ---- half precision


def bf16_errors(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    """Squared error against fp32 of (context parallel, one rank), summed over this rank's rows, by tensor."""
    inner, outer = two_levels(rank, world_size)
    layout = PrefixLayout([160, 30, 77, 12, 51], [-1, 0, 0, 2, 0])
    tensors = inputs(layout.num_rows, (12, 4), (16, 16), torch.bfloat16)
    exact = [x.float() for x in tensors]
    expected = run(partial(repeated_attention, layout=layout), exact[0], exact[1], exact[2], exact[3])
    one_rank = CpShare(CpPlan.build(layout, 1, "branch"), None, CPU)
    alone = on_this_rank(one_rank, "p2p", tensors)
    found = []
    for comm_type, placement in ways(world_size):
        plan = CpPlan.build(layout, world_size, placement)
        rows = plan.rows(rank)
        result = on_this_rank(CpShare(plan, dist.group.WORLD, CPU, inner, outer), comm_type, tensors)
        for name, value in result.items():
            squares = [(x.float() - expected[name][rows]).square().sum().item() for x in (value, alone[name][rows])]
            found.append((comm_type, placement, name, *squares))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_bf16_is_within_twice_the_error_of_one_rank(world_size: int) -> None:
    ranks = run_distributed(bf16_errors, world_size, timeout_s=TIMEOUT_S)
    for entries in zip(*ranks, strict=True):
        together, alone = (sum(entry[i] for entry in entries) ** 0.5 for i in (3, 4))
        assert 0 < together <= 2 * alone, (entries[0][:3], together, alone)


# ---- order of issue and wait


class Recorder:
    """Notes in order what starts, what is waited for and what is computed; all of it really happens."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.exchanges = 0

    def start_exchange(self, *args: Any) -> Any:
        number, self.exchanges = self.exchanges, self.exchanges + 1
        self.events.append(("start", number))
        pending = START_EXCHANGE(*args)
        return RecordedPending(self, number, pending)


class RecordedPending:
    def __init__(self, recorder: Recorder, number: int, pending: Pending) -> None:
        self.recorder, self.number, self.pending = recorder, number, pending

    def wait(self) -> Tensor:
        self.recorder.events.append(("wait", self.number))
        return self.pending.wait()


class RecordedKernel:
    """The CPU's kernel; a call counts as its own or a step's by the keys that it gets."""

    mixed_head_dims = False
    contiguous = False

    def __init__(self, recorder: Recorder, own_calls: int, step_calls: list[int]) -> None:
        self.recorder = recorder
        self.labels = [("own",)] * own_calls + [("step", i) for i, n in enumerate(step_calls) for _ in range(n)]
        self.done = 0

    def refusal(self, *args: Any) -> str | None:
        return KERNELS["sdpa"].refusal(*args)

    def _note(self) -> None:
        self.recorder.events.append(self.labels[self.done % len(self.labels)])
        self.done += 1

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self._note()
        return KERNELS["sdpa"].forward(*args)

    def backward(self, *args: Any) -> None:
        self._note()
        KERNELS["sdpa"].backward(*args)


START_EXCHANGE = ring.start_exchange


def record(rank: int, world_size: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Events of forward and of backward with p2p."""
    plan = CpPlan.build(PrefixLayout([24, 8, 8, 8, 8], [-1, 0, 0, 0, 0]), world_size, "dual_chunk_swap")
    share = CpShare(plan, dist.group.WORLD, CPU)
    calls = share.ring(1)
    recorder = Recorder()
    kernel = RecordedKernel(recorder, 1 + len(calls.own.ancestors), [len(step.calls) for step in calls.steps])
    assert all(step.calls for step in calls.steps)
    q, k, v, dout = (x[plan.rows(rank)].requires_grad_() for x in inputs(plan.layout.num_rows))
    with mock.patch.object(ring, "start_exchange", recorder.start_exchange):
        out = context_parallel_attention(q, k, v, share, "p2p", 0.3, kernel)
        forward, recorder.events, recorder.exchanges = recorder.events, [], 0
        out.backward(dout)
    return forward, recorder.events


@pytest.mark.parametrize("world_size", [3, 4])
def test_keys_of_the_next_step_are_on_their_way_while_a_step_is_computed(world_size: int) -> None:
    steps = world_size - 1
    for forward, backward in run_distributed(record, world_size, timeout_s=TIMEOUT_S):

        def last(events: list[tuple[Any, ...]], event: tuple[Any, ...]) -> int:
            return max(i for i, each in enumerate(events) if each == event)

        # Forward: exchange i brings the keys of step i.
        assert forward.index(("start", 0)) < forward.index(("own",))
        assert last(forward, ("own",)) < forward.index(("wait", 0))
        for i in range(steps):
            assert forward.index(("wait", i)) < forward.index(("step", i))
            if i + 1 < steps:
                assert forward.index(("start", i + 1)) < forward.index(("step", i))
                assert last(forward, ("step", i)) < forward.index(("wait", i + 1))
        # Backward: keys of step i + 1 start before step i is computed, gradients of step i right after it; they are
        # waited for only when the next step is done.
        keys, gradients = [0], []
        number = 1
        for i in range(steps):
            if i + 1 < steps:
                keys.append(number)
                number += 1
            gradients.append(number)
            number += 1
        assert [event for event in backward if event[0] == "start"] == [("start", n) for n in range(number)]
        assert backward.index(("start", 0)) < backward.index(("own",))
        assert last(backward, ("own",)) < backward.index(("wait", 0))
        for i in range(steps):
            assert backward.index(("wait", keys[i])) < backward.index(("step", i))
            assert last(backward, ("step", i)) < backward.index(("start", gradients[i]))
            if i + 1 < steps:
                assert backward.index(("start", keys[i + 1])) < backward.index(("step", i))
                assert last(backward, ("step", i + 1)) < backward.index(("wait", gradients[i]))


# ---- what is refused


def refusals(rank: int, world_size: int) -> list[str]:
    share = CpShare(CpPlan.build(FLAT, world_size, "branch"), dist.group.WORLD, CPU)
    messages = []
    for comm_type, heads in (("a2a", (3, 3)), ("ring", (4, 2)), ("a2a+p2p", (4, 2)), ("all-gather", (4, 2))):
        try:
            on_this_rank(share, comm_type, inputs(FLAT.num_rows, heads))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_done_is_refused_by_name() -> None:
    for messages in run_distributed(refusals, 2, timeout_s=TIMEOUT_S):
        assert messages == [
            "cp_comm_type a2a needs query heads that divide by its 2 ranks, got 3; use p2p",
            "unknown cp_comm_type 'ring'; choose one of p2p, all_gather, a2a, a2a+p2p",
            "cp_comm_type 'a2a+p2p' needs two levels of groups; initialise megatron-core with "
            "hierarchical_context_parallel_sizes=[a2a size, p2p size]",
            "unknown cp_comm_type 'all-gather'; choose one of p2p, all_gather, a2a, a2a+p2p",
        ]


# ---- deliberate errors: the comparison must notice each

ADD_PENDING = ring.GradientsInFlight._add_pending


def drop_pending(gradients: ring.GradientsInFlight) -> None:
    """Wait for gradients as always, and forget them."""
    for _, pending in gradients.pending:
        pending.wait()
    gradients.pending = []


def with_mutants(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """(error of the output, of the gradients) with a call left out, and with keys that come from the wrong rows."""
    layout = LAYOUTS["ragged"]
    tensors = inputs(layout.num_rows, (12, 4))
    expected = run(partial(repeated_attention, layout=layout), *tensors)
    plan = CpPlan.build(layout, world_size, "dual_chunk_swap")
    rows = plan.rows(rank)
    found = {}
    for name in ("none", "no last step", "shifted rows", "no gradient back"):
        share = CpShare(plan, dist.group.WORLD, CPU)
        steps = list(share.ring(1).steps)
        if name == "no last step":
            steps[-1] = replace(steps[-1], calls=())
        if name == "shifted rows":
            other = torch.arange(steps[0].sent.num_rows) if steps[0].sent else None
            steps[0] = replace(steps[0], sent=replace(steps[0].sent, index=other))
        share._rings[1] = replace(share.ring(1), steps=tuple(steps))
        change = drop_pending if name == "no gradient back" else ADD_PENDING
        with mock.patch.object(ring.GradientsInFlight, "_add_pending", change):
            result = on_this_rank(share, "p2p", tensors)
        errors = {key: (value - expected[key][rows]).abs().max().item() for key, value in result.items()}
        found[name] = (errors["out"], max(errors["dq"], errors["dk"], errors["dv"]))
    return found


def test_deliberate_errors_are_noticed() -> None:
    ranks = run_distributed(with_mutants, 3, timeout_s=TIMEOUT_S)
    for name in ranks[0]:
        out, gradients = (max(rank[name][i] for rank in ranks) for i in (0, 1))
        if name == "none":
            assert max(out, gradients) <= 1e-10
        else:
            assert gradients > 1e-2, name
            assert (out > 1e-2) is (name != "no gradient back"), name
