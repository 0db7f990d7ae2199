"""Guidance: combining conditional and unconditional predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.samplers.config import CFGConfig, GuidanceConfig

Denoiser = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``(x [n, ...], time [n], condition) -> prediction [n, ...]``."""


def classifier_free(
    unconditional: Float[Tensor, "..."], conditional: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """Return u + scale (c - u) (2207.12598).

    The weights add up to one, so that guiding velocities, noise, data or scores made at the same x is all the same.
    """
    return unconditional + scale * (conditional - unconditional)


def guides_at(config: GuidanceConfig, time: float) -> bool:
    """Tell whether guidance changes the prediction at this path time."""
    if not isinstance(config, CFGConfig) or config.scale == 1.0:
        return False
    return (config.low is None or time >= config.low) and (config.high is None or time <= config.high)


def guided(
    denoiser: Denoiser,
    x: Float[Tensor, "n ..."],
    time: Float[Tensor, " n"],
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    scale: float,
) -> Float[Tensor, "n ..."]:
    """Return the guided prediction from one forward pass over both halves."""
    both = {name: torch.cat([null[name], value]) for name, value in condition.items()}
    unconditional, conditional = denoiser(torch.cat([x, x]), torch.cat([time, time]), both).float().chunk(2)
    return classifier_free(unconditional, conditional, scale)
