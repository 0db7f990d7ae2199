"""Distribution matching distillation (DMD2, 2405.14867), optionally with a head on the fake score's features.

Two denoisers judge what the student draws: the frozen teacher knows the data's distribution, the fake score learns the
student's own. Their difference is the direction in which a sample becomes more likely under the one than the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Networks, Phase, Progress, Role
from sixfold.objectives.distillation.common import (
    Drawn,
    FewStepObjective,
    PerSample,
    require_hidden_tokens,
    require_teacher,
)
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.view import View, on_path
from sixfold.paths.predictions import Endpoints, express

STUDENT, JUDGES = "main", "fake_score"


class DistributionMatching(FewStepObjective):
    """Student: .5 |x - sg(x - g)|^2 with g from two beliefs about re-noised x. Fake score: denoising of x."""

    config: DistributionMatchingConfig

    def __init__(self, config: DistributionMatchingConfig, networks_config: Mapping[str, Any]) -> None:
        teacher = require_teacher(config, "distribution matching compares with a teacher")
        super().__init__(config, networks_config)
        assert self.teacher is not None
        # It starts as the teacher and is asked like it: both judge on the teacher's own path.
        self.fake_score = self.teacher
        self.roles = {
            **self.roles,
            "fake_score": Role(kind="trainable", network=teacher, starts_from="teacher"),
        }
        if config.discriminator is not None:
            require_hidden_tokens(networks_config, teacher, read_after=config.read_after, heads=config.discriminator)
            self.roles = {**self.roles, "discriminator": Role(kind="trainable", network=config.discriminator)}

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """The fake score (with the heads) at every step, the student at every ``fake_updates``-th."""
        judges = ("fake_score",) if self.config.discriminator is None else ("fake_score", "discriminator")
        phases = [Phase(name=JUDGES, trains=judges, done=progress.done)]
        if progress.step % self.config.fake_updates == self.config.fake_updates - 1:
            phases.append(Phase(name=STUDENT, trains=("denoiser",), done=progress.done))
        return phases

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the phase's loss of each sample."""
        if phase.name == STUDENT:
            return self._student_loss(nets, drawn, random)
        with torch.no_grad():
            samples = self.draw_samples(nets, drawn, random)
        return self._judges_loss(nets, samples, drawn, random)

    def draw_samples(self, nets: Networks, drawn: Drawn, random: PositionRandom) -> Float[Tensor, "n ..."]:
        """Return what the student draws at one of its steps, from its own earlier ones (backward simulation).

        Gradients reach the last step alone, which is one forward pass whichever step it is of each sample.
        """
        path = self.student.path
        chosen = random.integers("distillation/step", self.config.steps)
        asked, time, samples = drawn.noise, drawn.quantile, None
        for number in range(self.config.steps):
            fraction = 1.0 - number / self.config.steps
            now = path.time_at_fraction(torch.full_like(drawn.quantile, fraction))
            at = path.coefficients(now)
            noise = drawn.noise if number == 0 else random.normal(f"distillation/noise/{number}", asked.shape[1:])
            start = torch.zeros_like(noise) if samples is None else samples  # pure noise, whatever the path calls alpha
            x = on_path(Endpoints(start, noise), at.alpha, at.sigma)
            here = chosen == number
            asked = torch.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, asked)
            time = torch.where(here, now, time)
            if number + 1 < self.config.steps:
                with torch.no_grad():
                    samples = self.student(nets["denoiser"], x, at.alpha, at.sigma, drawn.condition).data
        at = path.coefficients(time)
        return self.student(nets["denoiser"], asked, at.alpha, at.sigma, drawn.condition).data

    def _student_loss(self, nets: Networks, drawn: Drawn, random: PositionRandom) -> PerSample:
        samples = self.draw_samples(nets, drawn, random)
        alpha, sigma, noise = self._renoised(drawn, random, "student")
        x = on_path(Endpoints(samples, noise), alpha, sigma)
        with torch.no_grad():
            real = self.teach(nets, x.detach(), alpha, sigma, drawn).data
            fake = self.fake_score(nets["fake_score"], x.detach(), alpha, sigma, drawn.condition).data
            direction = matching_direction(samples, real=real, fake=fake)
        loss = 0.5 * (samples - (samples - direction).detach()).square().flatten(1).mean(1)
        metrics = {"direction": direction.abs().flatten(1).mean(1)}
        if self.config.discriminator is None:
            return PerSample(loss, metrics)
        _, features = self.fake_score.with_features(
            nets["fake_score"], x, alpha, sigma, drawn.condition, read_after=self.config.read_after
        )
        verdict: Tensor = nets["discriminator"](features).float()
        return PerSample(loss + self.config.student_weight * softplus(-verdict).mean(1), metrics)

    def _judges_loss(self, nets: Networks, samples: Tensor, drawn: Drawn, random: PositionRandom) -> PerSample:
        """Denoising of the samples; with heads, one pass over samples and data that both losses share."""
        view = self.fake_score
        alpha, sigma, noise = self._renoised(drawn, random, "judges")
        ends = Endpoints(samples, noise)
        if self.config.discriminator is None:
            found = view(nets["fake_score"], on_path(ends, alpha, sigma), alpha, sigma, drawn.condition)
            return PerSample(denoising_error(view, found, ends, alpha, sigma))
        x = torch.cat([on_path(ends, alpha, sigma), on_path(Endpoints(drawn.data, noise), alpha, sigma)])
        twice = {name: torch.cat([value, value]) for name, value in drawn.condition.items()}
        both, features = view.with_features(
            nets["fake_score"],
            x,
            torch.cat([alpha, alpha]),
            torch.cat([sigma, sigma]),
            twice,
            read_after=self.config.read_after,
        )
        found = Endpoints(*(end.chunk(2)[0] for end in both))
        on_fake, on_real = nets["discriminator"](features).float().chunk(2)
        adversarial = (softplus(on_fake) + softplus(-on_real)).mean(1)
        told_apart = 0.5 * ((on_real > 0).float() + (on_fake < 0).float()).mean(1)
        loss = denoising_error(view, found, ends, alpha, sigma) + self.config.discriminator_weight * adversarial
        return PerSample(loss, {"told_apart": told_apart})

    def _renoised(
        self, drawn: Drawn, random: PositionRandom, purpose: str
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n ..."]]:
        """Return a time of the teacher's path as (alpha, sigma), and fresh noise."""
        path, (low, high) = self.fake_score.path, self.config.noise_range
        fraction = low + (high - low) * random.uniform(f"distillation/{purpose}/time").double()
        at = path.coefficients(path.time_at_fraction(fraction))
        return at.alpha, at.sigma, random.normal(f"distillation/{purpose}/noise", drawn.data.shape[1:])


def matching_direction(
    samples: Float[Tensor, "n ..."], *, real: Float[Tensor, "n ..."], fake: Float[Tensor, "n ..."]
) -> Float[Tensor, "n ..."]:
    """Return [(x - D_real) - (x - D_fake)] / mean |x - D_real|, sample by sample (2311.18828, eq. 7 and 8)."""
    dims = tuple(range(1, samples.ndim))
    size = (samples - real).abs().mean(dims, keepdim=True).clamp(min=1e-6)
    return (fake - real) / size


def denoising_error(
    view: View, found: Endpoints, ends: Endpoints, alpha: Float[Tensor, " n"], sigma: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the squared error of what the network itself predicts, a mean over dimensions."""
    at = view.path.coefficients(view.path.time_at(alpha, sigma)).to(ends.data)
    kind, data_std = view.settings.prediction, view.settings.data_std
    error = express(found, kind, at, data_std) - express(ends, kind, at, data_std)
    return error.square().flatten(1).mean(1)
