"""A small transformer over a caption's bytes, trained together with the network that reads it."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, pad

from sixfold.models.attention import full_attention
from sixfold.models.network import Linear, Network, ParameterTag, normal, parameter
from sixfold.models.normalization import RMSNorm
from sixfold.models.text_encoder.config import END_OF_TEXT, VOCABULARY, ByteTextEncoderConfig

_EPSILON = 1e-6
_EMBEDDED = ParameterTag(init="normal", scale=0.1)


class Stem(nn.Module):
    """x += GELU(convolution of RMSNorm(x)), over a few neighbouring bytes."""

    def __init__(self, config: ByteTextEncoderConfig) -> None:
        super().__init__()
        self.reach, fan_in = config.stem // 2, config.stem * config.width
        self.norm = RMSNorm(config.width, _EPSILON)
        self.projection = Linear(fan_in, config.width, tag=normal(fan_in**-0.5))

    def forward(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        """Join neighbours; beyond either end there is nothing."""
        windows = pad(self.norm(x), (0, 0, self.reach, self.reach)).unfold(1, 2 * self.reach + 1, 1)
        joined: Tensor = self.projection(windows.flatten(2))
        return x + gelu(joined, approximate="tanh")


class EncoderBlock(nn.Module):
    """x += attention(RMSNorm(x)); x += MLP(RMSNorm(x)); every token of the caption sees every other."""

    def __init__(self, config: ByteTextEncoderConfig) -> None:
        super().__init__()
        width, hidden, self.heads = config.width, int(config.width * config.mlp_ratio), config.heads
        square = normal(width**-0.5)
        self.attention_norm = RMSNorm(width, _EPSILON)
        self.query = Linear(width, width, tag=square)
        self.key = Linear(width, width, tag=square)
        self.value = Linear(width, width, tag=square)
        self.output = Linear(width, width, tag=normal((2 * config.depth * width) ** -0.5))
        self.mlp_norm = RMSNorm(width, _EPSILON)
        self.up = Linear(width, hidden, tag=square)
        self.down = Linear(hidden, width, tag=normal((2 * config.depth * hidden) ** -0.5))

    def forward(
        self, x: Float[Tensor, "n length width"], visible: Bool[Tensor, "n 1 1 length"]
    ) -> Float[Tensor, "n length width"]:
        """Apply the block; ``visible`` tells the caption's tokens from padding."""
        seen = self.attention_norm(x)
        query, key, value = (
            projection(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = full_attention(query, key, value, visible)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        changed: Tensor = self.down(gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return x + changed


class ByteTextEncoder(Network):
    """Text encoder over bytes; see :class:`~sixfold.models.text_encoder.config.ByteTextEncoderConfig`."""

    def __init__(self, config: ByteTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bytes = parameter(VOCABULARY, config.width, tag=_EMBEDDED)
        self.positions = parameter(config.text_tokens, config.width, tag=_EMBEDDED)
        self.stem = Stem(config) if config.stem > 1 else None
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, _EPSILON)

    def forward(
        self, caption: Int64[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n tokens width"], Float[Tensor, "n width"]]:
        """Return text tokens, zero after the caption's end, and their mean over the caption.

        The first end-of-text token belongs to the caption, so that the empty one has a token, too.
        """
        ended = (caption == END_OF_TEXT).cumsum(dim=1)
        inside: Tensor = (ended - (caption == END_OF_TEXT).long()) == 0
        x = embedding(caption, self.bytes) * inside[:, :, None]
        x = x if self.stem is None else self.stem(x) * inside[:, :, None]
        x = x.unflatten(1, (-1, self.config.merge)).mean(dim=2) + self.positions
        inside = inside.reshape(len(x), -1, self.config.merge).any(dim=2)
        for block in self.layers:
            x = block(x, inside[:, None, None, :])
        kept = self.norm(x) * inside[:, :, None]
        return kept, kept.sum(dim=1) / inside.sum(dim=1, keepdim=True)

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks in order."""
        return iter(self.layers)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add: the convolution of bytes, maps of tokens, and attention's two products."""
        config, width = self.config, self.config.width
        n, tokens = next(iter(batch_fields.values()))[0], config.text_tokens
        token_maps = 4 * width * width + 2 * width * int(width * config.mlp_ratio)
        stem = config.length * config.stem * width * width if config.stem > 1 else 0
        return 2.0 * n * (config.depth * tokens * (token_maps + 2 * width * tokens) + stem)
