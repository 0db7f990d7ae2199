"""A small classifier that learns what matters in the data at hand, as features for a perceptual loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, pad, silu

from sixfold.models.convolution import Conv2d, channels_last
from sixfold.models.network import Linear, Network, ParameterTag, initialize, parameter_tags
from sixfold.models.perceptual.config import ClassifierConfig
from sixfold.models.perceptual.features import EMBEDDING, unit_normalized

_BATCH, _PEAK_LR, _SHIFT_PIXELS = 128, 4e-3, 1
_EPSILON = 1e-2
"""Under the root of a map's norm: blank regions have activations near 0, whose directions mean nothing."""


def _he_normal(fan_in: int) -> ParameterTag:
    return ParameterTag(init="normal", scale=math.sqrt(2.0 / fan_in), weight_decay=True)


class Classifier(Network):
    """Three convolutions, two of them halving the image, and two linear layers.

    Activations are smooth: a loss through thousands of kinks would not be the same on every engine.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.channels, config.width, 2 * config.width, 2 * config.width]
        self.convolutions = nn.ModuleList(
            Conv2d(channels[i], channels[i + 1], stride=1 if i == 0 else 2, padding=1, tag=_he_normal(9 * channels[i]))
            for i in range(3)
        )
        pooled = 4 * channels[-1]
        self.hidden = Linear(pooled, config.features, tag=_he_normal(pooled), bias=True)
        self.head = Linear(config.features, config.classes, tag=_he_normal(config.features), bias=True)

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """Return ``map_1`` to ``map_3``, normalised over channels, and ``embedding`` ``[n, features]``."""
        features, x = {}, channels_last(images)
        for number, convolution in enumerate(self.convolutions, start=1):
            x = silu(convolution(x))
            features[f"map_{number}"] = unit_normalized(x, _EPSILON)
        return {**features, EMBEDDING: silu(self.hidden(adaptive_avg_pool2d(x, 2).flatten(1)))}

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return logits, to train it."""
        scores: Tensor = self.head(self(images)[EMBEDDING])
        return scores

    def blocks(self) -> Iterator[nn.Module]:
        """None: it is too small to cut."""
        return iter(())

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add of convolutions and linear layers."""
        n, _, height, width = batch_fields["image"]
        total = 2.0 * self.config.features * (8 * self.config.width + self.config.classes)
        for index, convolution in enumerate(self.convolutions):
            assert isinstance(convolution, Conv2d)
            if index > 0:
                height, width = -(-height // 2), -(-width // 2)
            total += convolution.flops(float(height * width))
        return n * total


def trained_weights(
    config: ClassifierConfig, split: Callable[[], tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]
) -> dict[str, Tensor]:
    """Train the classifier, as a function of its settings and the training split alone; images shift by up to a pixel.

    Args:
        config: its settings.
        split: reads the training split's images and labels.
    """
    images, labels = split()
    with torch.device("meta"):
        network = Classifier(config)
    tags = parameter_tags(network)
    network.to_empty(device="cpu")
    initialize(network, tags, seed=config.seed, role="classifier")
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LR, total_steps=config.steps)
    with torch.enable_grad():
        for _ in range(config.steps):
            chosen = torch.randint(len(labels), (_BATCH,), generator=generator)
            shifted = _shifted(images[chosen].float(), generator)
            loss = cross_entropy(network.logits(shifted), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def _shifted(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Shift each image by up to ``_SHIFT_PIXELS`` each way, repeating its border."""
    count, channels, height, width = images.shape
    padded = pad(images, (_SHIFT_PIXELS,) * 4, mode="replicate")
    offsets = torch.randint(2 * _SHIFT_PIXELS + 1, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1] + torch.arange(width))[:, None, None, :]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channel, rows, columns]
