"""Settings of the samplers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.config.base import Component


class AutoregressiveConfig(Component):
    """Token by token, left to right, with cached keys and values."""

    implementation: ClassVar[str] = "sixfold.samplers.autoregressive:AutoregressiveSampler"

    type: Literal["autoregressive"] = "autoregressive"
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens to draw after the prompt.")
    temperature: float = Field(default=1.0, ge=0, description="Divides the logits; 0 takes the likeliest token.")
    top_k: int | None = Field(default=None, ge=1, description="Draw among the k likeliest tokens only.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the likeliest tokens that together reach this probability."
    )
    start_token: int = Field(
        default=0, ge=0, description="Token that begins a sample without a prompt, usually the one between documents."
    )
