"""Settings of probability paths, time distributions and loss weightings; torch-free."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Component, Config

Prediction = Literal["velocity", "noise", "data", "v", "edm"]
"""What a denoiser may be trained to predict: the path's velocity dx/dt, the noise e, the clean data x0, v =
alpha e - sigma x0 (Salimans and Ho, 2202.00512), or EDM's preconditioned F (Karras et al., 2206.00364, table 1)."""


class RectifiedFlowConfig(Component):
    """Rectified flow, x_t = (1 - t) x0 + t e (Liu et al., 2209.03003; Lipman et al., 2210.02747)."""

    implementation: ClassVar[str] = "sixfold.paths.affine:RectifiedFlow"
    type: Literal["rectified_flow"] = Field(
        "rectified_flow", description="Straight line from data at t=0 to noise at t=1."
    )


class VPLinearConfig(Component):
    """Variance preserving with a linear rate beta(t): DDPM in continuous time (2006.11239; 2011.13456, eq. 33)."""

    implementation: ClassVar[str] = "sixfold.paths.affine:VariancePreservingLinear"
    type: Literal["vp_linear"] = Field(
        "vp_linear", description="Variance preserving, noise rate linear in time (DDPM)."
    )
    beta_min: float = Field(0.1, gt=0, description="Noise rate at t=0 (1000 times DDPM's first beta).")
    beta_max: float = Field(20.0, gt=0, description="Noise rate at t=1 (1000 times DDPM's last beta).")

    @model_validator(mode="after")
    def _ordered(self) -> VPLinearConfig:
        if self.beta_max <= self.beta_min:
            raise ValueError(
                f"beta_max must exceed beta_min, got beta_min={self.beta_min} and beta_max={self.beta_max}; "
                "raise beta_max (20 is usual) or lower beta_min (0.1 is usual)"
            )
        return self


class VPDiscreteConfig(Component):
    """Variance preserving in discrete steps: DDPM's own table of noise levels (Ho et al., 2006.11239)."""

    implementation: ClassVar[str] = "sixfold.paths.discrete:VariancePreservingDiscrete"
    type: Literal["vp_discrete"] = Field(
        "vp_discrete", description="DDPM's table of noise levels, step k of N at time k / N."
    )
    steps: int = Field(1000, ge=2, le=100_000, description="Noise levels N of the table.")
    schedule: Literal["linear", "scaled_linear", "cosine"] = Field(
        "linear",
        description="Betas linear in the step (DDPM), linear in their root (Stable Diffusion 1), or improved DDPM's.",
    )
    beta_first: float = Field(1e-4, gt=0, lt=1, description="Variance that the first step adds; not for cosine.")
    beta_last: float = Field(0.02, gt=0, lt=1, description="Variance that the last step adds; not for cosine.")

    @model_validator(mode="after")
    def _ordered(self) -> VPDiscreteConfig:
        if self.beta_last < self.beta_first:
            raise ValueError(
                f"beta_last must not be below beta_first, got beta_first={self.beta_first} and "
                f"beta_last={self.beta_last}; 0.0001 and 0.02 are usual"
            )
        return self


class VPCosineConfig(Component):
    """Variance preserving with the cosine schedule (Nichol and Dhariwal, 2102.09672, eq. 17)."""

    implementation: ClassVar[str] = "sixfold.paths.affine:VariancePreservingCosine"
    type: Literal["vp_cosine"] = Field("vp_cosine", description="Variance preserving, cosine schedule (improved DDPM).")
    offset: float = Field(
        0.008, ge=0, le=0.1, description="Small offset s that keeps the first noise rates from vanishing."
    )


class VEConfig(Component):
    """Variance exploding, x_t = x0 + sigma(t) e with geometric sigma(t) (Song et al., 2011.13456, eq. 31)."""

    implementation: ClassVar[str] = "sixfold.paths.affine:VarianceExploding"
    type: Literal["ve"] = Field("ve", description="Variance exploding, noise level geometric in time.")
    sigma_min: float = Field(0.01, gt=0, description="Noise level at t=0, in units of the data.")
    sigma_max: float = Field(50.0, gt=0, description="Noise level at t=1, in units of the data.")

    @model_validator(mode="after")
    def _ordered(self) -> VEConfig:
        _require_ordered_sigmas(self.sigma_min, self.sigma_max)
        return self


class EDMPathConfig(Component):
    """EDM, x_t = x0 + t e: time *is* the noise level (Karras et al., 2206.00364)."""

    implementation: ClassVar[str] = "sixfold.paths.affine:EDM"
    type: Literal["edm"] = Field("edm", description="Variance exploding with time equal to the noise level.")
    sigma_min: float = Field(0.002, gt=0, description="Smallest noise level, in units of the data.")
    sigma_max: float = Field(80.0, gt=0, description="Largest noise level, in units of the data.")

    @model_validator(mode="after")
    def _ordered(self) -> EDMPathConfig:
        _require_ordered_sigmas(self.sigma_min, self.sigma_max)
        return self


