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
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Networks, Phase, Progress, Role
from sixfold.objectives.distillation.common import Drawn, FewStepObjective, PerSample
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.view import View, on_path
from sixfold.paths.predictions import Endpoints, express

STUDENT, JUDGES = "main", "fake_score"


class DistributionMatching(FewStepObjective):
    """Student: .5 |x - sg(x - g)|^2 with g from two beliefs about re-noised x. Fake score: denoising of x."""

    config: DistributionMatchingConfig

    def __init__(self, config: DistributionMatchingConfig, networks_config: Mapping[str, Any]) -> None:
        if config.teacher is None:
            raise RecipeError.of(
                "distribution matching compares with a teacher, and there is none",
                where="objective.teacher",
                fix="name one: networks.teacher: {type: trained, run: ...}",
            )
        super().__init__(config, networks_config)
        assert self.teacher is not None
        # It starts as the teacher and is asked like it: both judge on the teacher's own path.
        self.fake_score = self.teacher
        self.roles = {
            **self.roles,
            "fake_score": Role(kind="trainable", network=config.teacher, starts_from="teacher"),
        }
        if config.discriminator is not None:
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
        """Return what the student draws at one of its steps, from its own earlier steps (backward simulation).

        Gradients reach the last step alone.
        """
        path = self.student.path
        fractions = [1.0 - step / self.config.steps for step in range(self.config.steps)]
        chosen = random.integers("distillation/step", self.config.steps)
        noise, samples = drawn.noise, None
        for number, fraction in enumerate(fractions):
            time = torch.full_like(drawn.quantile, path.time_data + fraction * (path.time_noise - path.time_data))
            at = path.coefficients(time)
            x = at.broadcast(noise).sigma * noise if samples is None else on_path(Endpoints(samples, noise), *at[:2])
            found = self.student(nets["denoiser"], x, at.alpha, at.sigma, drawn.condition).data
            reached = (chosen >= number).reshape(-1, *[1] * (x.ndim - 1))
            samples = found if samples is None else torch.where(reached, found, samples)
            if number + 1 < len(fractions):
                ahead = (chosen > number).reshape(-1, *[1] * (x.ndim - 1))
                samples = torch.where(ahead, samples.detach(), samples)
                noise = random.normal(f"distillation/noise/{number + 1}", noise.shape[1:])
        assert samples is not None, "there is at least one step"
        return samples

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
        verdict = self._verdict(nets, x, alpha, sigma, drawn)
        return PerSample(loss + self.config.student_weight * softplus(-verdict).mean(1), metrics)

    def _judges_loss(self, nets: Networks, samples: Tensor, drawn: Drawn, random: PositionRandom) -> PerSample:
        view = self.fake_score
        alpha, sigma, noise = self._renoised(drawn, random, "judges")
        loss = denoising_error(view, nets["fake_score"], Endpoints(samples, noise), alpha, sigma, drawn.condition)
        if self.config.discriminator is None:
            return PerSample(loss)
        on_fake = self._verdict(nets, on_path(Endpoints(samples, noise), alpha, sigma), alpha, sigma, drawn)
        on_real = self._verdict(nets, on_path(Endpoints(drawn.data, noise), alpha, sigma), alpha, sigma, drawn)
        adversarial = (softplus(on_fake) + softplus(-on_real)).mean(1)
        told_apart = 0.5 * ((on_real > 0).float() + (on_fake < 0).float()).mean(1)
        return PerSample(loss + self.config.discriminator_weight * adversarial, {"told_apart": told_apart})

    def _verdict(
        self, nets: Networks, x: Tensor, alpha: Tensor, sigma: Tensor, drawn: Drawn
    ) -> Float[Tensor, "n verdicts"]:
        """Return the heads' logits on the fake score's features of x: above 0 is real."""
        features = self.fake_score.features(
            nets["fake_score"], x, alpha, sigma, drawn.condition, read_after=self.config.read_after
        )
        verdict: Tensor = nets["discriminator"](features)
        return verdict.float()

    def _renoised(
        self, drawn: Drawn, random: PositionRandom, purpose: str
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n ..."]]:
        """Return a time of the teacher's path as (alpha, sigma), and fresh noise."""
        path, (low, high) = self.fake_score.path, self.config.noise_range
        fraction = low + (high - low) * random.uniform(f"distillation/{purpose}/time")
        at = path.coefficients(path.time_data + fraction * (path.time_noise - path.time_data))
        return at.alpha, at.sigma, random.normal(f"distillation/{purpose}/noise", drawn.data.shape[1:])


def matching_direction(
    samples: Float[Tensor, "n ..."], *, real: Float[Tensor, "n ..."], fake: Float[Tensor, "n ..."]
) -> Float[Tensor, "n ..."]:
    """Return [(x - D_real) - (x - D_fake)] / mean |x - D_real|, sample by sample (2311.18828, eq. 7 and 8)."""
    dims = tuple(range(1, samples.ndim))
    size = (samples - real).abs().mean(dims, keepdim=True).clamp(min=1e-6)
    return (fake - real) / size


def denoising_error(
    view: View, network: Any, ends: Endpoints, alpha: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]
) -> Float[Tensor, " n"]:
    """Return the squared error of what the network itself predicts, a mean over dimensions."""
    found = view(network, on_path(ends, alpha, sigma), alpha, sigma, condition)
    at = view.path.coefficients(view.path.time_at(alpha, sigma))
    kind, data_std = view.settings.prediction, view.settings.data_std
    error = express(found, kind, at, data_std) - express(ends, kind, at, data_std)
    return error.square().flatten(1).mean(1)
