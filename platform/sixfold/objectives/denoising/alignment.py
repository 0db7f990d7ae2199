"""Alignment of a denoiser's hidden tokens with features of the clean image (REPA, arXiv 2410.06940, equation 8)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from sixfold.errors import RecipeError
from sixfold.models.settings import NetworkSettings
from sixfold.models.trained.network import NetworksConfig, architecture_of
from sixfold.objectives.contract import Networks
from sixfold.objectives.denoising.alignment_config import AlignmentConfig


def check_alignment(config: AlignmentConfig, denoiser: str, networks_config: NetworksConfig) -> None:
    """Raise RecipeError unless the denoiser has that block to read, and the projection its width."""
    settings = architecture_of(networks_config[denoiser])
    if "hidden_tokens" not in settings.provides:
        raise RecipeError.of(
            f"objective.alignment reads hidden tokens, which networks.{denoiser} does not give",
            where="objective.alignment",
            allowed="a denoiser of type dit",
            fix="change the denoiser, or leave objective.alignment out",
        )
    depth, width = _number(settings, "depth"), _number(settings, "width")
    if config.block > depth:
        raise RecipeError.of(
            f"objective.alignment.block is {config.block}, and networks.{denoiser} has {depth} blocks",
            where="objective.alignment.block",
            allowed=f"1 to {depth}",
            fix=f"set objective.alignment.block={max(1, depth // 3)}",
        )
    inputs = _number(architecture_of(networks_config[config.projection]), "input_width")
    if inputs != width:
        raise RecipeError.of(
            f"networks.{config.projection}.input_width is {inputs}, and tokens of networks.{denoiser} are {width} wide",
            where=f"networks.{config.projection}.input_width",
            allowed=str(width),
            fix=f"set networks.{config.projection}.input_width={width}",
        )


def cosine_alignment(
    config: AlignmentConfig, nets: Networks, hidden: Float[Tensor, "n tokens width"], images: Float[Tensor, "n c h w"]
) -> Float[Tensor, " n"]:
    """Return each sample's mean cosine, in fp32, between projected tokens and the frozen features where they lie.

    Args:
        config: which features.
        nets: roles ``projection`` and ``features``.
        hidden: tokens of a square grid.
        images: the clean images.

    Raises:
        RecipeError: the feature network has no such output, or the projection not its channels.
    """
    with torch.no_grad():
        outputs = nets["features"](images)
        if config.output not in outputs:
            raise RecipeError.of(
                f"networks.{config.features} has no output {config.output!r}",
                where="objective.alignment.output",
                allowed=", ".join(outputs),
                fix="choose one of these",
            )
        target = _by_token(outputs[config.output].float(), hidden.shape[1])
    tokens = hidden if target.shape[1] == hidden.shape[1] else hidden.mean(1, keepdim=True)
    projected: Tensor = nets["projection"](tokens).float()
    if projected.shape != target.shape:
        raise RecipeError.of(
            f"networks.{config.projection}.output_width is {projected.shape[-1]}, and {config.output} has "
            f"{target.shape[-1]} channels",
            where=f"networks.{config.projection}.output_width",
            fix=f"set networks.{config.projection}.output_width={target.shape[-1]}",
        )
    return (normalize(projected, dim=-1) * normalize(target, dim=-1)).sum(-1).mean(1)


def _by_token(features: Float[Tensor, "n ..."], tokens: int) -> Float[Tensor, "n places channels"]:
    """A map averaged within each token's square, ``[n, tokens, channels]``; an embedding as one place."""
    if features.ndim == 2:
        return features[:, None]
    side = math.isqrt(tokens)
    assert side * side == tokens, "denoisers' tokens are squares of a square image"
    return adaptive_avg_pool2d(features, side).flatten(2).transpose(1, 2)


def _number(settings: NetworkSettings, name: str) -> int:
    value: int = getattr(settings, name)
    return value
