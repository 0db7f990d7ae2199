"""What every objective that trains a few-step denoiser shares: its roles, and what a batch gives it to work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.models.trained.network import TrainedNetwork, architecture_of
from sixfold.objectives.conditioning.conditioning import Conditioning
from sixfold.objectives.contract import Batch, LossTerms, Networks, Phase, Progress, Role, Sum
from sixfold.objectives.denoising.objective import denoiser_config
from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.objectives.distillation.view import Condition, View, on_path
from sixfold.objectives.latents import clean_data
from sixfold.objectives.stratification import stratified_quantiles
from sixfold.paths.predictions import Endpoints


class Drawn(NamedTuple):
    """What one evaluation of a loss works on.

    Attributes:
        data: clean images or latents.
        noise: standard normal noise of their shape.
        quantile: uniform in (0, 1), in fp64: which time.
        condition: what the networks are conditioned on, dropped at random.
        null: the same, absent.
    """

    data: Float[Tensor, "n ..."]
    noise: Float[Tensor, "n ..."]
    quantile: Float64[Tensor, " n"]
    condition: Condition
    null: Condition


class PerSample(NamedTuple):
    """What a phase's loss is made of, by sample.

    Attributes:
        loss: what is minimised.
        metrics: what is logged beside it.
    """

    loss: Float[Tensor, " n"]
    metrics: Mapping[str, Float[Tensor, " n"]] = {}


class FewStepObjective(ABC):
    """Base of the objectives whose student is the role ``denoiser``; subclasses give ``loss``.

    Raises:
        RecipeError: the teacher is missing, or it makes other images or knows other classes than the student.
    """

    def __init__(self, config: FewStepSettings, networks_config: Mapping[str, Any]) -> None:
        self.config = config
        student = denoiser_config(networks_config, config.network)
        self.student = View.of(config.as_denoising(networks_config))
        self.conditioning = Conditioning(config.encoders, networks_config, student)
        self.roles: Mapping[str, Role] = {
            "denoiser": Role(kind="trainable", network=config.network, starts_from=_start(config, networks_config)),
            **({} if config.codec is None else {"codec": Role(kind="frozen", network=config.codec)}),
            **self.conditioning.roles,
        }
        self.teacher: View | None = None
        if config.teacher is not None:
            self.teacher = View.of(config.teacher_as_denoising(networks_config))
            self.roles |= {"teacher": Role(kind="frozen", network=config.teacher)}
            _check_teacher(config, networks_config)

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """One phase: the student trains at every step."""
        return (Phase(name="main", trains=("denoiser",), done=progress.done),)

    def after_step(self, nets: Networks, statistics: Mapping[str, Tensor], progress: Progress) -> None:  # noqa: B027  # a default
        """Nothing is learnt but by gradient."""

    @abstractmethod
    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the phase's loss of each sample, a mean over its dimensions where it is a squared error."""

    def __call__(self, nets: Networks, batch: Batch, phase: Phase, random: PositionRandom) -> LossTerms:
        """Return the phase's summed loss, with conditions dropped at random."""
        found = self.loss(nets, self._draw(nets, batch, random), phase, random)
        count = torch.tensor(float(len(found.loss)), device=found.loss.device)
        metrics = {name: Sum(value.detach().sum(), count) for name, value in found.metrics.items()}
        return LossTerms(found.loss.sum(), count, metrics=metrics)

    @torch.no_grad()
    def evaluate(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Return the error of one-step samples: how far the student's image lies from the teacher's own beliefs.

        A few-step loss has moving targets and says little by itself. This one is fixed: from x at stratified times, the
        squared distance between the student's belief about the data and the data, which denoising would minimise.
        """
        drawn = self._draw(nets, batch, random)._replace(quantile=stratified_quantiles(batch.positions).double())
        path = self.student.path
        at = path.coefficients(path.time_data + (path.time_noise - path.time_data) * drawn.quantile)
        x = on_path(Endpoints(drawn.data, drawn.noise), at.alpha, at.sigma)
        believed = self.student(nets["denoiser"], x, at.alpha, at.sigma, drawn.condition)
        error = (believed.data - drawn.data).square().flatten(1).mean(1)
        return {"loss": Sum(error.sum(), torch.tensor(float(len(error)), device=error.device))}

    def teach(
        self,
        nets: Networks,
        x: Float[Tensor, "n ..."],
        alpha: Float[Tensor, " n"],
        sigma: Float[Tensor, " n"],
        drawn: Drawn,
        scale: float | Float[Tensor, " n"] | None = None,
    ) -> Endpoints:
        """Return the teacher's beliefs without gradient, guided as the settings say or by ``scale``."""
        assert self.teacher is not None, "asked for where there is a teacher"
        scale = self.config.teacher_guidance if scale is None else scale
        with torch.no_grad():
            return self.teacher.guided(nets["teacher"], x, alpha, sigma, drawn.condition, null=drawn.null, scale=scale)

    def _draw(self, nets: Networks, batch: Batch, random: PositionRandom) -> Drawn:
        data = clean_data(batch, random)
        fields = self.conditioning.fields_of(batch.fields)
        inputs = self.conditioning.dropped(fields, random, self.config.label_drop)
        absent = self.conditioning.inputs(self.conditioning.absent(batch.positions))
        return Drawn(
            data=data,
            noise=random.normal("distillation/noise", data.shape[1:]),
            quantile=random.uniform("distillation/time").double(),
            condition=self.conditioning.encode(nets, inputs),
            null=self.conditioning.encode(nets, absent),
        )


def _start(config: FewStepSettings, networks_config: Mapping[str, Any]) -> str | None:
    """Return the role whose weights the student takes over; None where it starts fresh or from a run of its own."""
    if (
        config.teacher is None
        or config.start == "fresh"
        or isinstance(networks_config.get(config.network), TrainedNetwork)
    ):
        return None
    student, teacher = config.as_denoising(networks_config), config.teacher_as_denoising(networks_config)
    if (student.path, student.prediction) != (teacher.path, teacher.prediction):
        raise RecipeError.of(
            "the student has another path or prediction than the teacher, whose weights would mean nothing to it",
            where="objective.start",
            fix="set objective.start=fresh, or leave objective.path and objective.prediction to the teacher",
        )
    return "teacher"


def _check_teacher(config: FewStepSettings, networks_config: Mapping[str, Any]) -> None:
    """Raise RecipeError unless teacher and student make the same images from the same conditions."""
    assert config.teacher is not None
    student, teacher = (
        architecture_of(networks_config[name]) if name in networks_config else denoiser_config(networks_config, name)
        for name in (config.network, config.teacher)
    )
    for name in ("image_size", "channels", "classes", "text_width"):
        own, taught = getattr(student, name, None), getattr(teacher, name, None)
        if own != taught:
            raise RecipeError.of(
                f"networks.{config.network}.{name} is {own}, the teacher's is {taught}: it cannot teach this student",
                where=f"networks.{config.teacher}",
                fix=f"give the student {name}={taught}, or take another teacher",
            )
