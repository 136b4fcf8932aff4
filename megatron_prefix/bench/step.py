"""A whole training step of a megatron-core model on one prefix group: forward, log-probs, GRPO loss, backward.

The optimizer is left out: it does the same in both cases. Repeated prefixes run in the same model, through the same
kernels, with only response rows in the output layer, so the comparison shows what sharing the prefix saves and nothing
else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_prefix.attention import known_impl, resolve_impl
from megatron_prefix.bench.group import DTYPES, GroupSizes, ratios
from megatron_prefix.bench.report import (
    TOLERANCE,
    Differences,
    check_equal,
    new_report,
    relative_difference,
    speed_ups,
    with_total,
)
from megatron_prefix.collectives import Traffic
from megatron_prefix.layout import FLOPS_PER_PAIR
from megatron_prefix.loss import grpo_loss
from megatron_prefix.mcore.layer_specs import prefix_gpt_layer_spec
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.measure import Stopwatch, interleaved_times, track_memory
from megatron_prefix.model_config import ModelConfig
from megatron_prefix.packing import Pack, pack_groups
from megatron_prefix.rollouts import RolloutGroup


@dataclass(frozen=True)
class StepSettings:
    """How the step is computed.

    Raises:
        ValueError: an unknown dtype or impl.
    """

    dtype: str = "fp32"
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        known_impl(self.impl)


class Step:
    """The step on one pack; gradients are in the parameters afterwards. ``cp_placement``: see `response_log_probs`."""

    def __init__(self, model: torch.nn.Module, pack: Pack, cp_placement: str = "auto") -> None:
        self.model, self.pack, self.cp_placement = model, pack, cp_placement
        self.device = next(model.parameters()).device

    def forward(self, traffic: Traffic | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs [N] and the loss, on policy: the old log-probs are the policy's own."""
        for param in self.model.parameters():
            param.grad = None
        log_probs = response_log_probs(self.model, self.pack, cp_placement=self.cp_placement, cp_traffic=traffic)
        assert isinstance(log_probs, Tensor)
        pairs, advantages = self.pack.pairs.to(self.device), self.pack.advantages.to(self.device)
        loss, _ = grpo_loss(log_probs, log_probs.detach(), advantages, pairs, self.pack.totals)
        return log_probs.detach(), loss

    def time(self) -> dict[str, float]:
        """Seconds of one step."""
        watch = Stopwatch(self.device)
        _, loss = self.forward()
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        return with_total(watch.phases)

    def measure(self) -> tuple[dict[str, Tensor], int, int]:
        """Log-probs and every parameter's gradient, peak bytes beside the parameters, FLOPs of matrix products."""
        # The counter is the inner mode: it may rewrite operations, and the tracker is to see what really runs.
        with track_memory(self.device) as memory, FlopCounterMode(display=False) as counter:
            log_probs, loss = self.forward()
            loss.backward()
        results = self.take_results(log_probs)
        # Attention kernels are counted from the mask's area: this counter knows neither all of them nor masks.
        counts = counter.get_flop_counts()["Global"]
        flops = sum(count for operation, count in counts.items() if "attention" not in str(operation))
        return results, memory.peak_bytes, flops

    def take_results(self, log_probs: Tensor) -> dict[str, Tensor]:
        """Log-probs and every parameter's gradient, which leaves the parameter."""
        results = {"log_probs": log_probs}
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                results[f"grad {name}"] = param.grad
                param.grad = None
        return results


