"""Vector quantisation: latents become the nearest of a learned set of vectors (arXiv 1711.00937). All of it in fp32.

The codebook learns by a loss, as parameters, or as moving averages of the latents assigned to each code (the paper's
appendix A.1), as buffers. The averages are updated once per optimizer step from sums over the global batch, so that
they do not depend on how the batch was divided.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.codec.config import VQConfig
from sixfold.models.network import OwnsBuffers, ParameterTag, parameter
from sixfold.models.precision import full_precision

_PRIORITY_POWER = 4.0
"""Offers weigh u^-4 for a uniform u: of several for one code, the one with the smallest u outweighs the rest."""

_JITTER = 0.05
"""How far, relative to itself, a moved code lands from its latent: blank regions offer the same latent many times, and
between equal codes rounding would choose."""

_SMALLEST_SHARE = 1e-5


class VectorQuantizer(OwnsBuffers):
    """The codebook, and the map of latents to its vectors."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        if config.codebook == "loss":
            self.vectors = parameter(config.codes, config.channels, tag=ParameterTag(init="normal", scale=1.0))
            return
        self.share: Tensor
        self.weighted: Tensor
        self.register_buffer("share", torch.empty(config.codes))
        self.jitter: Tensor
        self.register_buffer("weighted", torch.empty(config.codes, config.channels))
        self.register_buffer("jitter", torch.empty(config.codes, config.channels), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Begin with unused codes at fixed random places: the first updates move them to latents of their batches."""
        if self.config.codebook == "ema":
            share = self.config.revive_below / 2.0 if self.config.revive_below else 1.0
            generator = torch.Generator().manual_seed(0)
            self.share.fill_(share)
            self.weighted.copy_(share * torch.randn(self.weighted.shape, generator=generator, device="cpu"))
            self.jitter.copy_(1.0 + _JITTER * torch.randn(self.jitter.shape, generator=generator, device="cpu"))

    def forward(
        self, features: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"] | None = None
    ) -> dict[str, Tensor]:
        """Return ``latents``, ``codes`` ``[n, h, w]`` and losses ``[n]``; noise is ignored.

        ``latents`` are the nearest vectors e, with the gradient passed straight through to the features z.
        ``commitment`` is mean |z - sg(e)|^2 and, where the codebook learns by a loss, ``codebook`` mean |sg(z) - e|^2.
        ``features`` are z and ``error`` ``[n, h, w]`` their squared distances, for :func:`assignment_statistics`.
        """
        with full_precision(features):
            z = features.float()
            codes = nearest(z.detach(), self.codebook().detach())
            e = self.look_up(codes)
            result = {"latents": z + (e - z).detach(), "codes": codes, "features": z.detach()}
            difference = z - e.detach()
            result["commitment"] = difference.square().flatten(1).mean(1)
            result["error"] = difference.detach().square().sum(1)
            if self.config.codebook == "loss":
                result["codebook"] = (z.detach() - e).square().flatten(1).mean(1)
        return result

    def codebook(self) -> Float[Tensor, "codes c"]:
        """The vectors."""
        if self.config.codebook == "loss":
            return self.vectors
        return self.weighted / self.share[:, None]

    def look_up(self, codes: Int64[Tensor, "n h w"]) -> Float[Tensor, "n c h w"]:
        """Return the vectors of codes."""
        return nn.functional.embedding(codes, self.codebook()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Move the averages towards a batch's, and unused codes to latents that were offered (``ema`` alone).

        Args:
            statistics: sums over the global batch of what :func:`assignment_statistics` returned.
        """
        config, counts = self.config, statistics["code_counts"]
        even = counts.sum() / config.codes
        self.share.lerp_(counts / even, 1.0 - config.decay)
        self.weighted.lerp_(statistics["code_sums"] / even, 1.0 - config.decay)
        self.share.clamp_(min=_SMALLEST_SHARE)
        if config.revive_below > 0:
            offered = statistics["offer_weights"] > 0
            dead = (offered & (self.share < config.revive_below))[:, None]
            vectors = statistics["offer_sums"] / statistics["offer_weights"].clamp(min=1e-30)[:, None]
            # an even share: a moved code is given time to win latents before it is judged again
            self.share.copy_(torch.where(dead[:, 0], torch.ones_like(self.share), self.share))
            self.weighted.copy_(torch.where(dead, vectors * self.jitter, self.weighted))


def nearest(z: Float[Tensor, "n c h w"], vectors: Float[Tensor, "codes c"]) -> Int64[Tensor, "n h w"]:
    """Return the index of the vector nearest to each latent: argmin |e|^2 - 2 z.e."""
    cells = z.permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.addmm(vectors.square().sum(1), cells, vectors.t(), alpha=-2.0)
    return distances.argmin(1).view(z.shape[0], *z.shape[2:])


def assignment_statistics(
    z: Float[Tensor, "n c h w"],
    codes: Int64[Tensor, "n h w"],
    codebook_size: int,
    *,
    error: Float[Tensor, "n h w"],
    offered_to: Int64[Tensor, "n cells"],
    priority: Float[Tensor, "n cells"],
) -> dict[str, Tensor]:
    """Sums over a micro-batch for :meth:`VectorQuantizer.update`: latents by code, and latents offered to unused codes.

    Args:
        z: latents before quantisation.
        codes: the code of each.
        codebook_size: how many codes there are.
        error: squared distance of each latent from its code: the worse it is represented, the more its offer counts.
        offered_to: the code that each latent is offered to, drawn by the sample's position.
        priority: uniform in (0, 1); of several offers the one of lowest priority nearly decides, which needs only sums
            and thus does not depend on how the batch was divided.
    """
    cells = z.permute(0, 2, 3, 1).flatten(0, 2)
    weights = error.flatten() * priority.flatten() ** -_PRIORITY_POWER
    assigned, offered = codes.flatten(), offered_to.flatten()
    zeros = cells.new_zeros(codebook_size)
    zero_vectors = cells.new_zeros(codebook_size, cells.shape[1])
    return {
        "code_counts": zeros.index_add(0, assigned, torch.ones_like(weights)),
        "code_sums": zero_vectors.index_add(0, assigned, cells),
        "offer_weights": zeros.index_add(0, offered, weights),
        "offer_sums": zero_vectors.index_add(0, offered, cells * weights[:, None]),
    }
