"""``sixfold plan``: whether a recipe fits the machines, how long it will take there, and the cheapest way that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.planning.devices import Device
from sixfold.planning.estimate import Assumptions, Estimate, estimate
from sixfold.planning.meter import bytes_by_kind
from sixfold.planning.search import candidates, is_accepted, rescaled, with_engine
from sixfold.planning.trace import StepTrace, micro_batch_of, trace_step
from sixfold.recipe.recipe import Recipe

CHECKPOINTING = ("none", "selective", "full")
"""Modes of activation checkpointing; each recomputes more than the one before."""
_FINALISTS = 3
"""Settings that fit and are traced, before the fastest of them is taken."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a recipe is to run."""

    nodes: int
    ranks_per_node: int
    device: Device

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.nodes * self.ranks_per_node

    @property
    def torch_device(self) -> torch.device:
        """The kind of device, as torch calls it."""
        return torch.device("cpu" if self.device.name == "cpu" else "cuda")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One recipe on one cluster.

    Attributes:
        engine: how it is sharded and computed.
        trace: what a step costs a rank.
        memory: bytes on a rank's device at the peak, by use.
        estimate: seconds, days and cost.
        fits: whether the device's memory suffices.
    """

    engine: EngineConfig
    trace: StepTrace
    memory: dict[str, int]
    estimate: Estimate
    fits: bool

    @property
    def peak_bytes(self) -> int:
        """What a rank's device must hold."""
        return sum(self.memory.values())

    def as_record(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "engine": self.engine.model_dump(mode="json"),
            "parameters": self.trace.parameters,
            "memory_bytes": self.memory,
            "peak_bytes": self.peak_bytes,
            "on_host_bytes": self.trace.held.on_host,
            "activation_bytes": self.trace.most["activations"],
            "fits": self.fits,
            "micro_batch": self.trace.micro_batch,
            "flops_per_step": self.trace.flops,
            "collective_bytes_per_step": bytes_by_kind(self.trace.collectives),
            **asdict(self.estimate),
        }


