"""What a feature extractor is, and the two that need nothing: pixels, and a small classifier of the training split.

The classifier needs no download and knows what matters in these very data. It is trained deterministically in
seconds, kept by a hash of the data and of this code's version, and its accuracy on held-out images is part of every
report.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sixfold.errors import RecipeError, SixfoldError

CLASSIFIER_VERSION = "small-classifier/1"
"""Part of the cache key: any change to architecture or training needs a new one."""

_STEPS, _BATCH, _PEAK_LR, _SHIFT_PIXELS = 300, 128, 4e-3, 1


class FeatureExtractor(Protocol):
    """Images to feature vectors."""

    @property
    def name(self) -> str:
        """What a distance in this space is called: FD(<name>)."""
        ...

    @property
    def identity(self) -> str:
        """A hash or name of all that decides the features: weights, code, preprocessing."""
        ...

    def __call__(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Return one fp32 vector for each image in [-1, 1], on the images' device."""
        ...


def require_finite(features: Float[Tensor, "n ..."], what: str, error: type[SixfoldError]) -> None:
    """Raise ``error`` where features or scores are not finite: every metric of them would be meaningless."""
    bad = (~torch.isfinite(features.reshape(len(features), -1))).any(1).sum().item() if len(features) else 0
    if bad:
        raise error.of(
            f"{bad} of {len(features)} {what} are not finite numbers",
            where="evaluation",
            fix="check the extractor's preprocessing (mean, std) and precision, and that training has not diverged",
        )


class PixelFeatures:
    """The pixels themselves."""

    name = "pixel"
    identity = "pixel"

    def __call__(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Flatten each image."""
        return images.flatten(1).float()


class SmallClassifier(nn.Module):
    """Three convolutions, two of them halving the image, and two linear layers; features are the hidden activations."""

    def __init__(self, channels: int, classes: int, *, width: int = 24, features: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(8 * width, features)
        self.head = nn.Linear(features, classes)

    def features(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Return the activations before the last layer."""
        hidden: Tensor = self.hidden(self.convolutions(images))
        return F.relu(hidden)

    def forward(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """Return logits."""
        logits: Tensor = self.head(self.features(images))
        return logits


@dataclass(frozen=True, kw_only=True)
class ClassifierFeatures:
    """A trained classifier as a feature extractor.

    Attributes:
        network: the classifier, in evaluation mode.
        accuracy: its accuracy on held-out images.
        held_out_samples: how many those were.
        identity: the hash it is kept under.
    """

    network: SmallClassifier
    accuracy: float
    held_out_samples: int
    identity: str
    name: str = "classifier"

    def to(self, device: torch.device) -> ClassifierFeatures:
        """Return it on a device."""
        return replace(self, network=self.network.to(device))

    def __call__(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Return the hidden activations."""
        with torch.no_grad():
            return torch.cat([self.network.features(part.float()) for part in torch.split(images, 1024)])

    def predict(self, images: Float[Tensor, "n channels height width"]) -> Int64[Tensor, " n"]:
        """Return the most likely class of each image."""
        with torch.no_grad():
            return torch.cat([self.network(part.float()).argmax(1) for part in torch.split(images, 1024)])


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A split held in memory: images in [-1, 1] and, where the data have them, their labels."""

    images: Float[Tensor, "n channels height width"]
    labels: Int64[Tensor, " n"] | None = None

    def require_labels(self) -> Int64[Tensor, " n"]:
        """Return the labels; raises RecipeError where there are none."""
        if self.labels is None:
            raise RecipeError.of(
                "a classifier's features need labelled images, and these data have no labels",
                where="evaluation.features",
                allowed="pixel, for data without labels",
                fix="set evaluation.features=pixel and leave conditional_accuracy out of evaluation.metrics",
            )
        return self.labels


def train_classifier(training: LabelledImages, *, seed: int = 0) -> SmallClassifier:
    """Train a classifier, as a function of the data and the seed alone, on images shifted by up to a pixel."""
    labels = training.require_labels()
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # so that no weight is drawn from the global generator
        network = SmallClassifier(training.images.shape[1], int(labels.max()) + 1)
    _draw_weights(network.to_empty(device="cpu"), generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LR, total_steps=_STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            chosen = torch.randint(len(labels), (_BATCH,), generator=generator)
            images = _shifted(training.images[chosen].float(), generator)
            loss = F.cross_entropy(network(images), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def load_or_train_classifier(
    training: LabelledImages, held_out: LabelledImages, *, cache: Path, fingerprint: str, seed: int = 0
) -> ClassifierFeatures:
    """Return the classifier of the data set named by ``fingerprint``, trained now or read from the folder ``cache``."""
    key = hashlib.sha256(f"{CLASSIFIER_VERSION}/{fingerprint}/{seed}".encode()).hexdigest()[:16]
    path = cache / f"classifier-{key}.safetensors"
    if path.exists():
        return _read(path)
    network = train_classifier(training, seed=seed)
    fresh = ClassifierFeatures(network=network, accuracy=0.0, held_out_samples=len(held_out.images), identity=key)
    right = fresh.predict(held_out.images) == held_out.require_labels()
    description = {"accuracy": repr(right.float().mean().item()), "held_out_samples": str(fresh.held_out_samples)}
    keep_tensors(path, network.state_dict(), **description)
    return _read(path)


def keep_tensors(path: Path, tensors: dict[str, Tensor], **description: str) -> None:
    """Write a file of a cache, which other processes may read or write meanwhile: they see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, partial, metadata=description)
    partial.replace(path)


def _read(path: Path) -> ClassifierFeatures:
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        description = file.metadata()
    network = SmallClassifier(weights["convolutions.0.weight"].shape[1], len(weights["head.bias"]))
    network.load_state_dict(weights)
    return ClassifierFeatures(
        network=network.eval().requires_grad_(False),
        accuracy=float(description["accuracy"]),
        held_out_samples=int(description["held_out_samples"]),
        identity=path.stem,
    )


def _draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draw He-normal weights from ``generator``; biases are zero."""
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim == 1:
                value.zero_()
            else:
                value.normal_(0.0, math.sqrt(2.0 / value[0].numel()), generator=generator)


def _shifted(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Shift each image by up to ``_SHIFT_PIXELS`` each way, repeating its border."""
    count, _, height, width = images.shape
    padded = F.pad(images, (_SHIFT_PIXELS,) * 4, mode="replicate")
    offsets = torch.randint(2 * _SHIFT_PIXELS + 1, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1] + torch.arange(width))[:, None, None, :]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channel, rows, columns]
