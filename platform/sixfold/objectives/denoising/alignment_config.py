"""Settings of the alignment of a denoiser's hidden tokens with frozen features (REPA, arXiv 2410.06940); torch-free."""

from __future__ import annotations

from pydantic import Field

from sixfold.config.base import Config


class AlignmentConfig(Config):
    """What a hidden block is to resemble, and how much."""

    features: str = Field(min_length=1, description="Name in `networks` of the frozen feature network.")
    projection: str = Field(min_length=1, description="Name in `networks` of the projection head; it trains along.")
    output: str = Field(
        "embedding",
        min_length=1,
        description="Which of its features: a map, such as map_2, token by token; embedding, by the tokens' mean.",
    )
    block: int = Field(8, ge=1, description="The block of the denoiser, from 1, whose output is aligned.")
    weight: float = Field(0.5, gt=0, description="Weight of the mean negative cosine in the loss.")
