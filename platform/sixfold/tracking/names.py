"""Fits a run's names and values to what MLflow accepts, each on its own, so that one bad name never costs a batch.

Names may hold letters, digits and ``_ - . space : /`` and must be a clean relative path of at most 250 characters; a
parameter's value has at most 6000 characters, a tag's 8000.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

NAME_LIMIT = 250
PARAMETER_LIMIT = 6000
TAG_LIMIT = 8000

_FORBIDDEN = re.compile(r"[^\w\-. :/]+")
_IMAGE_KEY_FORBIDDEN = re.compile(r"[^A-Za-z0-9_\-./ ]+")
_CREDENTIALS_IN_URL = re.compile(r"(://)[^/@\s]+@")
_SECRET_WORD = r"(?:token|secret|password|passwd|api[_-]?key|credentials?)"
_SECRET_ASSIGNMENT = re.compile(rf"(?i)(--[\w-]*{_SECRET_WORD}\s+|[\w.-]*{_SECRET_WORD}=)\S+")


def metric_name(name: str) -> str:
    """Return the nearest acceptable name: forbidden characters become ``_``, empty and dotted path parts vanish."""
    parts = [part for part in _FORBIDDEN.sub("_", name).split("/") if part.strip(". ")]
    return _shortened("/".join(parts) or "_", NAME_LIMIT)


def image_key(key: str) -> str:
    """Return the nearest key that MLflow's image grid accepts (ASCII, no colon)."""
    return _IMAGE_KEY_FORBIDDEN.sub("_", metric_name(key))


class NameMap:
    """Gives every metric of a run an acceptable name of its own: two names that would become equal stay apart."""

    def __init__(self) -> None:
        self._original: dict[str, str] = {}
        self._accepted: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._accepted:
            accepted = metric_name(name)
            if self._original.setdefault(accepted, name) != name:
                accepted = _shortened(f"{accepted[: NAME_LIMIT - 9]}_{_digest(name)}", NAME_LIMIT)
            self._accepted[name] = accepted
        return self._accepted[name]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to ``{"networks.denoiser.width": "128"}``; lists become JSON; credentials are blanked."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple | Mapping):
            flat[name] = redact(json.dumps(value, default=str))
        else:
            flat[name] = redact(f"{name}={value}").removeprefix(f"{name}=")
    return flat


def parameter_value(value: str) -> str:
    """Cut a value to what a parameter may hold, and say so in it."""
    return _cut(value, PARAMETER_LIMIT, "see recipe.yaml")


def tag_value(value: str) -> str:
    """Cut a value to what a tag may hold, and say so in it."""
    return _cut(value, TAG_LIMIT, "see the run folder")


def redact(text: str) -> str:
    """Blank credentials: ``user:password@`` in URLs, and what follows ``token=``, ``--password`` and their like."""
    return _SECRET_ASSIGNMENT.sub(r"\1***", _CREDENTIALS_IN_URL.sub(r"\1***@", text))


def _cut(value: str, limit: int, where: str) -> str:
    if len(value) <= limit:
        return value
    note = f" ... [cut from {len(value)} characters; {where}]"
    return value[: limit - len(note)] + note


def _shortened(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 9]}_{_digest(name)}"


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
