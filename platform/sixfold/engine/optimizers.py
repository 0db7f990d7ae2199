"""The update rules: AdamW for everything, or Muon for hidden matrices with AdamW for the rest.

State is made before the first update, so that checkpoints have all their keys from the start, and is named by parameter
and slot (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``), the same on every engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from sixfold.engine.config import AdamWConfig, AdamWSettings, MuonConfig, OptimizerConfig
from sixfold.engine.newton_schulz import newton_schulz
from sixfold.engine.sharding import own_part
from sixfold.models.network import ParameterTag

Slots = dict[str, dict[str, Tensor]]
"""Optimizer state: parameter name to slot name to tensor."""


class Updater(Protocol):
    """An optimizer whose state is addressed by parameter name."""

    def step(self, factor: float) -> None:
        """Update all parameters from their ``grad`` at ``factor`` times their peak rates."""
        ...

    def slots(self) -> Slots:
        """Return the live state tensors."""
        ...

    def set_updates(self, updates: int) -> None:
        """Tell how many updates were applied, for bias correction."""
        ...


def build_optimizer(
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    tags: Mapping[str, ParameterTag],
    *,
    dtype: torch.dtype = torch.float32,
) -> Updater:
    """Build the optimizer for named parameters (tensors or DTensors) and allocate its state.

    Args:
        config: the update rule.
        parameters: what it updates, by name.
        tags: how each parameter is to be treated.
        dtype: what the network computes in; Muon orthogonalises in it, as the iteration tolerates bf16.
    """
    if isinstance(config, AdamWConfig):
        return AdamW(config, config.lr, parameters, tags)
    matrices = {name: value for name, value in parameters.items() if tags[name].matrix}
    rest = {name: value for name, value in parameters.items() if not tags[name].matrix}
    return MuonWithAdamW(Muon(config, matrices, tags, dtype), AdamW(config.adamw, config.adamw.lr, rest, tags))


def parameter_groups(
    weight_decay: float, lr: float, parameters: Mapping[str, nn.Parameter], tags: Mapping[str, ParameterTag]
) -> list[dict[str, Any]]:
    """Group parameters by their tags' decay and rate scale; ``peak_lr`` of a group is what schedules multiply."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, value in parameters.items():
        groups[tags[name].weight_decay, tags[name].lr_scale].append(value)
    return [
        {
            "params": members,
            "peak_lr": lr * scale,
            "lr": lr * scale,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (decayed, scale), members in groups.items()
    ]


def torch_adamw(
    settings: AdamWSettings, lr: float, parameters: Mapping[str, nn.Parameter], tags: Mapping[str, ParameterTag]
) -> torch.optim.AdamW:
    """Return torch's fused AdamW over the tagged groups, without state."""
    groups = parameter_groups(settings.weight_decay, lr, parameters, tags)
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)


def allocate_adamw_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Make the state that AdamW would make at its first update, and return it."""
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
    optimizer.state[cast(nn.Parameter, parameter)] = state
    return state


class AdamW:
    """Decoupled weight decay Adam (Loshchilov and Hutter, 2019) over named parameters, fused."""

    def __init__(
        self,
        settings: AdamWSettings,
        lr: float,
        parameters: Mapping[str, nn.Parameter],
        tags: Mapping[str, ParameterTag],
    ) -> None:
        self._state: dict[str, dict[str, Tensor]] = {}
        self._optimizer: torch.optim.AdamW | None = None
        if parameters:
            self._optimizer = torch_adamw(settings, lr, parameters, tags)
            self._state = {name: allocate_adamw_state(self._optimizer, value) for name, value in parameters.items()}

    def step(self, factor: float) -> None:
        """Update all parameters."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        self._optimizer.step()

    def slots(self) -> Slots:
        """Return first and second moments by name."""
        return {
            name: {slot: value for slot, value in state.items() if slot != "step"}
            for name, state in self._state.items()
        }

    def set_updates(self, updates: int) -> None:
        """Set the count that bias correction uses."""
        for state in self._state.values():
            state["step"].fill_(updates)


