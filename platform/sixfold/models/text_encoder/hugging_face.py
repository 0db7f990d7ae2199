"""Frozen text encoders of the Hugging Face hub's formats: CLIP's text tower and T5's encoder, from a folder.

The one home of ``transformers``. Nothing is downloaded: the folder comes from the user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.errors import EnvironmentFault, RecipeError
from sixfold.models.text_encoder.config import END_OF_TEXT, HuggingFaceTextConfig


def load_hugging_face_text(config: HuggingFaceTextConfig) -> HuggingFaceText:
    """Read encoder and tokenizer from the configured folder.

    Raises:
        EnvironmentFault: transformers is not installed.
        RecipeError: the folder holds no encoder of a known kind, or one of another width.
    """
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault.of(
            "frozen text encoders need the package transformers",
            where="networks, type huggingface_text",
            fix='pip install "sixfold[transformers]"',
        ) from error
    folder, tokens_folder = (Path(config.path) / part for part in (config.encoder_folder, config.tokenizer_folder))
    try:
        described: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tokens_folder, local_files_only=True)
        kind = _encoder_class(transformers, described, pooled=config.pooled_width > 0)
        encoder: nn.Module = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for folders it cannot read
        raise RecipeError.of(
            f"the text encoder cannot be read: {str(error).splitlines()[0]}",
            where=config.path,
            allowed="a folder with config.json, safetensors and tokenizer files of a CLIP or T5 model",
            fix="name the folder the model was saved to; nothing is downloaded",
        ) from error
    return HuggingFaceText(config, encoder, tokenizer)


def _encoder_class(transformers: Any, described: Any, *, pooled: bool) -> Any:
    """Return the class of the text part of a model: CLIP's projected text tower, or T5's encoder."""
    if described.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    if described.model_type in ("t5", "mt5", "umt5"):
        return {"t5": transformers.T5EncoderModel, "mt5": transformers.MT5EncoderModel}.get(
            described.model_type, transformers.UMT5EncoderModel
        )
    raise ValueError(f"model type {described.model_type!r} is not among clip, clip_text_model, t5, mt5, umt5")


class HuggingFaceText(nn.Module):
    """A frozen encoder with its own tokenizer, called like every text encoder: with captions as bytes."""

    def __init__(self, config: HuggingFaceTextConfig, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.config, self.encoder, self._tokenizer = config, encoder, tokenizer
        described: Any = encoder.config
        pooled = int(getattr(described, "projection_dim", 0) or 0) if config.pooled_width else 0
        found, named = (int(described.hidden_size), pooled), (config.text_width, config.pooled_width)
        if found != named:
            raise RecipeError.of(
                f"text_width, pooled_width are {named[0]}, {named[1]}, but the encoder has {found[0]}, {found[1]}",
                where=config.path,
                fix=f"set text_width={found[0]} and pooled_width={found[1]}",
            )

    def forward(
        self, caption: Int64[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n tokens width"], Float[Tensor, "n pooled"] | None]:
        """Return features of the configured layer and, where the encoder has them, pooled ones."""
        tokens = self._tokenizer(
            texts_of(caption),
            padding="max_length",
            truncation=True,
            max_length=self.config.text_tokens,
            return_tensors="pt",
        ).input_ids.to(caption.device)
        made: Any = self.encoder(tokens, output_hidden_states=True)
        last = self.config.layer == -1
        text: Tensor = made.last_hidden_state if last else made.hidden_states[self.config.layer]
        return text, made.text_embeds if self.config.pooled_width else None


class SilentText(nn.Module):
    """Zeros in the shapes of an encoder's features, for a dry run without its weights."""

    def __init__(self, config: HuggingFaceTextConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, caption: Int64[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n tokens width"], Float[Tensor, "n pooled"] | None]:
        """Return zeros."""
        config, n = self.config, len(caption)
        text = torch.zeros(n, config.text_tokens, config.text_width, device=caption.device)
        return text, text.new_zeros(n, config.pooled_width) if config.pooled_width else None


def texts_of(caption: Int64[Tensor, "n length"]) -> list[str]:
    """Return captions as strings; bytes after the first end of text are left out."""
    rows = caption.tolist()
    ends = [row.index(END_OF_TEXT) if END_OF_TEXT in row else len(row) for row in rows]
    return [bytes(row[:end]).decode("utf-8", errors="replace") for row, end in zip(rows, ends, strict=True)]
