"""Frozen text encoders of the Hugging Face hub's formats: CLIP's text tower and T5's encoder, from a folder or the hub.

The hub is asked only for names that begin with ``hf://``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sixfold.errors import EnvironmentFault, RecipeError
from sixfold.models.hub import HUB, ModelSource, model_source
from sixfold.models.text_encoder.config import END_OF_TEXT, HuggingFaceTextConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_hugging_face_text(config: HuggingFaceTextConfig) -> HuggingFaceText:
    """Read encoder and tokenizer from the configured folder.

    Raises:
        EnvironmentFault: transformers is not installed.
        RecipeError: the folder holds no encoder of a known kind, or one of another width.
    """
    transformers = _transformers()
    try:
        source = model_source(config.path)
        kind, _ = _described(transformers, config, source)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            source.name, subfolder=config.tokenizer_folder, local_files_only=source.local_files_only
        )
        encoder: nn.Module = kind.from_pretrained(
            source.name,
            subfolder=config.encoder_folder,
            local_files_only=source.local_files_only,
            dtype=_DTYPES[config.dtype],
        )
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for what it cannot read
        raise RecipeError.of(
            f"the text encoder cannot be read: {str(error).splitlines()[0]}",
            where=config.path,
            allowed="a folder with config.json, safetensors and tokenizer files of a CLIP or T5 model, or its name on "
            f"the hub after {HUB}",
            fix=f"name the folder the model was saved to, or {HUB}OWNER/NAME where the hub can be reached",
        ) from error
    return HuggingFaceText(config, encoder, tokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault.of(
            "frozen text encoders need the package transformers",
            where="networks, type huggingface_text",
            fix='pip install "sixfold[transformers]"',
        ) from error
    return transformers


def _described(transformers: Any, config: HuggingFaceTextConfig, source: ModelSource) -> tuple[Any, Any]:
    """Return the class that reads the text part of a model, and the model's own settings."""
    described: Any = transformers.AutoConfig.from_pretrained(
        source.name, subfolder=config.encoder_folder, local_files_only=source.local_files_only
    )
    return _encoder_class(transformers, described, pooled=config.pooled_width > 0), described


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
        return text.float(), made.text_embeds.float() if self.config.pooled_width else None


class SilentText(nn.Module):
    """Zeros in the shapes of an encoder's features, for a rehearsal without its weights; it is as large as the encoder.

    Raises:
        RecipeError: nothing tells how many weights the encoder has.
    """

    def __init__(self, config: HuggingFaceTextConfig) -> None:
        super().__init__()
        self.config = config
        count = _count_parameters(config) if config.parameters is None else config.parameters
        self.weights = nn.Parameter(torch.empty(count, dtype=_DTYPES[config.dtype]), requires_grad=False)

    def forward(
        self, caption: Int64[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n tokens width"], Float[Tensor, "n pooled"] | None]:
        """Return zeros."""
        config, n = self.config, len(caption)
        text = torch.zeros(n, config.text_tokens, config.text_width, device=caption.device)
        return text, text.new_zeros(n, config.pooled_width) if config.pooled_width else None


def _count_parameters(config: HuggingFaceTextConfig) -> int:
    transformers = _transformers()
    try:
        kind, described = _described(transformers, config, model_source(config.path))
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError.of(
            f"how large the text encoder is cannot be told: {str(error).splitlines()[0]}",
            where=config.path,
            fix="set the network's `parameters` to the number of its weights, or bring the folder here",
        ) from error
    with unset_fake_temporarily(), torch.device("meta"):
        encoder: nn.Module = kind(described)
    return sum(value.numel() for value in encoder.parameters())


def texts_of(caption: Int64[Tensor, "n length"]) -> list[str]:
    """Return captions as strings; bytes after the first end of text are left out."""
    rows = caption.tolist()
    ends = [row.index(END_OF_TEXT) if END_OF_TEXT in row else len(row) for row in rows]
    return [bytes(row[:end]).decode("utf-8", errors="replace") for row, end in zip(rows, ends, strict=True)]
