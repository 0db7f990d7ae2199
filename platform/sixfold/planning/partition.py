"""What a role keeps on a rank between steps, and what DDP and ZeRO send, by arithmetic on parameter shapes.

FSDP2's messages are seen on a fake process group instead: they depend on which networks a phase calls, and how often.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch

from sixfold.engine.config import (
    AdamWConfig,
    AdamWSettings,
    DDPConfig,
    DeepSpeedConfig,
    EngineConfig,
    FSDPConfig,
    OptimizerConfig,
)
from sixfold.engine.precision import compute_dtype
from sixfold.models.network import ParameterTag
from sixfold.planning.meter import Collective

ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``; it is allocated whole, however small the network."""
ZERO_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default ``stage3_max_reuse_distance``: a parameter needed again this soon stays gathered."""

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a network: its shape, and how it is trained."""

    shape: tuple[int, ...]
    tag: ParameterTag

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a rank keeps between steps.

    Attributes:
        parameters: fp32 masters.
        working: copies of them that forward uses, where it does not use the masters.
        gradients: summed until the update.
        optimizer: state of the update rule.
        average: moving averages.
        buckets: buffers of fixed size through which an engine sends; under ZeRO-3 also what it keeps gathered.
        on_host: of the above, what lies in the host's memory.
    """

    parameters: int = 0
    working: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    buckets: int = 0
    on_host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Held)})

    @property
    def on_device(self) -> int:
        """All that lies in the device's memory."""
        kept = self.parameters + self.working + self.gradients + self.optimizer + self.average + self.buckets
        return kept - self.on_host


def working_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """In what the parameters that forward uses are stored or gathered; DDP and ZeRO-1 leave casts to autocast."""
    if isinstance(engine, DDPConfig) or (isinstance(engine, DeepSpeedConfig) and engine.zero_stage == 1):
        return torch.float32
    return compute_dtype(engine.precision, device)


def held_by_rank(
    parameters: Iterable[Parameter],
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    world_size: int,
    averages: int,
    accumulates: bool,
    device: torch.device,
) -> Held:
    """What a trainable role keeps on rank 0, which has the largest shards.

    Under DDP gradients are summed outside the buckets until the last of several micro-batches.
    """
    shapes = list(parameters)
    slots = [(value, _slots(optimizer, value.tag)) for value in shapes]
    if isinstance(engine, FSDPConfig):
        shards = world_size // engine.replicate
        shard = sum(_FP32 * shard_elements(value.shape, shards) for value in shapes)
        state = sum(_FP32 * count * shard_elements(value.shape, shards) for value, count in slots)
        return Held(parameters=shard, gradients=shard, optimizer=state, average=averages * shard)
    elements = sum(value.elements for value in shapes)
    state = sum(_FP32 * count * value.elements for value, count in slots)
    if isinstance(engine, DDPConfig):
        whole = _FP32 * elements
        gradients = 2 * whole if accumulates else whole
        return Held(parameters=whole, gradients=gradients, optimizer=state, average=averages * whole)
    return _held_by_zero(elements, state, engine, world_size=world_size, averages=averages, device=device)


def shard_elements(shape: tuple[int, ...], shards: int) -> int:
    """Elements of FSDP2's first shard: rows, or an expert stack's matrices' rows where the experts do not divide."""
    uneven_stack = len(shape) == 3 and shape[0] % shards != 0 and shape[1] % shards == 0
    axis = 1 if uneven_stack else 0
    return math.prod(shape) // shape[axis] * -(-shape[axis] // shards)


def _held_by_zero(
    elements: int, state: int, engine: DeepSpeedConfig, *, world_size: int, averages: int, device: torch.device
) -> Held:
    part = -(-elements // world_size)
    stored = working_dtype(engine, device).itemsize
    stage = engine.zero_stage
    buckets = 2 if device.type == "cuda" and stage < 3 else 1  # overlapping fills one while the other is sent
    bucket_dtype = torch.float32.itemsize if stage != 2 else stored
    held = Held(
        parameters=_FP32 * part,
        working=stored * (elements if stage < 3 else part),
        gradients=_FP32 * (elements if stage == 1 else part),
        optimizer=state // world_size,
        average=averages * _FP32 * part,
        buckets=buckets * ZERO_BUCKET_ELEMENTS * bucket_dtype
        + (stored * min(elements, ZERO_REUSE_ELEMENTS) if stage == 3 else 0),
    )
    if not engine.offload_optimizer:
        return held
    moved = held.parameters + held.optimizer + held.average + (held.gradients if stage > 1 else 0)
    return held + Held(on_host=moved)


def sent_by_replica(
    parameters: Iterable[Parameter], engine: EngineConfig, *, world_size: int, device: torch.device, micro_batches: int
) -> Counter[Collective]:
    """Messages of one step in which a role under DDP or ZeRO is called once a micro-batch, and updated."""
    shapes = list(parameters)
    elements, ranks = sum(value.elements for value in shapes), tuple(range(world_size))
    sent: Counter[Collective] = Counter()
    if world_size == 1:
        return sent

    def send(kind: str, message_elements: int, itemsize: int, times: int) -> None:
        sent[Collective(kind=kind, ranks=ranks, message_bytes=message_elements * itemsize)] += times

    if isinstance(engine, DDPConfig):
        send("all_reduce", elements, _FP32, 1)
        return sent
    assert isinstance(engine, DeepSpeedConfig), "FSDP2's messages are seen, not computed"
    stored = working_dtype(engine, device).itemsize
    if engine.zero_stage < 3:
        send("all_reduce", elements, _FP32, micro_batches if engine.zero_stage == 2 else 1)
        for group in _optimizer_groups(shapes).values():
            send("all_gather", _padded(group, 2 * world_size), stored, 1)
        return sent
    padded = sum(_padded(value.elements, world_size) for value in shapes)
    again = max(0, padded - ZERO_REUSE_ELEMENTS // 2)  # the last layers stay gathered between forward and backward
    send("all_gather", padded + again, stored, micro_batches)
    send("reduce_scatter", padded, _FP32, micro_batches)
    return sent


def gathered_whole(shapes: Iterable[Parameter], *, world_size: int) -> Counter[Collective]:
    """Messages by which ZeRO makes parameters whole on every rank, in fp32: for Muon, and for networks that track."""
    ranks = tuple(range(world_size))
    messages = (
        Collective(kind="all_reduce", ranks=ranks, message_bytes=value.elements * _FP32)
        for value in (shapes if world_size > 1 else ())
    )
    return Counter(messages)


def _optimizer_groups(parameters: Iterable[Parameter]) -> Mapping[tuple[bool, float], int]:
    """Elements by optimizer group, each of which is one flat buffer."""
    groups: Counter[tuple[bool, float]] = Counter()
    for value in parameters:
        groups[value.tag.weight_decay, value.tag.lr_scale] += value.elements
    return groups


def _slots(optimizer: OptimizerConfig, tag: ParameterTag) -> int:
    """State tensors of a parameter's size: two moments under AdamW, one momentum for a matrix under Muon."""
    return 2 if isinstance(optimizer, AdamWConfig | AdamWSettings) or not tag.matrix else 1


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
