"""Log-probs and entropies over a sharded vocabulary against torch's log-softmax; chunks, memory, bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_prefix import RolloutGroup, RolloutTree, TreeNode, pack_groups, response_log_probs
from megatron_prefix.mcore.log_probs import vocab_parallel_log_probs
from tests.distributed import run_distributed

Results = dict[str, Tensor]


def by_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by torch's own log-softmax over the whole vocabulary."""
    log_probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_probs.exp() * log_probs).sum(-1)


def logits_and_targets(rows: int, vocab_size: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * spread
    return logits, torch.randint(vocab_size, (rows,), generator=generator)


def values_and_gradients(function: Any, logits: Tensor, targets: Tensor, weights: tuple[float, float]) -> Results:
    """log-probs, entropies and the gradient of a weighted sum of both, with weights that differ by row."""
    leaf = logits.detach().clone().requires_grad_()
    log_probs, entropies = function(leaf, targets)
    by_row = torch.linspace(-1, 2, len(logits), dtype=log_probs.dtype)
    (weights[0] * (by_row * log_probs).sum() + weights[1] * (by_row.flip(0) * entropies).sum()).backward()
    assert leaf.grad is not None
    return {"log_probs": log_probs.detach(), "entropies": entropies.detach(), "gradient": leaf.grad}


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6),
    vocab_size=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    spread=st.sampled_from([0.0, 3.0, 300.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, -0.2)]),
    seed=st.integers(0, 100),
)
def test_one_rank_in_fp64(
    rows: int, vocab_size: int, temperature: float, spread: float, weights: tuple[float, float], seed: int
) -> None:
    logits, targets = logits_and_targets(rows, vocab_size, seed, spread)

    def sharded(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_log_probs(x, t, temperature=temperature, with_entropy=True)

    result = values_and_gradients(sharded, logits, targets, weights)
    expected = values_and_gradients(lambda x, t: by_torch(x, t, temperature), logits, targets, weights)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_dtypes_are_computed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    logits, targets = logits_and_targets(50, 1000, seed=0)
    logits = logits.to(dtype)
    before = logits.clone()
    result = values_and_gradients(
        lambda x, t: vocab_parallel_log_probs(x, t, temperature=0.7, with_entropy=True), logits, targets, (1.0, 0.5)
    )
    expected = values_and_gradients(lambda x, t: by_torch(x, t, 0.7), logits.double(), targets, (1.0, 0.5))
    assert [value.dtype for value in result.values()] == [torch.float32, torch.float32, dtype]
    assert torch.equal(logits, before)
    for name in ("log_probs", "entropies"):
        torch.testing.assert_close(result[name].double(), expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result["gradient"].double(), expected["gradient"], atol=tolerance, rtol=tolerance)


def test_without_entropy_it_is_zero_and_costs_no_gradient() -> None:
    logits, targets = logits_and_targets(4, 9, seed=1)
    leaf = logits.requires_grad_()
    log_probs, entropies = vocab_parallel_log_probs(leaf, targets)
    assert entropies.tolist() == [0.0] * 4
    (log_probs.sum() + 5 * entropies.sum()).backward()
    (expected,) = torch.autograd.grad(by_torch(leaf, targets, 1.0)[0].sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected, atol=1e-12, rtol=0)


def test_extreme_logits_give_finite_numbers() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0], [-1e4, 1e4, 1e4, 0.0]])
    targets = torch.tensor([1, 2])
    result = values_and_gradients(
        lambda x, t: vocab_parallel_log_probs(x / 2, t, with_entropy=True), logits, targets, (1.0, 1.0)
    )
    assert all(value.isfinite().all() for value in result.values())
    assert result["log_probs"].tolist() == pytest.approx([-3e38, -torch.log(torch.tensor(2.0)).item()])


# ---- over tensor parallel ranks

SHARDED = [(rows, size, temperature, spread) for rows, size in ((1, 4), (7, 40), (16, 8)) for temperature in (0.5, 1.0)
           for spread in (1.0, 200.0)]  # fmt: skip


