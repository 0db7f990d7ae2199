"""Turning pydantic's validation errors into faults that name the file and line, what was got and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sixfold.config.base import Config
from sixfold.config.provenance import KeyPath, Provenance, dotted
from sixfold.config.schema import Location, Slot, allowed, locate, nearest, sections_with, spell, type_tag
from sixfold.errors import Fault


def faults_of(error: ValidationError, *, root: type[Config], values: Any, provenance: Provenance) -> list[Fault]:
    """Return one fault for each key that a validation error blames, in the order of the recipe's sections.

    Args:
        error: what validating ``values`` against ``root`` raised.
        root: the configuration class.
        values: the plain values, for what was got.
        provenance: where each of them was written.
    """
    faults: dict[tuple[KeyPath, str], Fault] = {}
    missing: dict[KeyPath, list[Location]] = {}
    context = _Context(root, values, provenance)
    for details in error.errors(include_url=False, include_context=True):
        location = locate(root, details["loc"])
        if details["type"] == "missing" and location.path[-1] in location.section.model_fields:
            missing.setdefault(location.section_path, []).append(location)
            continue
        fault = _fault(details, location, context)
        faults.setdefault((location.path, fault.what), fault)  # a plain union complains once for each member
    return [*(_missing_keys(locations, context) for locations in missing.values()), *faults.values()]


class _Context:
    def __init__(self, root: type[Config], values: Any, provenance: Provenance) -> None:
        self.root, self.values, self.provenance = root, values, provenance

    def got(self, path: KeyPath) -> Any:
        node = self.values
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node[key]
        return node


def _fault(details: ErrorDetails, location: Location, context: _Context) -> Fault:
    if details["loc"][-1:] == ("[key]",):
        return _bad_name(details, location, context)
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(location, context)
        case "missing":  # an element of a list of fixed length
            return _wrong_value(details, locate(context.root, details["loc"][:-1]), context)
        case "union_tag_not_found" | "union_tag_invalid":
            return _wrong_type(location, context)
        case "value_error" | "assertion_error":
            return _broken_rule(details, location, context)
        case _:
            return _wrong_value(details, location, context)


def _unknown_key(location: Location, context: _Context) -> Fault:
    key, known = location.path[-1], list(location.section.model_fields)
    suggestion, elsewhere = nearest(key, known), sections_with(context.root, key)
    if suggestion is not None:
        fix = f"did you mean `{suggestion}`?"
    elif elsewhere:
        fix = f"move it to {' or '.join(elsewhere[:3])}"
    else:
        fix = f"remove it; {_help(location)}"
    of_type = type_tag(location.section)
    what = f"{dotted(location.path)}: unknown key" + (f" of type {of_type}" if of_type else "")
    return Fault(what=what, where=context.provenance.nearest(location.path), allowed=", ".join(known), fix=fix)


def _missing_keys(locations: Sequence[Location], context: _Context) -> Fault:
    """What one section lacks, as one fault."""
    section_path = locations[0].section_path
    prefix = f"{dotted(section_path)}." if section_path else ""
    keys = [location.path[-1] for location in locations]
    may_be = [
        f"{key}: {allowed(location.slot)}" for key, location in zip(keys, locations, strict=True) if location.slot
    ]
    return Fault(
        what=f"{', '.join(prefix + key for key in keys)} {'is' if len(keys) == 1 else 'are'} missing",
        where=context.provenance.nearest(section_path),
        allowed="; ".join(may_be),
        fix=f"add {', '.join(f'`{key}: ...`' for key in keys)}"
        + (f" to {dotted(section_path)}" if section_path else ""),
    )


def _bad_name(details: ErrorDetails, location: Location, context: _Context) -> Fault:
    pattern = details.get("ctx", {}).get("pattern", "")
    return Fault(
        what=f"{dotted(location.path)}: {location.path[-1]!r} cannot be a name",
        where=context.provenance.nearest(location.path),
        allowed=f"text matching {pattern}",
        fix="use small letters, digits and _, beginning with a letter",
    )


def _wrong_type(location: Location, context: _Context) -> Fault:
    assert location.slot is not None, "pydantic reports only fields of a union as untagged"
    tags, got = list(location.slot.kinds()), context.got(location.path)
    tag, key = (got.get("type"), dotted((*location.path, "type"))) if isinstance(got, dict) else (None, "")
    if isinstance(got, str):  # a name that stands for a section of that type
        what, where = f"{dotted(location.path)}: got {spell(got)}", context.provenance.nearest(location.path)
        suggestion = nearest(got, tags)
    elif tag is None:
        what = f"{key or dotted(location.path)} is missing" if key else f"{dotted(location.path)}: got {spell(got)}"
        where, suggestion = context.provenance.nearest(location.path), None
    else:
        what, where = f"{key}: got {spell(tag)}", context.provenance.nearest((*location.path, "type"))
        suggestion = nearest(str(tag), tags)
    fix = f"did you mean `{suggestion}`?" if suggestion else f"write `type: {tags[0]}`, or another of the allowed types"
    return Fault(what=what, where=where, allowed=", ".join(tags), fix=fix)


def _broken_rule(details: ErrorDetails, location: Location, context: _Context) -> Fault:
    """A sentence of a model's own check, ``expected, got; what to change``; the keys it names tell the line."""
    raised = details.get("ctx", {}).get("error")
    sentence = str(raised) if raised is not None else details["msg"]
    what, semicolon, fix = sentence.rpartition("; ")
    section = next(iter(location.slot.kinds().values()), None) if location.slot is not None else None
    mentions = {
        key: re.search(rf"\b{key}\b", sentence) for key in (section.model_fields if section is not None else ())
    }
    named = sorted((found.start(), (*location.path, key)) for key, found in mentions.items() if found is not None)
    written = [path for _, path in named if path in context.provenance.places]
    where = context.provenance.nearest(written[0] if written else location.path)
    prefix = f"{dotted(location.path)}: " if location.path else ""
    return Fault(
        what=prefix + (what if semicolon else sentence), where=where, fix=fix if semicolon else _help(location)
    )


