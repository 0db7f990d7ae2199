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
from sixfold.models.trained.network import TrainedNetwork, architecture_of, unlike
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
        """Return the denoising error: how far the student's belief about the data lies from the data, squared.

        A few-step loss has moving targets and says little by itself; this measure is fixed, at stratified times. Its
        least value is the denoiser's, which no few-step student reaches: it tells of divergence, not of quality.
        """
        drawn = self._draw(nets, batch, random)._replace(quantile=stratified_quantiles(batch.positions).double())
        path = self.student.path
        at = path.coefficients(path.time_at_fraction(drawn.quantile))
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


def require_boundary_condition(student: View) -> None:
    """Raise RecipeError unless what the student implies at the clean end is x itself, whatever its network says."""
    kind = student.settings.prediction
    if kind in ("data", "noise"):
        raise RecipeError.of(
            f"a student that predicts {kind} does not meet the boundary condition f(x, 0) = x",
            where="objective.prediction",
            allowed="velocity, v, edm",
            fix="set objective.prediction=velocity (a fresh student), or start from a teacher of one of these",
        )


def require_scalar(config: FewStepSettings, networks_config: Mapping[str, Any], scalar: str, why: str) -> None:
    """Raise RecipeError, which says ``why`` it is told, unless the student takes the number called ``scalar``."""
    student = architecture_of(networks_config[config.network])
    known = getattr(student, "scalars", None)
    if known is None or scalar not in known:
        raise RecipeError.of(
            f"{why}, and networks.{config.network} has no input for it",
            where=f"networks.{config.network}",
            allowed="a denoiser of type dit or mmdit with this name among its scalars",
            fix=f"write the network out, with the settings it has and scalars: {[*(known or ()), scalar]}",
        )


def require_hidden_tokens(
    networks_config: Mapping[str, Any], name: str, *, read_after: Sequence[int], heads: str
) -> None:
    """Raise RecipeError unless a network has the blocks that are read, and the heads the width of their tokens."""
    network, reader = (architecture_of(networks_config[key]) for key in (name, heads))
    if "hidden_tokens" not in network.provides:
        raise RecipeError.of(
            f"networks.{heads} reads hidden tokens, which networks.{name} does not give",
            where=f"networks.{name}",
            allowed="a denoiser of type dit or mmdit",
            fix="take a teacher of one of these types, or features of images (objective.features)",
        )
    depth, width = (getattr(network, setting) for setting in ("depth", "width"))
    wanted = getattr(reader, "heads", len(read_after))
    in_order = list(read_after) == sorted(set(read_after))
    if not read_after or len(read_after) != wanted or not in_order or not 0 <= read_after[0] <= read_after[-1] < depth:
        raise RecipeError.of(
            f"objective.read_after is {list(read_after)}; networks.{heads} has {wanted} heads, and networks.{name} "
            f"{depth} blocks",
            where="objective.read_after",
            allowed=f"{wanted} different blocks from 0 to {depth - 1}, in order",
            fix=f"name as many blocks as there are heads, such as {_spread(wanted, depth)}",
        )
    if getattr(reader, "features", width) != width:
        raise RecipeError.of(
            f"networks.{heads}.features is {getattr(reader, 'features', None)}, and tokens of networks.{name} are "
            f"{width} wide",
            where=f"networks.{heads}.features",
            allowed=str(width),
            fix=f"set networks.{heads}.features={width}",
        )


def _spread(count: int, depth: int) -> list[int]:
    """Return blocks that lie evenly within the depth."""
    return sorted({depth * (2 * number + 1) // (2 * count) for number in range(count)})


def require_teacher(config: FewStepSettings, why: str) -> str:
    """Return the teacher's name in the networks; raise RecipeError, which says ``why`` it is needed, without one."""
    if config.teacher is None:
        raise RecipeError.of(
            f"{why}, and there is none",
            where="objective.teacher",
            fix="name one: networks.teacher: {type: trained, run: ...}, and objective.teacher: teacher",
        )
    return config.teacher


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
    for name, own, taught in unlike(networks_config[config.network], networks_config[config.teacher]):
        raise RecipeError.of(
            f"networks.{config.network}.{name} is {own}, the teacher's is {taught}: it cannot teach this student",
            where=f"networks.{config.teacher}",
            fix=f"give the student {name}={taught}, or take another teacher",
        )