PathConfig = Annotated[
    RectifiedFlowConfig | VPLinearConfig | VPDiscreteConfig | VPCosineConfig | VEConfig | EDMPathConfig,
    Field(discriminator="type"),
]


class _TimeConfig(Config):
    """What every time distribution has."""

    type: str
    shift: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Factor on the noise-to-signal ratio: sqrt(tokens / base tokens), about 3 at 1024 px.",
    )


class UniformTimeConfig(_TimeConfig):
    """Times uniform over the path's interval."""

    type: Literal["uniform"] = Field("uniform", description="Uniform over the path's interval.")


class DiscreteTimeConfig(_TimeConfig):
    """Times k / N of the path's interval, k = 1 .. N with equal probability (DDPM, 2006.11239, algorithm 1)."""

    type: Literal["discrete"] = Field("discrete", description="One of N evenly spaced times, the clean end left out.")
    steps: int = Field(1000, ge=1, le=100_000, description="How many times N there are.")


class LogitNormalTimeConfig(_TimeConfig):
    """Times whose logit is normal (Stable Diffusion 3, 2403.03206, eq. 19)."""

    type: Literal["logit_normal"] = Field("logit_normal", description="The logit of the time is normal.")
    mean: float = Field(0.0, ge=-10, le=10, description="Mean of the logit; positive favours noise.")
    std: float = Field(1.0, gt=0, le=10, description="Standard deviation of the logit.")


class ModeTimeConfig(_TimeConfig):
    """Times with a heavier (or lighter) middle (Stable Diffusion 3, 2403.03206, eq. 20)."""

    type: Literal["mode"] = Field("mode", description="Density with its mode in the middle and no vanishing tails.")
    scale: float = Field(
        1.29,
        ge=-1,
        le=2 / (math.pi - 2),
        description="Positive favours the middle of the interval, negative its ends, 0 is uniform.",
    )


class LogNormalTimeConfig(_TimeConfig):
    """Noise-to-signal ratios sigma/alpha that are log-normal (EDM's training distribution, 2206.00364)."""

    type: Literal["log_normal"] = Field(
        "log_normal", description="The log of the noise-to-signal ratio is normal (EDM)."
    )
    mean: float = Field(-1.2, ge=-10, le=10, description="Mean of ln(sigma/alpha).")
    std: float = Field(1.2, gt=0, le=10, description="Standard deviation of ln(sigma/alpha).")


TimeConfig = Annotated[
    UniformTimeConfig | DiscreteTimeConfig | LogitNormalTimeConfig | ModeTimeConfig | LogNormalTimeConfig,
    Field(discriminator="type"),
]


class UniformWeightingConfig(Config):
    """The plain squared error of the prediction."""

    type: Literal["uniform"] = Field("uniform", description="Weight 1 on the squared error of the prediction.")


class MinSNRWeightingConfig(Config):
    """min(SNR, gamma) on the squared error of the data (Hang et al., 2303.09556)."""

    type: Literal["min_snr"] = Field("min_snr", description="min(SNR, gamma) on the squared error of the data.")
    gamma: float = Field(5.0, gt=0, description="Signal-to-noise ratio above which the weight stops growing.")


class EDMWeightingConfig(Config):
    """(sigma^2 + sd^2) / (sigma sd)^2 on the squared error of the data: 1 on EDM's own prediction (2206.00364)."""

    type: Literal["edm"] = Field(
        "edm", description="EDM's weighting, which makes its prediction's error count equally."
    )


WeightingConfig = Annotated[
    UniformWeightingConfig | MinSNRWeightingConfig | EDMWeightingConfig, Field(discriminator="type")
]


class IndependentCouplingConfig(Config):
    """Data and noise as they come."""

    type: Literal["independent"] = Field("independent", description="Every sample with noise of its own.")


class OptimalTransportCouplingConfig(Config):
    """Noise dealt out anew within groups of samples, so that paths cross less (2302.00482; 2304.14772)."""

    type: Literal["optimal_transport"] = Field(
        "optimal_transport", description="Pair data and noise within each group by the least total squared distance."
    )
    group: int = Field(
        32,
        ge=2,
        le=1024,
        description="Samples in a group: consecutive positions. Every micro-batch is whole groups.",
    )


CouplingConfig = Annotated[IndependentCouplingConfig | OptimalTransportCouplingConfig, Field(discriminator="type")]


def _require_ordered_sigmas(sigma_min: float, sigma_max: float) -> None:
    if sigma_max <= sigma_min:
        raise ValueError(
            f"sigma_max must exceed sigma_min, got sigma_min={sigma_min} and sigma_max={sigma_max}; "
            "lower sigma_min or raise sigma_max"
        )