def _wrong_value(details: ErrorDetails, location: Location, context: _Context) -> Fault:
    got = context.got(location.path)
    may_be = details["msg"] if location.slot is None else allowed(location.slot)
    return Fault(
        what=f"{dotted(location.path) or 'the recipe'}: got {spell(got)}",
        where=context.provenance.nearest(location.path),
        allowed=may_be,
        fix=_fix_value(got, location),
    )


def _fix_value(got: Any, location: Location) -> str:
    """Guess what was meant from what was got; the help of the section otherwise."""
    slot = location.slot or Slot(Any)
    accepted = [member.annotation for member in slot.members()]
    fix = f"write an allowed value; {_help(location)}"
    if isinstance(got, float) and int in accepted and got.is_integer():
        fix = f"write `{int(got)}`, an integer"
    elif isinstance(got, str) and str not in accepted:
        suggestion = nearest(got, [str(value) for value in _literals(slot)])
        if suggestion is not None:
            fix = f"did you mean `{suggestion}`?"
        elif bool in accepted:
            fix = "write `true` or `false`"
        elif _is_number(got):
            fix = f"write `{got}` without quotes"
    elif isinstance(got, int | float) and accepted == [str]:
        fix = f'put it in quotes: "{got}"'
    if slot.entry() is not None and not isinstance(got, list | dict):
        fix = f"write it in brackets: [{got}]"
    return fix


def _literals(slot: Slot) -> Sequence[Any]:
    return [value for m in slot.members() if not isinstance(m.annotation, type) for value in get_args(m.annotation)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _help(location: Location) -> str:
    """The command that describes the section of a location."""
    tag = type_tag(location.section)
    path = location.section_path
    if path[:1] == ("networks",) and tag is not None:
        path = ("networks",)
    section = dotted((*path, tag) if tag is not None else path)
    return f"`sixfold help{' ' + section if section else ''}` describes the settings"
