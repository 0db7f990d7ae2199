"""Latents of a frozen codec as training data: one sample of the posterior each time a sample is seen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Batch

LATENT = "latent"
"""The batch field of latents: normalised means and log-variances ``[n, 2 channels, height, width]``."""


def clean_data(batch: Batch, random: PositionRandom) -> Float[Tensor, "n channels height width"]:
    """Return what is to be denoised: images, or z = mean + e^(log variance / 2) * noise, keyed by position."""
    if LATENT not in batch.fields:
        return batch["image"]
    mean, log_variance = batch[LATENT].chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * random.normal("latents/posterior", mean.shape[1:])
