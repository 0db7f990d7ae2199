"""Grouped-query self-attention with rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sixfold.models.attention import AttentionMask, causal_attention
from sixfold.models.moe_transformer.cache import LayerCache
from sixfold.models.moe_transformer.config import MoETransformerConfig
from sixfold.models.network import Linear, ParameterTag, normal
from sixfold.models.normalization import RMSNorm


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    It is no pytree on purpose: sharding hooks that cast a block's inputs to bf16 leave the rotary angles in fp32.

    Attributes:
        cosine, sine: see :func:`rotary_table`.
        mask: see :func:`sixfold.models.attention.causal_attention`.
        start: the position of the first token: how many are cached.
    """

    cosine: Float[Tensor, "length 1 features"]
    sine: Float[Tensor, "length 1 features"]
    mask: AttentionMask | None = None
    start: int = 0


def rotary_table(
    start: int, length: int, features: int, theta: float, device: torch.device
) -> tuple[Float[Tensor, "length 1 features"], Float[Tensor, "length 1 features"]]:
    """Return cosine and signed sine of position * theta^(-2i / features), i < features / 2 (arXiv 2104.09864).

    Feature i turns with feature i + features / 2, so the angles come twice; the sine is negative the first time.
    """
    exponent = torch.arange(0, features, 2, device=device, dtype=torch.float32) / features
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = position[:, None, None] * theta**-exponent
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(
    x: Float[Tensor, "n length heads features"],
    cosine: Float[Tensor, "length 1 features"],
    sine: Float[Tensor, "length 1 features"],
) -> Float[Tensor, "n length heads features"]:
    """Rotate each feature with its partner, half the features away, in fp32."""
    rotated: Tensor = _Rotation.apply(x, cosine, sine)  # type: ignore[no-untyped-call]  # torch's
    return rotated


class _Rotation(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the opposite angle: as cheap as the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return rotate(gradient, cosine, -sine), None, None


class Attention(nn.Module):
    """Causal self-attention: grouped queries, rotary positions, optional RMSNorm of queries and keys."""

    def __init__(self, config: MoETransformerConfig, *, output_tag: ParameterTag) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.features = config.features_per_head
        tag = normal(config.init_scale)
        self.query = Linear(config.width, self.heads * self.features, tag=tag)
        self.key = Linear(config.width, self.kv_heads * self.features, tag=tag)
        self.value = Linear(config.width, self.kv_heads * self.features, tag=tag)
        self.output = Linear(self.heads * self.features, config.width, tag=output_tag)
        self.query_norm = RMSNorm(self.features, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(self.features, config.norm_epsilon) if config.qk_norm else None

    def forward(
        self, x: Float[Tensor, "n length width"], context: AttentionContext, cache: LayerCache | None = None
    ) -> Float[Tensor, "n length width"]:
        """Attend to this and earlier positions, cached ones included."""
        query = self.query(x).unflatten(-1, (self.heads, self.features))
        key = self.key(x).unflatten(-1, (self.kv_heads, self.features))
        value = self.value(x).unflatten(-1, (self.kv_heads, self.features)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, context.cosine, context.sine).transpose(1, 2)
        key = rotate(key, context.cosine, context.sine).transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value, context.start)
        attended = causal_attention(query, key, value, context.mask)
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return mixed
