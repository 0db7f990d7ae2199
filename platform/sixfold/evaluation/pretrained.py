"""Feature extractors from timm and transformers, from local files alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.errors import EnvironmentFault, SixfoldError, UserError
from sixfold.evaluation.extractor_config import TimmFeaturesConfig, TransformersFeaturesConfig
from sixfold.evaluation.extractors import PreprocessedFeatures, file_hash, require_path
from sixfold.evaluation.references import References


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
        UserError: the folder holds no such network.
        EnvironmentFault: transformers is not installed.
    """
    path = require_path(config.path)
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise _missing("transformers", error) from error
    try:
        network = AutoModel.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError.of(
            f"transformers cannot load it: {str(error).splitlines()[0]}",
            where=config.path,
            fix="name a folder that save_pretrained wrote, with config.json and weights",
        ) from error
    return PreprocessedFeatures(
        function=_VisionFeatures(network.eval().requires_grad_(False).to(references.device), config.normalized),
        preprocessing=config.preprocessing,
        name=path.name,
        content=f"transformers/{file_hash(path)}/{config.normalized}",
    )


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