def sharded_results(rank: int, world_size: int) -> list[Results]:
    results = []
    for seed, (rows, size, temperature, spread) in enumerate(SHARDED):
        logits, targets = logits_and_targets(rows, size, seed, spread)
        targets[0] = 0  # the first id of the first shard, and the last of the last
        targets[-1] = size - 1
        mine = logits.chunk(world_size, dim=1)[rank].contiguous()
        results.append(
            values_and_gradients(
                lambda x, t, temperature=temperature: vocab_parallel_log_probs(
                    x, t, temperature=temperature, with_entropy=True, tp_group=torch.distributed.group.WORLD
                ),
                mine,
                targets,
                (1.0, -0.3),
            )
        )
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sharded_vocabulary(world_size: int) -> None:
    ranks = run_distributed(sharded_results, world_size)
    for seed, (rows, size, temperature, spread) in enumerate(SHARDED):
        logits, targets = logits_and_targets(rows, size, seed, spread)
        targets[0], targets[-1] = 0, size - 1
        expected = values_and_gradients(
            lambda x, t, temperature=temperature: by_torch(x, t, temperature), logits, targets, (1.0, -0.3)
        )
        results = [rank[seed] for rank in ranks]
        for name in ("log_probs", "entropies"):
            assert all(torch.equal(result[name], results[0][name]) for result in results)
            torch.testing.assert_close(results[0][name], expected[name], atol=1e-10, rtol=1e-10)
        gradient = torch.cat([result["gradient"] for result in results], dim=1)
        torch.testing.assert_close(gradient, expected["gradient"], atol=1e-10, rtol=1e-10)


# ---- through a model

VOCAB_SIZE, HIDDEN_SIZE = 512, 32
PROMPT, RESPONSES = list(range(20)), [[40, 41, 42, 43, 511], [7], [0, 8, 9] * 5, [3] * 9]  # 30 response rows
CHUNKS = (1, 4, 7, 29, 30, 4096)


