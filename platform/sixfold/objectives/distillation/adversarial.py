"""Adversarial distillation: heads on frozen features tell the student's samples from data (ADD, LADD), hinge losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Networks, Phase, Progress, Role
from sixfold.objectives.distillation.adversarial_config import AdversarialDistillationConfig
from sixfold.objectives.distillation.common import (
    Drawn,
    FewStepObjective,
    PerSample,
    require_hidden_tokens,
    require_teacher,
)
from sixfold.objectives.distillation.view import on_path
from sixfold.paths.predictions import Endpoints
from sixfold.paths.times import time_at_quantile

EMBEDDING = "embedding"
"""Which of a feature network's outputs the heads read."""


class AdversarialDistillation(FewStepObjective):
    """Discriminator: relu(1 - D(real)) + relu(1 + D(fake)). Student: -D(fake) + weight |x - teacher(x noised)|^2."""

    config: AdversarialDistillationConfig

    def __init__(self, config: AdversarialDistillationConfig, networks_config: Mapping[str, Any]) -> None:
        teacher = require_teacher(config, "adversarial distillation learns from a teacher")
        super().__init__(config, networks_config)
        self.roles = {**self.roles, "discriminator": Role(kind="trainable", network=config.discriminator)}
        if config.features is None:
            require_hidden_tokens(networks_config, teacher, read_after=config.read_after, heads=config.discriminator)
        else:
            if config.codec is not None:
                raise RecipeError.of(
                    f"networks.{config.features} reads images, and the samples are latents of networks.{config.codec}",
                    where="objective.features",
                    fix="leave objective.features out, and name blocks of the teacher in objective.read_after",
                )
            self.roles = {**self.roles, "features": Role(kind="frozen", network=config.features)}

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """The discriminator, then the student, at every step."""
        return (
            Phase(name="discriminator", trains=("discriminator",), done=progress.done),
            Phase(name="main", trains=("denoiser",), done=progress.done),
        )

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the phase's loss of each sample."""
        if phase.name == "discriminator":
            with torch.no_grad():
                samples = self.draw_samples(nets, drawn, random)
            on_real = self._verdict(nets, drawn.data, drawn, random)
            hinge = relu(1.0 - on_real) + relu(1.0 + self._verdict(nets, samples, drawn, random))
            return PerSample(hinge.mean(1) + self._penalty(nets, on_real, drawn, random))
        samples = self.draw_samples(nets, drawn, random)
        loss = self.config.distillation_weight * self._distance_to_teacher(nets, samples, drawn, random)
        if phase.done < self.config.discriminator_start:
            return PerSample(loss)
        verdict = self._verdict(nets, samples, drawn, random).mean(1)
        return PerSample(loss - verdict, {"verdict": verdict})

    def draw_samples(self, nets: Networks, drawn: Drawn, random: PositionRandom) -> Float[Tensor, "n ..."]:
        """Return the student's belief about data that were noised to one of its times; at the first nothing is left."""
        path = self.student.path
        step = random.integers("distillation/step", self.config.steps) + 1
        fraction = step.to(drawn.quantile) / self.config.steps
        at = path.coefficients(path.time_at_fraction(fraction))
        x = on_path(Endpoints(drawn.data, drawn.noise), at.alpha, at.sigma)
        return self.student(nets["denoiser"], x, at.alpha, at.sigma, drawn.condition).data

    def _verdict(
        self, nets: Networks, images: Tensor, drawn: Drawn, random: PositionRandom
    ) -> Float[Tensor, "n verdicts"]:
        """Return the heads' logits, on the features of re-noised latents or of the images themselves."""
        assert self.teacher is not None
        if self.config.features is not None:
            features: tuple[Tensor, ...] = (nets["features"](images)[EMBEDDING],)
        else:
            time = time_at_quantile(
                self.config.time, self.teacher.path, random.uniform("distillation/verdict/time").double()
            )
            at = self.teacher.path.coefficients(time)
            noise = random.normal("distillation/verdict/noise", images.shape[1:])
            x = on_path(Endpoints(images, noise), at.alpha, at.sigma)
            _, features = self.teacher.with_features(
                nets["teacher"], x, at.alpha, at.sigma, drawn.condition, read_after=self.config.read_after
            )
        verdict: Tensor = nets["discriminator"](features)
        return verdict.float()

    def _penalty(
        self, nets: Networks, on_real: Tensor, drawn: Drawn, random: PositionRandom
    ) -> Float[Tensor, " n"] | float:
        """R1 by a finite difference (2501.08316, eq. 4): no second derivative has to pass through sharded networks."""
        if self.config.gradient_penalty == 0.0:
            return 0.0
        moved = drawn.data + self.config.penalty_noise * random.normal("distillation/penalty", drawn.data.shape[1:])
        change = (self._verdict(nets, moved, drawn, random) - on_real) / self.config.penalty_noise
        return self.config.gradient_penalty * change.square().mean(1)

    def _distance_to_teacher(
        self, nets: Networks, samples: Tensor, drawn: Drawn, random: PositionRandom
    ) -> Float[Tensor, " n"]:
        """ADD's distillation term, |x - teacher's belief|^2 weighted by the signal alpha (2311.17042, eq. 4)."""
        assert self.teacher is not None
        if self.config.distillation_weight == 0.0:
            return samples.new_zeros(len(samples))
        path = self.teacher.path
        fraction = random.uniform("distillation/teacher/time").double()
        at = path.coefficients(path.time_at_fraction(fraction))
        noise = random.normal("distillation/teacher/noise", samples.shape[1:])
        x = on_path(Endpoints(samples.detach(), noise), at.alpha, at.sigma)
        believed = self.teach(nets, x, at.alpha, at.sigma, drawn).data
        return at.alpha.to(samples) * (samples - believed).square().flatten(1).mean(1)
