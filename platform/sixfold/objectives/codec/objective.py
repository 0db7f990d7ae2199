"""Training a codec: reconstruction, likeness of features, the bottleneck's terms, and an adversary (LDM, VQGAN).

The codec's loss is cut at the decoder's output: what other networks say about a reconstruction is differentiated once,
down to its pixels, and the codec is trained by that gradient. The adversary's weight follows from the two gradients
there, for each sample by itself (in place of VQGAN's gradients at the last layer, arXiv 2012.09841, equation 7), so
that it does not depend on how the codec is sharded or the batch divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError, RecipeError
from sixfold.models.codec.config import CodecConfig
from sixfold.models.codec.vector_quantizer import VectorQuantizer, assignment_statistics
from sixfold.models.perceptual.features import EMBEDDING, perceptual_distance
from sixfold.models.trained.network import NetworksConfig, architecture_of
from sixfold.objectives.codec.config import CodecObjectiveConfig
from sixfold.objectives.codec.measures import code_measures, feature_measures, peak_signal_to_noise
from sixfold.objectives.contract import Batch, LossTerms, Networks, Phase, Progress, Role, Sum

_LARGEST_ADAPTIVE_WEIGHT = 1e4
_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class CodecPhase(Phase):
    """A phase that also says whether the discriminator has a voice in it yet."""

    adversarial: bool = False


class CodecTraining:
    """Roles ``codec``, ``discriminator`` (where there is one) and ``perceptual`` (frozen, where there is one)."""

    def __init__(self, config: CodecObjectiveConfig, networks_config: NetworksConfig) -> None:
        self.config = config
        self.codec = _codec_config(networks_config, config.network)
        roles = {"codec": Role(kind="trainable", network=config.network)}
        if config.adversarial is not None:
            roles["discriminator"] = Role(kind="trainable", network=config.adversarial.network)
        if config.perceptual is not None:
            roles["perceptual"] = Role(kind="frozen", network=config.perceptual.network)
        self.roles: Mapping[str, Role] = roles

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """The discriminator, once it has begun, and then the codec."""
        adversarial = self.config.adversarial
        if adversarial is None:
            return (CodecPhase(name="main", trains=("codec",)),)
        codec = CodecPhase(name="main", trains=("codec",), adversarial=progress.step >= adversarial.from_step)
        if progress.step < adversarial.discriminator_from_step:
            return (codec,)
        return CodecPhase(name="discriminator", trains=("discriminator",)), codec

    def __call__(self, nets: Networks, batch: Batch, phase: Phase, random: PositionRandom) -> LossTerms:
        """Return the discriminator's hinge loss, or the codec's whole loss."""
        assert isinstance(phase, CodecPhase), "phases come from this objective"
        images = self._images(batch)
        if "discriminator" in phase.trains:
            return self._discriminator_terms(nets, images, random)
        return self._codec_terms(nets, images, random, adversarial=phase.adversarial)

    @torch.no_grad()
    def evaluate(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Measures of reconstructions from posterior means: ``loss`` (without the adversary's term), ``psnr``,
        ``codebook_use`` and ``perplexity``, ``feature_distance`` and ``feature_fd``, as far as they apply.
        """
        images = self._images(batch)
        coded = nets["codec"](images)
        terms = self._bottleneck_terms(coded, images)
        loss = self._pixel_error(coded["image"], images)
        sums = {"psnr": _mean(peak_signal_to_noise(coded["image"], images))}
        if "codes" in coded:
            assert self.codec.codebook_size is not None
            sums |= code_measures(coded["codes"], self.codec.codebook_size)
        if self.config.perceptual is not None:
            features, others = nets["perceptual"](images), nets["perceptual"](coded["image"].clamp(-1.0, 1.0))
            distance = perceptual_distance(features, others)
            loss = loss + self.config.perceptual.weight * distance
            sums |= {"feature_distance": _mean(distance)} | feature_measures(features[EMBEDDING], others[EMBEDDING])
        return {"loss": _mean(loss + sum(terms.values())), **sums}

    def after_step(self, nets: Networks, statistics: Mapping[str, Tensor], progress: Progress) -> None:
        """Update a codebook of moving averages."""
        if "code_counts" not in statistics:
            return
        for part in nets["codec"].modules():
            if isinstance(part, VectorQuantizer):
                part.update(statistics)

    def _codec_terms(
        self, nets: Networks, images: Float[Tensor, "n c h w"], random: PositionRandom, *, adversarial: bool
    ) -> LossTerms:
        coded = nets["codec"](images, noise=self._noise(images, random))
        own = self._bottleneck_terms(coded, images)
        judged = self._judge(nets, coded["image"].detach(), images, adversarial=adversarial)
        # The inner product has the gradient of the judgement; its value is replaced by the judgement's own.
        guided = (coded["image"] * judged.gradient).flatten(1).sum(1)
        loss = judged.loss + (guided - guided.detach()) + sum(own.values())
        return LossTerms(
            loss=loss.sum(),
            count=_count(images),
            metrics={name: _mean(value.detach()) for name, value in {**judged.metrics, **own}.items()},
            statistics=self._codebook_statistics(coded, random),
        )

    def _judge(
        self, nets: Networks, made: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], *, adversarial: bool
    ) -> _Judgement:
        """Differentiate everything said about reconstructions with respect to their pixels."""
        made = made.requires_grad_()
        metrics = {"pixel": self._pixel_error(made, images)}
        loss = metrics["pixel"]
        if self.config.perceptual is not None:
            with torch.no_grad():
                features = nets["perceptual"](images)
            metrics["perceptual"] = perceptual_distance(features, nets["perceptual"](made))
            loss = loss + self.config.perceptual.weight * metrics["perceptual"]
        (gradient,) = torch.autograd.grad(loss.sum(), made)
        loss = loss.detach()
        if adversarial:
            assert self.config.adversarial is not None
            against = -nets["discriminator"](made).flatten(1).mean(1)
            (other,) = torch.autograd.grad(against.sum(), made)
            weight = self.config.adversarial.weight * adaptive_weight(gradient, other)
            gradient = gradient + weight[:, None, None, None] * other
            loss = loss + weight * against.detach()
            metrics |= {"adversarial": against, "adversarial_weight": weight}
        return _Judgement(loss=loss, gradient=gradient, metrics=metrics)

    def _discriminator_terms(
        self, nets: Networks, images: Float[Tensor, "n c h w"], random: PositionRandom
    ) -> LossTerms:
        """Hinge loss over patches of real images x and reconstructions x': (relu(1 - D(x)) + relu(1 + D(x'))) / 2."""
        with torch.no_grad():
            made = nets["codec"](images, noise=self._noise(images, random))["image"]
        real, fake = nets["discriminator"](torch.cat([images, made])).flatten(1).chunk(2)
        loss = 0.5 * (relu(1.0 - real).mean(1) + relu(1.0 + fake).mean(1))
        metrics = {"real": _mean(real.detach().mean(1)), "fake": _mean(fake.detach().mean(1))}
        return LossTerms(loss=loss.sum(), count=_count(images), metrics=metrics)

    def _pixel_error(self, made: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        difference = made - images
        error = difference.abs() if self.config.pixel_loss == "l1" else difference.square()
        return error.flatten(1).mean(1)

    def _bottleneck_terms(self, coded: Mapping[str, Tensor], images: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """The weighted terms ``[n]`` that the bottleneck asks for."""
        weights = {
            "kl": self.config.kl_weight / images[0].numel(),
            "commitment": self.config.commitment_weight,
            "codebook": self.config.codebook_weight,
        }
        return {name: weight * coded[name] for name, weight in weights.items() if name in coded}

    def _noise(
        self, images: Float[Tensor, "n c h w"], random: PositionRandom
    ) -> Float[Tensor, "n latents rows columns"] | None:
        if self.codec.bottleneck.type != "kl":
            return None
        rows, columns = (side // self.codec.factor for side in images.shape[2:])
        return random.normal("codec/posterior", (self.codec.latent_channels, rows, columns))

    def _codebook_statistics(self, coded: Mapping[str, Tensor], random: PositionRandom) -> dict[str, Tensor]:
        bottleneck = self.codec.bottleneck
        if bottleneck.type != "vq" or bottleneck.codebook != "ema":
            return {}
        cells = coded["codes"][0].numel()
        return assignment_statistics(
            coded["features"],
            coded["codes"],
            bottleneck.codes,
            error=coded["error"],
            offered_to=random.integers("codec/offer", bottleneck.codes, (cells,)),
            priority=random.uniform("codec/priority", (cells,)),
        )

    def _images(self, batch: Batch) -> Float[Tensor, "n c h w"]:
        """Return the batch's images; raises DataError where the codec cannot take them."""
        images = batch.fields.get("image")
        factor, channels = self.codec.factor, self.codec.channels
        if images is None:
            raise DataError.of(
                "a codec is trained on images, which the data lack", allowed=f"the data have {', '.join(batch.fields)}"
            )
        _, held, height, width = images.shape
        if held != channels or height % factor or width % factor:
            raise DataError.of(
                f"the codec cannot take images of {held} x {height} x {width} (channels, height, width)",
                where=f"networks.{self.config.network}",
                allowed=f"{channels} channels, and sides that are multiples of {factor}",
                fix=f"set networks.{self.config.network}.channels={held}"
                if held != channels
                else f"set data.image_size to a multiple of {factor}",
            )
        return images


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """What is said about reconstructions: loss ``[n]``, its gradient by their pixels, and its parts ``[n]``."""

    loss: Float[Tensor, " n"]
    gradient: Float[Tensor, "n c h w"]
    metrics: Mapping[str, Tensor]


def adaptive_weight(gradient: Float[Tensor, "n c h w"], adversarial: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """|gradient| / |adversarial|, clamped, for each sample: by it both pull at a reconstruction alike."""
    norms = [value.flatten(1).norm(dim=1) for value in (gradient, adversarial)]
    weight: Tensor = (norms[0] / (norms[1] + _EPSILON)).clamp(max=_LARGEST_ADAPTIVE_WEIGHT)
    return weight


def _codec_config(networks_config: NetworksConfig, name: str) -> CodecConfig:
    config = architecture_of(networks_config[name]) if name in networks_config else None
    if not isinstance(config, CodecConfig):
        raise RecipeError.of(
            f"the codec objective trains a network of type codec, and {name!r} is "
            + ("not in networks" if config is None else f"a {type(config).__name__}"),
            where="objective.network",
            fix="name one of type codec",
        )
    return config


def _mean(values: Float[Tensor, " n"]) -> Sum:
    return Sum(values.sum(), _count(values))


def _count(values: Float[Tensor, "n ..."]) -> Tensor:
    return torch.tensor(float(len(values)), device=values.device)
