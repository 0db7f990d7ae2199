"""``sixfold plan``: whether a recipe fits the machines, how long it will take there, and the cheapest way that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.planning.devices import Device
from sixfold.planning.estimate import Assumptions, Estimate, estimate
from sixfold.planning.meter import bytes_by_kind
from sixfold.planning.search import candidates, rescaled, with_engine
from sixfold.planning.trace import StepTrace, trace_step
from sixfold.recipe.recipe import Recipe

CHECKPOINTING = ("none", "selective", "full")


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
    """Plans one recipe on one cluster; a step is traced once a mode of checkpointing and kind of engine.

    Args:
        recipe: what is to train.
        cluster: where.
        assumptions: efficiencies that estimates take for granted.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, assumptions: Assumptions | None = None) -> None:
        self.cluster = cluster
        self.assumptions = assumptions or Assumptions()
        self.recipe = self._with_precision(recipe)
        self._traces: dict[str, StepTrace] = {}

    def plan(self) -> Plan:
        """Plan the recipe as it is.

        Raises:
            RecipeError: it does not fit that many ranks.
        """
        return self._plan(self.recipe, self._trace(self.recipe))

    def cheapest(self) -> Plan | None:
        """The fastest setting that fits (of equal devices the fastest is the cheapest), or None."""
        best: tuple[Recipe, Plan] | None = None
        for mode in CHECKPOINTING:
            for base in self._bases(mode):
                for recipe, plan in self._variants(base):
                    if plan.fits and (best is None or plan.estimate.step_s < best[1].estimate.step_s):
                        best = (recipe, plan)
        return None if best is None else best[1]

    def _bases(self, mode: str) -> list[Recipe]:
        """The recipe with a mode of checkpointing; where replicas do not fit, sharded instead."""
        engine = self.recipe.engine
        bases = [with_engine(self.recipe, _checkpointing(engine, mode))]
        if isinstance(engine, DDPConfig) and self.cluster.ranks > 1 and not self.plan().fits:
            shared = {name: getattr(engine, name) for name in ("precision", "micro_batch", "clip_grad_norm", "compile")}
            bases.append(with_engine(self.recipe, FSDPConfig(**shared, activation_checkpointing=mode)))  # type: ignore[arg-type]  # one of its literals
        return bases

    def _variants(self, base: Recipe) -> list[tuple[Recipe, Plan]]:
        cluster, trace = self.cluster, self._trace(base)
        found = []
        for engine in candidates(
            base.engine,
            ranks=cluster.ranks,
            ranks_per_node=cluster.ranks_per_node,
            rank_batch=base.data.global_batch // cluster.ranks,
        ):
            changed = with_engine(base, engine)
            on_paper = rescaled(trace, base, engine, ranks=cluster.ranks, device=cluster.torch_device)
            found.append((changed, self._plan(changed, on_paper)))
        return found

    def _plan(self, recipe: Recipe, trace: StepTrace) -> Plan:
        memory = memory_of(trace)
        unchecked = with_engine(self.recipe, _checkpointing(recipe.engine, "none"))
        return Plan(
            engine=recipe.engine,
            trace=trace,
            memory=memory,
            estimate=estimate(
                flops=trace.flops,
                model_flops=self._trace(unchecked).flops,
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

    def _trace(self, recipe: Recipe) -> StepTrace:
        """The step's trace; the one without checkpointing serves every micro-batch and sharding."""
        mode = recipe.engine.activation_checkpointing
        key = f"{recipe.engine.type}/{mode}"
        if key not in self._traces:
            self._traces[key] = trace_step(recipe, self.cluster.ranks, device=self.cluster.torch_device)
        return self._traces[key]

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


def memory_of(trace: StepTrace) -> dict[str, int]:
    """Bytes on a rank's device at the peak, by use; what is on the host is left out."""
    held, host = trace.held, trace.held.on_host
    return {
        "parameters": held.parameters,
        "working copies": held.working,
        "gradients": held.gradients,
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
