"""One training step of a recipe at full size and world size, on fake tensors, metered.

Every distinct phase runs its forward and backward once as rank 0 of a process group that does not exist: FSDP2 as it
is, DDP and ZeRO by a network that stands for theirs. What repeats (micro-batches, phases over the steps of a cycle) is
multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule

from sixfold.distributed.fake import fake_world
from sixfold.distributed.process_group import World
from sixfold.distributed.randomness import PositionRandom
from sixfold.engine.averaging import kinds_of
from sixfold.engine.base import NetworkSpecification, RoleSpecification
from sixfold.engine.config import ConstantScheduleConfig, DeepSpeedConfig, EngineConfig, FSDPConfig, MuonConfig
from sixfold.engine.fsdp import FSDPEngine, forget_gathered
from sixfold.engine.rehearsal import untrained_network
from sixfold.engine.sharding import local_tensors
from sixfold.models.kernels import kernels_of
from sixfold.models.network import Network, parameter_tags
from sixfold.models.trained.network import NetworksConfig
from sixfold.objectives.contract import Batch, LossTerms, Objective, Phase, Progress
from sixfold.planning.meter import Collective, Counts, StepMeter, Use
from sixfold.planning.partition import Held, Parameter, gathered_whole, held_by_rank, sent_by_replica
from sixfold.planning.replica import Replica
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.rehearsal import batch_fields
from sixfold.train.roles import names_of, served_by, settings_of, tracked_roles

_CYCLE_STEPS = 60
"""Steps over which phases are counted: a multiple of the ratios between roles that recipes use."""


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """What one step costs a rank, on average over a cycle of phases.

    Attributes:
        most: by use, the most memory that a phase's own tensors held at once.
        at_peak: by use, what they held when all together held most.
        besides_gradients: by other uses, what they held when these together held most.
        flops: floating-point operations that are carried out, recomputation included.
        collectives: messages, with how many there are a step.
        held: what the trainable roles keep between steps.
        companion_bytes: what frozen and tracking networks keep.
        shapes: the trainable networks' parameters, by role.
        micro_batch: samples that the fullest phase computes at once.
    """

    most: Mapping[Use, int]
    at_peak: Mapping[Use, int]
    besides_gradients: Mapping[Use, int]
    flops: float
    collectives: Mapping[Collective, float]
    held: Held
    companion_bytes: int
    shapes: Mapping[str, Sequence[Parameter]]
    micro_batch: int

    @property
    def parameters(self) -> dict[str, int]:
        """Elements of the trainable networks, by role."""
        return {role: sum(value.elements for value in shapes) for role, shapes in self.shapes.items()}


def trace_step(
    recipe: Recipe,
    world_size: int,
    *,
    device: torch.device | None = None,
    collectives: Mapping[Collective, float] | None = None,
) -> StepTrace:
    """Rehearse one step of ``recipe`` as rank 0 of ``world_size`` ranks; nothing may have joined a process group yet.

    Args:
        recipe: what trains.
        world_size: ranks to pretend.
        device: where the run would be, as far as buffers and attention's kernels depend on it; tensors are a CPU's.
        collectives: the step's messages, where an earlier trace has counted them already.

    Raises:
        RecipeError: the recipe does not fit that many ranks.
    """
    check_recipe(recipe, world_size)
    networks = resolve_networks(recipe, planning=True)
    objective: Objective = recipe.objective.load()(recipe.objective, networks)
    frequency = phases_of(objective, recipe.train.steps)
    kernels = kernels_of(device or torch.device("cpu"))
    with fake_world(world_size) as world, FakeTensorMode(allow_non_fake_inputs=True), kernels:
        cast = _Cast(recipe, objective, networks, world)
        traced = {phase: cast.trace(phase) for phase in frequency}
        readings = cast.meter.readings()
        kept = {role: shapes for role, shapes in cast.shapes.items() if isinstance(cast.engines[role], Replica)}
        in_buckets = held_by_roles(recipe, kept, world_size, device or world.device).gradients
        if collectives is None:
            collectives = add_up((times, cast.messages(phase, traced[phase])) for phase, times in frequency.items())
        return StepTrace(
            most=readings.most,
            at_peak={**readings.at_peak, "gradients": readings.at_peak["gradients"] + in_buckets},
            besides_gradients=readings.besides_gradients,
            flops=sum(times * cast.flops(phase, traced[phase]) for phase, times in frequency.items()),
            collectives=collectives,
            held=held_by_roles(recipe, cast.shapes, world_size, device or world.device),
            companion_bytes=cast.companion_bytes(),
            shapes=cast.shapes,
            micro_batch=max(micro_batch_of(recipe, phase.trains, world_size) for phase in frequency),
        )


def add_up(parts: Iterable[tuple[float, Mapping[Collective, float]]]) -> dict[Collective, float]:
    """Add messages of several parts of a step, each so many times."""
    total: dict[Collective, float] = {}
    for times, messages in parts:
        for message, count in messages.items():
            total[message] = total.get(message, 0.0) + count * times
    return total


def held_by_roles(
    recipe: Recipe, shapes: Mapping[str, Sequence[Parameter]], world_size: int, device: torch.device
) -> Held:
    """What the trainable roles keep on a rank between steps."""
    parts = (
        held_by_rank(
            parameters,
            recipe.engine_of(role),
            recipe.optimizer_of(role),
            world_size=world_size,
            averages=0 if recipe.train.ema is None else len(kinds_of(recipe.train.ema)),
            accumulates=micro_batch_of(recipe, (role,), world_size) < recipe.data.global_batch // world_size,
            device=device,
        )
        for role, parameters in shapes.items()
    )
    return sum(parts, start=Held())


def phases_of(objective: Objective, total_steps: int) -> dict[Phase, float]:
    """How often a step has each phase, late in training, when every term has begun.

    How far training is, is the same for all: phases that differ in nothing else cost the same, and are traced once.
    """
    cycle = range(max(0, total_steps - _CYCLE_STEPS), total_steps)
    progress = [Progress(samples=0, step=step, total_steps=total_steps) for step in cycle]
    counted = Counter(replace(phase, done=progress[-1].done) for now in progress for phase in objective.phases(now))
    return {phase: times / len(cycle) for phase, times in counted.items()}


def micro_batch_of(recipe: Recipe, roles: Iterable[str], world_size: int) -> int:
    """Samples that a rank computes at once in a phase that trains ``roles``."""
    rank_batch = recipe.data.global_batch // world_size
    return min(rank_batch, *(recipe.engine_of(role).micro_batch or rank_batch for role in roles))


class _Traced(NamedTuple):
    """A phase's micro-batches but the last, each; its last; its update; and the sums over ranks that end its step."""

    earlier: Counts
    last: Counts
    update: Counts
    summed: int


