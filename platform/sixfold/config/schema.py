"""Reading the types of configuration models: which keys a section has, which kinds it comes in, what a value may be.

Error messages, ``sixfold help`` and nearest-key suggestions are all made from here, so they never disagree.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sixfold.config.base import Config

_BOUNDS = (("ge", "from {}"), ("gt", "greater than {}"), ("le", "up to {}"), ("lt", "less than {}"))
_SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    Any: "anything",
}


@dataclass(frozen=True)
class Slot:
    """The type of a value and what constrains it, as one field declares them."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    @classmethod
    def of_field(cls, field: FieldInfo) -> Slot:
        """The slot of a model's field."""
        return cls(field.annotation, tuple(field.metadata)).unwrapped()

    def unwrapped(self) -> Slot:
        """Move the metadata of ``Annotated`` into the slot."""
        if get_origin(self.annotation) is not Annotated:
            return self
        inner, *metadata = get_args(self.annotation)
        flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return Slot(inner, (*self.metadata, *flat)).unwrapped()

    def members(self) -> list[Slot]:
        """The alternatives of a union (itself, when it is none); bounds of the whole apply to each."""
        if get_origin(self.annotation) in (Union, types.UnionType):
            return [m for arg in get_args(self.annotation) for m in Slot(arg, self.metadata).unwrapped().members()]
        return [self]

    def kinds(self) -> dict[str, type[Config]]:
        """The configuration classes that may stand here, by their ``type`` (by class name where they have none)."""
        classes = [m.annotation for m in self.members() if isinstance(m.annotation, type)]
        return {type_tag(cls) or cls.__name__: cls for cls in classes if issubclass(cls, Config)}

    def entry(self) -> Slot | None:
        """The slot of each entry of a mapping or list, if this is one."""
        for member in self.members():
            arguments = get_args(member.annotation)
            if get_origin(member.annotation) is dict:
                return Slot(arguments[1]).unwrapped()
            if get_origin(member.annotation) in (list, tuple):
                return Slot(arguments[0]).unwrapped()
        return None


def type_tag(cls: type[Config]) -> str | None:
    """The value of ``type`` that selects a configuration class, if it has one."""
    field = cls.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field is not None and get_origin(field.annotation) is Literal else None


def allowed(slot: Slot) -> str:
    """Say in words what a value may be: ``an integer from 1``, ``one of: auto, fp32, bf16``, ``null, or a number``."""
    kinds = slot.kinds()
    words = [_allowed_member(m) for m in slot.members() if m.annotation not in kinds.values()]
    if kinds:
        tags = [tag for tag, cls in kinds.items() if type_tag(cls) is not None]
        words.insert(0, f"a section of type {', '.join(tags)}" if len(tags) > 1 else "a section")
    return ", or ".join(words)


def _allowed_member(slot: Slot) -> str:
    annotation, origin = slot.annotation, get_origin(slot.annotation)
    if origin is Literal:
        return "one of: " + ", ".join(spell(value).strip("'") for value in get_args(annotation))
    if origin is dict:
        return f"a mapping of names to {allowed(Slot(get_args(annotation)[1]).unwrapped())}"
    if origin in (list, tuple):
        return _allowed_list([arg for arg in get_args(annotation) if arg is not Ellipsis], annotation)
    words = _SCALARS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return f"{words} {' and '.join(_bounds(slot))}".rstrip()


def _allowed_list(arguments: Sequence[Any], annotation: Any) -> str:
    words = [allowed(Slot(arg).unwrapped()) for arg in arguments]
    if get_origin(annotation) is list or Ellipsis in get_args(annotation):
        return f"a list, each {words[0]}"
    if len(set(words)) == 1:
        return f"a list of {len(words)}, each {words[0]}"
    return f"a list of {len(words)}: " + "; ".join(words)


def _bounds(slot: Slot) -> Iterator[str]:
    for name, template in _BOUNDS:
        values = [getattr(item, name) for item in slot.metadata if getattr(item, name, None) is not None]
        if values and slot.annotation in (int, float):
            yield template.format(spell(values[0]))
    for item in slot.metadata:
        if getattr(item, "pattern", None) is not None and slot.annotation is str:
            yield f"matching {item.pattern}"
        if getattr(item, "multiple_of", None) is not None:
            yield f"divisible by {item.multiple_of}"
        if getattr(item, "min_length", None) and slot.annotation is str:
            yield "that is not empty" if item.min_length == 1 else f"of at least {item.min_length} characters"


