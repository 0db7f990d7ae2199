"""What reconstructions and codes are measured by on held-out images, as sums over any division of them."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.errors import TrainingError
from sixfold.objectives.contract import Sum

_PEAK = 2.0
"""Images lie in [-1, 1]."""

_SMALLEST_ERROR = 1e-10


def peak_signal_to_noise(made: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """10 log10(peak^2 / mean squared error) in decibels, of reconstructions clamped into the range of images."""
    error = (made.clamp(-1.0, 1.0) - images).square().flatten(1).mean(1)
    return 10.0 * torch.log10(_PEAK**2 / error.clamp(min=_SMALLEST_ERROR))


def code_measures(codes: Int64[Tensor, "n h w"], codebook_size: int) -> dict[str, Sum]:
    """``codebook_use``, the share of codes that occur, and ``perplexity``, the exponential of their entropy."""
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    return {
        "codebook_use": Sum(counts, counts.sum(), _share_used),
        "perplexity": Sum(counts, counts.sum(), _perplexity),
    }


def feature_measures(features: Float[Tensor, "n d"], others: Float[Tensor, "n d"]) -> dict[str, Sum]:
    """``feature_fd``: the Frechet distance between images' features and their reconstructions'."""
    moments = [_moments(value.double()) for value in (features, others)]
    count = torch.tensor(float(len(features)), device=features.device)
    return {"feature_fd": Sum(torch.cat(moments), count, partial(_frechet, features.shape[1]))}


def _share_used(counts: Tensor, total: Tensor) -> float:
    return float((counts > 0).double().mean())


def _perplexity(counts: Tensor, total: Tensor) -> float:
    return float(torch.special.entr(counts / total).sum().exp())


def _moments(x: Float[Tensor, "n d"]) -> Float[Tensor, " d+d*d"]:
    """Sums of x and of its outer products."""
    return torch.cat([x.sum(0), (x.t() @ x).flatten()])


def _frechet(width: int, sums: Tensor, count: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2) from sums of both sides."""
    if not bool(torch.isfinite(sums).all()):
        raise TrainingError.of(
            "features of held-out images or of their reconstructions are not finite",
            where="feature_fd",
            fix="look at train/skipped_steps, lower optimizer.lr, or compute with engine.precision=fp32",
        )
    (mean, covariance), (other_mean, other_covariance) = (
        _mean_and_covariance(part, count, width) for part in sums.chunk(2)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0.0).sqrt().sum()
    traces = covariance.trace() + other_covariance.trace()
    return float((mean - other_mean).square().sum() + traces - 2.0 * cross)


def _mean_and_covariance(sums: Tensor, count: Tensor, width: int) -> tuple[Tensor, Tensor]:
    mean = sums[:width] / count
    return mean, sums[width:].view(width, width) / count - torch.outer(mean, mean)
