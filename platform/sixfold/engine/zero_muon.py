"""Muon with AdamW over the flat fp32 partitions that ZeRO gives to the optimizer it drives.

Momentum is a matter of elements, so that every rank keeps it for what it holds. Orthogonalisation needs whole matrices:
they are gathered from all ranks' fragments a few at a time, orthogonalised on every rank, and each rank applies what
belongs to its fragments, as for matrices that FSDP shards inside.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sixfold.engine.config import MuonConfig
from sixfold.engine.newton_schulz import newton_schulz
from sixfold.engine.optimizers import aspect_scale, parameter_groups, torch_adamw
from sixfold.engine.zero_fragments import Fragment
from sixfold.models.network import ParameterTag

MOMENTUM = "momentum_buffer"
_MATRICES = "matrices"
_MOST_ELEMENTS_AT_ONCE = 1 << 26


class FlatMuonAndAdamW(torch.optim.Optimizer):
    """Muon for groups of hidden matrices, AdamW for the others; DeepSpeed puts one flat partition into each group.

    Every rank must step the same groups in the same order, as DeepSpeed does: an update of matrices is a collective.
    """

    def __init__(
        self, config: MuonConfig, parameters: Mapping[str, nn.Parameter], tags: Mapping[str, ParameterTag]
    ) -> None:
        matrices = {name: value for name, value in parameters.items() if tags[name].matrix}
        rest = {name: value for name, value in parameters.items() if not tags[name].matrix}
        self._config = config
        self._adamw = torch_adamw(config.adamw, config.adamw.lr, rest, tags)
        self._fragments: dict[int, list[Fragment]] = {}
        groups = parameter_groups(config.weight_decay, config.lr, matrices, tags)
        super().__init__([*self._adamw.param_groups, *({**group, _MATRICES: True} for group in groups)], {})

    def place(self, partitions: Sequence[Tensor], fragments: Mapping[str, Fragment]) -> None:
        """Say where in the flat partitions the fragments of parameters lie."""
        for fragment in fragments.values():
            self._fragments.setdefault(id(partitions[fragment.partition]), []).append(fragment)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Update the partitions that the groups hold now from their ``grad``."""
        assert closure is None
        for group in self.param_groups:
            if _MATRICES in group:
                for partition in group["params"]:
                    self._update_matrices(partition, group["lr"], group["weight_decay"])
        self._adamw.param_groups = [group for group in self.param_groups if _MATRICES not in group]
        self._adamw.state = self.state
        if self._adamw.param_groups:
            self._adamw.step()

    def _update_matrices(self, partition: Tensor, lr: float, weight_decay: float) -> None:
        gradient, momentum = partition.grad, self.state[cast(nn.Parameter, partition)][MOMENTUM]
        assert gradient is not None, "ZeRO sets the gradient of a partition before it has it updated"
        momentum.lerp_(gradient, 1.0 - self._config.momentum)
        ahead = gradient.lerp(momentum, self._config.momentum)
        if weight_decay:
            partition.mul_(1.0 - lr * weight_decay)
        for batch in _batches(self._fragments[id(partition)]):
            whole = torch.stack([fragment.gather(fragment.held_of(ahead)) for fragment in batch])
            matrices = whole.reshape(-1, *whole.shape[-2:])
            updates = newton_schulz(matrices, steps=self._config.newton_schulz_steps).reshape(whole.shape)
            for fragment, update in zip(batch, updates, strict=True):
                own = fragment.cut(update).to(partition.device)
                fragment.held_of(partition).add_(own, alpha=-lr * aspect_scale(update.shape))


def allocate_momentum(optimizer: torch.optim.Optimizer, partition: Tensor) -> None:
    """Make the state of a partition of matrices before the first update."""
    optimizer.state[cast(nn.Parameter, partition)] = {MOMENTUM: torch.zeros_like(partition)}


def holds_matrices(group: Mapping[str, Any]) -> bool:
    """Whether a group of :class:`FlatMuonAndAdamW` is orthogonalised."""
    return _MATRICES in group


def _batches(fragments: Sequence[Fragment]) -> Iterator[Sequence[Fragment]]:
    """Fragments of parameters of one shape, as many as may be whole at a time; the same batches on all ranks."""
    by_shape: dict[torch.Size, list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        by_shape[fragment.shape].append(fragment)
    for shape, members in by_shape.items():
        size = max(1, _MOST_ELEMENTS_AT_ONCE // math.prod(shape))
        yield from (members[start : start + size] for start in range(0, len(members), size))
