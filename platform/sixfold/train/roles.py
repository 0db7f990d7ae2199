"""From an objective's roles to engines and companions, with the weights that each starts from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sixfold.checkpoint.export import read_parameters
from sixfold.checkpoint.verification import Candidate, newest_verified
from sixfold.distributed.process_group import World
from sixfold.engine.averaging import MAIN
from sixfold.engine.base import NetworkSpecification
from sixfold.engine.build import build_engine
from sixfold.engine.companion import Companion, place
from sixfold.engine.contract import Engine
from sixfold.engine.precision import compute_dtype, compute_in
from sixfold.errors import RecipeError
from sixfold.models.network import reset_buffers
from sixfold.models.settings import NetworkSettings
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork
from sixfold.objectives.contract import Objective, Progress, Role
from sixfold.recipe.recipe import Recipe
from sixfold.train.made_weights import make_weights
from sixfold.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that holds weights, by role."""

    engines: Mapping[str, Engine]
    companions: Mapping[str, Companion]


def build_roles(
    recipe: Recipe, objective: Objective, networks: NetworksConfig, world: World, *, cache: Path | None = None
) -> Parts:
    """Build the networks of all roles: trainable ones in engines, the others as companions.

    Args:
        recipe: the recipe.
        objective: what gives roles to networks.
        networks: the recipe's networks, resolved.
        world: this rank.
        cache: folder in which weights are kept that were made for this run.

    Raises:
        RecipeError: weights to start from are missing, or are of another shape.
    """
    weights = _Weights(recipe, networks, cache)
    engines: dict[str, Engine] = {}
    for role in names_of(objective, "trainable"):
        engines[role] = _engine(recipe, objective, networks, role, world)
        if (start := weights.of(objective, role)) is not None:
            start_from(engines[role], start, where=f"networks.{objective.roles[role].network}")
    companions: dict[str, Companion] = {}
    for role in (*names_of(objective, "tracking"), *names_of(objective, "frozen")):
        part = objective.roles[role]
        specification = NetworkSpecification(
            engine=recipe.engine_of(served_by(objective, role)),
            network=settings_of(networks, part),
            role=role,
            seed=recipe.seed,
            world=world,
        )
        follows = None if part.follows is None else engines[part.follows]
        companions[role] = Companion(specification, follows=follows, decay=part.decay)
        if follows is None and (start := weights.of(objective, role)) is not None:
            companions[role].load_full(start)
    return Parts(engines=engines, companions=companions)


def names_of(objective: Objective, kind: str) -> list[str]:
    """The roles of one kind, in the objective's order."""
    return [role for role, part in objective.roles.items() if part.kind == kind]


def served_by(objective: Objective, role: str) -> str:
    """The trainable role whose engine a role is sharded like, and computes like: itself, or the one it serves."""
    part = objective.roles[role]
    return role if part.kind == "trainable" else part.follows or names_of(objective, "trainable")[0]


def tracked_roles(objective: Objective) -> dict[str, list[str]]:
    """By trainable role, the roles that track it."""
    tracked: dict[str, list[str]] = {}
    for role, part in objective.roles.items():
        if part.follows is not None:
            tracked.setdefault(part.follows, []).append(role)
    return tracked


def settings_of(networks: NetworksConfig, part: Role) -> NetworkSettings:
    """The settings of the network that a role is built from."""
    network = networks[part.network]
    return network.architecture if isinstance(network, TrainedNetwork) else network


def updates_of(objective: Objective, role: str, total_steps: int) -> int:
    """How many updates a role gets in the whole run: phases may leave steps out."""
    if len(names_of(objective, "trainable")) == 1:
        return total_steps
    progress = (Progress(samples=0, step=step, total_steps=total_steps) for step in range(total_steps))
    return sum(any(role in phase.trains for phase in objective.phases(now)) for now in progress)


def checkpoint_of(network: TrainedNetwork) -> Candidate:
    """The checkpoint that a network's weights are taken from.

    Raises:
        RecipeError: the run has none yet, or not the one that is asked for.
    """
    assert network.run is not None, "weights are only asked for where the run exists"
    folder = RunFolder(network.run)
    warn = partial(print, file=sys.stderr)
    candidate = newest_verified(folder.checkpoints, warn, step=network.step)
    if candidate is None:
        asked = "" if network.step is None else f" of step {network.step}"
        raise RecipeError.of(
            f"the run has no checkpoint{asked} that verifies, and its {network.role} is to be used",
            where=str(network.run),
            fix="let it train until it has saved, or name another run",
        )
    return candidate


