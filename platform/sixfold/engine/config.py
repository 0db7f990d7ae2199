"""Settings of engines, optimizers and schedules: how a role is sharded, computed and updated."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sixfold.config.base import Component, Config

Betas = Annotated[
    tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]], Field(strict=False)
]
"""Two decay rates; a YAML list is taken for a tuple."""


class _EngineSettings(Component):
    """What every engine can do, however it shards."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Arithmetic of forward and backward; masters, reductions and optimizer state are always fp32. "
        "auto: bf16 on CUDA and on CPUs with AVX512-BF16 or AMX, else fp32.",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Samples a rank computes at once; the rest of its batch is accumulated. null: all at once.",
    )
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = Field(
        default="none",
        description="What backward recomputes: nothing, whole blocks, blocks except matrix products and "
        "attention, or what the compiler picks to fit activation_memory_budget (needs compile).",
    )
    activation_memory_budget: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="With activation_checkpointing budget: share of the activations that is kept "
        "(0 recomputes all, 1 nothing).",
    )
    compile: bool = Field(default=False, description="Compile each block with torch.compile (one graph, no breaks).")
    clip_grad_norm: float | None = Field(
        default=1.0,
        gt=0.0,
        description="Largest global 2-norm of the gradient; larger ones are scaled down. null: off.",
    )

    @model_validator(mode="after")
    def _budget_is_complete(self) -> Self:
        wants_budget = self.activation_checkpointing == "budget"
        if wants_budget != (self.activation_memory_budget is not None):
            raise ValueError(
                "activation_memory_budget belongs to activation_checkpointing: budget and to nothing else; "
                f"got activation_checkpointing: {self.activation_checkpointing} with activation_memory_budget: "
                f"{self.activation_memory_budget}; set both or neither"
            )
        if wants_budget and not self.compile:
            raise ValueError(
                "activation_checkpointing: budget is decided by the compiler and needs compile: true, "
                "got compile: false; set compile: true, or choose selective"
            )
        return self


class DDPConfig(_EngineSettings):
    """One device, or a full replica on every rank with gradients all-reduced (through accelerate)."""

    implementation: ClassVar[str] = "sixfold.engine.ddp:DDPEngine"
    type: Literal["ddp"] = Field(default="ddp", description="One device or data-parallel replicas.")


class FSDPConfig(_EngineSettings):
    """PyTorch FSDP2: parameters, gradients and optimizer state are sharded, block by block."""

    implementation: ClassVar[str] = "sixfold.engine.fsdp:FSDPEngine"
    type: Literal["fsdp"] = Field(default="fsdp", description="Fully sharded data parallel (FSDP2, HSDP).")
    replicate: int = Field(
        default=1,
        ge=1,
        description="Replicas of the sharded network (HSDP): ranks form a replicate x shard mesh; "
        "must divide the world size.",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="Free a block's gathered parameters after forward and gather them again in backward, "
        "rather than keeping them.",
    )


class DeepSpeedConfig(_EngineSettings):
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters."""

    implementation: ClassVar[str] = "sixfold.engine.deepspeed:DeepSpeedEngine"
    type: Literal["deepspeed"] = Field(default="deepspeed", description="DeepSpeed ZeRO.")
    zero_stage: Literal[1, 2, 3] = Field(
        default=2,
        description="What is sharded: 1 optimizer state, 2 and gradients, 3 and parameters. In bf16 stage 1 computes "
        "under autocast on fp32 parameters, as ddp does; 2 and 3 keep bf16 parameters beside the fp32 masters.",
    )
    offload_optimizer: bool = Field(
        default=False, description="Keep fp32 masters and optimizer state in CPU memory and update there."
    )

    @model_validator(mode="after")
    def _compile_meets_stage(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "ZeRO-3 gathers parameters in Python hooks that one compiled graph cannot hold: "
                "expected compile: false, got true; use zero_stage: 2, or engine type fsdp, which compiles"
            )
        return self


EngineConfig = Annotated[DDPConfig | FSDPConfig | DeepSpeedConfig, Field(discriminator="type")]


class AdamWSettings(Config):
    """AdamW (Loshchilov and Hutter, 2019) without its learning rate."""

    betas: Betas = Field(default=(0.9, 0.95), description="Decay rates of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0.0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="Decoupled decay of decayed parameters (matrices; never norms, biases, embeddings).",
    )


class AdamWConfig(AdamWSettings):
    """AdamW for all parameters, fused."""

    type: Literal["adamw"] = Field(default="adamw", description="AdamW.")
    lr: float = Field(ge=0.0, description="Peak learning rate.")


class MuonAdamWSettings(AdamWSettings):
    """AdamW for what Muon does not orthogonalise (embeddings, heads, norms, biases)."""

    lr: float = Field(
        default=3e-4, ge=0.0, description="Peak learning rate of the parameters that are no hidden matrices."
    )


class MuonConfig(Config):
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for the rest."""

    type: Literal["muon"] = Field(default="muon", description="Muon for matrices, AdamW for the rest.")
    lr: float = Field(ge=0.0, description="Peak learning rate of hidden matrices.")
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0, description="Momentum, applied in Nesterov's form.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Decoupled decay of hidden matrices.")
    newton_schulz_steps: int = Field(
        default=4,
        ge=1,
        le=8,
        description="Iterations of the orthogonalisation; each evens out a 4.2 times wider range of singular values.",
    )
    adamw: MuonAdamWSettings = Field(
        default_factory=MuonAdamWSettings, description="Settings of the parameters that are no hidden matrices."
    )


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="type")]


class _WarmUp(Config):
    """A linear warm-up that every schedule starts with."""

    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the rate rises linearly to its peak.")


class ConstantScheduleConfig(_WarmUp):
    """The peak rate throughout."""

    type: Literal["constant"] = Field(default="constant", description="Constant after warm-up.")


class CosineConfig(_WarmUp):
    """Half a cosine from the peak to ``final_fraction`` of it (Loshchilov and Hutter, 2017)."""

    type: Literal["cosine"] = Field(default="cosine", description="Cosine decay after warm-up.")
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="Rate at the end as a share of the peak.")


class WSDConfig(_WarmUp):
    """Warm-up, stable, decay (Hu et al., 2024): constant, then a linear or 1-sqrt decay over the last part."""

    type: Literal["wsd"] = Field(default="wsd", description="Warm-up, stable, decay.")
    decay_fraction: float = Field(default=0.2, ge=0.0, le=1.0, description="Share of all steps that the decay takes.")
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="Rate at the end as a share of the peak.")
    decay: Literal["linear", "sqrt"] = Field(
        default="linear", description="Shape of the decay: linear, or 1 - sqrt(progress) (Haegele et al., 2024)."
    )


ScheduleConfig = Annotated[ConstantScheduleConfig | CosineConfig | WSDConfig, Field(discriminator="type")]
