"""Denoising: diffusion and flow matching as one regression, of a prediction on a path at random times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork
from sixfold.objectives.conditioning.conditioning import Conditioning
from sixfold.objectives.contract import Batch, LossTerms, Networks, Phase, Progress, Role, Sum
from sixfold.objectives.denoising.alignment import check_alignment, cosine_alignment
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.latents import clean_data
from sixfold.objectives.stratification import stratified_quantiles
from sixfold.paths.affine import AffinePath
from sixfold.paths.couplings import coupled
from sixfold.paths.predictions import Endpoints, express, network_input
from sixfold.paths.times import time_at_quantile
from sixfold.paths.weightings import loss_weight


@runtime_checkable
class DenoiserConfig(Protocol):
    """What a denoiser's settings tell: the shape of its images, its conditions, and each one's value for "absent"."""

    @property
    def channels(self) -> int:
        """Channels of one image."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of one image."""
        ...

    @property
    def null_values(self) -> Mapping[str, int]:
        """The null value of each condition, by the name of its batch field."""
        ...


def denoiser_config(networks_config: Mapping[str, object], name: str) -> DenoiserConfig:
    """Return the named network's settings; raises RecipeError where it is missing or cannot denoise."""
    config = networks_config.get(name)
    config = config.architecture if isinstance(config, TrainedNetwork) else config
    if not isinstance(config, DenoiserConfig):
        denoisers = [key for key, value in networks_config.items() if isinstance(value, DenoiserConfig)]
        raise RecipeError.of(
            f"the denoising objective needs a network that denoises images, and {name!r} is "
            + ("not in networks" if config is None else f"a {type(config).__name__}"),
            where="objective.network",
            allowed=", ".join(denoisers) or None,
            fix="name a denoiser such as one of type dit",
        )
    return config


class _Draw(NamedTuple):
    """What is random in one evaluation of the loss."""

    quantile: Float[Tensor, " n"]
    noise: Float[Tensor, "n ..."]
    condition: Mapping[str, Tensor]


class _Loss(NamedTuple):
    """By sample: what is minimised, the weighted squared error in it, and how well hidden tokens are aligned."""

    total: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    alignment: Float[Tensor, " n"] | None = None

    def detached(self) -> _Loss:
        return _Loss(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]  # by field


