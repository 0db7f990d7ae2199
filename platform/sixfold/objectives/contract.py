"""What an objective is: roles, phases, and a callable that turns networks and a batch into summed loss terms.

An objective never owns an optimizer, a device or a rank. Losses are *local sums with counts*; the engine divides once
per optimizer step by the count summed over all micro-batches and ranks, so that accumulation, packing and world size
cannot change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.distributed.randomness import PositionRandom


@dataclass(frozen=True)
class Batch:
    """Samples at known positions of the global order.

    Attributes:
        fields: tensors with the sample as first dimension. Names are fixed across the platform: ``image``
            ``[n, channels, height, width]`` fp32 in [-1, 1]; ``label`` ``[n]`` int64; ``tokens``
            ``[n, length + 1]`` int64 (inputs and their successors); ``documents``
            ``[n, length + 1]`` int64, a document number for each token;
            ``token_bytes`` ``[n, length + 1]`` int64, how many bytes of the source each token stands for.
        positions: ``[n]`` int64, the samples' positions in the order of consumption: all randomness is keyed by them.
    """

    fields: Mapping[str, Tensor]
    positions: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device`` (asynchronously from pinned memory)."""
        move = {name: value.to(device, non_blocking=True) for name, value in self.fields.items()}
        return Batch(move, self.positions.to(device, non_blocking=True))

    def split(self, micro_batch: int) -> Iterator[Batch]:
        """Yield consecutive micro-batches of at most ``micro_batch`` samples."""
        for start in range(0, len(self), micro_batch):
            part = slice(start, start + micro_batch)
            yield Batch({name: value[part] for name, value in self.fields.items()}, self.positions[part])


@dataclass(frozen=True, kw_only=True)
class Role:
    """One network's part in an objective.

    Attributes:
        kind: ``trainable`` has an optimizer; ``frozen`` never changes; ``tracking`` averages another role over time.
            Gradients pass through frozen and tracking networks to their inputs, never into them.
        network: the name in the recipe's ``networks`` that builds it. Roles may share one; each has weights of its own.
        follows: for ``tracking``, the trainable role that it averages, and starts equal to.
        decay: for ``tracking``, the decay of the average per update of that role.
        starts_from: for ``trainable``, the role whose initial weights it takes over wherever names and shapes agree.
    """

    kind: Literal["trainable", "frozen", "tracking"]
    network: str
    follows: str | None = None
    decay: float | None = None
    starts_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One pass over the batch that trains one role, or several by one backward pass.

    Networks of other roles are frozen meanwhile: gradients pass through them to their inputs alone.
    ``Phase(name="generator", trains=("generator",))``; the phase called ``main`` logs its metrics without a prefix.
    ``done`` is the fraction of training that is over, for losses that change on the way.
    """

    name: str
    trains: tuple[str, ...]
    done: float = 0.0


@dataclass(frozen=True)
class Sum:
    """A metric as a local sum and the count it is to be divided by.

    Attributes:
        total: 0-dimensional; of any shape where ``conclude`` turns it into a number (a histogram, moments of features).
        count: 0-dimensional.
        conclude: what the metric is as a function of total and count over all batches and ranks, both fp64 on the CPU;
            None for total / count.
    """

    total: Tensor
    count: Tensor
    conclude: Callable[[Tensor, Tensor], float] | None = None

    def __add__(self, other: Sum) -> Sum:
        return self.holding(self.total + other.total, self.count + other.count)

    def holding(self, total: Tensor, count: Tensor) -> Sum:
        """The same metric of other sums."""
        return replace(self, total=total, count=count)

    def nothing(self) -> Sum:
        """The sum that changes no other."""
        return self.holding(torch.zeros_like(self.total), torch.zeros_like(self.count))

    def widened(self) -> Sum:
        """The same in fp64, in which long sums stay exact enough."""
        return self.holding(self.total.double(), self.count.double())


def add_sums(totals: dict[str, Sum], more: Mapping[str, Sum]) -> None:
    """Add metrics to running totals, in fp64."""
    for name, value in more.items():
        wide = value.widened()
        totals[name] = totals[name] + wide if name in totals else wide


def means_of(sums: Mapping[str, Sum]) -> dict[str, float]:
    """Return each metric's mean, or what it concludes; a metric that nothing counted towards has none, and is left out.

    All means reach the host in one copy: a copy each would hold up an accelerator several times a step.
    """
    concluded = {
        name: value.conclude(value.total.double().cpu(), value.count.double().cpu())
        for name, value in sums.items()
        if value.conclude is not None and value.count != 0
    }
    plain = {name: value.widened() for name, value in sums.items() if value.conclude is None}
    if not plain:
        return concluded
    pairs = torch.stack([torch.stack([value.total, value.count]) for value in plain.values()], dim=1)
    totals, counts = pairs.tolist()
    means = {name: total / count for name, total, count in zip(plain, totals, counts, strict=True) if count != 0}
    return {name: means[name] if name in means else concluded[name] for name in sums if name in means | concluded}


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns for one micro-batch, all of it local to the rank.

    Attributes:
        loss: the summed loss, 0-dimensional, with gradient. Never a mean.
        count: how many terms were summed (samples, or predicted tokens), 0-dimensional, no gradient.
        metrics: further sums for logging, detached; ``loss`` itself is logged without being named here.
        statistics: detached tensors that are summed over micro-batches and ranks and handed to ``after_step``
            (routed tokens per expert, codebook use).
    """

    loss: Float[Tensor, ""]
    count: Tensor
    metrics: Mapping[str, Sum] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training is: ``samples`` consumed is the unit, ``step`` counts optimizer steps up to ``total_steps``."""

    samples: int
    step: int
    total_steps: int

    @property
    def done(self) -> float:
        """The fraction of training that is over, in [0, 1)."""
        return self.step / self.total_steps


Networks = Mapping[str, nn.Module]
"""Networks by role, as wrapped by their engines: call these, never inner modules, or gradients go unsynchronised."""


class Objective(Protocol):
    """The contract of ``objectives/``: constructed as ``implementation(config, networks_config)``.

    ``networks_config`` is a :data:`~sixfold.models.trained.network.NetworksConfig`.
    """

    roles: Mapping[str, Role]

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """Which roles train at this step, in order; ratios between roles live here. A function of progress alone."""
        ...

    def __call__(self, nets: Networks, batch: Batch, phase: Phase, random: PositionRandom) -> LossTerms:
        """Return the summed loss terms of one micro-batch in one phase."""
        ...

    def evaluate(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Held-out measures of one batch (``loss`` and others) under the same definition, without gradient.

        Draws that training makes at random are stratified over ``batch.positions`` here, so that the measure is nearly
        noise-free.
        """
        ...

    def after_step(self, nets: Networks, statistics: Mapping[str, Tensor], progress: Progress) -> None:
        """Update what no gradient trains (expert bias, codebooks) from statistics summed over the global batch.

        Here ``nets`` are the *bare* networks: methods and buffers may be reached, forward may not be called.
        """
        ...
