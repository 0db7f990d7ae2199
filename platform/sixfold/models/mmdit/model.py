"""The multimodal diffusion transformer: two streams, one attention (Esser et al., arXiv 2403.03206, figure 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from sixfold.models.attention import full_attention
from sixfold.models.dit.embedding import ScalarEmbeddings, TimeEmbedding, patchify, sinusoids, unpatchify
from sixfold.models.dit.model import modulated_norm
from sixfold.models.mmdit.config import MMDiTConfig
from sixfold.models.network import ZERO_MATRIX, Linear, Network, OwnsBuffers, normal, xavier_uniform
from sixfold.models.normalization import RMSNorm

_EPSILON = 1e-6


class CroppedPatchEmbedding(OwnsBuffers):
    """A linear map of each patch, plus its position in the middle of a larger grid.

    Images of several aspect ratios so share their centre, and cells keep the spacing they have at ``image_size``.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.patch, self.spacing = config.patch_size, config.grid / (config.position_grid or config.grid)
        features = config.channels * config.patch_size**2
        self.projection = Linear(features, config.width, tag=xavier_uniform(features, config.width), bias=True)
        self.axis: Tensor
        self.register_buffer(
            "axis", torch.empty(config.position_grid or config.grid, config.width // 2), persistent=False
        )
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recompute [sin, cos] of the places along one axis."""
        cells, width = self.axis.shape
        places = torch.arange(cells, device=self.axis.device, dtype=torch.float64) * self.spacing
        cosines, sines = sinusoids(places, width).chunk(2, dim=-1)
        self.axis.copy_(torch.cat([sines, cosines], dim=-1))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        """Embed images whose patches fit the grid of positions, in the type of the weights."""
        embedded: Tensor = self.projection(patchify(images, self.patch).to(self.projection.weight.dtype))
        rows, columns = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        down, across = (self._middle(count) for count in (rows, columns))
        position = torch.cat([across.expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)], dim=-1)
        return embedded + position.flatten(0, 1).to(embedded.dtype)

    def _middle(self, count: int) -> Float[Tensor, "count half"]:
        start = (len(self.axis) - count) // 2
        return self.axis[start : start + count]


class Stream(nn.Module):
    """One modality's weights in a block; a stream that ends here gives keys and values and changes no more."""

    def __init__(self, config: MMDiTConfig, *, ends: bool) -> None:
        super().__init__()
        width, hidden, self.heads, self.ends = config.width, config.hidden_width, config.heads, ends
        square = xavier_uniform(width, width)
        self.modulation = Linear(width, (2 if ends else 6) * width, tag=ZERO_MATRIX, bias=True)
        self.query = Linear(width, width, tag=square, bias=True)
        self.key = Linear(width, width, tag=square, bias=True)
        self.value = Linear(width, width, tag=square, bias=True)
        self.query_norm = RMSNorm(width // config.heads, _EPSILON) if config.qk_norm else None
        self.key_norm = RMSNorm(width // config.heads, _EPSILON) if config.qk_norm else None
        if not ends:
            self.output = Linear(width, width, tag=square, bias=True)
            self.up = Linear(width, hidden, tag=xavier_uniform(width, hidden), bias=True)
            self.down = Linear(hidden, width, tag=xavier_uniform(hidden, width), bias=True)

    def modulate(self, condition: Float[Tensor, "n width"]) -> tuple[Tensor, ...]:
        """Return shift and scale of the attention's input and, unless it ends, gate, and all three of the MLP."""
        parts: Tensor = self.modulation(condition)[:, None]
        return parts.chunk(2 if self.ends else 6, dim=-1)

    def attended(self, x: Float[Tensor, "n tokens width"], parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[n, heads, tokens, features]``."""
        seen = modulated_norm(x, parts[0], parts[1])
        query, key, value = (
            projection(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def updated(
        self, x: Float[Tensor, "n tokens width"], mixed: Float[Tensor, "n tokens width"], parts: tuple[Tensor, ...]
    ) -> Float[Tensor, "n tokens width"]:
        """Add what attention brought, then the MLP."""
        _, _, attention_gate, shift, scale, gate = parts
        x = torch.addcmul(x, attention_gate, self.output(mixed))
        hidden = gelu(self.up(modulated_norm(x, shift, scale)), approximate="tanh")
        return torch.addcmul(x, gate, self.down(hidden))


class JointBlock(nn.Module):
    """Two streams that meet in one attention over all their tokens."""

    def __init__(self, config: MMDiTConfig, *, last: bool) -> None:
        super().__init__()
        self.image = Stream(config, ends=False)
        self.text = Stream(config, ends=last)

    def forward(
        self,
        image: Float[Tensor, "n tokens width"],
        text: Float[Tensor, "n length width"],
        condition: Float[Tensor, "n width"],
    ) -> tuple[Tensor, ...]:
        """Return the changed image and, except from the last block, text; ``condition`` comes after its SiLU."""
        image_parts, text_parts = self.image.modulate(condition), self.text.modulate(condition)
        pairs = zip(self.image.attended(image, image_parts), self.text.attended(text, text_parts), strict=True)
        query, key, value = (torch.cat(pair, dim=2) for pair in pairs)
        attended = full_attention(query, key, value).transpose(1, 2).flatten(-2)
        patches = image.shape[1]
        image = self.image.updated(image, attended[:, :patches], image_parts)
        if self.text.ends:
            return (image,)
        return image, self.text.updated(text, attended[:, patches:], text_parts)


class PooledTextEmbedding(nn.Module):
    """A two-layer MLP of the pooled text, which is added to the embedded time."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.inner = Linear(config.pooled_width, config.width, tag=normal(0.02), bias=True)
        self.outer = Linear(config.width, config.width, tag=normal(0.02), bias=True)

    def forward(self, pooled: Float[Tensor, "n features"]) -> Float[Tensor, "n width"]:
        """Embed pooled features."""
        embedded: Tensor = self.outer(silu(self.inner(pooled.to(self.inner.weight.dtype))))
        return embedded


class MMDiT(Network):
    """Multimodal diffusion transformer; see :class:`~sixfold.models.mmdit.config.MMDiTConfig`."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, features = config.width, config.patch_size**2 * config.channels
        self.patches = CroppedPatchEmbedding(config)
        self.time = TimeEmbedding(width, frequencies=config.time_frequencies, scale=config.time_scale)
        self.scalars = ScalarEmbeddings(
            config.scalars, width, frequencies=config.time_frequencies, scale=config.time_scale
        )
        self.pooled = PooledTextEmbedding(config) if config.pooled_width else None
        self.text = Linear(config.text_width, width, tag=xavier_uniform(config.text_width, width), bias=True)
        self.layers = nn.ModuleList(JointBlock(config, last=n + 1 == config.depth) for n in range(config.depth))
        self.modulation = Linear(width, 2 * width, tag=ZERO_MATRIX, bias=True)
        self.projection = Linear(width, features, tag=ZERO_MATRIX, bias=True)

    def forward(
        self,
        x: Float[Tensor, "n c h w"],
        time: Float[Tensor, "n"],
        condition: Mapping[str, Tensor],
        *,
        read_after: tuple[int, ...] = (),
    ) -> Float[Tensor, "n c h w"] | tuple[Float[Tensor, "n c h w"], tuple[Float[Tensor, "n tokens width"], ...]]:
        """Return the prediction for noisy images, and with ``read_after`` the image's tokens after those blocks.

        Args:
            x: images or latents at ``time``; height and width are multiples of the patch, at most the position grid.
            time: fp32 in [0, 1].
            condition: ``text`` ``[n, length, text_width]`` and, where the network takes it, ``pooled``
                ``[n, pooled_width]``. Each of ``scalars`` ``[n]`` fp32, 0 where it is left out.
            read_after: block numbers from 0, in increasing order.
        """
        embedded = self.time(time)
        if self.pooled is not None:
            embedded = embedded + self.pooled(condition["pooled"])
        activated = silu(self.scalars(embedded, time, condition))
        image, text = self.patches(x), self.text(condition["text"].to(self.text.weight.dtype))
        read = []
        for number, block in enumerate(self.layers):
            image, *text_stream = block(image, text, activated)
            text = text_stream[0] if text_stream else text
            if number in read_after:
                read.append(image)
        shift, scale = self.modulation(activated)[:, None].chunk(2, dim=-1)
        tokens = self.projection(modulated_norm(image, shift, scale))
        patch = self.config.patch_size
        prediction = unpatchify(tokens, patch, self.config.channels, x.shape[-2] // patch)
        return (prediction, tuple(read)) if read_after else prediction

    def blocks(self) -> Iterator[nn.Module]:
        """The joint blocks in order."""
        return iter(self.layers)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add: maps of each stream's tokens, joint attention, and maps of the condition."""
        config, width = self.config, self.config.width
        n, _, *sides = batch_fields["image"]
        length = config.text_tokens
        tokens = sides[0] * sides[1] // config.patch_size**2
        token_maps = config.depth * (4 * width * width + 2 * width * config.hidden_width)
        image_maps = tokens * (token_maps + 2 * config.channels * config.patch_size**2 * width)
        text_maps = length * (token_maps - width * width - 2 * width * config.hidden_width + config.text_width * width)
        attention = 2 * config.depth * width * (tokens + length) ** 2
        condition_maps = (12 * config.depth - 2) * width * width
        condition_maps += (config.time_frequencies + config.pooled_width + 2 * width) * width
        return 2.0 * n * (image_maps + text_maps + attention + condition_maps)
