"""From a recipe's networks to what objectives are built with: those of other runs are looked up in those runs."""

from __future__ import annotations

import json
from pathlib import Path

from sixfold.errors import RecipeError, SixfoldError, UserError
from sixfold.models.settings import NetworkSettings
from sixfold.models.trained.config import TrainedConfig
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork
from sixfold.recipe.recipe import Recipe
from sixfold.tracking.runs import RUNS, find_run, list_runs

RUN = "run://"
"""What a reference to a run by its recipe begins with, as in ``run://codec/kl-f8d16@latest``."""

_RECIPE_FILE = "recipe.yaml"


def resolve_networks(recipe: Recipe, *, planning: bool = False) -> NetworksConfig:
    """Return the recipe's networks with each of type ``trained`` read from its run.

    Args:
        recipe: the recipe.
        planning: let ``recipe`` of a trained network stand in for a run that does not exist (yet): shapes are enough.

    Raises:
        RecipeError: a run, its recipe or the role in it is missing, with the place in this recipe.
    """
    return {
        name: _resolve(f"networks.{name}", network, planning) if isinstance(network, TrainedConfig) else network
        for name, network in recipe.networks.items()
    }


def network_of_run(run: Path, role: str, step: int | None = None) -> TrainedNetwork:
    """Return one role of a run, as a recipe that names it would get it; raises RecipeError where it has none."""
    return _resolve("networks", TrainedConfig(run=str(run), role=role, step=step), planning=False)


def locate_run(reference: str) -> Path:
    """Return the folder of a run named by path, run id, or ``run://<recipe>@latest``.

    Raises:
        UserError: there is no such run.
    """
    if not reference.startswith(RUN):
        return find_run(reference)
    name, _, which = reference.removeprefix(RUN).partition("@")
    runs = [run for run in list_runs() if _recipe_name(run).replace("/", "-") == name.replace("/", "-")]
    if which in ("", "latest") and runs:
        return runs[0]
    chosen = [run for run in runs if run.name == which]
    if chosen:
        return chosen[0]
    raise UserError.of(
        f"there is no run {reference!r} below {RUNS}/",
        allowed=", ".join(sorted({f"{RUN}{_recipe_name(run)}@latest" for run in list_runs()})) or "none: no runs here",
        fix="train it first, or name a run folder",
    )


def _resolve(key: str, network: TrainedConfig, planning: bool) -> TrainedNetwork:
    try:
        run = locate_run(network.run)
    except UserError as error:
        if planning and network.recipe is not None:
            return _take(key, network, load_source(network.recipe, key), None)
        raise RecipeError.of(
            f"{key}.run is {network.run!r}, and there is no such run",
            where=f"{key}.run",
            allowed=error.faults[0].allowed,
            fix="train it first, or name a run folder",
        ) from error
    return _take(key, network, load_source(str(run / _RECIPE_FILE), key), run)


def load_source(reference: str, key: str) -> Recipe:
    """Load the recipe that another network was trained by; raises RecipeError that names the place ``key``."""
    from sixfold.recipe.load import load_recipe

    try:
        return load_recipe(reference).recipe
    except SixfoldError as error:
        raise RecipeError.of(
            f"{key}: the recipe {reference} cannot be read: {error.faults[0].what}", where=key, fix="name another run"
        ) from error


def _take(key: str, network: TrainedConfig, source: Recipe, run: Path | None) -> TrainedNetwork:
    role = network.role if network.role is not None else source.objective.role_names[0]
    if role not in source.objective.role_names:
        raise RecipeError.of(
            f"{key}.role is {role!r}, which {source.name} does not train",
            where=f"{key}.role",
            allowed=", ".join(source.objective.role_names),
            fix="name one of these, or leave it out",
        )
    networks = resolve_networks(source, planning=True)
    latents_of = source.objective.latents_of
    return TrainedNetwork(
        architecture=_architecture(key, source, role),
        objective=source.objective.as_trained(networks),
        run=run,
        role=role,
        averaged=network.averaged and source.train.ema is not None,
        step=network.step,
        codec=None if latents_of is None else networks[latents_of],
    )


def _architecture(key: str, source: Recipe, role: str) -> NetworkSettings:
    """The settings of the network behind a role, through as many runs as it was handed on."""
    config = source.networks[source.objective.trains[role]]
    return _resolve(key, config, planning=True).architecture if isinstance(config, TrainedConfig) else config


def _recipe_name(run: Path) -> str:
    try:
        record: dict[str, str] = json.loads((run / "run.json").read_text())
    except (OSError, ValueError):  # a folder that is being made, or that is no longer whole
        return ""
    return record.get("recipe", "")
