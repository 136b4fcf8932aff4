"""The plan of a pipeline: times, order and live prefixes, by hand and against traced steps of real stages."""

import random
import time
from itertools import pairwise

import pytest
import torch
from megatron.core import parallel_state

from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
from megatron_prefix.mcore.schedule_trace import ScheduleTrace
from megatron_prefix.pipeline_order import BUBBLE_TOLERANCE, in_turns, order_jobs
from megatron_prefix.pipeline_plan import (
    BACKWARD_WORK,
    PipelineJob,
    PipelineRun,
    even_bubble,
    pipeline_jobs,
    plan_pipeline,
)
from megatron_prefix.splitting import pack_and_split
from tests import pipeline_cases as pc
from tests.distributed import run_distributed
from tests.mcore_helpers import start


def jobs_of(*groups: tuple[float, list[float]], whole: tuple[float, ...] = ()) -> list[PipelineJob]:
    """Groups of (prefix, parts), one after the other."""
    jobs = []
    for number, (prefix, parts) in enumerate(groups):
        jobs.append(PipelineJob("A", prefix, number))
        jobs += [PipelineJob("B", part, number) for part in parts]
        jobs.append(PipelineJob("C", prefix, number))
    return jobs + [PipelineJob("whole", work) for work in whole]


EVEN = jobs_of(*[(8.0, [8.0] * 4)] * 8, whole=(8.0,) * 3)
PUBLISHED = jobs_of(*[(16.0, [4.0] * 4)] * 8)  # P = 16384, G = 16 responses of 1024, four parts


def random_jobs(seed: int) -> list[PipelineJob]:
    """Every third step has micro-batches of one size, as limits make them."""
    draw = random.Random(seed)
    least = 16 if seed % 3 == 0 else 1

    def work() -> float:
        return float(draw.randint(least, 16))

    groups = [(work(), [work() for _ in range(draw.randint(1, 5))]) for _ in range(draw.randint(1, 6))]
    return jobs_of(*groups, whole=tuple(work() for _ in range(draw.randint(0, 4))))


