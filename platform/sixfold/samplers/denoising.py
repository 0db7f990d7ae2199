"""What all samplers from a denoiser share: beliefs about both ends of the path, the starting noise, conditions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError, UserError
from sixfold.models.trained.network import TrainedNetwork, unlike
from sixfold.objectives.conditioning.conditioning import Conditioning
from sixfold.objectives.contract import Networks
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import denoiser_config
from sixfold.paths.affine import AffinePath
from sixfold.paths.predictions import Endpoints, endpoints_of, express, network_input
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.grids import solver_times
from sixfold.samplers.guidance import Guided, Predict, needs_guide

PredictEndpoints = Callable[[Tensor, Tensor], Endpoints]
"""``(x [n, ...], path time [n]) -> `` what the data and the noise in x are believed to be."""


class Knots(NamedTuple):
    """Where a solver with fixed steps evaluates: falling times, and the path there and at the clean end (1, 0)."""

    times: list[float]
    alphas: list[float]
    sigmas: list[float]


def knots_at(path: AffinePath, times: Float64[Tensor, " steps"]) -> Knots:
    """Evaluate the path at a solver's times; the last step ends at clean data."""
    at = path.coefficients(times)
    return Knots(times.tolist(), [*at.alpha.tolist(), 1.0], [*at.sigma.tolist(), 0.0])


def everywhere(time: float, x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Return the same time for every sample."""
    return torch.full((len(x),), time, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """Standard normal noise of the shape of samples, keyed by (seed, sample number, purpose)."""

    random: PositionRandom
    shape: tuple[int, ...]

    def __call__(self, purpose: str) -> Float[Tensor, "n ..."]:
        """Draw; the same purpose gives the same noise."""
        return self.random.normal(f"sampling/{purpose}", self.shape)


class DenoisingSampler(ABC):
    """From noise, keyed by (seed, sample number), to images; subclasses say how.

    ``needs_signal`` says that a solver cannot start from pure noise.

    Raises:
        RecipeError: guidance asks for a condition or a network that is not there.
    """

    needs_signal: ClassVar[bool] = False

    def __init__(self, config: Any, objective: Any, networks_config: Mapping[str, Any]) -> None:
        objective = objective.as_denoising(networks_config)
        self.config, self.objective = config, objective
        self.path: AffinePath = objective.path.load()(objective.path)
        network = denoiser_config(networks_config, objective.network)
        self.shape = (network.channels, network.image_size, network.image_size)
        self.conditioning = Conditioning(objective.encoders, networks_config, network)
        self.guide = _guide_objective(objective, networks_config)
        if config.guidance.needs_null and not self.conditioning.null_values:
            raise RecipeError.of(
                f"classifier-free guidance needs conditions, and network {objective.network!r} has none",
                where="sampling.guidance",
                fix="make the network conditional (for a DiT: classes) or set sampling.guidance.type=none",
            )
        if needs_guide(config.guidance) and self.guide is None:
            raise RecipeError.of(
                "autoguidance needs a weaker network to push away from, and objective.guide names none",
                where="sampling.guidance",
                fix="add networks.guide: {type: trained, run: ...} and objective.guide: guide",
            )

    @abstractmethod
    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples; ``steps`` overrides the configured number."""

    def knots(self, steps: int | None) -> Knots:
        """Return where a solver with the configured number of steps, or ``steps``, evaluates the path."""
        signal = self.needs_signal or self.objective.prediction == "noise"
        times = solver_times(self.config.grid, self.path, steps or self.config.steps, needs_signal=signal)
        return knots_at(self.path, times)

    @torch.no_grad()
    def __call__(self, nets: Networks, request: SampleRequest) -> Mapping[str, Tensor]:
        """Return ``image`` ``[n, channels, height, width]`` in [-1, 1]; a condition not given counts as absent.

        Where the objective names a codec it is ``latent``, normalised, for whoever knows the latents' statistics.
        """
        noise = NoiseSource(random=PositionRandom(request.seed, request.numbers), shape=self.shape)
        image = self.integrate(self.beliefs(nets, request), noise, request.steps)
        return {"image": image.clamp(-1.0, 1.0)} if self.objective.codec is None else {"latent": image}

    def beliefs(self, nets: Networks, request: SampleRequest) -> PredictEndpoints:
        """Return what the guided network believes of both ends, as a function of x and path time."""
        condition, null = (
            self.conditioning.encode(nets, self.conditioning.inputs(fields)) for fields in self._conditions(request)
        )
        guided = Guided(
            config=self.config.guidance,
            path=self.path,
            predict=self._prediction(nets, "denoiser", self.objective),
            guide=None if self.guide is None else self._prediction(nets, "guide", self.guide),
            condition=condition,
            null=null,
        )

        def predict(x: Tensor, time: Tensor) -> Endpoints:
            value, at = guided(x, time), self.path.coefficients(time)
            believed = endpoints_of(value, self.objective.prediction, x, at, self.objective.data_std)
            resting = guided.resting(time)
            if resting is None:
                return believed
            held = endpoints_of(torch.zeros_like(x), "velocity", x, at, self.objective.data_std)
            still = resting.reshape(-1, *[1] * (x.ndim - 1))
            return Endpoints(*(torch.where(still, *pair) for pair in zip(held, believed, strict=True)))

        return predict

    def _prediction(self, nets: Networks, role: str, trained_for: DenoisingConfig) -> Predict:
        """Return a role's prediction, turned into the kind that this run's objective trains."""
        kind, data_std = trained_for.prediction, trained_for.data_std

        def predict(x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            at = self.path.coefficients(time)
            seen, seen_time = network_input(x, time, at, kind, data_std)
            value: Tensor = nets[role](seen, seen_time, condition).to(x.dtype)
            if trained_for is self.objective:
                return value
            return express(
                endpoints_of(value, kind, x, at, data_std), self.objective.prediction, at, self.objective.data_std
            )

        return predict

    def _conditions(self, request: SampleRequest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the requested conditions, filled up with null values, and the null conditions."""
        unknown = sorted(set(request.conditions) - self.conditioning.readable)
        if unknown:
            raise UserError.of(
                f"network {self.objective.network!r} has no condition {', '.join(unknown)}",
                allowed=", ".join(self.conditioning.null_values) or "none: it is unconditional",
                fix="leave the condition out",
            )
        null = self.conditioning.absent(request.numbers)
        return {**null, **request.conditions}, null


def _guide_objective(objective: DenoisingConfig, networks_config: Mapping[str, Any]) -> DenoisingConfig | None:
    """Return what the weaker network of autoguidance was trained for; it must know the same images and path.

    Raises:
        RecipeError: it knows others.
    """
    if objective.guide is None:
        return None
    network = networks_config[objective.guide]
    for name, own, guiding in unlike(networks_config[objective.network], network):
        raise RecipeError.of(
            f"networks.{objective.guide}.{name} is {guiding}, that of networks.{objective.network} is {own}: it cannot "
            "guide it",
            where=f"networks.{objective.guide}",
            fix="take a run that makes the same images from the same conditions, such as an earlier step",
        )
    trained_for = network.objective if isinstance(network, TrainedNetwork) else objective
    if not isinstance(trained_for, DenoisingConfig) or trained_for.path != objective.path:
        raise RecipeError.of(
            f"networks.{objective.guide} was trained on another path than objective.path, so that it cannot be a guide",
            where="objective.guide",
            fix="take a run with the same objective.path, such as an earlier step of this one",
        )
    return trained_for