class Denoising:
    """|prediction - target|^2, a mean over dimensions and a sum over samples, with weights by noise level.

    The network is called as ``network(x [n, ...], time [n], condition)`` and returns a prediction shaped like ``x``.
    """

    def __init__(self, config: DenoisingConfig, networks_config: NetworksConfig) -> None:
        self.config = config
        denoiser = denoiser_config(networks_config, config.network)
        self.conditioning = Conditioning(config.encoders, networks_config, denoiser)
        aligned = config.alignment
        if aligned is not None:
            check_alignment(aligned, config.network, networks_config)
        frozen = {
            "guide": config.guide,
            "codec": config.codec,
            "features": None if aligned is None else aligned.features,
        }
        self.roles: Mapping[str, Role] = {
            **{role: Role(kind="trainable", network=network) for role, network in config.trains.items()},
            **{role: Role(kind="frozen", network=network) for role, network in frozen.items() if network is not None},
            **self.conditioning.roles,
        }
        self.path: AffinePath = config.path.load()(config.path)

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """One phase: all that trains does so at every step."""
        return (Phase(name="main", trains=tuple(self.config.trains)),)

    def __call__(self, nets: Networks, batch: Batch, phase: Phase, random: PositionRandom) -> LossTerms:
        """Return the weighted squared error at random times, with each condition dropped at random."""
        inputs = self.conditioning.dropped(self.conditioning.fields_of(batch.fields), random, self.config.label_drop)
        data = clean_data(batch, random)
        noise = self._noise(data, batch, random, "noise", whole_groups=True)
        draw = _Draw(random.uniform("denoising/time"), noise, self.conditioning.encode(nets, inputs))
        loss = self._loss(nets, data, draw, images=None if self.config.alignment is None else batch["image"])
        return LossTerms(loss.total.sum(), _count(loss.total), metrics=self._metrics(loss.detached(), draw.quantile))

    @torch.no_grad()
    def evaluate(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Return the same loss at times stratified over positions, with noise of its own and no condition dropped."""
        data = clean_data(batch, random)
        noise = self._noise(data, batch, random, "evaluation_noise", whole_groups=False)
        inputs = self.conditioning.inputs(self.conditioning.fields_of(batch.fields))
        draw = _Draw(stratified_quantiles(batch.positions), noise, self.conditioning.encode(nets, inputs))
        loss = self._loss(nets, data, draw)
        return {"loss": Sum(loss.total.sum(), _count(loss.total)), **self._metrics(loss, draw.quantile)}

    def after_step(self, nets: Networks, statistics: Mapping[str, Tensor], progress: Progress) -> None:
        """Nothing is learnt but by gradient."""

    def _noise(
        self, data: Float[Tensor, "n ..."], batch: Batch, random: PositionRandom, purpose: str, *, whole_groups: bool
    ) -> Float[Tensor, "n ..."]:
        """Draw each sample's noise, paired with the data as the coupling says."""
        noise = random.normal(f"denoising/{purpose}", data.shape[1:])
        if self.config.offset_noise > 0:
            channels = (data.shape[1], *[1] * (data.ndim - 2))
            noise = noise + self.config.offset_noise * random.normal(f"denoising/{purpose}/offset", channels)
        return coupled(self.config.coupling, data, noise, batch.positions, whole_groups=whole_groups)

    def _loss(
        self,
        nets: Networks,
        data: Float[Tensor, "n ..."],
        draw: _Draw,
        *,
        images: Float[Tensor, "n c h w"] | None = None,
    ) -> _Loss:
        """Return the loss of each sample, in fp32; with ``images``, hidden tokens are aligned with their features.

        The squared error is a mean over dimensions, weighted by the noise level. With learnt uncertainty it is divided
        by e^u, which costs u: the best u(t) is the log of the mean error at t, so that in the end all times weigh alike
        (EDM2, 2312.02696, eq. 21).
        """
        kind, data_std = self.config.prediction, self.config.data_std
        time = time_at_quantile(self.config.time, self.path, draw.quantile)
        at = self.path.coefficients(time)
        wide = at.broadcast(data)
        seen, seen_time = network_input(wide.alpha * data + wide.sigma * draw.noise, time, at, kind, data_std)
        predicted, aligned = self._predict(nets, (seen, seen_time, draw.condition), images)
        difference = predicted.float() - express(Endpoints(data, draw.noise), kind, at, data_std)
        weight: Tensor = loss_weight(self.config.weighting, kind, at, data_std)
        error = weight * difference.square().flatten(1).mean(1)
        total = error
        if self.config.uncertainty is not None:
            log_scale: Tensor = nets["uncertainty"](torch.log(at.sigma / at.alpha)).float()
            total = error * torch.exp(-log_scale) + log_scale
        if aligned is not None and self.config.alignment is not None:
            total = total - self.config.alignment.weight * aligned
        return _Loss(total, error, aligned)

    def _predict(
        self, nets: Networks, inputs: tuple[Tensor, Tensor, Mapping[str, Tensor]], images: Tensor | None
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"] | None]:
        """Return the prediction and, with ``images``, how well the hidden tokens behind it are aligned with them."""
        alignment = self.config.alignment
        if images is None or alignment is None:
            return nets["denoiser"](*inputs), None
        predicted, (hidden,) = nets["denoiser"](*inputs, read_after=(alignment.block - 1,))
        return predicted, cosine_alignment(alignment, nets, hidden, images)

    def _metrics(self, loss: _Loss, quantile: Float[Tensor, " n"]) -> dict[str, Sum]:
        metrics = _loss_by_quarter(loss.total, quantile)
        if self.config.uncertainty is not None:
            metrics["squared_error"] = Sum(loss.error.sum(), _count(loss.error))
        if loss.alignment is not None:
            metrics["alignment"] = Sum(loss.alignment.sum(), _count(loss.alignment))
        return metrics


def _count(loss: Float[Tensor, " n"]) -> Tensor:
    return torch.tensor(float(len(loss)), device=loss.device)


def _loss_by_quarter(loss: Float[Tensor, " n"], quantile: Float[Tensor, " n"]) -> dict[str, Sum]:
    """Return the loss in each quarter of the time distribution, from the very draws that are trained on."""
    quarter = (quantile * 4).long().clamp(max=3)
    member = torch.nn.functional.one_hot(quarter, 4).to(loss.dtype)
    totals, counts = loss @ member, member.sum(0)
    return {f"loss_quarter_{index + 1}": Sum(totals[index], counts[index]) for index in range(4)}
