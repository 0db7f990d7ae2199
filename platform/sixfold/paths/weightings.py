"""Loss weightings over noise levels, written once for the error of x0 and moved to whatever the network predicts."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.paths.affine import Coefficients
from sixfold.paths.config import EDMWeightingConfig, MinSNRWeightingConfig, UniformWeightingConfig, WeightingConfig
from sixfold.paths.predictions import Quantity, squared_error_scale


def loss_weight(config: WeightingConfig, quantity: Quantity, at: Coefficients, data_std: float) -> Float[Tensor, " n"]:
    """Return the weight of the squared error of the prediction ``quantity`` at each time.

    Min-SNR comes out as min(S, g)/S on the noise, min(S, g) on the data and min(S, g)/(S + 1) on v (2303.09556);
    EDM's as 1 on F.
    """
    match config:
        case UniformWeightingConfig():
            return torch.ones_like(at.alpha)
        case MinSNRWeightingConfig():
            weight_of_data = ((at.alpha / at.sigma) ** 2).clamp(max=config.gamma)
        case EDMWeightingConfig():
            ratio = at.sigma / at.alpha
            weight_of_data = (ratio**2 + data_std**2) / (ratio * data_std) ** 2
        case _:
            assert_never(config)
    return weight_of_data * squared_error_scale(quantity, at, data_std)