class RowsOfLogits(TorchDispatchMode):
    """Most rows of any tensor as wide as (a rank's share of) the vocabulary, but for the output layer's own weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.width and x.shape[0] != HIDDEN_SIZE:
                self.rows = max(self.rows, x.numel() // self.width)
        return result


def through_a_model(rank: int, world_size: int, sequence_parallel: bool, tied: bool) -> dict[str, Any]:
    """Results, gradients, rows of logits and peak bytes for several chunk sizes, of one model."""
    from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
    from megatron_prefix.mcore.model import build_model, transformer_config
    from megatron_prefix.measure import track_memory
    from tests.mcore_helpers import start, tiny_config

    start(tp=world_size)
    config = tiny_config(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, tied_embeddings=tied, num_layers=1)
    settings = {"dtype": torch.float64, "sequence_parallel": sequence_parallel}
    spec = prefix_gpt_layer_spec(transformer_config(config, **settings))
    model = build_model(config, layer_spec=spec, seed=3, **settings)
    (pack,) = pack_groups([RolloutGroup(PROMPT, RESPONSES, [1.0, 0.0, 0.5, 0.2])])
    out: dict[str, Any] = {}
    for chunk_rows in CHUNKS:
        model.zero_grad()
        with track_memory() as memory, RowsOfLogits(VOCAB_SIZE // world_size) as logits:
            log_probs, entropies = response_log_probs(
                model, pack, temperature=0.8, with_entropy=True, chunk_rows=chunk_rows
            )
            (log_probs * torch.linspace(-1, 1, 30)).sum().sub(entropies.mean()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            alone = response_log_probs(model, pack, temperature=0.8, chunk_rows=chunk_rows)
        out[str(chunk_rows)] = (
            log_probs.detach(),
            entropies.detach(),
            gradients,
            logits.rows,
            memory.peak_bytes,
            alone,
        )
    refusals = {
        "temperature 0": {"temperature": 0.0},
        "temperature below 0": {"temperature": -1.0},
        "temperature nan": {"temperature": float("nan")},
        "chunk_rows 0": {"chunk_rows": 0},
    }
    for name, arguments in refusals.items():
        out[name] = refusal(model, pack, **arguments)
    out["token outside"] = refusal(model, pack_groups([RolloutGroup([1, VOCAB_SIZE, 5], [[1]], [0.0])])[0])
    out["target outside"] = refusal(model, pack_groups([RolloutGroup([1, 2, 5], [[1, 600]], [0.0])])[0])
    out["after refusals"] = response_log_probs(model, pack, temperature=0.8).detach()
    return out


def refusal(model: Any, pack: Any, **arguments: Any) -> str:
    try:
        response_log_probs(model, pack, **arguments)
    except ValueError as error:
        return str(error)
    return "not refused"


CASES = {"tp1": (1, False, False), "tp1 tied": (1, False, True), "tp2": (2, False, True), "tp2 sp": (2, True, False)}


@pytest.fixture(scope="module", params=CASES)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    world_size, sequence_parallel, tied = CASES[request.param]
    return run_distributed(through_a_model, world_size, sequence_parallel, tied)


def test_chunks_give_the_same_results_and_gradients(ranks: list[dict[str, Any]]) -> None:
    whole = ranks[0]["4096"]
    assert whole[0].shape == (30,) and whole[0].dtype == torch.float64
    for rank in ranks:
        for chunk_rows in CHUNKS:
            log_probs, entropies, gradients, _, _, alone = rank[str(chunk_rows)]
            for result, expected in ((log_probs, whole[0]), (alone, whole[0]), (entropies, whole[1])):
                torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
            for name, gradient in rank["4096"][2].items():
                torch.testing.assert_close(gradients[name], gradient, atol=1e-12, rtol=1e-10)
    for name in ranks[0]["4096"][2]:
        assert max(rank["4096"][2][name].abs().max() for rank in ranks) > 0, name


def test_chunks_bound_the_logits(ranks: list[dict[str, Any]]) -> None:
    """No tensor as wide as the (rank's) vocabulary has more rows than a chunk, forward or backward."""
    for rank in ranks:
        assert {chunk_rows: rank[str(chunk_rows)][3] for chunk_rows in CHUNKS} == {c: min(c, 30) for c in CHUNKS}
        peaks = [rank[str(chunk_rows)][4] for chunk_rows in CHUNKS]
        fewer_bytes = (30 - 4) * VOCAB_SIZE // len(ranks) * 8
        assert peaks[1] < peaks[-1] - 1.5 * fewer_bytes  # more than the logits alone: the softmax is chunked as well
        # One chunk is one chunk; a vector [30] more or less may be held by an all-reduce that has just ended.
        assert abs(peaks[-2] - peaks[-1]) <= 2 * 30 * 8


def test_bad_input_is_refused_and_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "temperature must be above 0, got 0.0" in rank["temperature 0"]
        assert "temperature must be above 0, got -1.0" in rank["temperature below 0"]
        assert "temperature must be above 0, got nan" in rank["temperature nan"]
        assert "chunk_rows must be at least 1, got 0" in rank["chunk_rows 0"]
        assert "row 1: token id 512 is outside the model's vocabulary of 512" in rank["token outside"]
        assert "row 3: target id 600 is outside the model's vocabulary of 512" in rank["target outside"]
        assert torch.equal(rank["after refusals"], rank["4096"][0])


def test_negative_token_ids_never_reach_a_pack() -> None:
    with pytest.raises(ValueError, match="a token id must be an int of 0 or more, got -1"):
        RolloutGroup([1, -1], [[2]], [0.0])
    with pytest.raises(ValueError, match="a token id must be an int of 0 or more, got -100"):
        RolloutTree((TreeNode([1], -1), TreeNode([-100], 0, (0,))), (0.0,))
