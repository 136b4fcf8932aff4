"""What a split group costs: rows through every layer, memory, and how long the cached keys live."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_prefix import LossConfig, Pack, RolloutGroup
from megatron_prefix.attention import KERNELS
from megatron_prefix.attention.calls import AttentionCalls
from megatron_prefix.attention.grouped import grouped_attention
from megatron_prefix.attention.prefix_cache import PREFIX_GRAD_DTYPES, PrefixCache
from megatron_prefix.collectives import all_gather_object
from megatron_prefix.layout import PartLayout
from megatron_prefix.mcore.core_attention import PrefixCoreAttention
from megatron_prefix.mcore.schedule import forward_backward_prefix_groups
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.training import PolicyTrainer
from megatron_prefix.measure import MemoryTracker, track_memory
from megatron_prefix.splitting import pack_and_split
from tests import pipeline_cases as pc
from tests.attention_oracle import CPU_KERNELS, inputs
from tests.distributed import run_distributed
from tests.mcore_helpers import start
from tests.pipeline_cases import WHOLE, Case

TIMEOUT_S = 120
MODULES = ("linear_qkv", "core_attention", "linear_proj", "mlp", "linear_fc1", "linear_fc2")
PARTS = RolloutGroup([3] * 9, [[t] * n for t, n in enumerate((12, 11, 6, 14, 9))], [0.0, 1.0, 0.5, 0.2, 0.7])
PREFIX_ROWS, RESPONSE_ROWS = 8, 52


def trainer_of(case: Case) -> PolicyTrainer:
    settings = replace(pc.settings_of(case), chunk_rows=4096)  # logits are computed once
    return PolicyTrainer(pc.build(case), settings, LossConfig())


# ---- rows through every layer

Counts = dict[str, tuple[int, int]]
"""Rows forward and backward, by "layer.module"."""


def count_rows(trainer: PolicyTrainer) -> Callable[[], Counts]:
    """Count the rows that modules return, and the rows of the gradients that reach them."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            forward[name] += rows.shape[0]
            if rows.requires_grad:
                rows.register_hook(lambda grad: backward.update({name: grad.shape[0]}))

        module.register_forward_hook(hook)

    for chunk in trainer.chunks:
        inner = unwrap(chunk)
        for layer in inner.decoder.layers:
            watch(f"{layer.layer_number}.layer", layer)
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] in MODULES:
                    watch(f"{layer.layer_number}.{name.rpartition('.')[2]}", module)
        if inner.post_process:
            watch("final.norm", inner.decoder.final_layernorm)
            watch("final.output_layer", inner.output_layer)
    return lambda: {name: (forward[name], backward[name]) for name in forward}


def counted(rank: int, world_size: int, cases: list[Case]) -> list[Counts]:
    """Rows of one step of each case, over all stages."""
    results = []
    for case in cases:
        start(pp=case.pp)
        trainer = trainer_of(case)
        inputs_ = pc.inputs_of(pack_and_split([PARTS], max_tokens_per_pack=case.limit))
        counts = count_rows(trainer)
        trainer.gradients(inputs_)
        found: Counts = {}
        for stage in all_gather_object(counts(), trainer.pp_group):
            found |= stage
        results.append(found)
        torch.distributed.barrier()
        pc.parallel_state.destroy_model_parallel()
    return results


COUNTED = {
    "unsplit": Case(layers=2, limit=WHOLE),
    "2 parts": Case(layers=2, limit=30),
    "5 parts": Case(layers=2, limit=16),
    "5 parts, full recompute": Case(layers=2, limit=16, recompute="full"),
    "5 parts, the prefix recomputed": Case(layers=2, limit=16, prefix_activations="recompute"),
    "5 parts, offloaded": Case(layers=2, limit=16, prefix_activations="offload"),
    "2 stages": Case(layers=2, limit=16, pp=2),
}


@pytest.fixture(scope="module")
def rows() -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    for world_size in (1, 2):
        names = [name for name, case in COUNTED.items() if case.world_size == world_size]
        ranks = run_distributed(counted, world_size, [COUNTED[name] for name in names], timeout_s=TIMEOUT_S)
        found |= dict(zip(names, ranks[0], strict=True))
    return found


