"""`megatron_prefix.megatron_rl`: bins of prefix groups for Megatron-RL, against brute force and a plain model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.repeated import build_plain_model
from megatron_prefix.megatron_rl import bin_log_probs, configure
from megatron_prefix.megatron_rl.bins import Bin, Sequences, make_bins
from tests.distributed import run_distributed
from tests.mcore_helpers import full_logits, start, tiny_config

PAD = 0
FINE: dict[str, Any] = {
    "rl_use_sequence_packing": True,
    "calculate_per_token_loss": True,
    "rl_training_cuda_graphs": False,
    "rl_verify_model_weights_swap": False,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_size": 1,
    "cuda_graph_impl": "local",
    "spec": ["megatron_prefix.specs", "te"],
    "variable_seq_lengths": False,
    "num_experts": None,
}


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Trajectories [n, L] and generation masks: few prompts, pad tokens anywhere, holes, rows without a response."""
    token = st.integers(0, 3)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        mask = draw(st.lists(st.booleans(), max_size=5))
        prompt = draw(st.sampled_from(prompts))
        rows.append((prompt + [draw(token) for _ in mask], [False] * len(prompt) + mask))
    rows.append((prompts[0] + [1], [False] * len(prompts[0]) + [True]))
    width = max(len(ids) for ids, _ in rows) + draw(st.integers(0, 2))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in rows])
    return ids, torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows])


@settings(max_examples=100)
@given(batch=batches(), slots=st.integers(10, 30), ranks=st.integers(1, 3))
def test_every_generated_token_has_one_slot(batch: tuple[Tensor, Tensor], slots: int, ranks: int) -> None:
    ids, generated = batch
    bins = make_bins(Sequences.of(ids, generated), slots, ranks)
    assert sorted(n for each in bins for n in each.numbers) == [n for n, mask in enumerate(generated) if mask.any()]
    for each in bins:
        pack = each.sequences.pack
        assert pack.layout.num_rows < slots  # slot t belongs to the token at t + 1
        taken: set[int] = set()
        for number, first_slot in zip(each.numbers, each.starts, strict=True):
            at = generated[number].nonzero().flatten().tolist()
            span = range(at[0], at[-1] + 1)
            rows = range(first_slot, first_slot + len(span))
            assert taken.isdisjoint(rows)
            taken |= set(rows)
            assert pack.targets[rows].tolist() == ids[number, span].tolist()
            assert pack.positions[rows].tolist() == [t - 1 for t in span]
            assert pack.tokens[rows].tolist() == ids[number, [t - 1 for t in span]].tolist()
        assert taken == set(pack.response_rows.tolist())


def test_groups_share_and_ranks_are_even() -> None:
    """Two groups of four fit a bin each, whatever their order; three ranks ask for one more."""
    ids = torch.tensor([[7, 8, 9, 1], [5, 6, 4, 2]] * 4)
    generated = torch.tensor([[False, False, True, True]] * 8)
    found = Sequences.of(ids, generated)
    assert [each.numbers for each in make_bins(found, 10, 1)] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [each.sequences.pack.layout.num_rows for each in make_bins(found, 10, 1)] == [9, 9]
    assert len(make_bins(found, 10, 3)) == 3


