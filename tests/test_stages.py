"""Parameters of pipeline stages under the names of the whole model, and the copy of stages into whole models."""

import itertools
from typing import Any

import pytest
import torch

from megatron_prefix.mcore.equivalence import Evaluation, differences
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.repeated import build_plain_model
from megatron_prefix.mcore.stages import copy_parameters, whole_model_parameters
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config

EMBEDDING = "embedding.word_embeddings.weight"


def copied(rank: int, world_size: int, vpp: int | None, tied: bool) -> dict[str, Any]:
    start(pp=2, **({"vpp": vpp} if vpp else {}))
    config = tiny_config(num_layers=4, tied_embeddings=tied)
    spec = prefix_gpt_layer_spec(transformer_config(config))
    stages = [None] if vpp is None else range(vpp)
    chunks = [build_model(config, layer_spec=spec, seed=1, vp_stage=stage) for stage in stages]
    plain = build_plain_model(config, dtype=torch.float64)
    copy_parameters(chunks, plain)
    mine, whole = whole_model_parameters(chunks), whole_model_parameters(plain)
    copy_parameters(plain, chunks)
    return {
        "mine": {name: value.detach().clone() for name, value in mine.items()},
        "whole": {name: value.detach().clone() for name, value in whole.items()},
        "own names": [name for name, _ in plain.named_parameters()],
        "same": all(torch.equal(value.double(), whole[name]) for name, value in mine.items()),
    }


@pytest.mark.parametrize(("vpp", "tied", "first"), [(None, True, (0, 1)), (2, False, (0, 2))])
def test_stages_make_the_whole_model(vpp: int | None, tied: bool, first: tuple[int, int]) -> None:
    ranks = run_distributed(copied, 2, vpp, tied)
    everything = set(ranks[0]["own names"])
    for rank, numbers in zip(ranks, (first, {0, 1, 2, 3} - set(first)), strict=True):
        assert rank["same"] and set(rank["whole"]) == everything
        assert all(torch.equal(value, ranks[0]["whole"][name]) for name, value in rank["whole"].items())
        layers = {int(name.split(".")[2]) for name in rank["mine"] if name.startswith("decoder.layers.")}
        assert layers == set(numbers)
    both = set(ranks[0]["mine"]) & set(ranks[1]["mine"])
    assert set(ranks[0]["mine"]) | set(ranks[1]["mine"]) == everything and both == ({EMBEDDING} if tied else set())
    values = [ranks[0]["whole"][f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(4)]
    assert all(not torch.equal(x, y) for x, y in itertools.pairwise(values))


def copied_from_another_model(rank: int, world_size: int) -> str:
    start()
    with pytest.raises(ValueError, match="no parameter") as error:
        copy_parameters(build_model(tiny_config(num_layers=1)), build_model(tiny_config(num_layers=2)))
    return str(error.value)


def test_models_of_other_configs_are_refused() -> None:
    (message,) = run_distributed(copied_from_another_model, 1)
    assert "has no parameter decoder.layers.1." in message and "copy between models of one config" in message


def compared(rank: int, world_size: int, missing: str | None) -> list[float] | str:
    """The evaluation of a stage per rank with that of a whole model; rank 1's ``b`` is wrong by a half."""
    values = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(1)}
    whole = Evaluation(torch.ones(2), 1.0, torch.ones(2), 2.0, values, values)
    own = {name: values[name] + 0.5 * (name == "b") for name in ("ac" if rank == 0 else "bc") if name != missing}
    stage = Evaluation(torch.ones(2), 1.0, torch.ones(2), 2.0, own, own)
    try:
        found = differences(stage, whole)
    except ValueError as error:
        return str(error)
    assert found.parameters == found.gradients
    return [found.gradients[name] for name in "abc"]


def test_every_stage_counts_and_none_may_be_missing() -> None:
    assert run_distributed(compared, 2, None) == [[0.0, 0.5, 0.0]] * 2
    assert run_distributed(compared, 2, "b") == ["the two models have different parameters: ['b']"] * 2