class Planner:
    """Plans one recipe on one cluster.

    Args:
        recipe: what is to train.
        cluster: where.
        assumptions: efficiencies that estimates take for granted.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, assumptions: Assumptions | None = None) -> None:
        self.cluster = cluster
        self.assumptions = assumptions or Assumptions()
        self.recipe = self._with_precision(recipe)
        self._traces: dict[str, dict[str, StepTrace]] = {}

    def plan(self) -> Plan:
        """Plan the recipe as it is.

        Raises:
            RecipeError: it does not fit that many ranks.
        """
        return self._plan(self.recipe, self._trace(self.recipe))

    def cheapest(self) -> Plan | None:
        """The fastest setting that fits (of equal devices the fastest is the cheapest), or None.

        Settings are compared on paper; the few that look best are traced as they would run, and one of these is it.
        """
        as_it_is = self.plan()
        best = as_it_is if as_it_is.fits else None
        fitting, underestimated = 0, dict[str, float]()
        for on_paper in self._fitting_on_paper():
            if best is not None and (fitting == _FINALISTS or on_paper.estimate.step_s >= best.estimate.step_s):
                break
            mode = on_paper.engine.activation_checkpointing
            if on_paper.peak_bytes * underestimated.get(mode, 1.0) > self.cluster.device.usable_bytes:
                continue
            recipe = with_engine(self.recipe, on_paper.engine)
            traced = self._plan(recipe, self._trace(recipe))
            if not traced.fits:
                underestimated[mode] = traced.peak_bytes / on_paper.peak_bytes
                continue
            fitting += 1
            best = traced if best is None else min(best, traced, key=_step_s)
        return best

    def _fitting_on_paper(self) -> Iterator[Plan]:
        """Every setting that fits on paper, the fastest first; modes of checkpointing are traced as they are needed."""
        waiting: list[Plan] = []
        for mode in CHECKPOINTING:
            plans = [plan for base in self._bases(mode) for plan in self._variants(base)]
            waiting += [plan for plan in plans if plan.fits]
            waiting.sort(key=_step_s)
            # Recomputing more takes longer: what fits gains nothing by it, what does not is no faster than it is now.
            fastest_s = min((_step_s(plan) for plan in plans if not plan.fits), default=math.inf)
            while waiting and waiting[0].estimate.step_s <= fastest_s:
                yield waiting.pop(0)
        yield from waiting

    def _bases(self, mode: str) -> list[Recipe]:
        """The recipe with a mode of checkpointing; where replicas do not fit, sharded instead."""
        engine = self.recipe.engine
        if isinstance(engine, FSDPConfig) and engine.replicate == self.cluster.ranks:
            engine = engine.model_copy(update={"replicate": 1})  # whole replicas gather nothing that could be counted
        bases = [with_engine(self.recipe, _checkpointing(engine, mode))]
        if isinstance(engine, DDPConfig) and self.cluster.ranks > 1 and not self.plan().fits:
            shared = {name: getattr(engine, name) for name in ("precision", "micro_batch", "clip_grad_norm", "compile")}
            bases.append(with_engine(self.recipe, FSDPConfig(**shared, activation_checkpointing=mode)))  # type: ignore[arg-type]  # one of its literals
        return bases

    def _variants(self, base: Recipe) -> list[Plan]:
        cluster, trace = self.cluster, self._trace(base)
        found = []
        for engine in candidates(
            base.engine,
            ranks=cluster.ranks,
            ranks_per_node=cluster.ranks_per_node,
            rank_batch=base.data.global_batch // cluster.ranks,
        ):
            changed = with_engine(base, engine)
            if is_accepted(changed, cluster.ranks):
                on_paper = rescaled(trace, base, engine, ranks=cluster.ranks, device=cluster.torch_device)
                found.append(self._plan(changed, on_paper))
        return found

    def _plan(self, recipe: Recipe, trace: StepTrace) -> Plan:
        memory = memory_of(trace)
        return Plan(
            engine=recipe.engine,
            trace=trace,
            memory=memory,
            estimate=estimate(
                flops=trace.flops,
                model_flops=self._model_flops,
                collectives=trace.collectives,
                held=trace.held,
                steps=recipe.train.steps,
                ranks=self.cluster.ranks,
                ranks_per_node=self.cluster.ranks_per_node,
                device=self.cluster.device,
                assumptions=self.assumptions,
            ),
            fits=sum(memory.values()) <= self.cluster.device.usable_bytes,
        )

    @cached_property
    def _model_flops(self) -> float:
        """What a step computes without recomputation, however it is sharded."""
        return self._trace(with_engine(self.recipe, _checkpointing(self.recipe.engine, "none"))).flops

    def _trace(self, recipe: Recipe) -> StepTrace:
        """The step's trace; recomputation lies between the hooks that send, so that all modes of it share messages."""
        ranks = self.cluster.ranks
        engines = {role: recipe.engine_of(role) for role in recipe.objective.trains}
        alike = {
            role: _checkpointing(engine, "none").model_copy(
                update={"micro_batch": micro_batch_of(recipe, (role,), ranks)}
            )
            for role, engine in engines.items()
        }
        traces = self._traces.setdefault(repr(alike), {})
        modes = repr({role: engine.activation_checkpointing for role, engine in engines.items()})
        if modes not in traces:
            earlier = next(iter(traces.values()), None)
            traces[modes] = trace_step(
                recipe,
                ranks,
                device=self.cluster.torch_device,
                collectives=None if earlier is None else earlier.collectives,
            )
        return traces[modes]

    def _with_precision(self, recipe: Recipe) -> Recipe:
        """Resolve ``auto`` as the planned device would."""
        if self.cluster.device.precision is None:
            return recipe
        roles = {
            name: part.model_copy(update={"engine": None if part.engine is None else self._resolved(part.engine)})
            for name, part in recipe.roles.items()
        }
        return recipe.model_copy(update={"engine": self._resolved(recipe.engine), "roles": roles})

    def _resolved(self, engine: EngineConfig) -> EngineConfig:
        return engine.model_copy(
            update={"precision": self.cluster.device.precision if engine.precision == "auto" else engine.precision}
        )


def _step_s(plan: Plan) -> float:
    return plan.estimate.step_s


def memory_of(trace: StepTrace) -> dict[str, int]:
    """Bytes on a rank's device at the peak, by use; what is on the host is left out."""
    held, host = trace.held, trace.held.on_host
    return {
        "parameters": held.parameters,
        "working copies": held.working,
        "gradients": trace.at_peak["gradients"],
        "optimizer": held.optimizer,
        "average": held.average,
        "on the host": -host,
        "other networks": trace.companion_bytes,
        "gathered and exchanged": held.buckets + trace.at_peak["exchange"],
        "activations": trace.at_peak["activations"],
    }


def describe_engine(engine: EngineConfig) -> str:
    """The settings that decide about memory, as overrides of the recipe."""
    words = [f"engine.type={engine.type}"]
    if isinstance(engine, FSDPConfig):
        words.append(f"engine.replicate={engine.replicate}")
    if isinstance(engine, DeepSpeedConfig):
        words.append(f"engine.zero_stage={engine.zero_stage}")
        words += ["engine.offload_optimizer=true"] if engine.offload_optimizer else []
    if engine.micro_batch is not None:
        words.append(f"engine.micro_batch={engine.micro_batch}")
    words.append(f"engine.activation_checkpointing={engine.activation_checkpointing}")
    return " ".join(words)


def _checkpointing(engine: EngineConfig, mode: str) -> EngineConfig:
    return engine.model_copy(update={"activation_checkpointing": mode, "activation_memory_budget": None})
