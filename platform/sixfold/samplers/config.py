"""Settings of samplers, time grids and guidance; torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Component, Config


class NoGuidanceConfig(Config):
    """The conditional prediction as it is."""

    type: Literal["none"] = Field("none", description="No guidance.")

    @property
    def needs_null(self) -> bool:
        """Whether the network must have learnt to do without its condition."""
        return False


class _GuidanceConfig(Config):
    """What every guidance has: a scale, and the times at which it acts (2404.07724)."""

    type: str
    scale: float = Field(1.5, ge=0, le=100, description="1 is the conditional prediction, 0 what it is pushed from.")
    low: float | None = Field(None, ge=0, description="Guide only at path times at or above this; null for no bound.")
    high: float | None = Field(None, ge=0, description="Guide only at path times at or below this; null for no bound.")

    @property
    def needs_null(self) -> bool:
        """Whether the network must have learnt to do without its condition."""
        return True

    @model_validator(mode="after")
    def _ordered(self) -> _GuidanceConfig:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(
                f"the guidance interval is empty: low={self.low} is not below high={self.high}; swap or widen them"
            )
        return self


class CFGConfig(_GuidanceConfig):
    """Classifier-free guidance, u + scale (c - u) (2207.12598), optionally within an interval (2404.07724)."""

    type: Literal["cfg"] = Field(
        "cfg", description="Classifier-free guidance; needs a network trained with label_drop."
    )


class CFGZeroConfig(_GuidanceConfig):
    """CFG-Zero*, s u + scale (c - s u) with s = <c, u> / |u|^2, and no motion at first (Fan et al., 2503.18886)."""

    type: Literal["cfg_zero"] = Field(
        "cfg_zero", description="CFG-Zero*: the unconditional prediction fitted to the conditional one; for flows."
    )
    zero_fraction: float = Field(
        0.04, ge=0, lt=1, description="Part of the path's interval, from pure noise on, in which x does not move."
    )


class AutoguidanceConfig(_GuidanceConfig):
    """Autoguidance, w + scale (c - w) with a weaker network's prediction w (Karras et al., 2406.02507)."""

    type: Literal["autoguidance"] = Field(
        "autoguidance", description="Push away from a weaker network, `objective.guide`, under the same condition."
    )

    @property
    def needs_null(self) -> bool:
        """No: the weaker network sees the same condition."""
        return False


SingleGuidanceConfig = Annotated[CFGConfig | CFGZeroConfig | AutoguidanceConfig, Field(discriminator="type")]


class CombinedGuidanceConfig(Config):
    """Several guidances at once: their pushes on the conditional prediction add up."""

    type: Literal["combined"] = Field("combined", description="Several guidances, their pushes added.")
    parts: list[SingleGuidanceConfig] = Field(min_length=1, description="The guidances, in any order.")

    @property
    def needs_null(self) -> bool:
        """Whether one of them does."""
        return any(part.needs_null for part in self.parts)


GuidanceConfig = Annotated[
    NoGuidanceConfig | CFGConfig | CFGZeroConfig | AutoguidanceConfig | CombinedGuidanceConfig,
    Field(discriminator="type"),
]


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


class _DenoisingSamplerConfig(Component):
    """What everything that samples from a denoiser has."""

    type: str
    guidance: GuidanceConfig = Field(NoGuidanceConfig(), description="How conditions are strengthened.")


class _SolverConfig(_DenoisingSamplerConfig):
    """What every solver with a fixed number of steps has."""

    steps: int = Field(50, ge=1, le=10_000, description="Solver steps from noise to data.")
    grid: GridConfig = Field(UniformGridConfig(), description="Where the solver's times lie.")


class EulerConfig(_SolverConfig):
    """Euler's method: first order, one network evaluation a step."""

    implementation: ClassVar[str] = "sixfold.samplers.flow:FlowSampler"
    type: Literal["euler"] = Field("euler", description="Euler's method, one evaluation a step.")


class HeunConfig(_SolverConfig):
    """Heun's method: second order, two network evaluations a step (one in the last)."""

    implementation: ClassVar[str] = "sixfold.samplers.flow:FlowSampler"
    type: Literal["heun"] = Field("heun", description="Heun's method, two evaluations a step.")


class DPMSolverConfig(_SolverConfig):
    """DPM-Solver++ (2M): second order by the predictions of the step before (Lu et al., 2211.01095)."""

    implementation: ClassVar[str] = "sixfold.samplers.dpm_solver:DPMSolverSampler"
    type: Literal["dpm_solver"] = Field("dpm_solver", description="DPM-Solver++ (2M), one evaluation a step.")


