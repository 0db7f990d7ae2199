"""Guidance: pushing the conditional prediction away from a worse one.

Every guidance is n + scale (c - n) with a *negative* n: the unconditional prediction (classifier-free), that prediction
fitted to the conditional one (CFG-Zero*), or a weaker network's (autoguidance). Relative to c that is a push of
(scale - 1)(c - n); pushes of several guidances add up, each within its own interval of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.distributed.collectives import any_rank
from sixfold.paths.affine import AffinePath
from sixfold.samplers.config import (
    AutoguidanceConfig,
    CFGConfig,
    CFGZeroConfig,
    CombinedGuidanceConfig,
    GuidanceConfig,
    NoGuidanceConfig,
    SingleGuidanceConfig,
)

Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``(x [n, ...], path time [n], condition) -> prediction [n, ...]``, in the kind that the objective trains."""


def parts_of(config: GuidanceConfig) -> Sequence[SingleGuidanceConfig]:
    """Return the guidances that act: those whose scale is not 1."""
    match config:
        case NoGuidanceConfig():
            return ()
        case CombinedGuidanceConfig():
            parts: Sequence[SingleGuidanceConfig] = config.parts
        case CFGConfig() | CFGZeroConfig() | AutoguidanceConfig():
            parts = (config,)
        case _:
            assert_never(config)
    return [part for part in parts if part.scale != 1.0 or isinstance(part, CFGZeroConfig)]


def needs_guide(config: GuidanceConfig) -> bool:
    """Tell whether a weaker network is asked for."""
    return any(isinstance(part, AutoguidanceConfig) for part in parts_of(config))


def classifier_free(
    negative: Float[Tensor, "..."], conditional: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """Return n + scale (c - n) (2207.12598).

    The weights add up to one, so that guiding velocities, noise, data or scores made at the same x is all the same.
    """
    return negative + scale * (conditional - negative)


def fitted(negative: Float[Tensor, "n ..."], conditional: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Return the multiple s n that is nearest to c, sample by sample: s = <c, n> / |n|^2 (2503.18886, eq. 8)."""
    dims = tuple(range(1, negative.ndim))
    product = (conditional * negative).sum(dims, keepdim=True)
    return negative * product / negative.square().sum(dims, keepdim=True).clamp(min=1e-8)


@dataclass(frozen=True, kw_only=True)
class Guided:
    """Predictions under guidance.

    Attributes:
        config: which guidance.
        path: tells which times a fraction of the interval means.
        predict: the trained network.
        guide: the weaker network, where one is needed; called under the same condition.
        condition: one value a sample.
        null: the same, absent.
    """

    config: GuidanceConfig
    path: AffinePath
    predict: Predict
    guide: Predict | None
    condition: Mapping[str, Tensor]
    null: Mapping[str, Tensor]

    def __call__(self, x: Float[Tensor, "n ..."], time: Float[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        """Return the guided prediction at ``x`` and path times."""
        acting = [(part, inside) for part in parts_of(self.config) if _anywhere(inside := interval(part, time), part)]
        if not acting:
            return self.predict(x, time, self.condition)
        unconditional = None
        if any(not isinstance(part, AutoguidanceConfig) for part, _ in acting):
            both = {name: torch.cat([self.null[name], value]) for name, value in self.condition.items()}
            unconditional, conditional = self.predict(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        else:
            conditional = self.predict(x, time, self.condition)
        push = torch.zeros_like(conditional)
        for part, inside in acting:
            negative = self._negative(part, x, time, unconditional, conditional)
            change = classifier_free(negative, conditional, part.scale) - conditional
            push = push + torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), change, 0.0)
        return conditional + push

    def resting(self, time: Float[Tensor, " n"]) -> Bool[Tensor, " n"] | None:
        """Return at which times x is not to move (CFG-Zero*'s start); None where that is nowhere."""
        fraction = max(
            (part.zero_fraction for part in parts_of(self.config) if isinstance(part, CFGZeroConfig)), default=0.0
        )
        if fraction == 0.0:
            return None
        interval = self.path.time_noise - self.path.time_data
        return time > self.path.time_noise - fraction * interval

    def _negative(
        self, part: SingleGuidanceConfig, x: Tensor, time: Tensor, unconditional: Tensor | None, conditional: Tensor
    ) -> Tensor:
        match part:
            case AutoguidanceConfig():
                assert self.guide is not None, "the sampler's constructor refuses autoguidance without a guide"
                return self.guide(x, time, self.condition)
            case CFGConfig():
                assert unconditional is not None
                return unconditional
            case CFGZeroConfig():
                assert unconditional is not None
                return fitted(unconditional, conditional)
        assert_never(part)


def interval(config: SingleGuidanceConfig, time: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Tell at which path times a guidance acts."""
    inside = torch.ones_like(time, dtype=torch.bool)
    if config.low is not None:
        inside &= time >= config.low
    if config.high is not None:
        inside &= time <= config.high
    return inside


def _anywhere(inside: Bool[Tensor, " n"], config: SingleGuidanceConfig) -> bool:
    """Whether any sample of any rank is inside: sharded networks need all ranks to compute alike."""
    return (config.low is None and config.high is None) or any_rank(bool(inside.any()))
