"""A frozen text encoder whose features come with the data: it is read only if a caption comes without."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.text_encoder.config import END_OF_TEXT, CachedTextConfig


def load_cached_text(config: CachedTextConfig) -> CachedText:
    """Read what the encoder makes of no caption."""
    content = torch.frombuffer(bytearray(Path(config.null).read_bytes()), dtype=torch.uint8)
    return CachedText(config, content.view(torch.bfloat16 if config.encoder.dtype == "bf16" else torch.float32))


class CachedText(nn.Module):
    """Called with captions and, where the data have them, the features that the encoder made of them beforehand."""

    def __init__(self, config: CachedTextConfig, null: Float[Tensor, " values"]) -> None:
        super().__init__()
        self.config = config
        self._live: list[nn.Module] = []  # not a part of this module: it has weights of its own, and may never be read
        self.null: Tensor
        self.register_buffer("null", null, persistent=False)

    def forward(
        self, caption: Int64[Tensor, "n length"], features: Float[Tensor, "n values"] | None = None
    ) -> tuple[Float[Tensor, "n tokens width"], Float[Tensor, "n pooled"] | None]:
        """Return the features as the encoder would; a caption that was dropped is empty, and has those of none."""
        empty = caption[:, :1] == END_OF_TEXT
        if features is None:
            if not empty.all():
                made: tuple[Tensor, Tensor | None] = self._encoder(caption.device)(caption)
                return made
            features = self.null.expand(len(caption), -1)
        encoder = self.config.encoder
        values = torch.where(empty, self.null, features).float()
        text, pooled = torch.split(values, [encoder.text_tokens * encoder.text_width, encoder.pooled_width], dim=1)
        shape = (len(caption), encoder.text_tokens, encoder.text_width)
        return text.reshape(shape), pooled if encoder.pooled_width else None

    def _encoder(self, device: torch.device) -> nn.Module:
        if not self._live:
            encoder: nn.Module = self.config.encoder.load()(self.config.encoder)
            self._live.append(encoder.requires_grad_(False).eval().to(device))
        return self._live[0]
