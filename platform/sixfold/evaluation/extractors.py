"""Feature extractors by their settings: preprocessing, then any function from images to vectors."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sixfold.errors import SixfoldError, UserError
from sixfold.evaluation.extractor_config import (
    CallableFeaturesConfig,
    ClassifierFeaturesConfig,
    PixelFeaturesConfig,
    PreprocessingConfig,
    TorchScriptFeaturesConfig,
)
from sixfold.evaluation.features import ClassifierFeatures, PixelFeatures
from sixfold.evaluation.references import References

Images = Float[Tensor, "n channels height width"]


@dataclass(frozen=True, kw_only=True)
class PreprocessedFeatures:
    """A function of preprocessed images as a feature extractor.

    Attributes:
        function: from preprocessed images to ``[n, features]``.
        preprocessing: what is done before.
        name: of the feature space.
        content: hash or name of the function and its weights.
    """

    function: Callable[[Images], Tensor]
    preprocessing: PreprocessingConfig
    name: str
    content: str

    @property
    def identity(self) -> str:
        """A hash of content and preprocessing."""
        return hashlib.sha256(f"{self.content}/{self.preprocessing.model_dump_json()}".encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Images) -> Float[Tensor, "n features"]:
        """Return one fp32 vector an image.

        Raises:
            UserError: the function fails, or returns something else than one vector an image.
        """
        if len(images) == 0:  # a rank without a share computes along, and foreign code may not know empty batches
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        try:
            features = self.function(preprocess(images, self.preprocessing))
        except Exception as error:  # foreign code: whatever it raises, the user needs to know what it was given
            raise self._fault(f"raised {type(error).__name__}: {error}", images) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            returned = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise self._fault(f"returned {returned}, not one vector for each of {len(images)} images", images)
        return features.float()

    def _fault(self, what: str, images: Images) -> SixfoldError:
        return UserError.of(
            f"the feature extractor {self.name} {what}",
            where="evaluation.features",
            allowed="a function from [n, channels, height, width] to [n, features]",
            fix=f"images are {list(images.shape)}: check features.preprocessing (image_size, colour, mean and std)",
        )


def preprocess(images: Images, config: PreprocessingConfig) -> Images:
    """Turn images in [-1, 1] into what an extractor was trained on."""
    values = ((images.float().clamp(-1.0, 1.0) + 1.0) / 2.0).contiguous()
    if config.rounded:
        values = (values * 255.0).round() / 255.0
    if config.colour and values.shape[1] == 1:
        values = values.expand(-1, 3, -1, -1)
    if config.image_size is not None and values.shape[-2:] != (config.image_size, config.image_size):
        values = F.interpolate(values, size=(config.image_size,) * 2, mode=config.interpolation, antialias=True)
        values = values.clamp(0.0, 1.0)  # bicubic weights overshoot
    if config.crop is not None:
        top, left = ((side - config.crop) // 2 for side in values.shape[-2:])
        values = values[..., top : top + config.crop, left : left + config.crop]
    mean, std = (values.new_tensor(numbers)[None, :, None, None] for numbers in (config.mean, config.std))
    return (values - mean) / std


def pixel_features(config: PixelFeaturesConfig, references: References) -> PixelFeatures:
    """The pixels."""
    return PixelFeatures()


def classifier_features(config: ClassifierFeaturesConfig, references: References) -> ClassifierFeatures:
    """The classifier of the training split."""
    return references.classifier()


def callable_features(config: CallableFeaturesConfig, references: References) -> PreprocessedFeatures:
    """A Python callable by its name; its source file is part of the features' identity.

    Raises:
        UserError: there is no such callable.
    """
    module_name, attribute = config.target.split(":")
    try:
        found: object = import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _unusable(config.target, f"cannot be imported: {error}") from error
    if not callable(found):
        raise _unusable(config.target, f"is a {type(found).__name__}, not callable")
    source = inspect.getsourcefile(import_module(module_name))
    content = file_hash(Path(source)) if source is not None else module_name
    return PreprocessedFeatures(
        function=found,
        preprocessing=config.preprocessing,
        name=attribute,
        content=f"callable/{config.target}/{content}",
    )


def torchscript_features(config: TorchScriptFeaturesConfig, references: References) -> PreprocessedFeatures:
    """A TorchScript file.

    Raises:
        UserError: the file is missing or is none.
    """
    path = require_path(config.path)
    try:
        network = torch.jit.load(path, map_location=references.device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _unusable(config.path, f"is no TorchScript file: {str(error).splitlines()[0]}") from error
    return PreprocessedFeatures(
        function=network,
        preprocessing=config.preprocessing,
        name=path.stem,
        content=f"torchscript/{file_hash(path)}",
    )


def require_path(path: str) -> Path:
    """Return the path; raises UserError where nothing is."""
    found = Path(path).expanduser()
    if not found.exists():
        raise _unusable(path, "does not exist")
    return found


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files below a folder with their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        digest.update(b"" if file == path else str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _unusable(what: str, why: str) -> SixfoldError:
    return UserError.of(
        f"{what!r} {why}",
        where="evaluation.features",
        allowed="classifier, pixel, a callable module:attribute, or a local path to TorchScript, timm or transformers",
        fix="correct the name or path; a callable's module must be importable where training runs (PYTHONPATH)",
    )