class Muon:
    """Muon (Jordan et al., 2024): the Nesterov momentum of each hidden matrix, orthogonalised, is its update.

    The update of an ``[out, in]`` matrix is scaled by sqrt(max(1, out / in)): its effect on activations then does not
    depend on the aspect; weight decay is decoupled. Stacks ``[experts, out, in]`` are one matrix an expert. A sharded
    matrix is gathered, orthogonalised on every rank and cut again, except a stack sharded by expert, whose matrices are
    whole where they are.
    """

    def __init__(
        self,
        config: MuonConfig,
        parameters: Mapping[str, nn.Parameter],
        tags: Mapping[str, ParameterTag],
        dtype: torch.dtype,
    ) -> None:
        self._config, self._dtype = config, dtype
        self._parameters = parameters
        self._tags = tags
        self._momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all matrices; those of one shape are orthogonalised in one batch."""
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, value in self._parameters.items():
            if value.grad is None:
                continue
            matrices = _whole_matrices(self._nesterov(name, value.grad))
            if matrices.numel() > 0:
                by_shape[matrices.shape[-2:]].append((name, matrices))
        for members in by_shape.values():
            stacks = [matrices.reshape(-1, *matrices.shape[-2:]) for _, matrices in members]
            updates = newton_schulz(torch.cat(stacks).to(self._dtype), steps=self._config.newton_schulz_steps)
            for (name, matrices), update in zip(
                members, torch.split(updates, [len(stack) for stack in stacks]), strict=True
            ):
                self._apply(name, update.reshape(matrices.shape).to(matrices.dtype), factor)

    def slots(self) -> Slots:
        """Return the momentum buffers by name."""
        return {name: {"momentum_buffer": value} for name, value in self._momentum.items()}

    def set_updates(self, updates: int) -> None:
        """Muon has no bias correction."""

    def _nesterov(self, name: str, gradient: Tensor) -> Tensor:
        """m <- mu m + (1 - mu) g; the update looks ahead: (1 - mu) g + mu m."""
        momentum = self._momentum[name].lerp_(gradient, 1.0 - self._config.momentum)
        return gradient.lerp(momentum, self._config.momentum)

    def _apply(self, name: str, update: Tensor, factor: float) -> None:
        value, tag = self._parameters[name], self._tags[name]
        lr = factor * self._config.lr * tag.lr_scale
        local = value.to_local() if isinstance(value, DTensor) else value
        if tag.weight_decay and self._config.weight_decay:
            local.mul_(1.0 - lr * self._config.weight_decay)
        local.add_(_part_to_apply(update, value), alpha=-lr * aspect_scale(update.shape))


def aspect_scale(shape: torch.Size) -> float:
    """sqrt(max(1, out / in)) of ``[..., out, in]`` matrices: what Muon's update of them is multiplied by."""
    rows, columns = shape[-2:]
    return float(max(1.0, rows / columns) ** 0.5)


class MuonWithAdamW:
    """Muon and AdamW as one optimizer."""

    def __init__(self, matrices: Muon, rest: AdamW) -> None:
        self._parts: tuple[Updater, Updater] = (matrices, rest)

    def step(self, factor: float) -> None:
        """Update all parameters."""
        for part in self._parts:
            part.step(factor)

    def slots(self) -> Slots:
        """Return both parts' state."""
        return self._parts[0].slots() | self._parts[1].slots()

    def set_updates(self, updates: int) -> None:
        """Set the count that bias correction uses."""
        for part in self._parts:
            part.set_updates(updates)


def _sharded_by_expert(value: DTensor) -> bool:
    return value.ndim == 3 and not any(isinstance(p, Shard) and p.dim != 0 for p in value.placements)


def _whole_matrices(value: Tensor) -> Tensor:
    """Return this rank's matrices to orthogonalise: its own experts', or the gathered whole."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local() if _sharded_by_expert(value) else value.full_tensor()


def _part_to_apply(update: Tensor, parameter: Tensor) -> Tensor:
    """Cut what belongs to this rank's shard of ``parameter`` out of an update made by :func:`_whole_matrices`."""
    if not isinstance(parameter, DTensor) or _sharded_by_expert(parameter):
        return update
    return own_part(update, parameter)
