"""Profile files: found by name or path, read by the recipes' own loader, listed and described.

Files may stand on others (``base:``), faults name file and line, ``key=value`` overrides apply last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sixfold.config.base import Config
from sixfold.config.composition import compose_file, merge
from sixfold.config.faults import faults_of
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Layer, Provenance, display_path
from sixfold.config.schema import Slot, allowed, nearest, spell_plain, with_default_types
from sixfold.errors import Fault, RecipeError, UserError
from sixfold_launchers.profiles import KINDS, Profile


class ProfileError(UserError):
    """A profile is malformed, inconsistent or not there. Exit code 2."""


@dataclass(frozen=True)
class LoadedProfile:
    """A profile, the name it was asked for by, and where each of its settings was written."""

    name: str
    profile: Profile
    provenance: Provenance
    source: Path


def load_profile(reference: str, overrides: Sequence[str] = ()) -> LoadedProfile:
    """Load a profile by file or name, apply overrides and validate it.

    Raises:
        ProfileError: with every fault of the first stage that has any, each with file and line.
    """
    source = find_profile(reference)
    override_layer, faults = parse_overrides(overrides)
    try:
        layer = compose_file(source)
    except RecipeError as error:
        raise ProfileError(*error.faults, *faults) from None
    if faults:
        raise ProfileError(*faults)
    layer = merge(layer, override_layer)
    provenance = Provenance(display_path(source), layer.places)
    return LoadedProfile(source.stem, _validate(layer, provenance), provenance, source)


def _validate(layer: Layer, provenance: Provenance) -> Profile:
    kind = layer.values.get("type")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        suggestion = nearest(str(kind), list(KINDS))
        raise ProfileError(
            Fault(
                what="type is missing" if kind is None else f"type: {kind!r} is no kind of profile",
                where=provenance.nearest(("type",)),
                allowed=", ".join(KINDS),
                fix=f"did you mean `{suggestion}`?" if suggestion else "write `type: slurm`, or another of these",
            )
        )
    values = with_default_types(layer.values, Slot(cls))
    try:
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = faults_of(error, root=cls, values=values, provenance=provenance)
        raise ProfileError(*(_without_recipe_help(fault, str(kind)) for fault in faults)) from None


def _without_recipe_help(fault: Fault, kind: str) -> Fault:
    """Point at the profiles' own description where a fault would point at the recipes'."""
    fix = None if fault.fix is None else re.sub(r"`sixfold help[^`]*`", f"`sixfold jobs profiles {kind}`", fault.fix)
    return Fault(what=fault.what, where=fault.where, allowed=fault.allowed, fix=fix)


def profile_folders() -> list[Path]:
    """The folders that are searched, first wins: ``./launchers/profiles``, then those that come with Sixfold."""
    here = Path(__file__).resolve()
    folders = [Path.cwd() / "launchers" / "profiles", here.parent / "builtin", here.parents[1] / "profiles"]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def list_profiles() -> dict[str, Path]:
    """Every profile that can be named; files that start with ``_`` are building blocks."""
    found: dict[str, Path] = {}
    for folder in profile_folders():
        for path in sorted(folder.rglob("*.yaml")):
            if not path.name.startswith(("_", ".")):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def find_profile(reference: str) -> Path:
    """Return the file of a profile given as a path or as a name.

    Raises:
        ProfileError: there is neither such a file nor such a name.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    names = list_profiles()
    if reference in names:
        return names[reference]
    suggestion = nearest(reference, list(names))
    raise ProfileError(
        Fault(
            what=f"there is no profile {reference!r}",
            where="--to",
            allowed="a YAML file, or one of: " + (", ".join(names) or "(no profiles were found)"),
            fix=f"did you mean `{suggestion}`?" if suggestion else "`sixfold jobs profiles` lists the names",
        )
    )


def summarise_profiles() -> list[dict[str, str]]:
    """What ``sixfold jobs profiles`` says of every profile that can be named."""
    return [_summary(name, path) for name, path in list_profiles().items()]


def _summary(name: str, path: Path) -> dict[str, str]:
    try:
        profile = load_profile(str(path)).profile
    except ProfileError as error:
        return {
            "name": name,
            "kind": "",
            "description": f"cannot be read: {error.faults[0]}",
            "file": display_path(path),
        }
    return {"name": name, "kind": profile.type, "description": profile.description, "file": display_path(path)}


def describe_kind(kind: str) -> list[dict[str, str]]:
    """Every setting of one kind of profile: what it may be, its default, what it means."""
    rows = []
    for name, field in KINDS[kind].model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        rows.append(
            {
                "setting": name,
                "allowed": allowed(Slot.of_field(field)),
                "default": "required" if field.is_required() else spell_plain(_plain(default)),
                "description": field.description or "",
            }
        )
    return rows


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Config) else value
