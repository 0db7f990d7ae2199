"""A moving average of any length, reconstructed after training from snapshots of a few (EDM2, 2312.02696, section 3.2).

A power average after t updates is the integral of the parameters' trajectory against the profile
p(x; t, g) = (g + 1) x^g / t^(g + 1) on [0, t]. The wanted profile is approximated by a sum of the kept ones, in the
sense of least squares; the same sum of the averages approximates the wanted average. All of it is in float64: the
equations are nearly singular, and their solutions large and of both signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from sixfold.engine.averaging import exponent_of


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How a power average weighs the past: after so many updates, with a relative standard deviation of ``width``."""

    updates: int
    width: float


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A wanted profile as a sum of kept ones.

    Attributes:
        weights: of the kept averages.
        error: norm of what the sum leaves of the wanted profile, relative to the profile's own.
    """

    weights: Float64[Tensor, " n"]
    error: float


def reconstruct(kept: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Solve for the weights of the kept averages that come nearest to the wanted one.

    Args:
        kept: profiles whose averages are at hand, at least one.
        wanted: the profile to approximate; its end should not lie beyond the last kept one.
    """
    inner = _inner_products(kept, kept)
    target = _inner_products(kept, [wanted])[:, 0]
    # Profiles of one width at neighbouring steps are nearly parallel: tiny singular values are noise.
    weights = torch.linalg.lstsq(inner, target, rcond=1e-14, driver="gelsd").solution
    norm = _inner_products([wanted], [wanted])[0, 0]
    left = (norm - 2.0 * weights @ target + weights @ inner @ weights).clamp(min=0.0)
    return Reconstruction(weights=weights, error=float((left / norm).sqrt()))


def _inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Float64[Tensor, "n m"]:
    """Return the integral of each product of two profiles, over the steps that they share."""
    end_a, g_a = (values[:, None] for values in _tensors(first))
    end_b, g_b = (values[None, :] for values in _tensors(second))
    shared = torch.minimum(end_a, end_b)
    ratio = (shared / end_a) ** g_a * (shared / end_b) ** g_b / torch.maximum(end_a, end_b)
    return (g_a + 1.0) * (g_b + 1.0) / (g_a + g_b + 1.0) * ratio


def _tensors(profiles: Sequence[Profile]) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    ends = torch.tensor([profile.updates for profile in profiles], dtype=torch.float64)
    return ends, torch.tensor([exponent_of(profile.width) for profile in profiles], dtype=torch.float64)
