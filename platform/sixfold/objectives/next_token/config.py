"""Settings of the next-token objective; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability
from sixfold.objectives.settings import Fit, ObjectiveSettings


class NextTokenConfig(ObjectiveSettings):
    """Autoregressive cross-entropy, with the auxiliary losses of a mixture of experts."""

    implementation: ClassVar[str] = "sixfold.objectives.next_token.objective:NextToken"
    fit: ClassVar[Fit] = Fit(modality="text", samplers=("autoregressive",), metrics=("loss", "bits_per_byte"))

    type: Literal["next_token"] = Field("next_token", description="Predict each token from those before it.")
    network: str = Field("lm", min_length=1, description="Name in `networks` of the language model.")
    z_weight: float = Field(
        0.0, ge=0, description="Weight of the squared log-partition of the output logits (PaLM's z-loss, 1e-4 there)."
    )
    balance_weight: float = Field(
        0.0, ge=0, description="Weight of the experts' load-balance loss (0.01 is usual); ignored by a dense network."
    )
    router_z_weight: float = Field(
        0.0, ge=0, description="Weight of the squared log-partition of the router logits (0.001 is usual)."
    )
    chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits are in memory at once in the cross-entropy readout."
    )

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The language model."""
        return {self.network: "language_model"}

    @property
    def trains(self) -> Mapping[str, str]:
        """One role, `lm`."""
        return {"lm": self.network}
