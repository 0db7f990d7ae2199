"""From a state to CPU copies of what this rank is to write: plan once, then copy into buffers that are reused.

Which rank writes which shard follows from names, shapes and placements alone. It is therefore agreed once and reused
for as long as no rank's state changes its layout; a later save exchanges a single bit. Planning before copying means
that of a replicated tensor (DDP, HSDP) a rank copies only what it is going to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from sixfold.checkpoint.ranks import Ranks

FlatState = dict[str, Tensor]
"""All roles' states in one: ``roles/<role>/<name>`` to tensor or DTensor."""

PrepareGlobalPlan = Callable[[list[SavePlan]], list[SavePlan]]


def flatten_roles(states: Mapping[str, Mapping[str, Tensor]]) -> FlatState:
    """Return the flat state of a checkpoint; DCP knows its tensors by these names."""
    return {f"roles/{role}/{name}": value for role, state in states.items() for name, value in state.items()}


@dataclass(frozen=True)
class WritePlan:
    """Who writes what.

    Attributes:
        share: what this rank writes; an item's index carries the tensor's name.
        metadata: on rank 0, shapes and chunks of every tensor.
    """

    share: SavePlan
    metadata: Metadata | None


class Planning:
    """Agrees on who writes what, and remembers it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._local: list[WriteItem] | None = None
        self._agreed: WritePlan | None = None

    def plan(self, state: FlatState, prepare: PrepareGlobalPlan) -> WritePlan:
        """Return this rank's share (a collective); ``prepare`` is the storage writer's part in it, called on rank 0.

        Raises:
            ValueError: the ranks' shards leave a hole in a tensor or contradict each other; an engine is wrong.
        """
        local = [item for name, value in state.items() for item in _write_items(name, value)]
        changed = self._agreed is None or local != self._local
        if self._ranks.any(changed) or self._agreed is None:
            self._agreed, self._local = self._agree(local, prepare), local
        return self._agreed

    def _agree(self, local: list[WriteItem], prepare: PrepareGlobalPlan) -> WritePlan:
        gathered = self._ranks.gather(SavePlan(items=local))
        shares: Sequence[SavePlan | ValueError] = []
        metadata: Metadata | None = None
        if gathered:
            try:
                # Of equal shards on several ranks DCP keeps one, on the rank that has the least to write so far.
                plans, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(gathered)
                shares = prepare(plans)
            except ValueError as error:  # the other ranks wait for an answer, whatever it is
                shares = [error] * self._ranks.size
        share = self._ranks.scatter(list(shares))
        if isinstance(share, ValueError):
            raise share
        return WritePlan(share, metadata)


def _write_items(name: str, value: Tensor) -> list[WriteItem]:
    """Return what this rank holds of a tensor: its shard, the whole, or (an uneven shard) nothing."""
    if isinstance(value, DTensor):
        in_mesh = value.device_mesh.get_coordinate() is not None
        chunks = value.__create_chunk_list__() if in_mesh else []  # type: ignore[no-untyped-call]  # DCP's protocol
    else:
        chunks = [ChunkStorageMetadata(offsets=torch.Size([0] * value.ndim), sizes=value.shape)]
    properties = TensorProperties(dtype=value.dtype)
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=value.shape),
        )
        for chunk in chunks
        if chunk.sizes.numel() > 0 or value.numel() == 0
    ]


class StagingBuffers:
    """CPU copies of a state, isolated from what training does to it next; allocated once (pinned for a GPU)."""

    def __init__(self) -> None:
        self._buffers: FlatState = {}

    def stage(self, state: FlatState, share: SavePlan) -> FlatState:
        """Copy this rank's share of ``state``; the result is overwritten by the next call."""
        names = {item.index.fqn for item in share.items}
        devices: set[torch.device] = set()
        for name in names:
            value = state[name]
            source = (value.to_local() if isinstance(value, DTensor) else value).detach()
            self._buffer(name, source).copy_(source, non_blocking=True)
            devices.add(source.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._buffers = {name: self._buffers[name] for name in names}
        return self._buffers

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.shape != source.shape or held.dtype != source.dtype:
            held = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)
            self._buffers[name] = held
        return held
