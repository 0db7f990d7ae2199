"""The diffusion transformer with adaptive layer norm (DiT, adaLN-Zero; Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from sixfold.models.attention import full_attention
from sixfold.models.dit.config import DiTConfig
from sixfold.models.dit.embedding import LabelEmbedding, PatchEmbedding, ScalarEmbeddings, TimeEmbedding, unpatchify
from sixfold.models.network import ZERO_MATRIX, Linear, Network, xavier_uniform
from sixfold.models.normalization import RMSNorm
from sixfold.models.precision import compute_dtype

_EPSILON = 1e-6


def modulated_norm(
    x: Float[Tensor, "n tokens width"], shift: Float[Tensor, "n 1 width"], scale: Float[Tensor, "n 1 width"]
) -> Float[Tensor, "n tokens width"]:
    """LayerNorm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=_EPSILON), 1.0 + scale).to(compute_dtype(x))


class SelfAttention(nn.Module):
    """Full attention between the tokens of an image, optionally with RMSNorm of queries and keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        tag = xavier_uniform(width, width)
        self.query = Linear(width, width, tag=tag, bias=True)
        self.key = Linear(width, width, tag=tag, bias=True)
        self.value = Linear(width, width, tag=tag, bias=True)
        self.output = Linear(width, width, tag=tag, bias=True)
        self.query_norm = RMSNorm(width // config.heads, _EPSILON) if config.qk_norm else None
        self.key_norm = RMSNorm(width // config.heads, _EPSILON) if config.qk_norm else None

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        """Mix tokens."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        attended = full_attention(query, key, value)
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return mixed


class Block(nn.Module):
    """x += gate * f(modulated_norm(x)) for f in (attention, MLP); shifts, scales and gates come from the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.modulation = Linear(width, 6 * width, tag=ZERO_MATRIX, bias=True)
        self.attention = SelfAttention(config)
        self.up = Linear(width, hidden, tag=xavier_uniform(width, hidden), bias=True)
        self.down = Linear(hidden, width, tag=xavier_uniform(hidden, width), bias=True)

    def forward(
        self, x: Float[Tensor, "n tokens width"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n tokens width"]:
        """Apply the block; ``condition`` is the embedded condition after its SiLU."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = parts
        attended = self.attention(modulated_norm(x, attention_shift, attention_scale))
        x = torch.addcmul(x, attention_gate, attended)
        hidden = gelu(self.up(modulated_norm(x, mlp_shift, mlp_scale)), approximate="tanh")
        return torch.addcmul(x, mlp_gate, self.down(hidden))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map of each token to its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = Linear(config.width, 2 * config.width, tag=ZERO_MATRIX, bias=True)
        self.projection = Linear(config.width, config.patch_size**2 * config.channels, tag=ZERO_MATRIX, bias=True)

    def forward(
        self, x: Float[Tensor, "n tokens width"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n tokens features"]:
        """Map tokens to patches."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        mapped: Tensor = self.projection(modulated_norm(x, shift, scale))
        return mapped


class DiT(Network):
    """Diffusion transformer; see :class:`~sixfold.models.dit.config.DiTConfig`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config)
        self.time = TimeEmbedding(config.width, frequencies=config.time_frequencies, scale=config.time_scale)
        self.scalars = ScalarEmbeddings(
            config.scalars, config.width, frequencies=config.time_frequencies, scale=config.time_scale
        )
        self.label = LabelEmbedding(config.classes, config.width) if config.classes else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = FinalLayer(config)

    def forward(
        self,
        x: Float[Tensor, "n c h w"],
        time: Float[Tensor, "n"],
        condition: Mapping[str, Tensor],
        *,
        read_after: tuple[int, ...] = (),
    ) -> Float[Tensor, "n c h w"] | tuple[Float[Tensor, "n c h w"], tuple[Float[Tensor, "n tokens width"], ...]]:
        """Return the prediction for noisy images, and with ``read_after`` the tokens after those blocks.

        Args:
            x: images or latents at ``time``.
            time: fp32 in [0, 1].
            condition: ``label`` ``[n]`` int64 where the network has classes; the value ``classes`` stands for no label.
                Each of ``scalars`` ``[n]`` fp32, 0 where it is left out.
            read_after: block numbers from 0, in increasing order.
        """
        embedded = self.time(time)
        if self.label is not None:
            embedded = embedded + self.label(condition["label"])
        activated = silu(self.scalars(embedded, time, condition))
        tokens, read = self.patches(x), []
        for number, block in enumerate(self.layers):
            tokens = block(tokens, activated)
            if number in read_after:
                read.append(tokens)
        prediction = unpatchify(self.final(tokens, activated), self.config.patch_size, self.config.channels)
        return (prediction, tuple(read)) if read_after else prediction

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks in order."""
        return iter(self.layers)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add: maps of tokens, attention's two products, and maps of the condition once an image."""
        config, width = self.config, self.config.width
        patch_features = config.channels * config.patch_size**2
        token_maps = config.depth * (4 * width * width + 2 * width * config.hidden_width) + 2 * patch_features * width
        attention = 2 * config.depth * width * config.tokens
        condition_maps = (6 * config.depth + 2) * width * width + (config.time_frequencies + width) * width
        return 2.0 * batch_fields["image"][0] * (config.tokens * (token_maps + attention) + condition_maps)
