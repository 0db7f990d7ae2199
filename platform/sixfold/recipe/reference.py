"""The reference of all settings, made from the configuration classes: what ``sixfold help`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from sixfold.config.base import Config
from sixfold.config.schema import Slot, allowed, nearest, spell, spell_plain, type_tag
from sixfold.errors import Fault, RecipeError
from sixfold.recipe.recipe import Recipe

_FIELD_HEADINGS = ("setting", "default", "allowed", "description")


@dataclass(frozen=True)
class HelpTable:
    """One table of ``sixfold help``."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_record(self) -> dict[str, Any]:
        """The table as JSON: a title and one object a row."""
        return {"title": self.title, "rows": [dict(zip(self.headings, row, strict=True)) for row in self.rows]}


def describe(section: str | None) -> list[HelpTable]:
    """Describe a dotted section, a kind of it (``engine.fsdp``), one setting, or the whole recipe (None).

    Raises:
        RecipeError: there is no such section.
    """
    parts = section.split(".") if section else []
    slot, field = Slot(Recipe), None
    for depth, part in enumerate(parts):
        found = _inside(slot, part)
        if found is None:
            raise _unknown(parts, depth, slot)
        slot, field = found
    kinds = slot.kinds() or (entry.kinds() if (entry := slot.entry()) is not None else {})
    title = section or "recipe"
    if not kinds:
        assert field is not None, "only a field can be no section"
        return [HelpTable(title, _FIELD_HEADINGS, [_row(parts[-1], field)])]
    if len(kinds) == 1:
        (kind,) = kinds.values()
        return [_fields(f"{title}: {_summary(kind)}", kind, [name for name in kind.model_fields if name != "type"])]
    return _describe_kinds(title, kinds)


def _inside(slot: Slot, part: str) -> tuple[Slot, FieldInfo | None] | None:
    """What ``part`` names inside a slot: a kind, a field of a kind, or an entry of a mapping."""
    kinds = slot.kinds()
    if part in kinds:
        return Slot(kinds[part]), None
    for kind in kinds.values():
        if part in kind.model_fields:
            field = kind.model_fields[part]
            return Slot.of_field(field), field
    entry = slot.entry()
    return None if entry is None else (_inside(entry, part) or (entry, None))


def _unknown(parts: Sequence[str], depth: int, slot: Slot) -> RecipeError:
    kinds = slot.kinds()
    tags = list(kinds) if len(kinds) > 1 else []
    known = list(dict.fromkeys([*tags, *(name for kind in kinds.values() for name in kind.model_fields)]))
    suggestion = nearest(parts[depth], known)
    above = ".".join(parts[:depth])
    return RecipeError(
        Fault(
            what=f"{above or 'a recipe'} has no section or setting {parts[depth]!r}",
            where="SECTION",
            allowed=", ".join(known) or "nothing below it",
            fix=f"did you mean `{'.'.join([*parts[:depth], suggestion])}`?"
            if suggestion
            else f"`sixfold help{' ' + above if above else ''}` lists them",
        )
    )


def _describe_kinds(title: str, kinds: dict[str, type[Config]]) -> list[HelpTable]:
    """An overview of the kinds, the settings all share, then those of each."""
    overview = [(tag, _summary(kind)) for tag, kind in kinds.items()]
    names = [name for name in next(iter(kinds.values())).model_fields if name != "type"]
    shared = [n for n in names if all(_same(kind.model_fields.get(n), kinds, n) for kind in kinds.values())]
    tables = [HelpTable(f"{title}: one of these types", ("type", "description"), overview)]
    if shared:
        tables.append(_fields(f"{title}: settings of every type", next(iter(kinds.values())), shared))
    for tag, kind in kinds.items():
        own = [name for name in kind.model_fields if name not in shared and name != "type"]
        if own:
            tables.append(_fields(f"{title} with type: {tag}", kind, own))
    return tables


def _same(field: FieldInfo | None, kinds: dict[str, type[Config]], name: str) -> bool:
    first = next(iter(kinds.values())).model_fields[name]
    return field is not None and _row(name, field) == _row(name, first)


def _fields(title: str, kind: type[Config], names: Sequence[str]) -> HelpTable:
    return HelpTable(title, _FIELD_HEADINGS, [_row(name, kind.model_fields[name]) for name in names])


def _row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    return name, _default(field), allowed(Slot.of_field(field)), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Config):
        return type_tag(type(default)) or "defaults"
    return spell_plain(default) if default else spell(default)


def _summary(kind: type[Config]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