def bench_step(
    group: GroupSizes,
    config: ModelConfig,
    settings: StepSettings,
    *,
    repeats: int = 5,
    seed: int = 0,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare, then time, the step on one random group of a model with random weights.

    Log-probs and every parameter's gradient of the prefix group are compared with those of repeated prefixes (in half
    precision, both with repeated prefixes in fp32). The run that is compared is also the one whose memory is measured,
    and the warm-up of the timed ones. megatron-core's process groups must exist (one process).

    Args:
        group: its prefix is the prompt without its last token, see `megatron_prefix.packing`.
        after_each: called with a note after each of `num_runs` runs.

    Returns:
        The report: JSON values, see `megatron_prefix.bench.report`.

    Raises:
        ResultsDifferError: log-probs or a gradient differ.
        ValueError: a model that is too small for the group, or not supported.
    """
    check_positions(group, config)
    note = after_each or (lambda _: None)
    dtype = DTYPES[settings.dtype]
    model = random_model(config, dtype, settings.impl, seed)
    device = next(model.parameters()).device
    impl = resolve_impl(settings.impl, device, dtype, config.channels)
    rollouts = random_rollouts(group, config.vocab_size, seed)
    grouped, repeated = (one_pack(rollouts, repeated) for repeated in (False, True))
    steps = {"repeated": Step(model, repeated), "grouped": Step(model, grouped)}
    report = new_report("step", asdict(group) | asdict(settings) | {"impl": impl, "repeats": repeats}, seed)
    report["model"] = asdict(config) | {"parameters": sum(param.numel() for param in model.parameters())}
    report["bound"] = {"name": "rho", "value": group.rho, "alpha": group.alpha}

    results: dict[str, dict[str, Any]] = {}
    measured = {}
    attention_flops = FLOPS_PER_PAIR * config.num_layers * config.num_attention_heads * config.channels
    for name, step in steps.items():
        layout = step.pack.layout
        measured[name], peak, flops = step.measure()
        flops += attention_flops * layout.area
        results[name] = {"rows": layout.num_rows, "area": layout.area, "flops": flops, "peak_bytes": peak}
        note(f"checking {name}")
    report["ratios"] = ratios(grouped.layout, repeated.layout)
    report["ratios"]["flops"] = results["repeated"]["flops"] / results["grouped"]["flops"]

    def exact() -> dict[str, Tensor]:
        return Step(exact_model(model, config), repeated).measure()[0]

    check_equal(report, differences(measured, "repeated", exact, dtype), dtype)
    note("checking against the reference")
    del measured

    times = interleaved_times(
        {name: step.time for name, step in steps.items()},
        repeats=repeats,
        warmup=0,
        after_each=lambda name: note(f"timing {name}"),
    )
    for name, result in results.items():
        result["seconds"] = {phase: taken.as_dict() for phase, taken in times[name].items()}
    report["results"] = results
    report["speed_up"] = speed_ups(times["repeated"], times["grouped"])
    report["speed_up_over_bound"] = report["speed_up"]["total"] / group.rho
    return report


def check_positions(group: GroupSizes, config: ModelConfig) -> None:
    """Raises ValueError when the model has fewer positions than a sequence of the group."""
    if group.prefix_len + group.response_len > config.max_position_embeddings:
        raise ValueError(
            f"prefix_len {group.prefix_len} + response_len {group.response_len} is over the model's "
            f"max_position_embeddings {config.max_position_embeddings}; choose shorter ones"
        )


def num_runs(repeats: int) -> int:
    """How often `bench_step` calls ``after_each``."""
    return 2 * (1 + repeats) + 1


def random_model(config: ModelConfig, dtype: torch.dtype, impl: str, seed: int, **settings: Any) -> torch.nn.Module:
    """A model with prefix-grouped attention; ``settings`` are more arguments of `build_model`."""
    overrides = settings.get("overrides")
    spec = prefix_gpt_layer_spec(transformer_config(config, dtype=dtype, overrides=overrides), impl=impl)
    return build_model(config, layer_spec=spec, dtype=dtype, seed=seed, **settings)


def exact_model(model: torch.nn.Module, config: ModelConfig, **settings: Any) -> torch.nn.Module:
    """The same weights in fp32, see `random_model`; on CUDA by the one fused implementation that takes fp32."""
    impl = "flex" if next(model.parameters()).is_cuda else "auto"
    exact = random_model(config, torch.float32, impl, 0, **settings)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, param in exact.named_parameters():
            param.copy_(values[name])
    return exact


def random_rollouts(group: GroupSizes, vocab_size: int, seed: int) -> RolloutGroup:
    """Random tokens and rewards; the prompt has one token more than the shared prefix has rows."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    responses = [tokens(group.response_len) for _ in range(group.group_size)]
    return RolloutGroup(tokens(group.prefix_len + 1), responses, [rng.random() for _ in responses])


def one_pack(rollouts: RolloutGroup, repeated: bool) -> Pack:
    """The group as a pack, its prefix shared or repeated."""
    (pack,) = pack_groups([rollouts], repeated=repeated)
    return pack


def differences(
    measured: dict[str, dict[str, Tensor]], baseline: str, exact: Callable[[], dict[str, Tensor]], dtype: torch.dtype
) -> dict[str, Differences]:
    """Relative differences by path and tensor: from the baseline, in half precision from what ``exact`` gives."""
    reference, compared = measured[baseline], [path for path in measured if path != baseline]
    if dtype not in TOLERANCE:
        reference, compared = exact(), list(measured)
    missing = {"tensors": float("inf")}  # a parameter that got a gradient on one path only
    return {
        path: {name: relative_difference(measured[path][name], value) for name, value in reference.items()}
        if measured[path].keys() == reference.keys()
        else missing
        for path in compared
    }