@pytest.mark.parametrize(("stages", "chunks"), [(1, None), (2, None), (4, None), (8, None), (2, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("count", [1, 8, 24])
def test_even_micro_batches_have_megatrons_bubble(stages: int, chunks: int | None, count: int) -> None:
    if chunks and count % stages:
        count = 4 * stages
    run = plan_pipeline([PipelineJob("whole", 3.0)] * count, stages, num_chunks=chunks)
    assert run.bubble == pytest.approx(even_bubble(count, stages, chunks))
    assert sum(run.busy) == pytest.approx(stages * count * 3 * (1 + BACKWARD_WORK))
    assert run.live_prefixes == 0


def test_a_group_on_two_stages_by_hand() -> None:
    """A is 2, parts 1 and 3: both stages forward and backward, with when they start and end."""
    run = plan_pipeline(jobs_of((2.0, [1.0, 3.0])), 2)
    found = [[(span.kind + "fb"[span.backward], span.start, span.end) for span in run.on_stage(s)] for s in (0, 1)]
    assert found == [
        [("Af", 0, 2), ("Bf", 2, 3), ("Ab", 4, 4), ("Bf", 4, 7), ("Bb", 7, 9), ("Cf", 9, 9), ("Bb", 16, 22),
         ("Cb", 22, 26)],
        [("Af", 2, 4), ("Ab", 4, 4), ("Bf", 4, 5), ("Bb", 5, 7), ("Bf", 7, 10), ("Bb", 10, 16), ("Cf", 16, 16),
         ("Cb", 16, 20)],
    ]  # fmt: skip
    assert run.busy == (18, 18) and run.bubble == pytest.approx(1 - 36 / 52)
    assert run.live_prefixes == 1
    # One micro-batch less than megatron-core counts: A and C are one.
    assert run.num_microbatches == 3 and run.even_bubble == pytest.approx(1 / 4)
    parts = "3 micro-batches (1 group in 2 parts), bubble 0.31 (even micro-batches: 0.25), at most 1 prefix live"
    assert run.describe() == f"pipeline 2 stages, {parts}"


def test_a_group_after_the_other_overlaps_on_the_first_stage() -> None:
    """Its next prefix is encoded while the last part of the one before waits for its gradient."""
    run = plan_pipeline(jobs_of((1.0, [1.0]), (1.0, [1.0])), 2)
    kinds = [span.kind + "fb"[span.backward] for span in run.on_stage(0)]
    assert kinds == ["Af", "Bf", "Ab", "Cf", "Bb", "Af", "Cb", "Bf", "Ab", "Cf", "Bb", "Cb"]
    assert run.live_prefixes == 2
    with pytest.raises(ValueError, match="0 jobs and 2 stages"):
        plan_pipeline([], 2)


def ordered(jobs: list[PipelineJob], stages: int, chunks: int | None, live: int | None = None) -> PipelineRun:
    order = order_jobs(jobs, stages, num_chunks=chunks, max_live_prefixes=live)
    return plan_pipeline(in_turns(jobs, order), stages, num_chunks=chunks)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("prefix", [1, 2, 4])
def test_a_heavy_prefix_costs_no_more_than_an_ordinary_micro_batch_of_its_work(prefix: int, stages: int) -> None:
    """megatron-core's schedule on ordinary micro-batches, the largest first, which is the better order."""
    group = [("A", prefix), *[("B", 1)] * 4, ("C", prefix)]
    split = [PipelineJob(kind, work, g) for g in range(8) for kind, work in group]
    ordinary = [PipelineJob("whole", work) for work in [prefix] * 8 + [1] * 32]
    assert ordered(split, stages, None).bubble <= plan_pipeline(ordinary, stages).bubble + BUBBLE_TOLERANCE


@pytest.mark.parametrize(
    ("jobs", "stages", "chunks", "before", "after"),
    [(EVEN, 2, None, 0.17, 0.03), (EVEN, 4, None, 0.20, 0.07), (PUBLISHED, 4, None, 0.49, 0.28),
     (PUBLISHED, 8, None, 0.68, 0.31), (PUBLISHED, 4, 2, 0.42, 0.25)],
)  # fmt: skip
def test_waves_and_shared_turns_make_the_bubble_smaller(
    jobs: list[PipelineJob], stages: int, chunks: int | None, before: float, after: float
) -> None:
    plain = plan_pipeline(jobs, stages, num_chunks=chunks)
    assert before - 0.02 < plain.bubble < before
    run = ordered(jobs, stages, chunks, live=stages)
    assert run.bubble < after and run.live_prefixes <= stages


def test_two_groups_that_share_turns_by_hand() -> None:
    """Prefixes 1 and 2, the second encoded in the turn in which the first has its backward."""
    jobs = jobs_of((1.0, [1.0]), (2.0, [1.0]))
    turns = [(0, 0), (1, 1), (3, 2), (4, 4), (5, 5)]
    run = plan_pipeline(in_turns(jobs, turns), 2)
    found = [[(span.kind + "fb"[span.backward], run.prefix_of(span)) for span in run.on_stage(s)] for s in (0, 1)]
    assert found == [
        [("Af", 0), ("Bf", 0), ("Ab", 0), ("Af", 1), ("Bb", 0), ("Bf", 1), ("Cb", 0), ("Cf", 1), ("Bb", 1), ("Cb", 1)],
        [("Af", 0), ("Ab", 0), ("Bf", 0), ("Bb", 0), ("Af", 1), ("Cb", 0), ("Bf", 1), ("Bb", 1), ("Cf", 1), ("Cb", 1)],
    ]
    assert run.num_microbatches == 4 and run.live_prefixes == 2
    assert run.busy == (15, 15)
    assert run.order(1) == [(0, n, backward) for n in range(5) for backward in (False, True)]


@pytest.mark.parametrize(("stages", "chunks", "live"), [(2, None, 2), (4, None, 2), (8, None, 3), (4, 2, 3)])
def test_even_groups_have_megatrons_bubble_by_default(stages: int, chunks: int | None, live: int) -> None:
    run = ordered(EVEN, stages, chunks)
    assert run.num_microbatches == 43 and run.live_prefixes == live
    assert run.bubble <= run.even_bubble + 1e-9
    if chunks is None:
        assert run.even_bubble == even_bubble(43, stages) == pytest.approx((stages - 1) / (42 + stages))


@pytest.mark.parametrize("seed", range(40))
def test_the_default_holds_as_few_prefixes_as_a_small_bubble_takes(seed: int) -> None:
    """No larger than megatron-core's with as many even micro-batches; where no order comes to that, than the smallest
    of all and the tolerance. One prefix less would not do."""
    jobs = random_jobs(seed)
    groups = sum(job.kind == "A" for job in jobs)
    for stages, chunks in ((2, None), (3, None), (4, 2), (6, None)):
        run, best = ordered(jobs, stages, chunks), ordered(jobs, stages, chunks, live=groups)
        assert best.bubble <= run.bubble + 1e-9
        reached = best.bubble <= run.even_bubble + 1e-9
        limit = run.even_bubble if reached else best.bubble + BUBBLE_TOLERANCE
        assert run.bubble <= limit + 1e-9
        least = plan_pipeline(jobs, stages, num_chunks=chunks).live_prefixes  # one after the other is always allowed
        if run.live_prefixes > least:
            assert ordered(jobs, stages, chunks, live=run.live_prefixes - 1).bubble > limit


def test_the_random_steps_reach_megatrons_bubble_and_fail_to() -> None:
    """So that both halves of the claim above are tried."""
    reached = [run.bubble <= run.even_bubble + 1e-9 for run in (ordered(random_jobs(s), 3, None) for s in range(40))]
    assert 5 < sum(reached) < 35


@pytest.mark.parametrize(
    ("groups", "stages", "chunks", "live"), [(8, 4, None, 2), (64, 4, None, 2), (8, 8, None, 3), (64, 4, 2, 8)]
)
def test_as_few_prefixes_are_held_in_long_steps(groups: int, stages: int, chunks: int | None, live: int) -> None:
    run = ordered(jobs_of(*[(8.0, [8.0] * 4)] * groups), stages, chunks)
    assert run.bubble <= run.even_bubble + 1e-9 and run.live_prefixes == live


def test_a_large_step_is_planned_at_once() -> None:
    """64 groups in 4 parts on 8 stages of 2 chunks: a fraction of a second."""
    jobs = jobs_of(*[(8.0, [8.0] * 4)] * 64)
    started = time.process_time()
    order_jobs(jobs, 8, num_chunks=2)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("seed", range(12))
def test_every_order_is_a_step(seed: int) -> None:
    """A before the parts and C after them; nothing lost; with a cap, which holds, never worse than one by one."""
    jobs = random_jobs(seed)
    for stages, chunks, limit in ((1, None, None), (2, None, 1), (3, None, None), (4, 2, 3)):
        plain = plan_pipeline(jobs, stages, num_chunks=chunks)
        order = order_jobs(jobs, stages, num_chunks=chunks, max_live_prefixes=limit)
        forwards, backwards = [begin for begin, _ in order], [end for _, end in order]
        shared = [(begin, end) for begin, end in order if begin != end]
        assert all((jobs[begin].kind, jobs[end].kind) == ("A", "C") for begin, end in shared)
        apart = [begin for begin, end in order if begin == end]
        assert sorted([*apart, *(i for turn in shared for i in turn)]) == list(range(len(jobs)))
        for prefix in {job.prefix for job in jobs if job.prefix is not None}:
            begin, *parts, end = (i for i, job in enumerate(jobs) if job.prefix == prefix)
            at = [forwards.index(part) for part in parts]
            assert forwards.index(begin) < min(at) and max(at) < backwards.index(end)
        arranged = in_turns(jobs, order)
        run = plan_pipeline(arranged, stages, num_chunks=chunks)
        if limit is not None:
            assert run.total <= plain.total + 1e-9
            assert run.live_prefixes <= max(plain.live_prefixes, limit)
        assert stages > 1 or arranged == jobs


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_what_a_simulation_finds(seed: int) -> None:
    """Nothing starts before its stage and what it waits for are ready; everything starts as early as that allows."""
    for stages, chunks, forward_only in ((1, None, False), (3, None, False), (2, 3, False), (4, 2, True)):
        jobs = random_jobs(seed)
        turns = [(i, i) for i in range(len(jobs))]
        if not forward_only:
            turns = order_jobs(jobs, stages, num_chunks=chunks)
        run = plan_pipeline(in_turns(jobs, turns), stages, num_chunks=chunks, forward_only=forward_only)
        shared = {number for number, (begin, end) in enumerate(turns) if begin != end}
        assert {number for number, job in enumerate(run.jobs) if job.ends is not None} == shared
        idle = [PipelineJob("idle", 0.0)] * (len(run.jobs) - len(turns))
        halves = [(jobs[begin], jobs[end]) for begin, end in turns] + [(job, job) for job in idle]
        times = [(begin.forward / (chunks or 1), end.backward / (chunks or 1)) for begin, end in halves]
        ends = simulated(run, times, chunks or 1)
        for span in run.spans:
            assert span.end == pytest.approx(ends[span.stage, span.chunk, span.number, span.backward])
            assert span.end - span.start == pytest.approx(times[span.number][span.backward])
            assert span.kind == halves[span.number][span.backward].kind
        assert run.live_prefixes == max(held(run, halves, stage) for stage in range(stages))


def test_the_simulated_steps_share_turns() -> None:
    """So that the claims above are tried."""
    shared = [sum(begin != end for begin, end in order_jobs(random_jobs(seed), 3)) for seed in range(8)]
    assert sum(each > 0 for each in shared) >= 3


def simulated(
    run: PipelineRun, times: list[tuple[float, float]], chunks: int
) -> dict[tuple[int, int, int, bool], float]:
    """Ends, corrected again and again until nothing changes: layer blocks in a row, forwards up it, backwards down."""
    ends = {(s.stage, s.chunk, s.number, s.backward): 0.0 for s in run.spans}
    blocks = run.num_stages * chunks
    changed = True
    while changed:
        changed = False
        for stage in range(run.num_stages):
            ready = 0.0
            for chunk, number, backward in run.order(stage):
                block = chunk * run.num_stages + stage
                if backward:
                    before = (block, False) if block == blocks - 1 else (block + 1, True)
                else:
                    before = (block - 1, False)
                if before[0] >= 0:
                    at, way = before
                    ready = max(ready, ends[at % run.num_stages, at // run.num_stages, number, way])
                ready += times[number][backward]
                key = (stage, chunk, number, backward)
                changed |= ends[key] != ready
                ends[key] = ready
    return ends


def held(run: PipelineRun, halves: list[tuple[PipelineJob, PipelineJob]], stage: int) -> int:
    """The most prefixes between their first and their last piece of work on a stage, moment by moment."""
    prefixes = [halves[number][backward].prefix for _, number, backward in run.order(stage)]
    return max(
        len({p for p in prefixes[: at + 1] if p is not None} & {p for p in prefixes[at:] if p is not None})
        for at in range(len(prefixes))
    )


def test_jobs_of_packs() -> None:
    packs = pack_and_split(pc.batch(), max_tokens_per_pack=16)
    jobs = pipeline_jobs(packs, pair_cost=0.5)
    assert [job.kind for job in jobs if job.kind != "C"] == [
        "whole" if pack.prefix is None else "A" if pack.is_prefix else "B" for pack in packs
    ]
    assert [job.work for job in jobs if job.kind != "C"] == [
        pack.layout.num_rows + 0.5 * pack.layout.area for pack in packs
    ]
    for number in range(sum(pack.is_prefix for pack in packs)):
        kinds = [job.kind for job in jobs if job.prefix == number]
        assert kinds == ["A", *"B" * (len(kinds) - 2), "C"]
    assert pipeline_jobs(packs, forward_only=True) == [job for job in pipeline_jobs(packs) if job.kind != "C"]


# ---- traced


def traced_steps(rank: int, world_size: int) -> list[tuple[PipelineRun, PipelineRun]]:
    """(traced, planned) steps of two stages: 1F1B and interleaved, with a backward and without."""
    found = []
    for vpp in (None, 2):
        start(pp=2, **({"vpp": vpp} if vpp else {}))
        chunks = pc.build(pc.Case(pp=2, vpp=vpp))
        for chunk in chunks:
            chunk.config.calculate_per_token_loss = True
        for forward_only in (False, True):
            trace = ScheduleTrace()
            packs = pack_and_split(pc.batch(), max_tokens_per_pack=16)
            iterators = [iter(packs) for _ in chunks]
            results = forward_backward_prefix_groups(
                forward_step_func=forward_step,
                data_iterator=iterators if vpp else iterators[0],
                model=chunks if vpp else chunks[0],
                num_microbatches=len(packs),
                forward_only=forward_only,
                seq_length=1,
                micro_batch_size=1,
                trace=trace,
            )
            with_loss = [float(pack.response_rows.numel()) for pack in packs if pack.response_rows.numel()]
            assert [float(x) for x in results] == (with_loss if rank == 1 else [])
            work = [job for job in trace.jobs if job.kind != "idle"]
            plan = plan_pipeline(work, 2, num_chunks=vpp, forward_only=forward_only)
            found.append((trace.gather(), plan))
        parallel_state.destroy_model_parallel()
    return found


def forward_step(iterator: object, model: torch.nn.Module) -> tuple[torch.Tensor, object]:
    pack = next(iterator)  # type: ignore[call-overload]
    rows = torch.tensor(float(pack.response_rows.numel()))
    return response_log_probs(model, pack), lambda output: (output.sum(), torch.ones((), dtype=torch.int), rows)


def test_a_traced_step_is_the_planned_one() -> None:
    for steps in run_distributed(traced_steps, 2):
        for traced, planned in steps:
            assert traced.jobs == planned.jobs
            has_backward = any(span.backward for span in traced.spans)
            assert any(job.ends is not None for job in traced.jobs) is has_backward
            for stage in (0, 1):
                assert traced.order(stage) == planned.order(stage)
                spans = traced.on_stage(stage)
                assert all(a.end <= b.start for a, b in pairwise(spans))
                # Work is where it should be. Processor time, since others may run on this machine.
                seconds = {(kind, backward): 0.0 for kind in ("A", "B", "C", "whole", "idle") for backward in (0, 1)}
                for span in spans:
                    seconds[span.kind, span.backward] += span.cpu_seconds
                assert seconds["A", False] > 5 * seconds["C", False]
                assert [span.kind for span in spans] == [span.kind for span in planned.on_stage(stage)]
                if has_backward:
                    assert seconds["C", True] > 5 * seconds["A", True] > 0
                    assert seconds["B", True] > seconds["A", False]
                else:
                    assert seconds["C", True] == seconds["B", True] == 0
            assert 0 < traced.bubble < 1 and traced.live_prefixes == planned.live_prefixes
