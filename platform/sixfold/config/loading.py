"""YAML with places: every node knows its file and line, and plain scalars mean what they look like.

Scalars follow YAML 1.2's core schema instead of PyYAML's 1.1: ``1e-4`` is a float, ``no``, ``yes``, ``on`` and ``off``
are text, ``1:30`` and ``2024-01-01`` are text. Digits may be grouped as in ``1_000_000``. Anchors, aliases and merge
keys work; a key written twice is a fault, never a silent choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sixfold.config.provenance import KeyPath, Layer, Place, display_path, dotted
from sixfold.errors import Fault

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_RULES: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)


def _implicit_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_characters in _RULES:
        for first in first_characters:
            entry = (f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"))
            resolvers.setdefault("" if first == "\0" else first, []).append(entry)
    return resolvers


IMPLICIT_RESOLVERS = _implicit_resolvers()
"""Which plain scalars are not text; reading and writing share it, so that what is dumped is read back unchanged."""


_MERGE_KEY = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = IMPLICIT_RESOLVERS


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": lambda text: _float(text.lower()),
    "str": str,
}


class _Construction:
    """Turns one composed document into plain values, noting the place of every node and every fault it meets."""

    def __init__(self, place_of: Callable[[yaml.Node], Place]) -> None:
        self.place_of = place_of
        self.places: dict[KeyPath, Place] = {}
        self.faults: list[Fault] = []
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the plain value of ``node``, which stands at ``path``."""
        self.places[path] = self.place_of(node)
        if id(node) in self._open:
            return self._fault(node, f"the anchor at {dotted(path)} contains itself", fix="write the value out")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.Node) -> Any:
        construct = _SCALARS.get(node.tag.removeprefix("tag:yaml.org,2002:"))
        try:
            if construct is not None:
                return construct(node.value)
        except ValueError:
            pass  # "!!int abc": the same fault as a tag that is not known
        return self._fault(
            node, f"the tag {node.tag} does not apply to {node.value!r}", fix="remove the tag; recipes are plain YAML"
        )

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        inherited: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, "a key must be text, got a list or mapping", fix="write a plain word as key")
            elif key_node.tag == _MERGE_KEY:
                inherited.append((key_node, value_node))
            elif key_node.value in first:
                line = self.place_of(first[key_node.value]).line
                self._fault(
                    key_node,
                    f"{dotted((*path, key_node.value))} is written twice, first on line {line}",
                    fix="keep one of the two",
                )
            else:
                first[key_node.value] = key_node
                result[key_node.value] = self.value(value_node, (*path, key_node.value))
                self.places[(*path, key_node.value)] = self.place_of(key_node)
        for key_node, value_node in inherited:
            self._inherit(result, key_node, value_node, path)
        return result

    def _inherit(self, result: dict[str, Any], key_node: yaml.Node, value_node: yaml.Node, path: KeyPath) -> None:
        """Add the entries of a merge key (``<<: *anchor``) that the mapping itself does not write."""
        sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode) or id(source) in self._open:
                self._fault(key_node, "<< needs another mapping's alias", fix="write <<: *name of an anchored mapping")
                continue
            inner = _Construction(self.place_of)
            inner._open = self._open
            for key, value in inner._mapping(source, path).items():
                if key not in result:
                    result[key] = value
                    prefix = (*path, key)
                    self.places.update({p: at for p, at in inner.places.items() if p[: len(prefix)] == prefix})
            self.faults.extend(inner.faults)

    def _fault(self, node: yaml.Node, what: str, *, fix: str) -> None:
        self.faults.append(Fault(what=what, where=str(self.place_of(node)), fix=fix))


def _syntax_fault(error: yaml.YAMLError, source: str) -> Fault:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = source if mark is None else f"{source}:{mark.line + 1}"
    problem = " ".join(str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    return Fault(
        what=f"this is not YAML: {problem or getattr(error, 'reason', error)}",
        where=where,
        fix="check the indentation, brackets, quotes and colons of this line and the one before it",
    )


def parse_yaml(text: str, source: str) -> tuple[Layer, list[Fault]]:
    """Parse a YAML mapping named ``source``; what could be read is returned beside the faults that were met."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        return Layer(), [_syntax_fault(error, source)]
    if node is None:
        return Layer(), []
    if not isinstance(node, yaml.MappingNode):
        fault = Fault(
            what="a recipe is a mapping of sections, got something else",
            where=f"{source}:{node.start_mark.line + 1}",
            fix="write `name: ...`, `data: ...` and so on, each on a line of its own",
        )
        return Layer(), [fault]
    construction = _Construction(lambda at: Place(source, at.start_mark.line + 1))
    values = construction.value(node, ())
    return Layer(values, construction.places), construction.faults


def parse_value(text: str, place: Place, path: KeyPath) -> tuple[Any, dict[KeyPath, Place], list[Fault]]:
    """Parse the value of an override, by the same rules as a file's; every node of it has ``place``."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        return None, {}, [Fault(what=_syntax_fault(error, "").what, where=str(place), fix="quote the value")]
    if node is None:
        return None, {path: place}, []
    construction = _Construction(lambda at: place)
    return construction.value(node, path), construction.places, construction.faults


def read_yaml(path: Path) -> tuple[Layer, list[Fault]]:
    """Read and parse one YAML file; its bases are not followed."""
    source = display_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fault = Fault(what=f"cannot be read: {error.strerror or error}", where=source, fix="give a readable YAML file")
        return Layer(), [fault]
    except UnicodeDecodeError:
        return Layer(), [Fault(what="is not UTF-8 text", where=source, fix="save the file as UTF-8")]
    return parse_yaml(text, source)
