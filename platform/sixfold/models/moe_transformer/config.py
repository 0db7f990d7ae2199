"""Settings of the mixture-of-experts transformer; without ``experts`` it is a dense one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Config
from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField

_ALIGNMENT = 8
"""Grouped matrix products need rows of a multiple of 16 bytes: eight bf16 elements."""


class ExpertsConfig(Config):
    """Routed feed-forward layers (DeepSeekMoE, arXiv 2401.06066; Mixtral, arXiv 2401.04088)."""

    count: int = Field(ge=2, description="Routed experts in each mixture layer.")
    top_k: int = Field(ge=1, description="Experts that each token is routed to.")
    hidden_width: int | None = Field(
        default=None, ge=1, description="Hidden width of one expert; the network's `hidden_width` where absent."
    )
    shared: int = Field(default=0, ge=0, description="Experts that every token passes, beside the routed ones.")
    first_dense_layers: int = Field(default=0, ge=0, description="Leading layers that stay dense.")
    router: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="How router logits become expert scores, in fp32."
    )
    normalize_top_k: bool = Field(
        default=True, description="Whether the scores of the chosen experts are rescaled to sum to one."
    )
    routed_scale: float = Field(default=1.0, gt=0, description="Factor on the routed experts' weights.")
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        description="Step of the expert bias that evens out loads without a loss (arXiv 2408.15664); 0 is off.",
    )

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        if self.top_k > self.count:
            raise ValueError(
                f"top_k must not exceed the experts' count ({self.count}), got {self.top_k}; lower top_k or raise count"
            )
        if self.hidden_width is not None and self.hidden_width % _ALIGNMENT:
            raise ValueError(
                f"an expert's hidden_width must be a multiple of {_ALIGNMENT}, got {self.hidden_width}; round it"
            )
        return self


class MoETransformerConfig(NetworkSettings):
    """Decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU, optionally routed experts."""

    implementation: ClassVar[str] = "sixfold.models.moe_transformer.model:MoETransformer"
    provides: ClassVar[frozenset[Capability]] = frozenset({"language_model"})

    type: Literal["moe_transformer"] = "moe_transformer"
    vocab_size: int = Field(ge=2, description="Number of different tokens.")
    width: int = Field(ge=8, description="Width of the residual stream.")
    depth: int = Field(ge=1, description="Number of blocks.")
    heads: int = Field(ge=1, description="Query heads of each attention layer.")
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; `heads` where absent.")
    head_width: int | None = Field(default=None, ge=2, description="Width of one head; width / heads where absent.")
    hidden_width: int | None = Field(
        default=None, ge=8, description="Hidden width of SwiGLU; 8/3 of `width`, rounded up to 64, where absent."
    )
    experts: ExpertsConfig | None = Field(default=None, description="Routed experts; a dense network where absent.")
    qk_norm: bool = Field(
        default=False, description="Whether queries and keys of each head pass an RMSNorm before RoPE."
    )
    rope_theta: float = Field(default=10_000.0, gt=1, description="Base wavelength of the rotary position embedding.")
    norm_epsilon: float = Field(default=1e-6, gt=0, description="Added to the mean square in RMSNorm.")
    tie_embeddings: bool = Field(default=False, description="Whether the head uses the token embedding's weight.")
    zero_output_projections: bool = Field(
        default=False,
        description="Whether every branch's last projection starts at zero, so that blocks start as identity.",
    )
    init_scale: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")

    def inputs(self, lengths: SampleLengths) -> dict[str, BatchField]:
        """Tokens and the documents they belong to, one more than are predicted."""
        assert lengths.sequence_length is not None, "the recipe's checks require it of text"
        sequence = BatchField((lengths.sequence_length + 1,), "int64")
        return {"tokens": sequence, "documents": sequence}

    @property
    def key_value_heads(self) -> int:
        """Key and value heads after defaults."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def features_per_head(self) -> int:
        """Width of one head after defaults."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def dense_hidden_width(self) -> int:
        """Hidden width of a dense SwiGLU after defaults."""
        return -(-8 * self.width // (3 * 64)) * 64 if self.hidden_width is None else self.hidden_width

    @property
    def expert_hidden_width(self) -> int:
        """Hidden width of one expert after defaults."""
        assert self.experts is not None, "a dense network has no experts"
        return self.dense_hidden_width if self.experts.hidden_width is None else self.experts.hidden_width

    @property
    def dense_layers(self) -> int:
        """How many leading blocks have no experts."""
        return self.depth if self.experts is None else self.experts.first_dense_layers

    @model_validator(mode="after")
    def _check(self) -> MoETransformerConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width must be divisible by heads, got {self.width} and {self.heads}; change one or set head_width"
            )
        if self.features_per_head % 2:
            raise ValueError(
                f"heads must be of even width for the rotary embedding, got {self.features_per_head}; "
                "change width, heads or head_width"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"heads must be divisible by kv_heads, got {self.heads} and {self.kv_heads}; change kv_heads"
            )
        if self.experts is None:
            return self
        if self.experts.first_dense_layers >= self.depth:
            raise ValueError(
                f"first_dense_layers must be less than depth ({self.depth}), got {self.experts.first_dense_layers}; "
                "lower it, or drop `experts` for a dense network"
            )
        for name, value in (("width", self.width), ("hidden_width", self.expert_hidden_width)):
            if value % _ALIGNMENT:
                raise ValueError(f"{name} must be a multiple of {_ALIGNMENT} with experts, got {value}; round it")
        return self