def test_bad_trajectories_are_refused() -> None:
    with pytest.raises(ValueError, match="trajectory 1 has no prompt: its first token is generated"):
        Sequences.of(torch.ones(2, 3), torch.tensor([[False, True, True], [True, True, False]]))
    with pytest.raises(ValueError, match="none of 2 trajectories has a generated token"):
        Sequences.of(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs 4 rows"):
        make_bins(Sequences.of(torch.ones(1, 5), torch.tensor([[False, True, True, True, True]])), 4, 1)


def _log_probs(rank: int, world_size: int) -> dict[str, Any]:
    start()
    config = tiny_config()
    dtype = torch.float64
    plain = build_plain_model(config, dtype=dtype)
    spec = prefix_gpt_layer_spec(transformer_config(config, dtype=dtype))
    shared = build_model(config, layer_spec=spec, dtype=dtype)
    shared.load_state_dict(plain.state_dict())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (6, 12), generator=draw)
    ids[1:3, :5], ids[4, :7] = ids[0, :5], ids[5, :7]
    generated = torch.zeros(6, 12, dtype=torch.bool)
    for number, (first, end) in enumerate([(5, 12), (5, 9), (5, 6), (3, 12), (7, 10), (7, 12)]):
        generated[number, first:end] = True
    expected = full_logits(plain, ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2).detach()
    worst, bins = 0.0, make_bins(Sequences.of(ids, generated), 30, 1)
    for each in bins:
        found = bin_log_probs(shared, each, no_grad=False)
        assert found.shape == (1, 29) and found.requires_grad
        wanted = torch.zeros(1, 29, dtype=found.dtype)
        for number, slot in zip(each.numbers, each.starts, strict=True):
            at = generated[number].nonzero().flatten()
            wanted[0, slot : slot + len(at)] = expected[number, at - 1]
        worst = max(worst, (found - wanted).abs().max().item())
    nothing = bin_log_probs(shared, Bin.empty(PAD, 30), no_grad=False)
    nothing.sum().backward()
    frozen = bin_log_probs(shared, bins[0], no_grad=True)
    return {
        "worst": worst,
        "bins": len(bins),
        "empty": (nothing.count_nonzero().item(), shared.output_layer.weight.grad is not None),
        "no_grad": frozen.requires_grad,
    }


def test_slots_hold_the_log_probs_of_a_plain_model() -> None:
    (found,) = run_distributed(_log_probs, 1)
    assert found["bins"] == 2
    assert found["worst"] < 1e-12
    assert found["empty"] == (1, True)  # upstream's loss mask leaves that slot out; the graph is there
    assert not found["no_grad"]


class ReachedError(Exception):
    """megatron-core's attention asked the inference context something."""


class Context:
    def __getattr__(self, name: str) -> Any:
        raise ReachedError(name)


def _attend(rank: int, world_size: int) -> list[str]:
    start()
    config = tiny_config()
    spec = prefix_gpt_layer_spec(transformer_config(config))
    attention = build_model(config, layer_spec=spec).decoder.layers[0].self_attention
    seen = []
    for context in (None, Context()):
        try:
            attention(torch.zeros(3, 1, 32), None, inference_context=context)
        except (ValueError, ReachedError) as error:
            seen.append(type(error).__name__)
    return seen


def test_sampling_goes_to_megatron_cores_own_inference_path() -> None:
    """Without an inference context a layer still refuses to run without a layout."""
    assert run_distributed(_attend, 1) == [["ValueError", "ReachedError"]]


@pytest.mark.ci_oldest
@pytest.mark.parametrize(("stages", "variable"), [(1, False), (2, True)])
def test_stages_exchange_as_many_rows_as_a_bin_has(stages: int, variable: bool) -> None:
    args = SimpleNamespace(**FINE | {"pipeline_model_parallel_size": stages})
    configure(args)
    assert args.variable_seq_lengths is variable


@pytest.mark.ci_oldest
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl_use_sequence_packing": False}, "add --rl-use-sequence-packing"),
        ({"calculate_per_token_loss": False}, "add --calculate-per-token-loss"),
        ({"rl_training_cuda_graphs": True}, "drop --rl-training-cuda-graphs"),
        ({"cuda_graph_impl": "full_iteration"}, "cuda_graph_impl=full_iteration"),
        ({"rl_verify_model_weights_swap": True}, "without a layout"),
        ({"virtual_pipeline_model_parallel_size": 2}, "drop the virtual pipeline"),
        ({"spec": None}, "add --spec megatron_prefix.specs te"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(SimpleNamespace(**FINE | change))
