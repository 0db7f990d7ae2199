"""Writing YAML that :mod:`sixfold.config.loading` reads back to equal values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sixfold.config.loading import IMPLICIT_RESOLVERS


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = IMPLICIT_RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True  # two settings that happen to share a value stay independent lines


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    inline = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=inline)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # a plain or single-quoted scalar folds Unicode's line breaks away; a double-quoted one escapes them
    folds = any(character in text for character in "\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if folds else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Spell plain values as block YAML in their own order, lists of scalars inline."""
    text: str = yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120
    )
    return text