def spell(value: Any) -> str:
    """Write a value as it would stand in a recipe, shortened to fit a line."""
    match value:
        case None:
            spelled = "null"
        case bool():
            spelled = str(value).lower()
        case float():
            spelled = f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case str():
            spelled = repr(value if len(value) <= 60 else value[:57] + "...")
        case dict():
            spelled = f"a mapping of {', '.join(map(str, value))}"[:80] if value else "{}"
        case list() | tuple():
            items = ", ".join(spell(item) for item in value)
            spelled = f"[{items}]" if len(items) <= 60 else f"a list of {len(value)}"
        case _:
            spelled = str(value)
    return spelled


def spell_plain(value: Any) -> str:
    """As :func:`spell`, text without quotes: for tables."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(spell_plain(item) for item in value)}]"
    return spell(value)


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate that ``word`` was probably meant to be, if any is close."""
    close = get_close_matches(word.lower(), [c.lower() for c in candidates], n=1, cutoff=0.6)
    return next((c for c in candidates if close and c.lower() == close[0]), None)


@dataclass(frozen=True)
class Location:
    """Where a validation error points, once the labels that pydantic adds for union members are taken out.

    Attributes:
        path: the keys as the recipe writes them.
        section: the configuration class in which the last key was looked up.
        section_path: the keys of that section.
        slot: the type of the value, or None where the key is unknown.
    """

    path: tuple[str, ...]
    section: type[Config]
    section_path: tuple[str, ...]
    slot: Slot | None


def locate(root: type[Config], labels: Sequence[str | int]) -> Location:
    """Follow a pydantic error location from ``root`` and tell keys from union labels."""
    here = Location((), root, (), Slot(root))
    for label in labels:
        if here.slot is None:
            break
        here = _follow(here, here.slot, str(label))
    return here


def _follow(here: Location, slot: Slot, label: str) -> Location:
    kinds = slot.kinds()
    if label == "[key]":
        return here  # pydantic's label for a mapping's key, which is the last of the path already
    if len(kinds) > 1:
        # a discriminated union: pydantic names the chosen kind before the key inside it
        chosen = kinds.get(label)
        return here if chosen is None else Location(here.path, chosen, here.path, Slot(chosen))
    for section in kinds.values():
        path = (*here.path, label)
        field = section.model_fields.get(label)
        return Location(path, section, here.path, None if field is None else Slot.of_field(field))
    entry = slot.entry()
    return here if entry is None else Location((*here.path, label), here.section, here.section_path, entry)


def sections_with(root: type[Config], key: str, *, depth: int = 3) -> list[str]:
    """Dotted names of the sections below ``root`` that have a field ``key``: where a misplaced key may belong."""
    found: list[str] = []
    for name, field in root.model_fields.items():
        slot = Slot.of_field(field)
        for tag, section in slot.kinds().items():
            many = len(slot.kinds()) > 1
            if key in section.model_fields:
                found.append(f"{name} (type: {tag})" if many else name)
            if depth > 1:
                found.extend(f"{name}.{inner}" for inner in sections_with(section, key, depth=depth - 1))
    return list(dict.fromkeys(found))


def with_default_types(values: Any, slot: Slot) -> Any:
    """Write the default's ``type`` into sections without one: ``engine: {micro_batch: 8}`` means the default engine.

    Values that do not fit the schema pass unchanged; validation reports them.
    """
    entry = slot.entry()
    if isinstance(values, list):
        return values if entry is None else [with_default_types(value, entry) for value in values]
    if not isinstance(values, dict):
        return values
    kinds = slot.kinds()
    kind = next(iter(kinds.values())) if len(kinds) == 1 else kinds.get(str(values.get("type")))
    if kind is None:
        return values if entry is None else {key: with_default_types(value, entry) for key, value in values.items()}
    return {key: _with_default_type(value, kind.model_fields.get(key)) for key, value in values.items()}


def _with_default_type(value: Any, field: FieldInfo | None) -> Any:
    if field is None:
        return value
    slot = Slot.of_field(field)
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, dict) and "type" not in value and len(slot.kinds()) > 1 and isinstance(default, Config):
        value = {"type": type_tag(type(default)), **value}
    return with_default_types(value, slot)