class DDIMConfig(_SolverConfig):
    """DDIM (Song et al., 2010.02502): deterministic at eta 0, as random as the forward process at eta 1."""

    implementation: ClassVar[str] = "sixfold.samplers.stochastic:StochasticSampler"
    type: Literal["ddim"] = Field("ddim", description="DDIM, noise added anew to the extent of eta.")
    eta: float = Field(0.0, ge=0, le=1, description="Standard deviation of new noise over the posterior's own.")


class AncestralConfig(_SolverConfig):
    """Ancestral sampling: each step draws from the posterior of the less noisy x (DDPM, 2006.11239, algorithm 2)."""

    implementation: ClassVar[str] = "sixfold.samplers.stochastic:StochasticSampler"
    type: Literal["ancestral"] = Field(
        "ancestral", description="DDPM's own sampler, a draw from each step's posterior."
    )
    variance: Literal["posterior", "forward"] = Field(
        "posterior",
        description="Of new noise: right for data that are one point (posterior), or for normal data (forward).",
    )


class ReverseSDEConfig(_SolverConfig):
    """The reverse-time SDE by Euler-Maruyama steps, with Langevin corrections (Song et al., 2011.13456)."""

    implementation: ClassVar[str] = "sixfold.samplers.reverse_sde:ReverseSDESampler"
    type: Literal["sde"] = Field("sde", description="Reverse-time SDE; with corrector_steps, predictor-corrector.")
    corrector_steps: int = Field(0, ge=0, le=100, description="Langevin steps after each step of the SDE.")
    corrector_ratio: float = Field(
        0.16, gt=0, le=0.7, description="Langevin step's signal over its noise; its variance is 2 ratio^2 sigma^2."
    )


class RK45Config(_DenoisingSamplerConfig):
    """Adaptive Dormand-Prince 5(4) on the probability-flow ODE, each sample with steps of its own (2011.13456)."""

    implementation: ClassVar[str] = "sixfold.samplers.adaptive:RK45Sampler"
    type: Literal["rk45"] = Field("rk45", description="Adaptive Runge-Kutta 5(4), with steps of its own choice.")
    rtol: float = Field(1e-4, gt=0, le=0.1, description="Tolerated error of a step, relative to the sample.")
    atol: float = Field(1e-4, gt=0, le=0.1, description="Tolerated error of a step, in units of the data.")
    end_ratio: float = Field(
        1e-3, gt=0, le=0.1, description="Noise-to-signal ratio at which a last step goes to clean data."
    )
    max_steps: int = Field(1000, ge=1, description="Steps, refused ones too, after which the solver gives up.")


class FewStepConfig(_SolverConfig):
    """One or a few jumps of a distilled student, a consistency model or a mean flow."""

    implementation: ClassVar[str] = "sixfold.samplers.few_step:FewStepSampler"
    type: Literal["few_step"] = Field("few_step", description="One or a few jumps, one evaluation each.")
    steps: int = Field(1, ge=1, le=1000, description="Jumps from noise to data.")
    times: tuple[float, ...] | None = Field(
        None, strict=False, description="Path times to jump from, falling; null: as grid and steps say."
    )
    stochastic: bool = Field(
        True, description="Noise the data anew between jumps; false keeps the noise believed in. Mean flows ignore it."
    )
    told_guidance: float | None = Field(
        None, ge=0, le=100, description="Scale told to a student that learnt it (objective.embed_guidance)."
    )

    @model_validator(mode="after")
    def _times_fall(self) -> FewStepConfig:
        if self.times is not None and any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"expected falling times, got {list(self.times)}; put them in order")
        return self


class ReconstructionConfig(Component):
    """Held-out images as a codec gives them back."""

    implementation: ClassVar[str] = "sixfold.samplers.reconstruction:Reconstruction"
    type: Literal["reconstruction"] = Field("reconstruction", description="Encode held-out images and decode them.")


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


SamplingConfig = Annotated[
    EulerConfig
    | HeunConfig
    | DPMSolverConfig
    | DDIMConfig
    | AncestralConfig
    | ReverseSDEConfig
    | RK45Config
    | FewStepConfig
    | ReconstructionConfig
    | AutoregressiveConfig,
    Field(discriminator="type"),
]
