"""An objective with every kind of role at once, on a small network, through the real step: what role tests train.

``encoder`` and ``head`` train in one phase by one backward pass; ``critic`` trains in a phase of its own, every other
step, and is called as a frozen network in the first; ``teacher`` is frozen; ``target`` tracks ``head``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine_cases import this_world
from parity_matrix import Trajectory
from sixfold.config.base import Component
from sixfold.engine.base import NetworkSpecification
from sixfold.engine.build import build_engine
from sixfold.engine.companion import Companion
from sixfold.engine.config import AdamWConfig, ConstantScheduleConfig, EngineConfig
from sixfold.models.network import Linear, Network, normal
from sixfold.objectives.contract import Batch, LossTerms, Phase, Progress, Role
from sixfold.train.loop import StepRecord, Training, train_step
from sixfold.train.roles import names_of, tracked_roles

GLOBAL_BATCH, WIDTH, DECAY = 16, 6, 0.5


class PerceptronConfig(Component):
    implementation: ClassVar[str] = "role_cases:Perceptron"
    depth: int = 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(WIDTH, WIDTH, tag=normal(WIDTH**-0.5), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Perceptron(Network):
    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(config.depth))
        self.last = Linear(WIDTH, WIDTH, tag=normal(WIDTH**-0.5), bias=True)  # in no block: sharded with the root

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.layers

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class EveryRole:
    roles: ClassVar = {
        "encoder": Role(kind="trainable", network="net"),
        "head": Role(kind="trainable", network="net"),
        "critic": Role(kind="trainable", network="net"),
        "teacher": Role(kind="frozen", network="net"),
        "target": Role(kind="tracking", network="net", follows="head", decay=DECAY),
    }

    def phases(self, progress: Progress) -> Sequence[Phase]:
        joint = Phase(name="main", trains=("encoder", "head"))
        return (joint, Phase(name="critic", trains=("critic",))) if progress.step % 2 else (joint,)

    def __call__(self, nets: Any, batch: Batch, phase: Phase, random: Any) -> LossTerms:
        x = batch["x"]
        count = torch.tensor(float(len(x)))
        drawn = nets["head"](nets["encoder"](x)).float()
        if phase.name == "critic":
            return LossTerms((nets["critic"](drawn.detach()).float() - x).square().sum(), count)
        with torch.no_grad():
            target = nets["target"](nets["encoder"](x)).float()
        taught = nets["teacher"](drawn).float()  # the gradient passes through the frozen network
        loss = (taught - x.flip(1)).square().sum() + 0.1 * (drawn - target).square().sum()
        return LossTerms(loss + 0.3 * nets["critic"](drawn).float().square().sum(), count)

    def after_step(self, nets: Any, statistics: Any, progress: Progress) -> None:
        """Nothing."""


def batches(rank: int, size: int) -> Iterator[Batch]:
    step = 0
    while True:
        x = torch.randn(GLOBAL_BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
        share = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
        yield Batch({"x": x[share]}, torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)[share])
        step += 1


def assemble_roles(config: EngineConfig, accumulation: int = 1) -> Training:
    world, objective = this_world(), EveryRole()
    engines = {
        role: build_engine(
            config,
            AdamWConfig(lr=1e-2),
            ConstantScheduleConfig(warmup_steps=2),
            network_config=PerceptronConfig(),
            role=role,
            seed=3,
            total_steps=20,
            average=None,
            world=world,
        )
        for role in names_of(objective, "trainable")
    }
    companions = {}
    for role in ("teacher", "target"):
        part = objective.roles[role]
        specification = NetworkSpecification(engine=config, network=PerceptronConfig(), role=role, seed=3, world=world)
        follows = engines[part.follows] if part.follows else None
        companions[role] = Companion(specification, follows=follows, decay=part.decay)
    return Training(
        objective=objective,
        engines=engines,
        companions=companions,
        tracked=tracked_roles(objective),
        stream=batches(world.rank, world.size),
        progress=Progress(samples=0, step=0, total_steps=20),
        device=torch.device("cpu"),
        seed=3,
        global_batch=GLOBAL_BATCH,
        micro_batch=dict.fromkeys(engines, GLOBAL_BATCH // world.size // accumulation),
        max_consecutive_skips=3,
    )


def advance(training: Training) -> StepRecord:
    record = train_step(training, next(training.stream))
    training.progress = record.progress
    return record


def weights(part: Any) -> dict[str, Tensor]:
    """Full parameters of an engine or a companion; a collective."""
    if isinstance(part, Companion):
        state = {k.removeprefix("parameters/"): v for k, v in part.checkpoint_state().items()}
        return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}
    return dict(part.full_parameters(averaged=False))


@dataclass(frozen=True)
class RolesTrace(Trajectory):
    """Losses and norms of every phase in order; every role's parameters at first, by step if alone, and at last."""

    parameters: list[dict[str, dict[str, Tensor]]]


def train_roles(config: EngineConfig, accumulation: int = 1, steps: int = 20) -> RolesTrace:
    """Train ``steps`` steps from scratch."""
    training = assemble_roles(config, accumulation)
    parts = {**training.engines, **training.companions}
    losses, norms = [], []
    held = [{role: weights(part) for role, part in parts.items()}]
    for step in range(steps):
        record = advance(training)
        losses += [value for name, value in record.metrics.items() if name.endswith("loss")]
        norms += [report.grad_norm for report in record.reports.values()]
        if this_world().size == 1 or step == steps - 1:  # gathering costs more than the step
            held.append({role: weights(part) for role, part in parts.items()})
    for companion in training.companions.values():
        companion.close()
    for engine in training.engines.values():
        engine.close()
    return RolesTrace(losses=losses, grad_norms=norms, parameters=held)
