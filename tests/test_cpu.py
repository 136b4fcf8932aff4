"""megatron-core on the CPU: the same numbers at every parallel size, with every kind of optimizer and recompute."""

import importlib.util
from typing import Any

import pytest
import torch

from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.parallel import ParallelSizes, initialize
from tests.distributed import run_distributed
from tests.mcore_helpers import OPTIMIZERS, Trainer, full_logits, start, tiny_config, tokens

HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
WITH_ALL = {"qk_layernorm": True, "qkv_bias": True, "tied_embeddings": True}
YARN = {"position_embedding": "yarn", "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}}
LEARNED = {"position_embedding": "learned_absolute", "norm": "layernorm", "activation": "gelu"}


def _patch_twice(rank: int, world_size: int) -> tuple[tuple[str, ...], bool]:
    first = run_on_cpu()
    patched = [torch.cuda.current_device, torch.Tensor.type, torch.zeros, torch.cuda.Stream]
    second = run_on_cpu()
    again = [torch.cuda.current_device, torch.Tensor.type, torch.zeros, torch.cuda.Stream]
    assert first == second
    return first, all(a is b for a, b in zip(patched, again, strict=True))


def test_patching_twice_changes_nothing() -> None:
    ((names, same),) = run_distributed(_patch_twice, 1)
    assert len(names) == len(set(names)) == 12
    assert same


def test_patching_is_refused_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    before = torch.cuda.current_device
    with pytest.raises(RuntimeError, match="Some GPU"):
        run_on_cpu()
    assert torch.cuda.current_device is before


@pytest.mark.parametrize(
    ("sizes", "world_size", "named"),
    [
        ({"tp": 2}, 3, "tp=2 .* does not divide the world size 3"),
        ({"tp": 2, "dp": 3}, 4, "needs 6 processes, but the world size is 4"),
        ({"tp": 0}, 1, "tp must be .* 0"),
        ({"vpp": 2}, 1, "vpp=2 needs pp > 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], world_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ParallelSizes(**sizes).resolve(world_size)


def test_resolve_fills_in_data_parallelism() -> None:
    assert ParallelSizes(tp=2, cp=3).resolve(12).dp == 2


def test_rank_without_world_size_is_refused() -> None:
    with pytest.raises(ValueError, match="both rank and world_size"):
        initialize(ParallelSizes(), rank=0)


def _train(rank: int, world_size: int, tp: int, kind: str, settings: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Logits after three steps; data-parallel ranks split the rows."""
    from megatron.core import parallel_state

    from megatron_prefix.mcore.model import build_model

    start(tp=tp)
    dp, index = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    trainer = Trainer(build_model(tiny_config(**changes), seed=1, **settings), kind)
    for step in range(3):
        trainer.step(tokens(seed=step).chunk(dp)[index])
    with torch.no_grad():
        return full_logits(trainer.ddp, tokens(seed=9))


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """One process, no recompute, the plain optimizer."""
    return run_distributed(_train, 1, 1, "plain", {}, WITH_ALL)[0]


@pytest.mark.parametrize(
    ("world_size", "tp", "kind", "settings"),
    [
        (2, 2, "plain", {}),
        (2, 2, "plain", {"sequence_parallel": True}),
        (2, 2, "distributed_overlap", {"sequence_parallel": True, "recompute": "full"}),
        *((2, 1, kind, {}) for kind in OPTIMIZERS),
        (1, 1, "plain", {"recompute": "selective"}),
        (1, 1, "plain", {"recompute": "selective", "overrides": {"recompute_modules": ["layernorm", "mlp"]}}),
        (1, 1, "plain", {"recompute": "full"}),
    ],
)
def test_training_gives_the_same_model(
    reference: torch.Tensor, world_size: int, tp: int, kind: str, settings: dict[str, Any]
) -> None:
    for logits in run_distributed(_train, world_size, tp, kind, settings, WITH_ALL):
        torch.testing.assert_close(logits, reference, rtol=0, atol=2e-5)


def _gradients(rank: int, world_size: int, tp: int, settings: dict[str, Any], changes: dict[str, Any]) -> Any:
    """fp64 logits, and the squared gradient norm over all ranks."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    from megatron_prefix.mcore.model import build_model

    start(tp=tp)
    model = build_model(tiny_config(**changes), dtype=torch.float64, seed=1, **settings)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    logits = full_logits(model, tokens())
    logits.square().sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.dtype is torch.float64
        share = p.grad.square().sum()
        total += share if getattr(p, "tensor_model_parallel", False) else share / tp
    return logits.detach(), reduce_from_tensor_model_parallel_region(total)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": {"factor": 8.0}}, YARN, LEARNED], ids=str)
def test_fp64_is_exact_over_tensor_parallel_ranks(changes: dict[str, Any]) -> None:
    ((logits, norm),) = run_distributed(_gradients, 1, 1, {}, changes)
    assert logits.dtype is torch.float64
    for other, other_norm in run_distributed(_gradients, 2, 2, {}, changes):
        torch.testing.assert_close(other, logits, rtol=0, atol=1e-13)
        torch.testing.assert_close(other_norm, norm, rtol=1e-12, atol=0)


def _pipeline(rank: int, world_size: int, path: str) -> Any:
    """Loss and some gradients of two micro-batches of different length through 1F1B, from the weights at `path`."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_prefix.mcore.checkpoint import load_checkpoint, load_config
    from megatron_prefix.mcore.model import build_model

    start(pp=world_size)
    model = build_model(load_config(path), dtype=torch.float64)
    load_checkpoint(path, model)

    def forward(batches: Any, model: Any) -> Any:
        ids = next(batches)
        output = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
        return output, lambda logits: (logits.square().mean(), {"loss": logits.square().mean().item()})

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([tokens(length=24), tokens(length=17)]),
        model=[model],
        num_microbatches=2,
        seq_length=24,
        micro_batch_size=2,
        forward_only=False,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    names = {
        f"decoder.layers.{int(name.split('.')[2]) + stage}.{name.split('.', 3)[3]}"
        if "layers." in name
        else name: p.grad
        for name, p in model.named_parameters()
    }
    return [x["loss"] for x in losses], names


def _save_random(rank: int, world_size: int, path: str) -> None:
    from megatron_prefix.mcore.checkpoint import save_checkpoint
    from megatron_prefix.mcore.model import build_model

    start()
    config = tiny_config(**WITH_ALL | {"tied_embeddings": False})
    save_checkpoint(path, build_model(config, dtype=torch.float64, seed=1), config)


def test_two_pipeline_stages_give_the_gradients_of_one(tmp_path: Any) -> None:
    path = str(tmp_path / "weights")
    run_distributed(_save_random, 1, path)
    ((losses, whole),) = run_distributed(_pipeline, 1, path)
    (none, first), (last_losses, last) = run_distributed(_pipeline, 2, path)
    assert none == []
    assert last_losses == pytest.approx(losses, rel=1e-13)
    parts = first | last
    assert set(parts) == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-13, msg=name)


def _hybrid(rank: int, world_size: int, tp: int, changes: dict[str, Any]) -> float:
    """Largest difference of logits between GPTModel and HybridModel with the same weights."""
    from megatron_prefix.mcore.model import build_hybrid_model, build_model

    start(tp=tp)
    config = tiny_config(**changes)
    gpt = build_model(config, dtype=torch.float64, seed=1)
    hybrid = build_hybrid_model(config, dtype=torch.float64, seed=2)
    weights = {name: value for name, value in gpt.state_dict().items() if isinstance(value, torch.Tensor)}
    renamed = {}
    for name, value in weights.items():
        parts = name.replace("final_layernorm", "final_norm").split(".")
        if parts[1] == "layers":
            parts[2] = str(2 * int(parts[2]) + (parts[3] in ("mlp", "pre_mlp_layernorm")))
        renamed[".".join(parts)] = value
    missing, unexpected = hybrid.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state")]
    with torch.no_grad():
        return (full_logits(gpt, tokens()) - full_logits(hybrid, tokens())).abs().max().item()


@pytest.mark.skipif(not HAS_HYBRID, reason="this megatron-core has no HybridModel")
@pytest.mark.parametrize(("tp", "changes"), [(1, WITH_ALL), (1, YARN), (2, WITH_ALL)])
def test_hybrid_model_is_the_same_network(tp: int, changes: dict[str, Any]) -> None:
    assert max(run_distributed(_hybrid, tp, tp, changes)) < 1e-13


def _hybrid_refusal(rank: int, world_size: int) -> None:
    from megatron_prefix.mcore.model import build_hybrid_model

    start()
    named = "no Llama 3 rope_scaling" if HAS_HYBRID else "HybridModel needs megatron-core 0.19"
    with pytest.raises(ValueError, match=named):
        build_hybrid_model(tiny_config(rope_scaling={"factor": 8.0}))


def test_hybrid_model_is_refused_by_name() -> None:
    run_distributed(_hybrid_refusal, 1)


def _refused_settings(rank: int, world_size: int, cases: list[tuple[dict[str, Any], dict[str, Any], str]]) -> None:
    from megatron_prefix.mcore.model import build_model

    start(tp=world_size)
    for changes, settings, named in cases:
        with pytest.raises(ValueError, match=named):
            build_model(tiny_config(**changes), **settings)


def test_what_cannot_be_built_is_refused_by_name() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"vocab_size": 63}, {}, "vocab_size 63 does not divide by tp=2"),
        ({"num_attention_heads": 3, "num_query_groups": 3, "head_dim": 8}, {}, "num_attention_heads 3 .* tp=2"),
        ({"num_query_groups": 1}, {}, "num_query_groups 1 .* tp=2"),
        ({}, {"recompute": "some"}, "recompute .* 'some'"),
        ({}, {"dtype": torch.float16}, "dtype .* torch.float16"),
        ({}, {"overrides": {"hidden_sizes": 3}}, "overrides .'hidden_sizes'"),
    ]
    run_distributed(_refused_settings, 2, cases)
    run_distributed(_refused_settings, 1, [({}, {"sequence_parallel": True}, "sequence_parallel needs")])
