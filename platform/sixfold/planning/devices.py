"""What a device can do, by its maker's data sheet, and what of that a training job may count on."""

from __future__ import annotations

from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # it ships no types

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator (or one rank's share of a CPU machine) and its links.

    Attributes:
        name: as the command spells it.
        memory_bytes: in all.
        reserved_bytes: of that, for the driver's context, communication libraries and fragments.
        peak_flops_per_s: dense bf16.
        memory_bytes_per_s: of its own memory.
        node_bytes_per_s: to another device of the node, one direction.
        network_bytes_per_s: to another node, one direction, this device's share.
        price_per_hour: of renting it, in US dollars; 0 where nobody is paid.
        precision: what ``auto`` resolves to; None where the machine decides.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    peak_flops_per_s: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    price_per_hour: float
    precision: str | None = "bf16"

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return self.memory_bytes - self.reserved_bytes


def _accelerator(
    name: str, *, gigabytes: int, peak: float, memory: float, node: float, network: float, price: float
) -> Device:
    total = gigabytes * 10**9
    return Device(
        name=name,
        memory_bytes=total,
        reserved_bytes=2 * _GIB + total // 20,
        peak_flops_per_s=peak,
        memory_bytes_per_s=memory,
        node_bytes_per_s=node,
        network_bytes_per_s=network,
        price_per_hour=price,
    )


ACCELERATORS = {
    "h200": _accelerator("h200", gigabytes=141, peak=989e12, memory=4.8e12, node=450e9, network=50e9, price=3.5),
    "h100": _accelerator("h100", gigabytes=80, peak=989e12, memory=3.35e12, node=450e9, network=50e9, price=2.5),
    "a100": _accelerator("a100", gigabytes=80, peak=312e12, memory=2.04e12, node=300e9, network=25e9, price=1.5),
}
"""SXM modules: NVLink 4 or 3 within a node, one 400 or 200 Gb/s port a device between nodes."""

DEVICE_NAMES = (*ACCELERATORS, "cpu")


def device_of(name: str, *, ranks_per_node: int) -> Device:
    """Return a device by name; ``cpu`` is a rank's share of this very machine."""
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    assert name == "cpu", name
    return Device(
        name="cpu",
        memory_bytes=psutil.virtual_memory().total // ranks_per_node,
        reserved_bytes=_GIB // 2,
        peak_flops_per_s=100e9,
        memory_bytes_per_s=10e9,
        node_bytes_per_s=2e9,
        network_bytes_per_s=1e9,
        price_per_hour=0.0,
        precision=None,
    )
