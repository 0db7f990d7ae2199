"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from sixfold.models.network import constant, parameter
from sixfold.models.precision import compute_dtype


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon) over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = parameter(width, tag=constant(1.0))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalise in fp32 internally; the result has the type that matrix products run in."""
        normalized = nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)
        return normalized.to(compute_dtype(x))
