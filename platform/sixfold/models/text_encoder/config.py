"""Settings of text encoders: a small trainable one over bytes, and frozen ones of the Hugging Face hub's formats."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField

CAPTION = "caption"
"""The batch field of captions: UTF-8 bytes, ended and padded by :data:`END_OF_TEXT`."""
END_OF_TEXT = 256
"""The token after the last byte; a caption of nothing else is the null caption."""
VOCABULARY = 257


class TextEncoderSettings(NetworkSettings):
    """What every text encoder tells; called with captions, it returns (text ``[n, tokens, width]``, pooled).

    Pooled features are ``[n, pooled_width]``, and None from an encoder that has none.
    """

    provides: ClassVar[frozenset[Capability]] = frozenset({"text_encoder"})

    @property
    def null_values(self) -> dict[str, int]:
        """The empty caption stands for no caption."""
        return {CAPTION: END_OF_TEXT}

    def inputs(self, lengths: SampleLengths) -> dict[str, BatchField]:
        """Captions."""
        return {CAPTION: BatchField((lengths.caption_length,), "int64")}


class ByteTextEncoderConfig(TextEncoderSettings):
    """Transformer over a caption's bytes, or groups of them, each of which sees all others; pooled by their mean.

    Attention by absolute positions must learn each word at each place it stands; a short convolution learns it once.
    """

    implementation: ClassVar[str] = "sixfold.models.text_encoder.byte_encoder:ByteTextEncoder"

    type: Literal["byte_text"] = "byte_text"
    length: int = Field(ge=1, description="Bytes it has positions for: data.caption_length.")
    width: int = Field(ge=2, description="Width of the residual stream and of both outputs.")
    depth: int = Field(ge=1, description="Number of blocks.")
    heads: int = Field(ge=1, description="Attention heads.")
    stem: int = Field(
        default=7,
        ge=1,
        description="Neighbouring bytes that a convolution joins first, so that words are known wherever they stand; "
        "odd, 1: none.",
    )
    merge: int = Field(
        default=1, ge=1, description="Neighbouring bytes that are averaged into one text token, after the convolution."
    )
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of the MLP over `width`.")

    @property
    def text_tokens(self) -> int:
        """Text tokens of one caption."""
        return self.length // self.merge

    @property
    def tokens(self) -> int:
        """Bytes of one caption."""
        return self.length

    @property
    def text_width(self) -> int:
        """Features of a text token."""
        return self.width

    @property
    def pooled_width(self) -> int:
        """Features of the pooled text."""
        return self.width

    @model_validator(mode="after")
    def _check(self) -> ByteTextEncoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width must be divisible by heads, got {self.width} and {self.heads}; change heads")
        if self.stem % 2 == 0:
            raise ValueError(f"stem must be odd, so that it reaches as far to both sides, got {self.stem}; add 1")
        if self.length % self.merge:
            raise ValueError(f"length must be divisible by merge, got {self.length} and {self.merge}; change one")
        return self


class HuggingFaceTextConfig(TextEncoderSettings):
    """A frozen CLIP or T5 encoder in the format of the Hugging Face hub, with its tokenizer."""

    implementation: ClassVar[str] = "sixfold.models.text_encoder.hugging_face:load_hugging_face_text"
    pretrained: ClassVar[bool] = True
    stand_in: ClassVar[str | None] = "sixfold.models.text_encoder.hugging_face:SilentText"

    type: Literal["huggingface_text"] = "huggingface_text"
    path: str = Field(
        min_length=1,
        description="Folder with config.json, weights and tokenizer (or its sub-folders); or hf://OWNER/NAME.",
    )
    encoder_folder: str = Field(default="", description="Sub-folder of the weights, such as text_encoder_2.")
    tokenizer_folder: str = Field(default="", description="Sub-folder of the tokenizer, such as tokenizer_2.")
    text_tokens: int = Field(ge=1, description="Tokens a caption is cut or padded to: 77 for CLIP; 77 or 256 for T5.")
    text_width: int = Field(ge=1, description="Features of a text token; checked against the weights.")
    pooled_width: int = Field(default=0, ge=0, description="Features of the pooled text; 0 where it has none (T5).")
    layer: int = Field(
        default=-1, le=-1, description="Which layer's features: -1 the last, -2 the one before it (SD3's CLIPs)."
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="What its weights are kept and computed in; bf16 takes half the memory."
    )
    parameters: int | None = Field(
        default=None, ge=1, description="Number of its weights, for plans; null: counted in the folder."
    )


class CachedTextConfig(TextEncoderSettings):
    """A frozen encoder whose features come with the data; made where data with features meet a recipe."""

    implementation: ClassVar[str] = "sixfold.models.text_encoder.cached:load_cached_text"
    pretrained: ClassVar[bool] = True

    type: Literal["cached_text"] = "cached_text"
    encoder: HuggingFaceTextConfig = Field(description="The encoder that made them.")
    field: str = Field(description="The batch field that holds them.")
    null: str = Field(description="File with what the encoder makes of no caption.")

    @property
    def text_tokens(self) -> int:
        """Text tokens of one caption."""
        return self.encoder.text_tokens

    @property
    def text_width(self) -> int:
        """Features of a text token."""
        return self.encoder.text_width

    @property
    def pooled_width(self) -> int:
        """Features of the pooled text."""
        return self.encoder.pooled_width
