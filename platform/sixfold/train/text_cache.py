"""Features of captions that were made beforehand: writing them, and training on them instead of the encoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sixfold.errors import RecipeError
from sixfold.evaluation.extractors import file_hash
from sixfold.models.hub import HUB
from sixfold.models.text_encoder.config import CachedTextConfig, HuggingFaceTextConfig
from sixfold.models.trained.network import NetworksConfig
from sixfold.objectives.conditioning.config import EncoderConfig
from sixfold.recipe.recipe import Recipe
from sixfold_data.build import BuildReport
from sixfold_data.config import CacheConfig
from sixfold_data.describe import DataInfo
from sixfold_data.encode_text import Encode, write_text_features
from sixfold_data.store import open_store
from sixfold_data.text_features import DTYPES, field_of

_IDENTITY_DIGITS = 16
_DECIDING = {"encoder_folder", "tokenizer_folder", "text_tokens", "text_width", "pooled_width", "layer", "dtype"}


def encode_text(
    recipe: Recipe, path: str, out: Path, *, batch: int, progress: Callable[[int, int], None]
) -> BuildReport:
    """Write a data set again with what the frozen text encoders of a recipe make of its captions.

    Raises:
        RecipeError: the recipe has no such encoder, or one of them cannot be read.
        DataError: the data set has no captions, or one cannot be read.
    """
    found = frozen_encoders(recipe)
    if not found:
        raise RecipeError.of(
            f"{recipe.name} has no frozen text encoder",
            where="objective.encoders",
            allowed="networks of type huggingface_text, with frozen: true under objective.encoders",
            fix="name a recipe that has one; encoders that train make other features at every step",
        )
    length = recipe.data.caption_length
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {encoder_identity(name, config, length): _encode(config, device) for name, config in found.items()}
    return write_text_features(path, out, encoders, caption_length=length, batch=batch, progress=progress)


def with_cached_text(recipe: Recipe, networks: NetworksConfig, info: DataInfo) -> NetworksConfig:
    """Let frozen text encoders take their features from the data, where those come with features.

    Raises:
        RecipeError: the features are of other encoders.
    """
    if not info.text:
        return networks
    cached = {name: _cached(name, config, recipe, info) for name, config in frozen_encoders(recipe).items()}
    return {**networks, **cached}


def frozen_encoders(recipe: Recipe) -> dict[str, HuggingFaceTextConfig]:
    """The frozen encoders of a recipe that come with their weights, by name; two alike count once each."""
    encoders: Mapping[str, EncoderConfig] = getattr(recipe.objective, "encoders", {})
    return {
        name: config
        for name in encoders
        if encoders[name].frozen and isinstance(config := recipe.networks.get(name), HuggingFaceTextConfig)
    }


def encoder_identity(name: str, config: HuggingFaceTextConfig, caption_length: int) -> str:
    """Hash everything that decides an encoder's features: its files, how it is read, and how long captions are.

    Raises:
        RecipeError: its folder is not here.
    """
    folder = Path(config.path).expanduser()
    if config.path.startswith(HUB) or not folder.is_dir():
        raise RecipeError.of(
            f"networks.{name}.path is {config.path!r}, and only of a folder can be told whose features the data hold",
            where=f"networks.{name}.path",
            fix="save the model to a folder and name that",
        )
    parts = {part: file_hash(folder / part) for part in (config.encoder_folder, config.tokenizer_folder)}
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key in _DECIDING}
    content = json.dumps({"files": parts, "settings": settings, "caption_length": caption_length}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:_IDENTITY_DIGITS]


def _cached(name: str, config: HuggingFaceTextConfig, recipe: Recipe, info: DataInfo) -> CachedTextConfig:
    identity = encoder_identity(name, config, recipe.data.caption_length)
    if identity not in info.text:
        raise RecipeError.of(
            f"the data hold features of the text encoders {', '.join(info.text)}, networks.{name} is {identity}",
            where=f"networks.{name}",
            allowed="the encoder that made them, with the same settings and data.caption_length",
            fix="write them again with `sixfold data encode-text`, or train on data without features",
        )
    store = open_store(recipe.data.paths[0], CacheConfig())
    return CachedTextConfig(
        encoder=config, field=field_of(identity), null=str(store.local_path(info.text[identity].null))
    )


def _encode(config: HuggingFaceTextConfig, device: torch.device) -> Encode:
    encoder: nn.Module = config.load()(config)
    encoder.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def encode(captions: Tensor) -> Tensor:
        text, pooled = encoder(captions.to(device))
        values = text.flatten(1) if pooled is None else torch.cat([text.flatten(1), pooled], dim=1)
        return values.to(DTYPES[config.dtype]).cpu()

    return encode