def read_trained(network: TrainedNetwork) -> dict[str, Tensor]:
    """Full parameters and buffers of a network that another run trained, on the CPU."""
    return read_parameters(checkpoint_of(network), network.role, averaged=network.averaged)


@torch.no_grad()
def start_from(engine: Engine, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Start an engine from given weights; parameters that they lack keep their initial values.

    Raises:
        RecipeError: some of the weights have no place in the network.
    """
    live, template = engine.checkpoint_state(), engine.checkpoint_template()
    strange = [
        name
        for name, value in weights.items()
        if not any(
            (held := template.get(f"{kind}/{name}")) is not None and held.shape == value.shape
            for kind in ("parameters", "buffers")
        )
    ]
    if strange:
        raise RecipeError.of(
            f"{len(strange)} of {len(weights)} weights to start from do not fit this network, such as {strange[0]}",
            where=where,
            fix="give it the architecture that the weights were trained with, or let it start fresh",
        )
    for name, value in template.items():
        kind, _, parameter = name.partition("/")
        source = weights.get(parameter) if kind in ("parameters", "buffers") or kind.startswith(MAIN) else None
        if source is None:
            value.copy_(live[name])
        else:
            place(source, value)
    engine.load_checkpoint_state(template)


class _Weights:
    """Weights of other runs, or made for this one, each read once."""

    def __init__(self, recipe: Recipe, networks: NetworksConfig, cache: Path | None) -> None:
        self._recipe, self._networks, self._cache = recipe, networks, cache
        self._read: dict[str, dict[str, Tensor]] = {}

    def of(self, objective: Objective, role: str) -> dict[str, Tensor] | None:
        """What a role starts from; None for the initial values of its own seed."""
        part = objective.roles[role]
        source = part if part.starts_from is None else objective.roles[part.starts_from]
        return self.of_network(source.network)

    def of_network(self, name: str) -> dict[str, Tensor] | None:
        """What a network comes with; None where it is drawn from the seed."""
        network = self._networks[name]
        if name not in self._read:
            if isinstance(network, TrainedNetwork):
                self._read[name] = read_trained(network)
            elif network.weights_from is not None:
                self._read[name] = make_weights(network, self._recipe.data, cache=self._cache)
            else:
                return None
        return self._read[name]


def _engine(recipe: Recipe, objective: Objective, networks: NetworksConfig, role: str, world: World) -> Engine:
    return build_engine(
        recipe.engine_of(role),
        recipe.optimizer_of(role),
        recipe.schedule_of(role),
        network_config=settings_of(networks, objective.roles[role]),
        role=role,
        seed=recipe.seed,
        total_steps=updates_of(objective, role, recipe.train.steps),
        average=recipe.train.ema,
        world=world,
    )


def load_networks(
    recipe: Recipe,
    objective: Objective,
    networks: NetworksConfig,
    candidate: Candidate,
    *,
    averaged: bool,
    device: torch.device,
    cache: Path | None = None,
) -> dict[str, nn.Module]:
    """Build every role's network whole, in evaluation mode, with a checkpoint's weights or those of the run it is from.

    Each computes in the precision that training has on such a device: then measures are those of training.

    Raises:
        CheckpointError: the checkpoint lacks a role.
    """
    loaded: dict[str, nn.Module] = {}
    weights = _Weights(recipe, networks, cache)
    for role, part in objective.roles.items():
        settings = settings_of(networks, part)
        network: nn.Module = settings.load()(settings)
        if not settings.pretrained:
            reset_buffers(network)
            if part.kind == "frozen":
                start = weights.of_network(part.network)
                assert start is not None, f"frozen role {role} has no weights"
                network.load_state_dict(start)
            else:
                kept = averaged and part.kind == "trainable"
                network.load_state_dict(read_parameters(candidate, role, averaged=kept))
            precision = recipe.engine_of(served_by(objective, role)).precision
            compute_in(network, compute_dtype(precision, device), device.type)
        loaded[role] = network.to(device).eval().requires_grad_(False)
    return loaded
