"""The log of a denoiser's expected loss, a cosine series over the log of the noise-to-signal ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sixfold.models.network import Network, ParameterTag, constant, parameter
from sixfold.models.noise_uncertainty.config import NoiseUncertaintyConfig

_RANGE = 10.0
"""Of ln(sigma / alpha): beyond it, where data or noise are practically pure, the loss no longer changes."""


class NoiseUncertainty(Network):
    """u(r) = b + sum_k w_k cos(pi k s), where s runs from 0 to 1 over the range of ln r.

    EDM2 takes random Fourier features of ln(sigma) / 4; a cosine series over a bounded range needs no random table. All
    weights start at zero, so that training starts with the plain loss.
    """

    def __init__(self, config: NoiseUncertaintyConfig) -> None:
        super().__init__()
        self.weight = parameter(config.frequencies, tag=ParameterTag(init="constant", scale=0.0))
        self.bias = parameter(1, tag=constant(0.0))

    def forward(self, log_ratio: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return u at ln(sigma / alpha), which may be infinite."""
        place = (log_ratio.float().clamp(-_RANGE, _RANGE) + _RANGE) / (2.0 * _RANGE)
        order = torch.arange(1, len(self.weight) + 1, device=place.device, dtype=place.dtype)
        return torch.cos(math.pi * place[:, None] * order) @ self.weight.float() + self.bias.float()

    def blocks(self) -> Iterator[nn.Module]:
        """None: it is too small to be sharded by parts."""
        return iter(())

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """One product a sample."""
        return 2.0 * batch_fields["image"][0] * len(self.weight)
