"""The base of every configuration model: frozen, strict, and free of torch.

A *component* (network, objective, sampler, engine, ...) is configured by a :class:`Component` that stands beside the
class it configures and names it as ``"module:attribute"``. The class, and whatever heavy library it needs, is
imported only when it is built; that keeps ``sixfold show`` and ``sixfold help`` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, strict group of settings: unknown keys are refused, values are not coerced (int to float excepted).

    Every field carries ``Field(description=...)``: ``sixfold help`` and the JSON Schema are made from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, defer_build=True)


class Component(Config):
    """Settings that name the implementation they configure; subclasses add ``type: Literal["..."]``."""

    implementation: ClassVar[str]
    """Where the configured class or function stands, as ``"package.module:attribute"``."""

    def load(self) -> Any:
        """Import and return the implementation."""
        module, attribute = self.implementation.split(":")
        return getattr(import_module(module), attribute)
