"""From what a step costs to how long it takes, what a run takes, and what that costs; every assumption is a field.

Within a step, computing and sending overlap; the update comes after both. A message of a ring collective passes every
link once (gather, scatter) or twice (all-reduce), less a rank's own part. A group that spans nodes is bound by the
network ports of all its ranks on a node together, since each byte enters a node once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sixfold.planning.devices import Device
from sixfold.planning.meter import Collective
from sixfold.planning.partition import Held

_SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What an estimate takes for granted, to be replaced by measurements where there are any.

    Attributes:
        compute_efficiency: share of the device's peak that all computation together sustains.
        link_efficiency: share of a link's bandwidth that a collective sustains.
        overlap: share of the shorter of computing and sending that hides behind the longer.
        latency_s: of one message, per doubling of the group.
        host_bytes_per_s: between device and host, for what is offloaded.
    """

    compute_efficiency: float = 0.45
    link_efficiency: float = 0.75
    overlap: float = 0.8
    latency_s: float = 15e-6
    host_bytes_per_s: float = 20e9


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step and what follows for the run.

    Attributes:
        compute_s: forward, backward and recomputation.
        communication_s: all messages, one after another.
        update_s: optimizer and average, bound by memory (or by the link to the host).
        step_s: all together, overlapped.
        mfu: model FLOPs utilisation: what the model needs over what the devices could do meanwhile.
        days: of the whole run.
        device_hours: of the whole run.
        cost: of the whole run, in US dollars; None where the device has no price.
    """

    compute_s: float
    communication_s: float
    update_s: float
    step_s: float
    mfu: float
    days: float
    device_hours: float
    cost: float | None


def estimate(
    *,
    flops: float,
    model_flops: float,
    collectives: Mapping[Collective, float],
    held: Held,
    steps: int,
    ranks: int,
    ranks_per_node: int,
    device: Device,
    assumptions: Assumptions,
) -> Estimate:
    """Estimate a run of ``steps`` steps from what one step costs a rank."""
    compute = flops / (device.peak_flops_per_s * assumptions.compute_efficiency)
    communication = sum(
        times * seconds_of(message, ranks_per_node=ranks_per_node, device=device, assumptions=assumptions)
        for message, times in collectives.items()
    )
    update = _update_seconds(held, device, assumptions)
    hidden = assumptions.overlap * min(compute, communication)
    step = compute + communication - hidden + update
    hours = steps * step / 3600 * ranks
    return Estimate(
        compute_s=compute,
        communication_s=communication,
        update_s=update,
        step_s=step,
        mfu=model_flops / (step * device.peak_flops_per_s),
        days=steps * step / _SECONDS_PER_DAY,
        device_hours=hours,
        cost=hours * device.price_per_hour if device.price_per_hour else None,
    )


def seconds_of(message: Collective, *, ranks_per_node: int, device: Device, assumptions: Assumptions) -> float:
    """Seconds of one message."""
    group = len(message.ranks)
    if group <= 1:
        return 0.0
    nodes = {rank // ranks_per_node for rank in message.ranks}
    bandwidth = device.node_bytes_per_s
    if len(nodes) > 1:
        bandwidth = min(bandwidth, device.network_bytes_per_s * -(-group // len(nodes)))
    passes = 2 if message.kind == "all_reduce" else 1
    travelling = passes * message.message_bytes * (group - 1) / group
    latency = passes * assumptions.latency_s * math.log2(group)
    return travelling / (bandwidth * assumptions.link_efficiency) + latency


def _update_seconds(held: Held, device: Device, assumptions: Assumptions) -> float:
    """State is read and written, gradients are read; what lies on the host is updated there, at the link's pace."""
    moved = 2 * (held.parameters + held.working + held.optimizer + held.average) + held.gradients
    if held.on_host:
        return moved / assumptions.host_bytes_per_s
    return moved / device.memory_bytes_per_s
