"""GPUs, how they are wired, and what collectives cost on them.

A message of n bytes takes latency + n / bandwidth; a ring over k ranks takes k - 1 such steps of n / k bytes for an
all-gather or a reduce-scatter, and twice that for an all-reduce; a rank sends a share of 1 / k of an all-to-all to
each other one (Thakur, Rabenseifner and Gropp, 2005, "Optimization of Collective Communication Operations in MPICH").
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.hardware import Device

LINK_LATENCY = 3e-6
"""Seconds of one message inside a node, its launch included: NCCL's small-message latency over NVLink."""

NETWORK_LATENCY = 1e-5
"""Seconds of one message between nodes: the same over InfiniBand."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of a link's bandwidth that large messages reach (bus bandwidth that nccl-tests report over the link's)."""


@dataclass(frozen=True)
class Cluster:
    """A number of equal nodes.

    Attributes:
        device: every GPU.
        num_gpus: of all nodes; whole nodes, or part of one.
        gpus_per_node: joined by NVLink (72 for GB200 NVL72).
        network_bandwidth: bytes/s of each GPU to other nodes, in one direction.
        memory_share: of a GPU's memory that tensors may take; the rest is for the CUDA context, NCCL, cuDNN and
            fragmentation.

    Raises:
        ValueError: a number that is not positive, a share above 1, or nodes that are not whole.
    """

    device: Device
    num_gpus: int
    gpus_per_node: int = 8
    network_bandwidth: float = 50e9
    memory_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpus_per_node", "network_bandwidth", "memory_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.memory_share > 1:
            raise ValueError(f"memory_share must be at most 1, got {self.memory_share}")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.num_gpus} GPUs are not whole nodes of {self.gpus_per_node}; take a multiple of "
                f"{self.gpus_per_node}, or other nodes"
            )

    @property
    def usable_memory(self) -> float:
        """Bytes of one GPU that tensors may take."""
        return self.device.memory_bytes * self.memory_share

    def link(self, span: int) -> Link:
        """Between ranks that all lie within ``span`` neighbouring ones: NVLink where that is inside a node."""
        if span <= self.gpus_per_node and self.gpus_per_node % span == 0:
            return Link(LINK_LATENCY, self.device.link_bandwidth * BANDWIDTH_EFFICIENCY)
        return Link(NETWORK_LATENCY, self.network_bandwidth * BANDWIDTH_EFFICIENCY)

    def ring(self, span: int, stride: int) -> Link:
        """Of a ring of every ``stride``-th rank among ``span`` neighbouring ones.

        Between nodes the ranks of one node share the ring's work, and the network of all of them.
        """
        link = self.link(span)
        if link.latency == LINK_LATENCY:
            return link
        members = max(1, self.gpus_per_node // stride)
        bandwidth = min(self.device.link_bandwidth, members * self.network_bandwidth)
        return Link(NETWORK_LATENCY, bandwidth * BANDWIDTH_EFFICIENCY)


@dataclass(frozen=True)
class Link:
    """What joins the ranks of a group.

    Attributes:
        latency: seconds of a message, whatever its size.
        bandwidth: bytes/s of one rank in one direction.
    """

    latency: float
    bandwidth: float

    def send(self, num_bytes: float) -> float:
        """Seconds of one message."""
        return self.latency + num_bytes / self.bandwidth

    def gather(self, num_bytes: float, ranks: int) -> float:
        """Seconds of a ring all-gather (or reduce-scatter) of ``num_bytes`` in all; 0 on one rank."""
        return (ranks - 1) * self.send(num_bytes / ranks)

    def all_to_all(self, num_bytes: float, ranks: int) -> float:
        """Seconds until each of the ranks has sent ``num_bytes``, its own share included; 0 on one rank."""
        return (ranks - 1) * self.send(num_bytes / ranks)
