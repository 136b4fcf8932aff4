"""Prefix-grouped decoding: its cache is exact, its sampling repeatable, on one rank and under tensor parallelism."""

import importlib.util
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_prefix.attention import KERNELS, WHOLE_LAYOUT
from megatron_prefix.generation import sampling
from megatron_prefix.generation.sampling import SampledResponse, sample_responses
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.model import build_hybrid_model, build_model, hybrid_stack_spec, transformer_config
from megatron_prefix.mcore.parallel import destroy
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import pack_groups
from megatron_prefix.rollouts import RolloutGroup
from tests.distributed import run_distributed
from tests.mcore_helpers import full_logits, start, tiny_config
from tests.te_on_cpu import VERSIONS, TeOnCpu

EOS = 3
LENGTHS = (7, 1, 20, 2)  # one prompt without a shared row
CONFIGS: dict[str, dict[str, Any]] = {
    "rope": {"qk_layernorm": True, "tied_embeddings": True},
    "learned": {"position_embedding": "learned_absolute", "norm": "layernorm", "activation": "gelu"},
    "yarn": {
        "position_embedding": "yarn",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32},
        "qkv_bias": True,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start()
    yield
    destroy()


def prefix_model(config: ModelConfig, *, hybrid: bool = False, impl: str = "auto", **settings: Any) -> torch.nn.Module:
    """A random model whose logits differ enough for sampled text to vary."""
    spec = prefix_gpt_layer_spec(transformer_config(config, **settings), impl=impl)
    model: Any
    if hybrid:
        model = build_hybrid_model(config, hybrid_stack_spec(spec), seed=1, **settings)
    else:
        model = build_model(config, layer_spec=spec, seed=1, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def some_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(64) for _ in range(length)] for length in lengths]


def sample(model: torch.nn.Module, prompts: list[list[int]], **changes: Any) -> list[list[SampledResponse]]:
    arguments: dict[str, Any] = {"group_size": 3, "max_new_tokens": 70, "eos_token_ids": [EOS], "seed": 5}
    return sample_responses(model, prompts, **(arguments | changes))


