"""Networks that are right by construction: the posterior means of data whose distribution is known."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from sixfold.models.settings import NetworkSettings
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.predictions import Endpoints, express


class Unconditional(NetworkSettings):
    """Settings of a denoiser of 1 x size x size images without conditions, or with those that have a null value."""

    implementation: ClassVar[str] = "exact_denoisers:ExactDenoiser"
    channels: int = 1
    image_size: int = 4
    null_values: dict[str, int]

    def __init__(self, size: int = 4, null_values: dict[str, int] | None = None):
        super().__init__(image_size=size, null_values=null_values or {})


class ExactDenoiser(nn.Module):
    """Turns a posterior mean ``E[x0 | x, alpha, sigma]`` into whatever an objective's network is to predict.

    It sees what a network sees, so that it has to undo EDM's input scaling and time on its own.
    """

    def __init__(self, config: DenoisingConfig, posterior: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.config, self.posterior = config, posterior
        self.path = config.path.load()(config.path)
        self.calls: list[int] = []

    def forward(self, seen: Tensor, seen_time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls.append(len(seen))
        kind, data_std = self.config.prediction, self.config.data_std
        x, time = seen, seen_time
        if kind == "edm":
            ratio = torch.exp(4 * seen_time)
            time = self.path.time_at(torch.ones_like(ratio), ratio)
        at = self.path.coefficients(time)
        wide = at.broadcast(seen)
        if kind == "edm":
            x = seen * torch.sqrt(wide.sigma**2 + wide.alpha**2 * data_std**2)
        data = self.posterior(x, wide.alpha, wide.sigma)
        # where there is no noise, E[e | x] is 0 by symmetry of the posterior, and x - alpha data is 0 as well
        noise = (x - wide.alpha * data) / wide.sigma.clamp(min=1e-12)
        return express(Endpoints(data, noise), kind, at, data_std)


def gaussian_posterior(mean: float, std: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[x0 | x] for data N(mean, std^2 I)."""

    def posterior(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return posterior


def finite_posterior(points: Tensor, temperature: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[x0 | x] for data uniform over ``points [k, ...]``: their mean under softmax(-|x - alpha p|^2 / 2 sigma^2)."""

    def posterior(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        distance = (x[:, None] - alpha[:, None] * points[None]).square().flatten(2).sum(2)
        weights = torch.softmax(-distance / (2 * temperature * sigma.flatten()[:, None] ** 2), 1)
        return torch.einsum("nk,k...->n...", weights, points)

    return posterior
