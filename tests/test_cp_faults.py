"""Context-parallel ranks that disagree or are gone: errors on every rank that is left, never a hang."""

import os
import re
import time
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix import PrefixLayout, RolloutGroup, pack_groups, response_log_probs
from megatron_prefix.attention import KERNELS
from megatron_prefix.collectives import two_levels_of_groups
from megatron_prefix.context_parallel.attention import CpShare, context_parallel_attention
from megatron_prefix.context_parallel.plan import CpPlan
from tests import cp_cases as cc
from tests.attention_oracle import inputs
from tests.distributed import LOOPBACK, run_distributed

pytestmark = pytest.mark.ci_oldest

# ---- ranks that disagree

COMMON = [3, 2]  # responses of all ranks but the last
LAST_RANK_HAS = {
    "one response fewer": ([3], "2 segments, 5 rows"),
    "one token fewer": ([3, 1], "3 segments, 6 rows"),
    "the same tokens in another order": ([2, 3], "3 segments, 7 rows"),
}


def pack_of(lengths: list[int], token: int = 4) -> Any:
    group = RolloutGroup([1, 2, 3], [[token] * n for n in lengths], [float(i) for i in range(len(lengths))])
    (pack,) = pack_groups([group])
    return pack


def log_probs_of_different_packs(rank: int, world_size: int, comm_type: str) -> dict[str, str]:
    world = cc.World(cp=world_size)
    overrides = cc.start_world(world)
    model, _ = cc.models_of(cc.Case(comm_type, "branch"), world, overrides)
    last = rank == world_size - 1
    messages = {}
    for name, (lengths, _) in LAST_RANK_HAS.items():
        try:
            response_log_probs(model, pack_of(lengths if last else COMMON))
        except ValueError as error:
            messages[name] = str(error)
    for pack, placement in (
        (pack_of(COMMON, token=4 + last), "branch"),
        (pack_of(COMMON), "auto" if last else "branch"),
    ):
        with pytest.raises(ValueError, match="different layouts, placements or tokens"):
            response_log_probs(model, pack, cp_placement=placement)
    if last:
        model.config.cp_comm_type = "a2a"  # of this rank alone
    with pytest.raises(ValueError, match=r"checksums of the layout .* the placement and cp_comm_type"):
        response_log_probs(model, pack_of(COMMON), cp_placement="branch")
    model.config.cp_comm_type = comm_type
    # The model still works afterwards.
    messages["equal"] = str(len(response_log_probs(model, pack_of(COMMON))))
    return messages


@pytest.mark.parametrize(("comm_type", "world_size"), [("p2p", 2), ("a2a+p2p", 4)])
def test_different_packs_are_an_error_on_every_rank_that_names_the_difference(comm_type: str, world_size: int) -> None:
    for messages in run_distributed(log_probs_of_different_packs, world_size, comm_type):
        assert messages.pop("equal") == "5"
        assert set(messages) == set(LAST_RANK_HAS)
        for name, (_, last) in LAST_RANK_HAS.items():
            assert "give all the same pack" in messages[name]
            seen = [f"rank {rank}: 3 segments, 7 rows" for rank in range(world_size - 1)]
            assert re.search(", .*; ".join([*seen, f"rank {world_size - 1}: {last}"]), messages[name]), messages[name]


# ---- ranks that are gone

WAYS = [("p2p", 3), ("all_gather", 3), ("a2a", 3), ("a2a+p2p", 4)]  # and ranks
INNER_SIZE = 2
GROUP_TIMEOUT_S = 5.0
SLACK_S = 60.0  # a busy machine
EXIT_CODE = 7


class LeavingKernel:
    """The CPU's kernel, until its third call: then this process is gone, or answers no more."""

    mixed_head_dims = False
    contiguous = False

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def refusal(self, *args: Any) -> str | None:
        return KERNELS["sdpa"].refusal(*args)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == 3:
            if self.how == "dies":
                os._exit(EXIT_CODE)
            time.sleep(GROUP_TIMEOUT_S + SLACK_S)

    def forward(self, *args: Any) -> Any:
        self._count()
        return KERNELS["sdpa"].forward(*args)

    def backward(self, *args: Any) -> None:
        self._count()
        KERNELS["sdpa"].backward(*args)


def attend(rank: int, world_size: int, folder: str, comm_type: str, how: str, reports: Any) -> None:
    """Attention again and again; the last rank leaves in the middle. Reports the error and how long it took to come."""
    os.environ.update(LOOPBACK)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    dist.barrier()  # however slowly processes start, the short limit counts from here
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    inner, outer = two_levels_of_groups(INNER_SIZE, limit) if comm_type == "a2a+p2p" else (None, None)
    group = dist.new_group(timeout=limit)
    layout = PrefixLayout([24, 9, 7, 5], [-1, 0, 0, 0])
    plan = CpPlan.build(layout, world_size, "dual_chunk_swap")
    share = CpShare(plan, group, torch.device("cpu"), inner, outer)
    q, k, v, dout = (x[plan.rows(rank)].requires_grad_() for x in inputs(layout.num_rows, (12, 12)))
    kernel: Any = LeavingKernel(how) if rank == world_size - 1 else KERNELS["sdpa"]
    started = time.monotonic()
    try:
        while True:
            context_parallel_attention(q, k, v, share, comm_type, 0.3, kernel).backward(dout)
            started = time.monotonic()
    except RuntimeError as error:
        reports.put((rank, str(error), time.monotonic() - started))
        # What is left of the group must not be waited for.
        reports.close()
        reports.join_thread()
        os._exit(0)


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize(("comm_type", "world_size"), WAYS)
def test_a_rank_that_is_gone_gives_the_others_an_error_in_time(
    comm_type: str, world_size: int, how: str, tmp_path: Path
) -> None:
    context = get_context("forkserver")
    reports = context.Queue()
    ranks = [
        context.Process(target=attend, args=(rank, world_size, str(tmp_path), comm_type, how, reports), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        found = [reports.get(timeout=180) for _ in range(world_size - 1)]
        if how == "dies":
            ranks[-1].join(30)
        left = ranks[-1].exitcode
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    assert sorted(rank for rank, _, _ in found) == list(range(world_size - 1))
    assert left == (None if how == "hangs" else EXIT_CODE)
    for rank, message, seconds in found:
        assert seconds <= GROUP_TIMEOUT_S + SLACK_S / 2, (rank, seconds)
        assert re.search("[Tt]imed out|[Cc]onnection|closed|reset", message), message
