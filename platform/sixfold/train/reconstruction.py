"""Averages of any length from a run's snapshots, for ``sixfold ema`` and for evaluating with them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sixfold.checkpoint.export import read_kind, read_updates, write_safetensors
from sixfold.checkpoint.store import open_store
from sixfold.checkpoint.verification import Candidate, newest_verified
from sixfold.engine.averaging import MAIN, kinds_of
from sixfold.engine.averaging_config import PowerAverageConfig
from sixfold.engine.posthoc import Profile, reconstruct
from sixfold.errors import UserError
from sixfold.recipe.load import load_recipe
from sixfold.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """A role's average of the wanted length.

    Attributes:
        role: whose.
        parameters: full parameters and buffers, as ``load_state_dict`` takes them.
        error: how far its profile is from the wanted one, relative to that one's norm.
        snapshots: how many were used.
        newest: the snapshot that it ends at.
    """

    role: str
    parameters: dict[str, Tensor]
    error: float
    snapshots: int
    newest: Candidate


def reconstruct_run(run: Path, *, length: float, step: int | None = None) -> list[Reconstructed]:
    """Reconstruct each trainable role's average of relative width ``length``, as it was after ``step``.

    Args:
        run: the run folder.
        length: relative standard deviation of the profile, below 0.28.
        step: of the last snapshot to use; None for the newest.

    Raises:
        UserError: the run keeps no snapshots, has none yet, or none of that step.
    """
    folder = RunFolder(run)
    recipe = load_recipe(folder.recipe).recipe
    averages = recipe.train.ema
    if not isinstance(averages, PowerAverageConfig):
        raise UserError.of(
            "the run keeps no power-function averages, from which alone others can be reconstructed",
            where=str(folder.recipe),
            fix="train with train.ema={type: power}",
        )
    snapshots = _snapshots(folder, step)
    return [_reconstruct_role(snapshots, averages, role, length) for role in recipe.objective.role_names]


def write_reconstructed(
    run: Path, *, length: float, step: int | None = None, out: Path | None = None
) -> list[tuple[Reconstructed, Path]]:
    """Write what :func:`reconstruct_run` makes to ``out`` (or ``out-<role>``); by default in the run folder's ``ema``.

    Raises:
        UserError: ``out`` exists, or see :func:`reconstruct_run`.
    """
    written = []
    for made in (parts := reconstruct_run(run, length=length, step=step)):
        target = out or run / "ema" / f"step_{made.newest.step}-length_{length:g}.safetensors"
        target = target if len(parts) == 1 else target.with_stem(f"{target.stem}-{made.role}")
        if out is not None and target.exists():
            raise UserError.of("the file exists", where=str(target), fix="name another with --out")
        described = {"averaged": f"power {length:g}", "profile_error": f"{made.error:.3g}"}
        write_safetensors(made.parameters, made.newest, made.role, target, **described)
        written.append((made, target))
    return written


def _snapshots(folder: RunFolder, step: int | None) -> list[Candidate]:
    """The run's snapshots that verify up to a step, oldest first."""
    store = open_store(folder.snapshots)
    steps = sorted({each.step for each in store.committed()}) if folder.snapshots.exists() else []
    if not steps or (step is not None and step not in steps):
        raise UserError.of(
            "the run has no snapshot yet" if not steps else f"the run has no snapshot of step {step}",
            where=str(folder.snapshots),
            allowed=", ".join(map(str, steps)) or None,
            fix="wait for checkpoint.every_steps, or resume it" if not steps else "choose one of these with --step",
        )
    warn = partial(print, file=sys.stderr)  # results alone go to stdout
    found = [newest_verified(folder.snapshots, warn, step=each) for each in steps if step is None or each <= step]
    return [each for each in found if each is not None]


@torch.no_grad()
def _reconstruct_role(
    snapshots: list[Candidate], averages: PowerAverageConfig, role: str, length: float
) -> Reconstructed:
    """Sum the kept averages in float64, one at a time."""
    updates = [read_updates(snapshot, role) for snapshot in snapshots]
    kept = [(snapshot, kind) for snapshot in snapshots for kind in kinds_of(averages)]
    profiles = [Profile(updates=count, width=width) for count in updates for width in averages.widths]
    found = reconstruct(profiles, Profile(updates=updates[-1], width=length))
    total: dict[str, Tensor] = {}
    for (snapshot, kind), weight in zip(kept, found.weights.tolist(), strict=True):
        for name, value in read_kind(snapshot, role, kind, buffers=False).items():
            total[name] = total[name] + weight * value.double() if name in total else weight * value.double()
    newest = read_kind(snapshots[-1], role, MAIN)
    averaged = {name: value.to(newest[name].dtype) for name, value in total.items()}
    return Reconstructed(
        role=role, parameters=newest | averaged, error=found.error, snapshots=len(snapshots), newest=snapshots[-1]
    )
