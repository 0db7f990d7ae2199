"""Feature extractors from timm and transformers, from local files or, where it is asked for, from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.errors import EnvironmentFault, SixfoldError, UserError
from sixfold.evaluation.extractor_config import PreprocessingConfig, TimmFeaturesConfig, TransformersFeaturesConfig
from sixfold.evaluation.extractors import PreprocessedFeatures, file_hash, require_path
from sixfold.evaluation.references import References
from sixfold.models.hub import HUB, ModelSource, model_source


def timm_features(config: TimmFeaturesConfig, references: References) -> PreprocessedFeatures:
    """A timm network without its head.

    Raises:
        UserError: the name or the weights do not fit.
        EnvironmentFault: timm is not installed.
    """
    path = require_path(config.path)
    try:
        import timm
    except ImportError as error:
        raise _missing("timm", error) from error
    try:
        network = timm.create_model(config.model, pretrained=False, num_classes=0, checkpoint_path=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError.of(
            f"timm cannot load {config.model}: {str(error).splitlines()[0]}",
            where=config.path,
            fix="check evaluation.features.model and path",
        ) from error
    return PreprocessedFeatures(
        function=network.eval().requires_grad_(False).to(references.device),
        preprocessing=config.preprocessing,
        name=config.model,
        content=f"timm/{config.model}/{file_hash(path)}",
    )


def transformers_features(config: TransformersFeaturesConfig, references: References) -> PreprocessedFeatures:
    """A vision network of transformers: image embeddings where it has them (CLIP), else its pooled output.

    Raises:
        UserError: there is no such network, or nothing says how it wants its images.
        EnvironmentFault: transformers is not installed.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise _missing("transformers", error) from error
    try:
        source = model_source(config.path)
        network = AutoModel.from_pretrained(source.name, local_files_only=source.local_files_only)
    except (OSError, ValueError) as error:
        raise UserError.of(
            f"transformers cannot load it: {str(error).splitlines()[0]}",
            where=config.path,
            allowed=f"a folder that save_pretrained wrote, or {HUB}OWNER/NAME where the hub can be reached",
            fix="name a folder with config.json and weights",
        ) from error
    preprocessing = config.preprocessing or _preprocessing_of(source)
    return PreprocessedFeatures(
        function=_VisionFeatures(network.eval().requires_grad_(False).to(references.device), config.normalized),
        preprocessing=preprocessing,
        name=Path(source.name).name,
        content=f"transformers/{weights_hash(network)}/{config.normalized}",
    )


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 of a network's class and of all its weights by name."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _preprocessing_of(source: ModelSource) -> PreprocessingConfig:
    """Read what a network's images must be like.

    Raises:
        UserError: nothing says so, or in words that are not known here.
    """
    from transformers import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(source.name, local_files_only=source.local_files_only)
        return read_preprocessing(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.of(
            f"how the network wants its images cannot be read: {str(error).splitlines()[0]}",
            where=f"{source.name}/preprocessor_config.json",
            fix="set features.preprocessing (image_size, interpolation, mean, std) as the network was trained",
        ) from error


def read_preprocessing(found: Mapping[str, Any]) -> PreprocessingConfig:
    """Turn a ``preprocessor_config.json`` into settings; images here are square, so that a shortest edge is a side.

    Raises:
        ValueError: it asks for something else.
    """
    resizes, crops, normalizes = (
        found.get(f"do_{name}", default)
        for name, default in (("resize", True), ("center_crop", False), ("normalize", True))
    )
    side = _side(found.get("size")) if resizes else None
    crop = _side(found.get("crop_size")) if crops else None
    filters = {2: "bilinear", 3: "bicubic"}
    if side is not None and found["resample"] not in filters:
        raise ValueError(f"resample is {found['resample']}, known are 2 (bilinear) and 3 (bicubic)")
    return PreprocessingConfig.model_validate(
        {
            "image_size": side,
            "crop": None if crop == side else crop,
            "interpolation": filters[found["resample"]] if side is not None else "bicubic",
            "mean": found["image_mean"] if normalizes else [0.0],
            "std": found["image_std"] if normalizes else [1.0],
        }
    )


def _side(size: Any) -> int:
    """Read a square's side from the several ways in which sizes are written."""
    if isinstance(size, Mapping):
        sides = {value for key, value in size.items() if key in ("shortest_edge", "height", "width")}
        size = sides.pop() if len(sides) == 1 else None
    if not isinstance(size, int):
        raise ValueError(f"size is {size!r}, not that of a square")
    return size


class _VisionFeatures:
    """One vector an image, from whatever the network offers."""

    def __init__(self, network: nn.Module, normalized: bool) -> None:
        self._network: Any = network
        self._normalized = normalized

    def __call__(self, images: Tensor) -> Tensor:
        if hasattr(self._network, "get_image_features"):
            found = self._network.get_image_features(pixel_values=images)
        else:
            found = self._network(pixel_values=images)
        vectors: Tensor = found if isinstance(found, Tensor) else _pooled(found)
        vectors = vectors.flatten(1)
        return F.normalize(vectors.float(), dim=1) if self._normalized else vectors


def _pooled(output: Any) -> Tensor:
    """The pooled output, or the mean over tokens of a network without one."""
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    tokens: Tensor = output.last_hidden_state
    return torch.mean(tokens, dim=1)


def _missing(package: str, error: ImportError) -> SixfoldError:
    return EnvironmentFault.of(
        f"features of type {package} need the package {package}: {error}",
        where="evaluation.features",
        allowed="classifier, pixel, callable and torchscript work without it",
        fix=f"pip install {package}",
    )