def recomputed(
    model: torch.nn.Module, prompts: list[list[int]], groups: list[list[SampledResponse]], temperature: float = 1.0
) -> torch.Tensor:
    """|log-probs of the sampler - log-probs of the training path|, per token."""
    rollouts = [
        RolloutGroup(prompt, [r.tokens for r in group], [0.0] * len(group), None, [r.log_probs for r in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    pack = pack_groups(rollouts)[0]
    assert pack.sampler_log_probs is not None
    with torch.no_grad():
        log_probs = response_log_probs(model, pack, temperature=temperature)
    assert isinstance(log_probs, torch.Tensor)
    return (log_probs - pack.sampler_log_probs).abs()


@pytest.mark.parametrize("impl", ["auto", *WHOLE_LAYOUT])
@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probs_are_those_of_training(kind: str, impl: str) -> None:
    """Over the doubling of the cache (64 rows), the end of responses and prompts without shared rows."""
    model = prefix_model(tiny_config(**CONFIGS[kind]), impl=impl)
    prompts = some_prompts()
    groups = sample(model, prompts, temperature=0.8)
    lengths = [len(response.tokens) for group in groups for response in group]
    assert max(lengths) == 70 and min(lengths) < 64, lengths
    assert recomputed(model, prompts, groups, temperature=0.8).max() < 1e-4


def test_a_kernel_that_looks_at_no_stride_decodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", kernel := TeOnCpu(VERSIONS[-1]))
    model = prefix_model(tiny_config())
    prompts = some_prompts()
    assert recomputed(model, prompts, sample(model, prompts, max_new_tokens=8)).max() < 1e-4
    assert len(kernel.compiled.launches) > 16


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.models.hybrid") is None, reason="needs megatron-core >= 0.19"
)
def test_a_hybrid_model_is_sampled_too() -> None:
    model = prefix_model(tiny_config(), hybrid=True)
    prompts = some_prompts()
    assert recomputed(model, prompts, sample(model, prompts)).max() < 1e-4


def test_greedy_decoding_is_that_of_encoding_everything_again() -> None:
    config = tiny_config()
    model, plain = prefix_model(config), prefix_model_twin(config)
    prompts = some_prompts()
    groups = sample(model, prompts, temperature=0, max_new_tokens=20, group_size=2)
    for prompt, group in zip(prompts, groups, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 20 and (len(tokens) == len(prompt) or tokens[-1] != EOS):
            tokens.append(int(full_logits(plain, torch.tensor([tokens]))[0, -1].argmax()))
        assert [response.tokens for response in group] == [tokens[len(prompt) :]] * 2


def prefix_model_twin(config: ModelConfig) -> torch.nn.Module:
    """Plain megatron-core with the weights of `prefix_model`."""
    plain = build_model(config)
    plain.load_state_dict(prefix_model(config).state_dict())
    return plain.eval()


def test_responses_do_not_depend_on_batching() -> None:
    model, prompts = prefix_model(tiny_config()), some_prompts()
    whole = tokens_of(sample(model, prompts))
    assert whole == tokens_of(sample(model, prompts, prompts_per_batch=1))
    assert whole[2:] == tokens_of(sample(model, prompts[2:], first_prompt=2))
    assert whole != tokens_of(sample(model, prompts, seed=6))
    assert len({tuple(tokens) for group in whole for tokens in group}) == 12  # no two share their random numbers


def tokens_of(groups: list[list[SampledResponse]]) -> list[list[list[int]]]:
    return [[response.tokens for response in group] for group in groups]


def test_a_response_ends_with_the_token_that_ends_it() -> None:
    model, prompts = prefix_model(tiny_config()), some_prompts()
    responses = [response for group in sample(model, prompts) for response in group]
    for response in responses:
        assert EOS not in response.tokens[:-1]
        assert response.truncated == (response.tokens[-1] != EOS)
        assert len(response.tokens) == len(response.log_probs) <= 70
    assert {response.truncated for response in responses} == {True, False}
    unending = [response for group in sample(model, prompts, eos_token_ids=()) for response in group]
    assert all(len(response.tokens) == 70 and response.truncated for response in unending)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    """Chi-square over 4,000 first tokens; the seed is fixed, so this cannot fail by chance."""
    model, temperature, count = prefix_model(tiny_config()), 1.5, 4000
    prompt = some_prompts()[0]
    (group,) = sample(model, [prompt], group_size=count, max_new_tokens=1, temperature=temperature)
    with torch.no_grad():
        logits = full_logits(prefix_model_twin(tiny_config()), torch.tensor([prompt]))[0, -1]
    expected = count * (logits / temperature).softmax(-1)
    seen = Counter(response.tokens[0] for response in group)
    tested = [token for token in range(64) if expected[token] >= 5]
    statistic = sum((seen[token] - float(expected[token])) ** 2 / float(expected[token]) for token in tested)
    assert len(tested) > 10
    assert statistic < len(tested) + 4 * (2 * len(tested)) ** 0.5


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).expand(5, -1)
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs = sampling._sample(logits, draws, 1.0, None)
    assert tokens.tolist() == [1, 1, 3, 3, 3]
    torch.testing.assert_close(log_probs, torch.full((5,), 0.5).log())


def test_steps_are_reported_and_the_mode_is_restored() -> None:
    model, prompts = prefix_model(tiny_config()), some_prompts()
    model.train()
    steps: list[tuple[int, int]] = []
    groups = sample(model, prompts, prompts_per_batch=3, on_step=lambda *step: steps.append(step))
    assert sum(tokens for tokens, _ in steps) == sum(len(r.tokens) for group in groups for r in group)
    assert sum(finished for _, finished in steps) == 12
    assert model.training


def test_prompt_keys_are_stored_once() -> None:
    """The cache of a long prompt does not grow with the group, but for the responses' own rows."""
    model = prefix_model(tiny_config())
    with torch.no_grad():
        sizes = []
        for group_size in (1, 16):
            decoder = sampling.PrefixDecoder(model, [[1] * 101], group_size=group_size, max_new_tokens=4)
            decoder.step([1] * group_size)
            prompt_parts = [part for layer in decoder.cache.values() if layer.prompt for part in layer.prompt]
            sizes.append(sum(part.untyped_storage().nbytes() for part in prompt_parts))
    assert sizes[0] == sizes[1] == 2 * 2 * 100 * 2 * 8 * 4  # layers, k and v, rows, heads, head dim, bytes


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, "prompt 0: token id 64 is outside the model's vocabulary of 64"),
        ([[1] * 60], {}, "prompt 0 has 60 tokens, with 70 new ones it passes the model's 128 positions"),
        ([[1]], {"group_size": 0}, "group_size must be at least 1, got 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -1.0}, "temperature must be a number of 0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be a number of 0"),
        ([[1]], {"eos_token_ids": [64]}, "eos token id 64 is outside"),
    ],
)
def test_bad_input_is_refused(prompts: list[list[int]], changes: dict[str, Any], message: str) -> None:
    model = prefix_model(tiny_config())
    with pytest.raises(ValueError, match=message):
        sample(model, prompts, **changes)


def sample_on_context_parallel_rank(rank: int, world_size: int) -> str:
    start(cp=world_size)
    with pytest.raises(ValueError) as refusal:
        sample(prefix_model(tiny_config()), [[1, 2]])
    return str(refusal.value)


def test_context_parallelism_is_refused() -> None:
    refusals = run_distributed(sample_on_context_parallel_rank, 2)
    assert all("context_parallel_size is 2; use cp=1" in refusal for refusal in refusals)


def sample_on_rank(rank: int, world_size: int, sequence_parallel: bool) -> tuple[list[list[list[int]]], float]:
    start(tp=world_size)
    model = prefix_model(tiny_config(), sequence_parallel=sequence_parallel)
    prompts = some_prompts()
    groups = sample(model, prompts)
    return tokens_of(groups), float(recomputed(model, prompts, groups).max())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_sample_as_one(sequence_parallel: bool) -> None:
    results = run_distributed(sample_on_rank, 2, sequence_parallel)
    alone = tokens_of(sample(prefix_model(tiny_config()), some_prompts()))
    assert results[0][0] == results[1][0] == alone
    assert max(difference for _, difference in results) < 1e-4
