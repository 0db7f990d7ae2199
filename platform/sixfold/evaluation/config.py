"""Settings of evaluation, in the loop and by command; torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sixfold.config.base import Config

Metric = Literal["loss", "bits_per_byte", "fd", "kid", "nearest_neighbour", "conditional_accuracy"]
"""``loss`` and ``bits_per_byte`` score held-out data; the others score samples and need images."""


class EvaluationConfig(Config):
    """What is measured, how often, and on how many samples."""

    every_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between evaluations; null for the end only."
    )
    metrics: list[Metric] = Field(["loss"], description="What to measure.")
    samples: Annotated[int, Field(ge=2)] | Literal["split"] = Field(
        "split",
        description="Samples to draw for fd and kid, at least 2; `split` draws as many as the training split has.",
    )
    held_out_samples: int | None = Field(
        None,
        ge=1,
        description="Held-out samples that loss and bits per byte are measured on; null for the whole split.",
    )
    batch: int = Field(256, ge=1, description="Samples in one forward pass, on each rank.")
    features: Literal["classifier", "pixel"] = Field(
        "classifier",
        description="Space of fd and kid: a small classifier trained on the recipe's own training split, or pixels.",
    )
    half_splits: int = Field(
        4,
        ge=1,
        le=100,
        description="Random halvings of the training split averaged in the fd that fd is compared with.",
    )
    show_samples: int = Field(40, ge=1, le=1024, description="Samples in the picture grid or text file that is logged.")
