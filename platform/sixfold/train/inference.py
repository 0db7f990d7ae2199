"""Using a trained run in one process, without engines: loading, evaluation, export."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sixfold.checkpoint.export import export_safetensors
from sixfold.checkpoint.verification import Candidate, newest_verified
from sixfold.distributed.process_group import World
from sixfold.errors import UserError
from sixfold.evaluation.contract import Estimate
from sixfold.models.trained.network import NetworksConfig
from sixfold.objectives.contract import Objective
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.codec_identity import check_codec, check_teachers
from sixfold.train.evaluator import Evaluator
from sixfold.train.reconstruction import reconstruct_run
from sixfold.train.roles import load_networks
from sixfold.train.run_folder import RunFolder
from sixfold.train.text_cache import with_cached_text
from sixfold_data.describe import describe


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's newest verified checkpoint, its networks ready to compute."""

    recipe: Recipe
    candidate: Candidate
    objective: Objective
    settings: NetworksConfig
    networks: Mapping[str, nn.Module]
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation found, and at which step."""

    step: int
    estimates: list[Estimate]


def load_trained(run: Path, *, length: float | None = None, overrides: Sequence[str] = ()) -> Trained:
    """Load a run's networks from its newest checkpoint that verifies, averaged where the recipe keeps an average.

    Args:
        run: the run folder.
        length: use averages of this relative width, reconstructed from snapshots, instead.
        overrides: changes of its recipe, as on a command line, that leave the networks which it trained as they are.

    Raises:
        RecipeError: the changes do not fit the recipe.
        UserError: the run has no checkpoint yet, or no snapshots to reconstruct from.
        CheckpointError: none of its checkpoints verifies.
    """
    folder = RunFolder(run)
    loaded = load_recipe(folder.recipe, overrides)
    recipe = loaded.recipe
    check_recipe(recipe, provenance=loaded.provenance)
    candidate = _newest(folder)
    info = describe(recipe.data)
    settings = with_cached_text(recipe, resolve_networks(recipe), info)
    check_codec(recipe, settings, info)
    if overrides:  # they may name denoisers of other runs, such as a guide
        check_teachers(recipe, settings)
    objective: Objective = recipe.objective.load()(recipe.objective, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    averaged = recipe.train.ema is not None
    networks = load_networks(
        recipe, objective, settings, candidate, averaged=averaged, device=device, cache=folder.features
    )
    for made in reconstruct_run(run, length=length) if length is not None else []:
        networks[made.role].load_state_dict(made.parameters)
    return Trained(
        recipe=recipe, candidate=candidate, objective=objective, settings=settings, networks=networks, device=device
    )


def evaluate_run(
    run: Path, *, samples: int | None = None, length: float | None = None, overrides: Sequence[str] = ()
) -> Measured:
    """Measure a run's newest checkpoint as its recipe's ``evaluation`` says, on averaged weights where it keeps them.

    Args:
        run: the run folder.
        samples: draw so many instead of the recipe's number.
        length: measure averages of this relative width instead; see :func:`load_trained`.
        overrides: changes of the recipe, such as ``evaluation.metrics=[fd]``.

    Raises:
        RecipeError: the changes do not fit the recipe.
        UserError: the recipe has no evaluation section, or the run no checkpoint.
    """
    trained = load_trained(run, length=length, overrides=overrides)
    recipe = trained.recipe
    if recipe.evaluation is None:
        raise UserError.of(
            "the run's recipe has no evaluation section", where=str(run), fix="say what to measure with --metrics"
        )
    if samples is not None:
        evaluation = recipe.evaluation.model_copy(update={"samples": samples})
        recipe = recipe.model_copy(update={"evaluation": evaluation})
    folder = RunFolder(run)
    evaluator = Evaluator(recipe, World(device=trained.device), folder.features, folder.quarantine)
    return Measured(step=trained.candidate.step, estimates=evaluator.measure(trained.objective, trained.networks))


def export_run(run: Path, *, out: Path, averaged: bool) -> list[Path]:
    """Write each role's newest weights as safetensors: ``out``, or ``out-<role>`` where there are several roles.

    Raises:
        UserError: the file exists, or the run has no checkpoint.
    """
    folder = RunFolder(run)
    recipe, candidate = load_recipe(folder.recipe).recipe, _newest(folder)
    roles = recipe.objective.role_names
    files = [out if len(roles) == 1 else out.with_stem(f"{out.stem}-{role}") for role in roles]
    for role, file in zip(roles, files, strict=True):
        if file.exists():
            raise UserError.of("the file exists", where=str(file), fix="name another with --out")
        export_safetensors(candidate, role, averaged=averaged and recipe.train.ema is not None, out=file)
    return files


def _newest(folder: RunFolder) -> Candidate:
    candidate = newest_verified(folder.checkpoints, partial(print, file=sys.stderr))  # results alone go to stdout
    if candidate is None:
        raise UserError.of(
            "the run has no checkpoint yet", where=str(folder.path), fix="wait for checkpoint.every_steps, or resume it"
        )
    return candidate
