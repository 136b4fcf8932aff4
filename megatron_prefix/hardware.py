"""Speeds and sizes of accelerators, from their data sheets: what plans and utilisation (MFU) are measured against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as in the data sheet.
        flops: dense bf16 tensor-core FLOP/s (without sparsity).
        memory_bytes: of its own memory.
        memory_bandwidth: bytes/s of its own memory.
        link_bandwidth: bytes/s in one direction to the other devices of its node (NVLink; half of the data sheet's
            number, which counts both directions).
    """

    name: str
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float


_GB = 10**9

DEVICES = {
    device.name: device
    for device in (
        Device("A100-80GB", 312e12, 80 * _GB, 2039e9, 300e9),
        Device("H20", 148e12, 96 * _GB, 4000e9, 450e9),
        Device("H100", 989e12, 80 * _GB, 3350e9, 450e9),
        Device("H200", 989e12, 141 * _GB, 4800e9, 450e9),
        Device("H800", 989e12, 80 * _GB, 3350e9, 200e9),
        Device("B200", 2250e12, 180 * _GB, 8000e9, 900e9),
        Device("GB200", 2500e12, 186 * _GB, 8000e9, 900e9),
    )
}
"""By name. Sources: NVIDIA's data sheets of the SXM versions (A100 80GB 2022, H100 2023, H200 2024, Blackwell 2025)."""


def find_device(name: str) -> Device:
    """The device of a short name ("h100") or of what torch calls it ("NVIDIA H100 80GB HBM3").

    Raises:
        ValueError: not in `DEVICES`, which the message lists.
    """
    wanted = name.lower().replace("nvidia", "").replace("-", " ").split()
    for device in sorted(DEVICES.values(), key=lambda device: -len(device.name)):
        if device.name.lower() in wanted or wanted[:1] == [device.name.lower().partition("-")[0]]:
            return device
    raise ValueError(f"device {name!r} is not known; known are {', '.join(DEVICES)}")
