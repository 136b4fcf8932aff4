"""Metrics of a step that need no policy: rewards, tokens, utilisation."""

import pytest

from megatron_prefix import RolloutGroup
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.model_flops import ModelSize
from megatron_prefix.step_metrics import StepMeter

pytestmark = pytest.mark.ci_oldest

GROUPS = [
    RolloutGroup([1, 2, 3, 4, 5], [[1], [2, 3], [4, 5, 6]], [1.0, 0.0, 2.0]),
    RolloutGroup([1, 2], [[7, 8], [9]], [0.5, 0.5]),
]
CONFIG = ModelConfig(
    num_layers=3, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1, vocab_size=32,
    max_position_embeddings=64,
)  # fmt: skip


def flops(rows: int, targets: int, pairs: int) -> int:
    """Six per parameter of a matrix and row, and twelve per layer, attention channel and pair: forward and backward."""
    hidden, ffn, head_dim = 8, 16, 4
    layer = hidden * (2 * head_dim + 2 * head_dim) + 2 * head_dim * hidden + 3 * hidden * ffn
    return 6 * (3 * layer * rows + hidden * 32 * targets) + 12 * 3 * 2 * head_dim * pairs


def test_metrics_of_a_step() -> None:
    found = StepMeter(ModelSize.of(CONFIG), ranks=4, peak_flops=1e6).measure(GROUPS, seconds=0.5)
    # rows: 4 + (1 + 2 + 3) and 1 + (2 + 1); repeated: 5, 6, 7 and 3, 2
    assert (found["tokens"], found["tokens_repeated"]) == (14, 23)
    assert found["saving"] == pytest.approx(9 / 23)
    assert found["tokens_per_second"] == 28
    assert found["reward"] == pytest.approx(0.8)
    assert found["reward_std"] == pytest.approx((sum((x - 0.8) ** 2 for x in (1, 0, 2, 0.5, 0.5)) / 5) ** 0.5)
    assert found["no_advantage"] == 0.5
    assert found["memory_bytes"] > 1e6
    # pairs: a triangle of 4, the first group's rows against it and their own triangles; the same for the second
    shared = (10 + 4 * 6 + 1 + 3 + 6) + (1 + 1 * 3 + 3 + 1)
    repeated = 15 + 21 + 28 + 6 + 3
    assert found["mfu"] == pytest.approx(flops(14, 9, shared) / (4 * 1e6 * 0.5))
    assert found["mfu_repeated"] == pytest.approx(flops(23, 9, repeated) / (4 * 1e6 * 0.5))


def test_utilisation_of_an_unknown_device_is_left_out() -> None:
    found = StepMeter(ModelSize.of(CONFIG), ranks=1).measure(GROUPS, seconds=1.0)
    assert not any(name.startswith("mfu") for name in found)
