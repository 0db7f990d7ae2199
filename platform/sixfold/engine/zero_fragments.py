"""The fp32 masters and slots that one rank holds under ZeRO, seen as fragments of named parameters.

Stages 1 and 2 cut one flat buffer of all parameters into equal parts: a rank holds some parameters whole, some partly,
some not at all. Stage 3 cuts every parameter into equal parts, the last of them padded. Both become: elements ``start``
to ``start + numel`` of the flattened parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter.

    Attributes:
        shape: the whole parameter's shape.
        start: first held element of the flattened parameter.
        numel: how many are held, possibly none.
        partition: which of :func:`partitions` holds them.
        offset: where in it they begin.
    """

    zero: Any
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    numel: int
    partition: int
    offset: int

    def read(self, slot: str | None = None) -> Tensor:
        """Return the held fp32 elements of the master, or of an optimizer slot, ``[numel]``."""
        if hasattr(self.parameter, "ds_id"):
            held: Tensor = self.zero.get_local_fp32_param(self.parameter, slot)
            return held.detach()[: self.numel]
        mapping = self.parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's mark on its parameters
        if mapping is None:
            return torch.empty(0, device=self.parameter.device)
        fragment: Tensor = mapping.get_hp_fragment(slot)
        return fragment.detach()

    def write(self, held: Tensor, slot: str | None = None) -> None:
        """Write the held elements ``[numel]`` of the master, or of an optimizer slot."""
        if hasattr(self.parameter, "ds_id"):
            partition = self.parameter.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed's mark on its parameters
            padded = torch.zeros(partition.numel(), dtype=torch.float32, device=held.device)
            padded[: self.numel].copy_(held)
            self.zero.set_local_hp_param(padded, self.parameter, slot)
        elif self.numel > 0:
            self.read(slot).copy_(held)

    def held_of(self, flat: Tensor) -> Tensor:
        """Return the held elements ``[numel]`` of a tensor laid out like the partition, as a view."""
        return flat.narrow(0, self.offset, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """Return what this rank holds of a whole parameter."""
        return whole.reshape(-1)[self.start : self.start + self.numel]

    def gather(self, held: Tensor) -> Tensor:
        """Join all ranks' fragments to the whole fp32 parameter on the parameter's device; a collective."""
        whole = torch.zeros(math.prod(self.shape), dtype=torch.float32, device=self.parameter.device)
        whole[self.start : self.start + self.numel].copy_(held)
        if dist.get_world_size() > 1:
            dist.all_reduce(whole)
        return whole.reshape(self.shape)


def partitions(zero: Any) -> list[Tensor]:
    """Return the flat fp32 partitions that the optimizer updates: one a group of parameters, or a part of one."""
    flat: list[Tensor] = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    return flat


def group_of(zero: Any, partition: int) -> dict[str, Any]:
    """Return the optimizer's group that a partition belongs to."""
    number = zero.sub_group_to_group_id[partition] if hasattr(zero, "sub_group_to_group_id") else partition
    group: dict[str, Any] = zero.optimizer.param_groups[number]
    return group


def fragments(zero: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Fragment]:
    """Return this rank's fragment of every parameter."""
    return {name: _fragment(zero, value) for name, value in parameters.items()}


def _fragment(zero: Any, parameter: Any) -> Fragment:
    if hasattr(parameter, "ds_id"):
        part = parameter.ds_tensor.numel()
        start = min(part * dist.get_rank(), parameter.ds_numel)
        numel = min(part, parameter.ds_numel - start)
        partition, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        return Fragment(zero, parameter, torch.Size(parameter.ds_shape), start, numel, partition, offset)
    partition = next(i for i, group in enumerate(zero.bit16_groups) if any(one is parameter for one in group))
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(zero, parameter, parameter.shape, 0, 0, partition, 0)
    held, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
    return Fragment(zero, parameter, parameter.shape, held.start, held.numel, partition, offset)
