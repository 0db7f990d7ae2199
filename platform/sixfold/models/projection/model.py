"""The head that carries hidden tokens into another network's feature space (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from sixfold.models.network import Linear, Network, xavier_uniform
from sixfold.models.projection.config import ProjectionConfig


class Projection(Network):
    """Linear layers with SiLU between them; see :class:`~sixfold.models.projection.config.ProjectionConfig`."""

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        widths = [config.input_width, *[config.width] * config.depth, config.output_width]
        self._costs = [narrow * wide for narrow, wide in pairwise(widths)]
        self.layers = nn.ModuleList(
            Linear(narrow, wide, tag=xavier_uniform(narrow, wide), bias=True) for narrow, wide in pairwise(widths)
        )

    def forward(self, tokens: Float[Tensor, "n tokens input_width"]) -> Float[Tensor, "n tokens output_width"]:
        """Map each token."""
        for number, layer in enumerate(self.layers):
            tokens = layer(tokens if number == 0 else silu(tokens))
        return tokens

    def blocks(self) -> Iterator[nn.Module]:
        """None: it is too small to be sharded by parts."""
        return iter(())

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add, for one token an image: how many there are is the denoiser's affair."""
        return 2.0 * batch_fields["image"][0] * sum(self._costs)
