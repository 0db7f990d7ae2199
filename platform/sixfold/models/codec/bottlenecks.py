"""What stands between encoder and decoder: a Gaussian posterior, or rounding. All of it in fp32.

A bottleneck is called as ``bottleneck(features, noise)`` and returns a dict: ``latents`` for the decoder, with
gradients, and whatever its objective needs.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.codec.config import FSQConfig, KLConfig
from sixfold.models.network import OwnsBuffers
from sixfold.models.precision import full_precision

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Bounds of a posterior's log-variance: beyond them its exponential is useless in fp32."""


class KLBottleneck(nn.Module):
    """z = mean + exp(log_variance / 2) * noise, the reparameterised posterior (arXiv 1312.6114, section 2.4)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()

    def forward(
        self, features: Float[Tensor, "n twice h w"], noise: Float[Tensor, "n c h w"] | None = None
    ) -> dict[str, Tensor]:
        """Return ``latents`` (the mean where no noise is given), ``mean``, ``log_variance`` and ``kl`` ``[n]``.

        ``kl`` is the divergence from the standard normal, summed over latents: (m^2 + e^v - 1 - v) / 2.
        """
        with full_precision(features):
            mean, log_variance = features.float().chunk(2, dim=1)
            mean = mean.clone()  # hooks of sharding must not be handed a view
            log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
            latents = mean if noise is None else torch.addcmul(mean, torch.exp(0.5 * log_variance), noise)
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
            kl = divergence.flatten(1).sum(1)
        return {"latents": latents, "mean": mean, "log_variance": log_variance, "kl": kl}


class FSQBottleneck(OwnsBuffers):
    """Every channel squashed into its levels and rounded, with the gradient of the squashing alone (2309.15505).

    Latents are the levels scaled into [-1, 1]; a code is their mixed-radix number, the first channel counting least.
    """

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.levels = list(config.levels)
        self.half_width: Tensor
        self.offset: Tensor
        self.basis: Tensor
        self.register_buffer("half_width", torch.empty(len(self.levels), 1, 1), persistent=False)
        self.register_buffer("offset", torch.empty(len(self.levels), 1, 1), persistent=False)
        self.register_buffer("basis", torch.empty(len(self.levels), 1, 1, dtype=torch.int64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recompute what follows from the levels."""
        levels = torch.tensor(self.levels)[:, None, None]
        # a little beyond the outermost levels, so that these can be reached
        self.half_width.copy_((levels - 1) * (1.0 + 1e-3) / 2.0)
        self.offset.copy_(0.5 * (levels % 2 == 0))
        self.basis.copy_(torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))])[:, None, None])

    def forward(
        self, features: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"] | None = None
    ) -> dict[str, Tensor]:
        """Return ``latents`` and ``codes`` ``[n, h, w]``; noise is ignored."""
        with full_precision(features):
            # an even number of levels has none at 0: shifted by half, so that the input 0 lies on a level
            shift = torch.atanh(self.offset / self.half_width)
            bounded = torch.tanh(features.float() + shift) * self.half_width - self.offset
            rounded = bounded + (bounded.round() - bounded).detach()
            latents = rounded / self._half_levels()
        return {"latents": latents, "codes": self.codes_of(latents.detach())}

    def codes_of(self, latents: Float[Tensor, "n c h w"]) -> Int64[Tensor, "n h w"]:
        """Return the codes of latents."""
        digits = (latents * self._half_levels()).round().long() + self._half_levels().long()
        return (digits * self.basis).sum(1)

    def look_up(self, codes: Int64[Tensor, "n h w"]) -> Float[Tensor, "n c h w"]:
        """Return the latents of codes."""
        levels = torch.tensor(self.levels, device=codes.device)[:, None, None]
        digits = codes[:, None] // self.basis % levels
        return (digits - self._half_levels().long()) / self._half_levels()

    def _half_levels(self) -> Float[Tensor, "c 1 1"]:
        return torch.ceil(self.half_width + self.offset - 0.5).clamp(min=1.0)
