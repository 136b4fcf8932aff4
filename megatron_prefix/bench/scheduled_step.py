"""A training step on some micro-batches through megatron-core's schedule: the forward and backward part of
`PolicyTrainer`, without the optimizer, in one process or on this rank of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_prefix.bench.report import with_total
from megatron_prefix.layout import FLOPS_PER_PAIR, FORWARD_FLOPS_PER_PAIR
from megatron_prefix.loss import LossConfig
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.mcore.training import PolicyTrainer, StepInput, TrainSettings
from megatron_prefix.measure import Stopwatch, track_memory
from megatron_prefix.packing import Pack

UNCLIPPED = LossConfig(clip_low=0.99, clip_high=100.0)
"""Rounding must not move a token over the bound of the ratio."""


class ScheduledStep:
    """The training step on some micro-batches; gradients are in the trainer's buffers afterwards."""

    def __init__(self, bench: BenchTrainer, packs: Sequence[Pack], prefix_activations: str = "keep") -> None:
        self.bench, self.packs, self.prefix_activations = bench, packs, prefix_activations
        self.has_phases = packs[0].is_prefix and bench.trainer.pp_group.size() == 1
        vocabulary = bench.chunks[0].vocab_size
        # On policy every ratio is 1 whatever the model computes, and the loss would show no difference.
        self.inputs = [StepInput(p, torch.full((len(p.response_rows),), -log(vocabulary))) for p in packs]

    def run(self, lap: Callable[[str], None]) -> dict[str, Tensor]:
        """Weighted loss terms [N] and, on the last stage, log-probs [N], by micro-batch. ``lap`` is told the ends of
        the phases of a split group."""
        return self.bench.run(self.inputs, self.prefix_activations, lap if self.has_phases else lambda _: None)

    def time(self) -> dict[str, float]:
        """Seconds of one step, of a split group in one process by phase."""
        watch = Stopwatch(self.bench.device)
        self.run(watch.lap)
        watch.lap("prefix_backward" if self.has_phases else "whole")
        return with_total(watch.phases)

    def measure(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One step: log-probs, loss terms and gradients; rows, FLOPs and memory of this rank as JSON values."""
        layers = [layer for chunk in self.bench.chunks for layer in chunk.decoder.layers]
        # The counter is the inner mode: it may rewrite operations, and the tracker is to see what really runs.
        with _counted_rows(layers) as rows, track_memory(self.bench.device) as memory:
            with FlopCounterMode(display=False) as counter:
                found = self.run(memory.lap)
            if self.has_phases:
                memory.lap("prefix_backward")
        # Attention kernels are counted from the mask's area: this counter knows neither all of them nor masks.
        counts = counter.get_flop_counts()["Global"]
        flops = sum(count for operation, count in counts.items() if "attention" not in str(operation))
        result = {
            "micro_batches": len(self.packs),
            "rows": rows["qkv"][0],
            "layer_rows": rows,
            "flops": flops + self._attention_flops(len(layers)),
            "peak_bytes": memory.peak_bytes,
        }
        if self.has_phases:
            result["phase_peak_bytes"] = memory.phase_peaks
        gradients = {f"grad {name}": grad.clone() for name, grad in self.bench.trainer.named_gradients().items()}
        return found | gradients, result

    def _attention_flops(self, layers: int) -> int:
        config = self.bench.trainer.config
        per_pair = config.num_attention_heads * config.kv_channels
        keys_only = any(chunk.post_process for chunk in self.bench.chunks)  # of a prefix, in the model's last layer
        flops = 0
        for pack in self.packs:
            attending = layers - (pack.is_prefix and keys_only)
            again = pack.is_prefix and self.prefix_activations == "recompute"
            flops += (FLOPS_PER_PAIR + again * FORWARD_FLOPS_PER_PAIR) * attending * per_pair * pack.layout.area
        return flops


class BenchTrainer:
    """A `PolicyTrainer` that keeps log-probs, and that tells where the phases of a split group end.

    Args:
        model: see `PolicyTrainer`.
    """

    def __init__(self, model: Any) -> None:
        self.chunks = [unwrap(chunk) for chunk in (model if isinstance(model, list) else [model])]
        self.device = next(self.chunks[0].parameters()).device
        settings = TrainSettings(optimizer="sgd", clip_grad=0.0)
        self.trainer = PolicyTrainer(model, settings, UNCLIPPED, log_probs=self._log_probs)
        if len(self.chunks) == 1:
            self.no_sync: Callable[[], AbstractContextManager[Any]] = self.trainer.config.no_sync_func
            self.trainer.config.no_sync_func = self._until_last
        self.lap: Callable[[str], None] = lambda _: None
        self.began = False
        self.found: dict[int, Tensor] = {}  # by id of the pack: a pipeline has an order of its own

    def run(self, inputs: Sequence[StepInput], activations: str, lap: Callable[[str], None]) -> dict[str, Tensor]:
        """See `ScheduledStep.run`."""
        self.trainer.settings = replace(self.trainer.settings, prefix_activations=activations)
        self.lap, self.began, self.found = lap, False, {}
        _, terms = self.trainer.gradients_and_terms(inputs)
        if not self.found:
            return {"loss_terms": terms}
        in_order = [self.found[id(each.pack)] for each in inputs if id(each.pack) in self.found]
        return {"loss_terms": terms, "log_probs": torch.cat(in_order)}

    def _log_probs(self, model: torch.nn.Module, pack: Pack) -> Tensor:
        if not self.began:
            self.began = True
            self.lap("prefix_forward")
        log_probs = response_log_probs(model, pack)
        assert isinstance(log_probs, Tensor)
        if unwrap(model).post_process:
            self.found[id(pack)] = log_probs.detach()
        return log_probs

    @contextmanager
    def _until_last(self) -> Iterator[None]:
        """megatron-core's no_sync: around all micro-batches but the last, which is the prefix's backward."""
        with self.no_sync():
            yield
        self.lap("responses")


@contextmanager
def _counted_rows(layers: Sequence[Any]) -> Iterator[dict[str, list[int]]]:
    """Rows that go through the forward of every layer's QKV projection and MLP inside a ``with`` block."""
    rows = {"qkv": [0] * len(layers), "mlp": [0] * len(layers)}

    def count(name: str, layer: int, _: Any, inputs: tuple[Tensor, ...]) -> None:
        rows[name][layer] += inputs[0].shape[0]

    handles = []
    for i, layer in enumerate(layers):
        for name, module in (("qkv", layer.self_attention.linear_qkv), ("mlp", layer.mlp)):
            handles.append(module.register_forward_pre_hook(partial(count, name, i)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
