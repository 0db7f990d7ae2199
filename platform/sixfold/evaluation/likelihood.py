"""Bits per dimension of held-out images under a denoiser's probability flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.evaluation.config import BitsPerDimConfig
from sixfold.objectives.contract import Batch, Networks, Sum
from sixfold.samplers.config import RK45Config
from sixfold.samplers.likelihood import Likelihood

_LEVEL = 2.0 / 255.0
"""Between two of the 256 values of a pixel in [-1, 1]."""


class BitsPerDimMetric:
    """-log2 p / d of 8-bit images, an upper bound by uniform dequantisation (1511.01844, section 3.1).

    Images get uniform noise of one level's width, keyed by position, and the density of the result is integrated over
    that width: bits = -ln p / (d ln 2) - log2(2 / 255).

    Raises:
        RecipeError: the network generates latents, whose bits are not those of images.
    """

    def __init__(self, settings: BitsPerDimConfig, objective: Any, networks: Mapping[str, Any]) -> None:
        solver = RK45Config(rtol=settings.rtol, atol=settings.atol)
        self._likelihood = Likelihood(
            objective, networks, solver=solver, exact_dimensions=settings.exact_dimensions, probes=settings.probes
        )
        if self._likelihood.sampler.objective.codec is not None:
            raise RecipeError.of(
                "bits_per_dim is about images, and this objective generates latents",
                where="evaluation.metrics",
                fix="remove bits_per_dim from the list",
            )

    def __call__(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Return the sum over the images of a held-out batch."""
        images = batch["image"]
        x = images + _LEVEL * (random.uniform("bits_per_dim/dequantisation", images.shape[1:]) - 0.5)
        conditions = self._likelihood.sampler.conditioning.fields_of(batch.fields)
        nats = self._likelihood(nets, x, conditions, random).double()
        bits = -nats / (self._likelihood.dimensions * math.log(2.0)) - math.log2(_LEVEL)
        return {"bits_per_dim": Sum(bits.sum(), torch.tensor(float(len(bits)), device=bits.device))}
