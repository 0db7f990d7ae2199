"""Settings of samplers, time grids and guidance; torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Component, Config


class NoGuidanceConfig(Config):
    """The conditional prediction as it is."""

    type: Literal["none"] = Field("none", description="No guidance.")


class CFGConfig(Config):
    """Classifier-free guidance, u + scale (c - u) (2207.12598), optionally within an interval (2404.07724)."""

    type: Literal["cfg"] = Field(
        "cfg", description="Classifier-free guidance; needs a network trained with label_drop."
    )
    scale: float = Field(1.5, ge=0, le=100, description="1 is the conditional prediction, 0 the unconditional one.")
    low: float | None = Field(None, ge=0, description="Guide only at path times at or above this; null for no bound.")
    high: float | None = Field(None, ge=0, description="Guide only at path times at or below this; null for no bound.")

    @model_validator(mode="after")
    def _ordered(self) -> CFGConfig:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(
                f"the guidance interval is empty: low={self.low} is not below high={self.high}; swap or widen them"
            )
        return self


GuidanceConfig = Annotated[NoGuidanceConfig | CFGConfig, Field(discriminator="type")]


class UniformGridConfig(Config):
    """Solver times evenly spaced over the path's interval, then shifted like training times."""

    type: Literal["uniform"] = Field("uniform", description="Evenly spaced times.")
    shift: float = Field(
        1.0, gt=0, le=100, description="Factor on the noise-to-signal ratio; above 1 spends more steps on noise."
    )


class EDMGridConfig(Config):
    """Noise-to-signal ratios evenly spaced in their rho-th root (Karras et al., 2206.00364, eq. 5)."""

    type: Literal["edm"] = Field("edm", description="EDM's spacing of noise levels.")
    rho: float = Field(7.0, ge=1, le=100, description="Curvature; larger spends more steps on little noise.")
    sigma_min: float = Field(
        0.002, gt=0, description="Smallest noise-to-signal ratio before the last step to clean data."
    )
    sigma_max: float = Field(80.0, gt=0, description="Largest noise-to-signal ratio, where sampling starts.")

    @model_validator(mode="after")
    def _ordered(self) -> EDMGridConfig:
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                f"sigma_max must exceed sigma_min, got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}; "
                "lower sigma_min or raise sigma_max"
            )
        return self


GridConfig = Annotated[UniformGridConfig | EDMGridConfig, Field(discriminator="type")]


class _SolverConfig(Component):
    """What every solver of the probability-flow ODE has."""

    type: str
    steps: int = Field(50, ge=1, le=10_000, description="Solver steps from noise to data.")
    grid: GridConfig = Field(UniformGridConfig(), description="Where the solver's times lie.")
    guidance: GuidanceConfig = Field(NoGuidanceConfig(), description="How conditions are strengthened.")


class EulerConfig(_SolverConfig):
    """Euler's method: first order, one network evaluation a step."""

    implementation: ClassVar[str] = "sixfold.samplers.flow:FlowSampler"
    type: Literal["euler"] = Field("euler", description="Euler's method, one evaluation a step.")


class HeunConfig(_SolverConfig):
    """Heun's method: second order, two network evaluations a step (one in the last)."""

    implementation: ClassVar[str] = "sixfold.samplers.flow:FlowSampler"
    type: Literal["heun"] = Field("heun", description="Heun's method, two evaluations a step.")


class AutoregressiveConfig(Component):
    """Token by token from a language model, with a KV cache."""

    implementation: ClassVar[str] = "sixfold.samplers.autoregressive:AutoregressiveSampler"
    type: Literal["autoregressive"] = Field("autoregressive", description="Sample one token after another.")
    temperature: float = Field(1.0, ge=0, le=10, description="Divides the logits; 0 takes the most likely token.")
    top_k: int | None = Field(None, ge=1, description="Keep only the k most likely tokens; null keeps all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Keep the most likely tokens whose probabilities reach this mass; 1 keeps all."
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens to generate after the prompt.")
    prompt: str = Field("", description="Text that every sample continues; empty starts a new document.")


SamplingConfig = Annotated[EulerConfig | HeunConfig | AutoregressiveConfig, Field(discriminator="type")]
