"""Discriminator heads on hidden tokens: each token is judged by itself, each layer by a head of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, leaky_relu

from sixfold.models.feature_heads.config import FeatureHeadsConfig
from sixfold.models.network import Linear, Network, normal

_SLOPE = 0.2


class Head(nn.Module):
    """A perceptron over each token, which is normalised first: layers differ in scale."""

    def __init__(self, config: FeatureHeadsConfig) -> None:
        super().__init__()
        widths = [config.features, *[config.width] * config.depth]
        self.hidden = nn.ModuleList(
            Linear(fan_in, fan_out, tag=normal((2.0 / fan_in) ** 0.5), bias=True)
            for fan_in, fan_out in pairwise(widths)
        )
        self.verdict = Linear(config.width, 1, tag=normal(config.width**-0.5), bias=True)

    def forward(self, tokens: Float[Tensor, "n tokens features"]) -> Float[Tensor, "n tokens"]:
        """Return a logit for each token."""
        x = layer_norm(tokens, tokens.shape[-1:])
        for layer in self.hidden:
            x = leaky_relu(layer(x), _SLOPE)
        logits: Tensor = self.verdict(x)
        return logits[..., 0]


class FeatureHeads(Network):
    """See :class:`~sixfold.models.feature_heads.config.FeatureHeadsConfig`."""

    def __init__(self, config: FeatureHeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Head(config) for _ in range(config.heads))

    def forward(self, features: Sequence[Float[Tensor, "n ... width"]]) -> Float[Tensor, "n verdicts"]:
        """Return the logits of all tokens of all layers; above 0 is real.

        Args:
            features: tokens of as many layers as there are heads; or one layer of pooled features ``[n, width]``.
        """
        layers = [part[:, None] if part.ndim == 2 else part for part in features]
        return torch.cat([head(part) for head, part in zip(self.layers, layers, strict=True)], dim=1)

    def blocks(self) -> Iterator[nn.Module]:
        """The heads."""
        return iter(self.layers)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add for one token a head; how many tokens there are only the read network knows."""
        config = self.config
        maps = config.features * config.width + (config.depth - 1) * config.width**2 + config.width
        return 2.0 * batch_fields["image"][0] * config.heads * maps