class _Cast:
    """Every role's network on fake tensors, as a rank would have it."""

    def __init__(self, recipe: Recipe, objective: Objective, networks: NetworksConfig, world: World) -> None:
        self._recipe, self._objective, self._networks, self._world = recipe, objective, networks, world
        self.engines = {role: self._engine(role) for role in names_of(objective, "trainable")}
        others = (*names_of(objective, "tracking"), *names_of(objective, "frozen"))
        self.companions = {
            role: untrained_network(self._specification(role, served_by(objective, role))) for role in others
        }
        self.shapes = {role: self._shapes(role) for role in self.engines}
        self.meter = StepMeter()  # one for all phases: what frozen networks gathered in one is there in the next

    def trace(self, phase: Phase) -> _Traced:
        """Run a phase's first and last micro-batch, and its update as far as that is more than a pass."""
        micro_batch, micro_batches = self._micro_batches(phase)
        began = self.meter.counts()
        with self.meter:
            with self._networks_in(phase) as networks:
                if micro_batches > 1:
                    self._compute(networks, phase, micro_batch, last=False)
                    self._keep_gradients(phase)
                before_last = self.meter.counts()
                terms = self._compute(networks, phase, micro_batch, last=True)
                summed = 2 * len(terms.metrics) + sum(value.numel() for value in terms.statistics.values())
                del terms
            self._keep_gradients(phase)
            computed = self.meter.counts()
            for role in phase.trains:
                self._finish(role)
        return _Traced(
            earlier=before_last.since(began),
            last=computed.since(before_last),
            update=self.meter.counts().since(computed),
            summed=summed,
        )

    def flops(self, phase: Phase, traced: _Traced) -> float:
        """Floating-point operations of all of a phase's micro-batches and its update."""
        _, micro_batches = self._micro_batches(phase)
        return traced.earlier.flops * (micro_batches - 1) + traced.last.flops + traced.update.flops

    def messages(self, phase: Phase, traced: _Traced) -> Mapping[Collective, float]:
        """Messages of all of a phase's micro-batches and its update, once every phase has been traced."""
        micro_batch, micro_batches = self._micro_batches(phase)
        computed = self._computed_again(phase, micro_batch, micro_batches) or [
            (micro_batches - 1, traced.earlier.collectives),
            (1, traced.last.collectives),
        ]
        of_the_step = self._of_the_step(phase, traced.summed, micro_batches)
        return add_up([*computed, (1, traced.update.collectives), (1, of_the_step)])

    def _computed_again(
        self, phase: Phase, samples: int, micro_batches: int
    ) -> Sequence[tuple[int, Mapping[Collective, float]]]:
        """Messages of a later step's micro-batches, and how many are alike; none where they are those of any step.

        What FSDP gathered of a network for a call without backward stays: of a frozen one for good, of one that tracks
        until its update, of one that another phase trains until this phase ends. All micro-batches but the first
        prefetch some of the one before, too.
        """
        others = list(self.companions.values())
        if micro_batches > 1:
            others += [engine.network for role, engine in self.engines.items() if role not in phase.trains]
        if not any(isinstance(network, FSDPModule) for network in others):
            return []
        for role in names_of(self._objective, "tracking"):
            forget_gathered(self.companions[role])
        kinds = {1: (1,), 2: (1, 1)}.get(micro_batches, (1, micro_batches - 2, 1))
        seen: list[tuple[int, Mapping[Collective, float]]] = []
        with self._networks_in(phase) as called:
            for number, alike in enumerate(kinds, start=1):
                with StepMeter() as meter:
                    self._compute(called, phase, samples, last=number == len(kinds))
                seen.append((alike, meter.counts().collectives))
        for role in phase.trains:
            self.engines[role].network.zero_grad()
        return seen

    def companion_bytes(self) -> int:
        """What the other roles keep on the rank."""
        values = (value for network in self.companions.values() for value in network.parameters())
        return sum(value.numel() * value.element_size() for value in local_tensors(list(values)))

    def _compute(self, networks: Mapping[str, nn.Module], phase: Phase, samples: int, *, last: bool) -> LossTerms:
        """One micro-batch, as the train loop takes it."""
        fields = batch_fields(self._recipe, self._networks, samples)
        batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in fields.items()}
        positions = torch.arange(samples)
        with ExitStack() as contexts:
            for role in phase.trains:
                contexts.enter_context(self.engines[role].accumulate(last=last))
            random = PositionRandom(self._recipe.seed, positions)
            terms = self._objective(networks, Batch(batch, positions), phase, random)
            first, *others = (self.engines[role] for role in phase.trains)
            loss = terms.loss
            for engine in others:
                loss = engine.join_backward(loss)
            first.backward(loss)
        return terms

    @contextmanager
    def _networks_in(self, phase: Phase) -> Iterator[dict[str, nn.Module]]:
        """Networks by role as a phase's micro-batches call them."""
        trained = {role: engine.module for role, engine in self.engines.items() if role in phase.trains}
        with ExitStack() as contexts:
            untrained = {
                role: contexts.enter_context(engine.untrained())
                for role, engine in self.engines.items()
                if role not in phase.trains
            }
            yield {**trained, **untrained, **self.companions}

    def _keep_gradients(self, phase: Phase) -> None:
        """Tell the meter which tensors are gradients by now."""
        parameters = [value for role in phase.trains for value in self.engines[role].network.parameters()]
        self.meter.keep(local_tensors([value.grad for value in parameters if value.grad is not None]))

    def _finish(self, role: str) -> None:
        """Update a role where its update is more than a pass over what it holds, and forget its gradients."""
        engine = self.engines[role]
        if isinstance(engine, Replica):
            engine.update()
        elif isinstance(self._recipe.optimizer_of(role), MuonConfig):
            engine.apply_update(1.0, 1.0)
        engine.network.zero_grad()

    def _of_the_step(self, phase: Phase, summed: int, micro_batches: int) -> Counter[Collective]:
        """Messages that no fake group sees: those of DDP and ZeRO, and the step's sums over ranks."""
        world_size = self._world.size
        numbers = 3 + world_size + summed
        sent: Counter[Collective] = Counter()
        if world_size > 1:
            sent[Collective(kind="all_reduce", ranks=tuple(range(world_size)), message_bytes=8 * numbers)] += 1
        for role in phase.trains:
            if not isinstance(engine := self._recipe.engine_of(role), FSDPConfig):
                sent += sent_by_replica(
                    self.shapes[role],
                    engine,
                    world_size=world_size,
                    device=self._world.device,
                    micro_batches=micro_batches,
                )
                if isinstance(engine, DeepSpeedConfig):
                    sent += self._gathered_whole(role)
        return sent

    def _gathered_whole(self, role: str) -> Counter[Collective]:
        """Messages by which ZeRO joins a role's fragments: Muon takes whole matrices, who tracks the role all."""
        sent: Counter[Collective] = Counter()
        if isinstance(self._recipe.optimizer_of(role), MuonConfig):
            matrices = [value for value in self.shapes[role] if value.tag.matrix]
            sent += gathered_whole(matrices, world_size=self._world.size)
        for _ in tracked_roles(self._objective).get(role, ()):
            sent += gathered_whole(self.shapes[role], world_size=self._world.size)
        return sent

    def _micro_batches(self, phase: Phase) -> tuple[int, int]:
        """Samples that a phase computes at once, and how often it does."""
        micro_batch = micro_batch_of(self._recipe, phase.trains, self._world.size)
        return micro_batch, -(-(self._recipe.data.global_batch // self._world.size) // micro_batch)

    def _engine(self, role: str) -> FSDPEngine | Replica:
        specification = self._specification(role, role)
        if not isinstance(specification.engine, FSDPConfig):
            return Replica(specification, self._recipe.optimizer_of(role))
        return FSDPEngine(
            RoleSpecification(
                **vars(specification),
                optimizer=self._recipe.optimizer_of(role),
                schedule=ConstantScheduleConfig(),
                total_steps=1,
                average=None,
            )
        )

    def _specification(self, role: str, served: str) -> NetworkSpecification:
        return NetworkSpecification(
            engine=_eager(self._recipe.engine_of(served)),
            network=settings_of(self._networks, self._objective.roles[role]),
            role=role,
            seed=0,
            world=self._world,
        )

    def _shapes(self, role: str) -> list[Parameter]:
        settings = settings_of(self._networks, self._objective.roles[role])
        with unset_fake_temporarily(), torch.device("meta"):
            network: Network = settings.load()(settings)
        tags = parameter_tags(network)
        return [Parameter(shape=tuple(value.shape), tag=tags[name]) for name, value in network.named_parameters()]


def _eager(engine: EngineConfig) -> EngineConfig:
    """Without compilation, which changes no shape and needs real tensors; a budget becomes its lower bound."""
    budget = {"activation_checkpointing": "full", "activation_memory_budget": None}
    return engine.model_copy(
        update={"compile": False, **(budget if engine.activation_checkpointing == "budget" else {})}
    )
