"""A denoiser seen through any affine path: the one conversion by which teachers and students of all kinds understand
each other.

A network knows one path and one prediction. Asked about x = a x0 + s e on any other path, it is shown the point of its
own path with the same ratio s : a, which is x rescaled, and its answer is read as beliefs about x0 and e, which mean
the same on every path. At the ends of paths the ratio is as near as the network knows: its path's own first or last,
and, where it predicts the noise, one at which that still tells something of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.affine import AffinePath, Coefficients
from sixfold.paths.predictions import LARGEST_RATIO_FOR_NOISE, Endpoints, endpoints_of, network_input

Condition = Mapping[str, Tensor]


class _Asked(NamedTuple):
    """A question in the network's own terms: the point and coefficients of its path, and what it is shown."""

    own: Float[Tensor, "n ..."]
    at: Coefficients
    seen: tuple[Float[Tensor, "n ..."], Float[Tensor, " n"]]


@dataclass(frozen=True, kw_only=True)
class View:
    """How a denoiser's network is asked.

    Attributes:
        settings: the path, prediction and data standard deviation that the network was trained for.
        path: that path.
    """

    settings: DenoisingConfig
    path: AffinePath

    @classmethod
    def of(cls, settings: DenoisingConfig) -> View:
        """Make the view that fits a denoising objective's settings."""
        return cls(settings=settings, path=settings.path.load()(settings.path))

    def __call__(
        self,
        network: Any,
        x: Float[Tensor, "n ..."],
        alpha: Float[Tensor, " n"],
        sigma: Float[Tensor, " n"],
        condition: Condition,
    ) -> Endpoints:
        """Return what the network believes of both ends, at x = alpha x0 + sigma e of any path."""
        asked = self._asked(x, alpha, sigma)
        value = network(*asked.seen, condition).to(x.dtype)
        return endpoints_of(value, self.settings.prediction, asked.own, asked.at, self.settings.data_std)

    def with_features(
        self,
        network: Any,
        x: Float[Tensor, "n ..."],
        alpha: Float[Tensor, " n"],
        sigma: Float[Tensor, " n"],
        condition: Condition,
        *,
        read_after: Sequence[int],
    ) -> tuple[Endpoints, tuple[Float[Tensor, "n tokens width"], ...]]:
        """Return the network's beliefs, and its tokens after the given blocks."""
        asked = self._asked(x, alpha, sigma)
        value, hidden = network(*asked.seen, condition, read_after=tuple(read_after))
        kind, data_std = self.settings.prediction, self.settings.data_std
        return endpoints_of(value.to(x.dtype), kind, asked.own, asked.at, data_std), hidden

    def _asked(self, x: Float[Tensor, "n ..."], alpha: Float[Tensor, " n"], sigma: Float[Tensor, " n"]) -> _Asked:
        # Of one number a sample, in fp64: the last bit of a time would depend on how many samples are computed at once.
        alpha, sigma = alpha.double(), sigma.double()
        known = alpha
        if self.settings.prediction == "noise":
            known = torch.maximum(alpha, sigma / LARGEST_RATIO_FOR_NOISE)
        time = torch.where(sigma == 0.0, self.path.time_data, self.path.time_at(known, sigma))
        exact = self.path.coefficients(time)
        # Rates are infinite where variance-preserving paths end in data, and count for nothing there: x is the data.
        exact = exact._replace(sigma_rate=exact.sigma_rate.nan_to_num(nan=1.0, posinf=1.0))
        scale = torch.hypot(exact.alpha, exact.sigma) / torch.hypot(alpha, sigma)
        own = x * scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        at = exact.to(x)
        seen = network_input(own, time.to(x.dtype), at, self.settings.prediction, self.settings.data_std)
        return _Asked(own=own, at=at, seen=seen)

    def guided(
        self,
        network: Any,
        x: Float[Tensor, "n ..."],
        alpha: Float[Tensor, " n"],
        sigma: Float[Tensor, " n"],
        condition: Condition,
        *,
        null: Condition,
        scale: float | Float[Tensor, " n"],
    ) -> Endpoints:
        """Return beliefs under classifier-free guidance (2207.12598), in one pass over twice the samples."""
        if isinstance(scale, float) and scale == 1.0:
            return self(network, x, alpha, sigma, condition)
        both = {name: torch.cat([null[name], value]) for name, value in condition.items()}
        found = self(network, torch.cat([x, x]), torch.cat([alpha, alpha]), torch.cat([sigma, sigma]), both)
        wide = scale if isinstance(scale, float) else scale.reshape(-1, *[1] * (x.ndim - 1))
        negative, conditional = (Endpoints(*halves) for halves in zip(*(end.chunk(2) for end in found), strict=True))
        return Endpoints(*(n + wide * (c - n) for n, c in zip(negative, conditional, strict=True)))


def on_path(ends: Endpoints, alpha: Float[Tensor, " n"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """Return alpha x0 + sigma e, in the type of x0."""
    like = ends.data
    wide = (value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1)) for value in (alpha, sigma))
    return next(wide) * ends.data + next(wide) * ends.noise