@pytest.mark.parametrize("name", COUNTED)
def test_prefix_rows_go_through_each_layer_once(name: str, rows: dict[str, Counts]) -> None:
    case, found = COUNTED[name], rows[name]
    whole = PREFIX_ROWS + RESPONSE_ROWS
    split = case.limit < WHOLE
    again = {"full": 2 * whole}.get(case.recompute, whole + PREFIX_ROWS * (case.prefix_activations == "recompute"))
    for module in MODULES:
        assert found[f"1.{module}"] == (again, whole), module
    assert found["2.linear_qkv"] == (again, whole)
    for module in MODULES[1:]:  # the last layer's attention and all behind it have no row of a split prefix
        mine = RESPONSE_ROWS if split else whole
        assert found[f"2.{module}"] == (2 * mine if case.recompute == "full" else mine, mine), module
    assert found["1.layer"][1] == whole and found["2.layer"][1] == (RESPONSE_ROWS if split else whole)
    assert found["final.norm"] == ((RESPONSE_ROWS,) * 2 if split else (whole,) * 2)
    assert found["final.output_layer"] == (RESPONSE_ROWS,) * 2


# ---- memory

SHARED, RESPONSE, PER_PART = 128, 32, 2


def step_memory(rollouts: int, *, split: bool = True, **changes: Any) -> MemoryTracker:
    """Memory of a step's forward and backward with one group of ``rollouts`` responses."""
    trainer = trainer_of(replace(Case(layers=2, dtype="float32"), **changes))
    responses = [[i % 60] * RESPONSE for i in range(rollouts)]
    group = RolloutGroup([1] * SHARED, responses, [float(i) for i in range(rollouts)])
    limit, num_parts = (SHARED, rollouts // PER_PART) if split else (None, 1)
    inputs_ = pc.inputs_of(pack_and_split([group], max_tokens_per_pack=limit, num_parts=num_parts))
    assert len(inputs_) == (1 + rollouts // PER_PART if split else 1)
    with track_memory() as tracker:
        trainer.gradients(inputs_)
    return tracker


def measure_memory(rank: int, world_size: int) -> dict[str, Any]:
    start()
    step_memory(4)  # what is made once only is not of the step
    trackers = {g: step_memory(g) for g in (4, 16, 32)}
    return {
        "peaks": {g: tracker.peak_bytes for g, tracker in trackers.items()},
        "left": {g: tracker.current_bytes for g, tracker in trackers.items()},
        "unsplit": step_memory(16, split=False).peak_bytes,
        "recompute": step_memory(16, prefix_activations="recompute").peak_bytes,
    }


def test_memory_of_a_split_step() -> None:
    """Flat from 4 to 32 responses at one size of parts, and far below that of the group in one micro-batch."""
    (found,) = run_distributed(measure_memory, 1, timeout_s=TIMEOUT_S)
    peaks = found["peaks"]
    assert max(peaks.values()) <= 1.02 * min(peaks.values()), found
    assert peaks[16] <= 0.6 * found["unsplit"], found
    assert found["recompute"] < 0.9 * peaks[16], found
    assert max(found["left"].values()) < 0.01 * peaks[4], found  # nothing of a step outlives it


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("setting", PREFIX_GRAD_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_sums_are_added_to_in_place(kernel: str, setting: str, dtype: torch.dtype) -> None:
    """One pair of tensors whatever the number of parts, in the dtype of the setting, and the keys are read where they
    lie."""
    q, k, v, dout = inputs(6, dtype=dtype)
    cache = PrefixCache(4, setting)
    sum_dtype = torch.promote_types(dtype, torch.float32) if setting == "fp32" else dtype
    shared = inputs(4, dtype=dtype)
    cache.export(1, shared[1], shared[2], KERNELS[kernel])
    calls = AttentionCalls.build(PartLayout([0, 4, 2], [-1, 0, 0], [4, 0, 0], [0, 0, 0]), q.device)
    places, sizes = set(), set()
    for _ in range(3):
        leaf = q.clone().requires_grad_()
        keys = cache.keys(1)
        grouped_attention(leaf, k, v, calls, 0.3, KERNELS[kernel], keys).backward(dout)
        assert keys.sums is not None and {x.dtype for x in keys.sums} == {sum_dtype}
        places.add(tuple(x.data_ptr() for x in (keys.k, keys.v, *keys.sums)))
        sizes.add(cache.num_bytes)
    assert len(places) == len(sizes) == 1
    once, thrice = PrefixCache(4, setting), cache.keys(1).gradients()[0]
    once.export(1, shared[1], shared[2], KERNELS[kernel])
    grouped_attention(q.requires_grad_(), k, v, calls, 0.3, KERNELS[kernel], once.keys(1)).backward(dout)
    torch.testing.assert_close(thrice, 3 * once.keys(1).gradients()[0])
    assert thrice.abs().sum() > 0


def sums_of_a_step(rank: int, world_size: int) -> dict[str, Any]:
    """By setting: the dtypes of the sums that the parts of a bf16 step leave, and the gradient of layer 1's QKV."""
    start(cp=world_size)
    found: dict[str, Any] = {}
    for setting in PREFIX_GRAD_DTYPES:
        trainer = trainer_of(Case(layers=2, dtype="bfloat16", cp=world_size))
        trainer.settings = replace(trainer.settings, prefix_grad_dtype=setting)
        packs = pack_and_split([PARTS], max_tokens_per_pack=16)
        dtypes: set[torch.dtype] = set()
        plain = PrefixCache.release

        def release(cache: PrefixCache, layers: Any, seen: Any = dtypes, plain: Any = plain) -> None:
            layers = list(layers)
            seen |= {total.dtype for layer in layers for total in cache.keys(layer).gradients()}
            plain(cache, layers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrefixCache, "release", release)
            trainer.gradients(pc.inputs_of(packs))
        (name,) = (n for n in trainer.named_gradients() if "layers.0" in n and "linear_qkv.weight" in n)
        found[setting] = (dtypes, trainer.named_gradients()[name].clone())
    return found


@pytest.mark.parametrize("cp", [1, 2])
def test_the_dtype_of_gradient_sums_is_a_setting(cp: int) -> None:
    for found in run_distributed(sums_of_a_step, cp, timeout_s=TIMEOUT_S):
        (wide, exact), (own, rounded) = found["fp32"], found["param"]
        assert wide == {torch.float32} and own == {torch.bfloat16}
        difference = float((exact - rounded).norm() / exact.norm())
        assert 0 < difference < 0.02  # rounded, and otherwise the same


def test_an_unknown_dtype_of_gradient_sums_is_refused() -> None:
    unused: dict[str, Any] = {"forward_step_func": None, "data_iterator": None, "model": None, "num_microbatches": 1}
    with pytest.raises(ValueError, match="prefix_grad_dtype must be one of fp32, param, got 'bf16'"):
        forward_backward_prefix_groups(**unused, prefix_grad_dtype="bf16")


# ---- how long keys live


def test_keys_of_a_layer_that_exported_none() -> None:
    with pytest.raises(ValueError, match="layer 3 has no keys of this prefix: its prefix pack must run before"):
        PrefixCache(4).keys(3)


class BrokenError(Exception):
    pass


def lifetime(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """A step, one that fails in the second part on the last stage, and the first again."""
    start(pp=case.pp)
    trainer = trainer_of(case)
    packs = pack_and_split([PARTS], max_tokens_per_pack=case.limit)
    inputs_ = pc.inputs_of(packs)
    seen: list[weakref.ref[Any]] = []
    is_last = trainer.pp_group.rank() == trainer.pp_group.size() - 1
    calls = 0
    fails = False
    plain = trainer.log_probs_fn

    def log_probs(model: Any, pack: Pack, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        assert pack.prefix is not None and pack.prefix.cache is not None
        keys = pack.prefix.cache.keys(
            next(m.layer_number for m in model.modules() if isinstance(m, PrefixCoreAttention))
        )
        seen.extend(weakref.ref(x) for x in (pack.prefix.cache, keys.k, keys.v))
        if fails and is_last and calls == 2:
            raise BrokenError("in the second part")
        return plain(model, pack, **settings)

    trainer.log_probs_fn = log_probs

    def gradients() -> list[torch.Tensor]:
        nonlocal calls
        calls = 0
        trainer.gradients(inputs_)
        return [p.main_grad.clone() for chunk in trainer.chunks for p in chunk.parameters()]

    def alive() -> int:
        gc.collect()
        return sum(reference() is not None for reference in seen)

    gc.disable()
    before = gradients()
    by_count_alone = sum(reference() is not None for reference in seen)
    gc.enable()
    fails = True
    try:
        gradients()
        error = "none"
    except (BrokenError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    fails = False
    open_caches = [pack.prefix is not None and pack.prefix.cache is not None for pack in packs]
    left = alive()
    after = gradients()
    return {
        "seen": len(seen), "alive": (by_count_alone, left), "error": error, "open": any(open_caches),
        "equal": all(a.equal(b) for a, b in zip(before, after, strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", [Case(layers=2), Case(layers=2, pp=2, recompute="full", prefix_activations="recompute")], ids=["1", "2"]
)
def test_the_cache_goes_with_the_step_and_with_an_error(case: Case) -> None:
    for rank, found in enumerate(run_distributed(lifetime, case.world_size, case, timeout_s=TIMEOUT_S)):
        assert "in the second part" in found["error"], found
        assert found["error"].startswith("Broken" if rank == case.world_size - 1 else "RuntimeError"), found
        assert found["seen"] > 0 and found["alive"] == (0, 0) and not found["open"], found
        assert found["equal"], found
