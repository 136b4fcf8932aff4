"""Bytes that the busiest GPU sends in a step, and the seconds that takes, by kind of parallelism.

tensor      per layer and pass, in front of attention and MLP an all-gather, behind them a reduce-scatter (sequence
            parallelism, arXiv 2205.05198, section 4.2); backward gathers the layers' inputs once more for the weights'
            gradients. Around the output layer the response rows are gathered, and their gradient is reduced
context     keys and values of the rows that other ranks read go around a ring; backward sends them again and their
            gradients back. Placement "branch": a prefix's keys, and those of responses that one rank cannot hold
            (`loads.RankLoad.keys_that_travel`); `context_parallel.traffic` counts a given layout to the byte
pipeline    hidden states to the next stage, gradients back, per micro-batch and model chunk (arXiv 2104.04473, 2.2)
data        over data- and context-parallel ranks gradients are reduce-scattered and weights gathered (arXiv 1910.02054)
expert      rows go to their experts and back, once more in backward (arXiv 2006.16668)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.estimator.cluster import Cluster, Link
from megatron_prefix.estimator.loads import RankLoad
from megatron_prefix.estimator.memory import Parameters
from megatron_prefix.estimator.model import PlannedModel
from megatron_prefix.estimator.saved_tensors import FP32
from megatron_prefix.estimator.sizes import RunSettings, Sizes


@dataclass(frozen=True)
class Moved:
    """Of one kind of communication in a step, on the busiest GPU."""

    num_bytes: float = 0.0
    seconds: float = 0.0

    def times(self, count: float) -> Moved:
        """Of ``count`` such."""
        return Moved(self.num_bytes * count, self.seconds * count)

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.num_bytes + other.num_bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class Communication:
    """What one choice of sizes moves; everything but `gradients` is of one data-parallel rank's micro-batches.

    Attributes:
        model: to be trained.
        sizes: parallel sizes.
        cluster: whose links are used.
        settings: dtype and optimizer.
        load: micro-batches.
        recompute: with "full" the forward, and what it sends, runs again.
    """

    model: PlannedModel
    sizes: Sizes
    cluster: Cluster
    settings: RunSettings
    load: RankLoad
    recompute: str

    def by_kind(self) -> dict[str, Moved]:
        """All of it; the names are those of `step_time.StepTime`."""
        return {
            "tensor": self.tensor(),
            "context": self.context(),
            "pipeline": self.pipeline(),
            "expert": self.expert(),
            "gradients": self.gradients(),
        }

    @property
    def _layers(self) -> float:
        return self.model.config.num_layers / self.sizes.pp

    @property
    def _passes(self) -> int:
        """Forward passes, and one backward."""
        return 3 if self.recompute == "full" else 2

    def tensor(self) -> Moved:
        """Of all micro-batches; nothing of it overlaps."""
        tp, work = self.sizes.tp, self.load.work
        if tp == 1:
            return Moved()
        # Experts are not cut, and rows go to them as they are: only attention gathers.
        blocks = 2 if self.model.experts is None else 1
        per_layer = 2 * blocks * self._passes + blocks
        rows = self._gather(work.rows, tp).times(per_layer * self._layers)
        return rows + self._gather(work.target_rows, tp).times(3)

    def context(self) -> Moved:
        """Of all micro-batches; a ring's step overlaps with the attention of the step before."""
        cp, config = self.sizes.cp, self.model.config
        if cp == 1:
            return Moved()
        row = 2 * config.groups * config.channels / self.sizes.tp * self.settings.element
        messages = (self._passes + 1) * self._layers
        link = self.cluster.link(self.sizes.tp * cp)
        num_bytes = self.load.keys_that_travel(cp) * row * (cp - 1) / cp * messages
        steps = (cp - 1) * messages * self.load.microbatches
        return Moved(num_bytes, num_bytes / link.bandwidth + steps * link.latency)

    def pipeline(self) -> Moved:
        """Of all micro-batches on one stage; interleaving overlaps it, 1F1B does not."""
        if self.sizes.pp == 1:
            return Moved()
        link = self.cluster.link(self.cluster.num_gpus)
        row = self.model.config.hidden_size * self.settings.element
        num_bytes = 2 * self.sizes.vpp * self.load.work.rows * row / self.sizes.row_ranks
        messages = 2 * self.sizes.vpp * self.load.microbatches
        return Moved(num_bytes, num_bytes / link.bandwidth + messages * link.latency)

    def expert(self) -> Moved:
        """Of all micro-batches; nothing of it overlaps."""
        ep, experts = self.sizes.ep, self.model.experts
        if experts is None or ep == 1:
            return Moved()
        rows = self.load.work.rows / self.sizes.row_ranks * experts.experts_per_token
        num_bytes = rows * self.model.config.hidden_size * self.settings.element
        link = self.cluster.link(ep)
        calls = 2 * self._passes * self._layers
        latency = (ep - 1) * link.latency * calls * (self.load.microbatches - 1)
        once = Moved(num_bytes * (ep - 1) / ep, link.all_to_all(num_bytes, ep))
        return once.times(calls) + Moved(0.0, latency)

    def gradients(self) -> Moved:
        """Once a step: gradients are reduced, which may overlap with the last backward, and weights gathered."""
        sizes, held = self.sizes, Parameters.of(self.model, self.sizes, True, self.sizes.pp == 1)
        total = self._reduced(held.dense, sizes.dp * sizes.cp, self.cluster.ring(sizes.stage_gpus, sizes.tp))
        if held.expert:
            ring = self.cluster.ring(sizes.stage_gpus, sizes.ep)
            total += self._reduced(held.expert, sizes.stage_gpus // sizes.ep, ring)
        return total

    def _reduced(self, parameters: float, ranks: int, link: Link) -> Moved:
        gradients = parameters * FP32
        # Without the distributed optimizer an all-reduce: gradients are gathered instead of weights.
        gathered = parameters * self.settings.element if self.settings.distributed_optimizer else gradients
        seconds = link.gather(gradients, ranks) + link.gather(gathered, ranks)
        return Moved((gradients + gathered) * (ranks - 1) / ranks, seconds)

    def _gather(self, rows: float, ranks: int) -> Moved:
        """An all-gather or reduce-scatter of hidden states over ``ranks`` neighbours, in every micro-batch."""
        num_bytes = rows / self.sizes.cp * self.model.config.hidden_size * self.settings.element
        link = self.cluster.link(ranks)
        seconds = link.gather(num_bytes, ranks) + (self.load.microbatches - 1) * (ranks - 1) * link.latency
        return Moved(num_bytes * (ranks - 1) / ranks, seconds)
