"""The recipe: every choice of a run in one typed, immutable record that imports no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field, field_validator

from sixfold.checkpoint.config import CheckpointConfig
from sixfold.config.base import Config
from sixfold.config.dumping import dump_yaml
from sixfold.engine.config import (
    AdamWConfig,
    ConstantScheduleConfig,
    DDPConfig,
    EngineConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from sixfold.evaluation.config import EvaluationConfig
from sixfold.models.codec.config import CodecConfig
from sixfold.models.discriminator.config import PatchDiscriminatorConfig
from sixfold.models.dit.config import DiTConfig
from sixfold.models.feature_heads.config import FeatureHeadsConfig
from sixfold.models.mmdit.config import MMDiTConfig
from sixfold.models.moe_transformer.config import MoETransformerConfig
from sixfold.models.noise_uncertainty.config import NoiseUncertaintyConfig
from sixfold.models.perceptual.config import ClassifierConfig, LPIPSConfig
from sixfold.models.projection.config import ProjectionConfig
from sixfold.models.text_encoder.config import ByteTextEncoderConfig, HuggingFaceTextConfig
from sixfold.models.trained.config import TrainedConfig
from sixfold.models.unet.config import UNetConfig
from sixfold.objectives.codec.config import CodecObjectiveConfig
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.distillation.adversarial_config import AdversarialDistillationConfig
from sixfold.objectives.distillation.consistency_config import ConsistencyConfig
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.objectives.distillation.trajectory_config import ProgressiveConfig, ReflowConfig
from sixfold.objectives.distillation.trigflow_config import TrigFlowConsistencyConfig
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.recipe.train import TrainConfig
from sixfold.samplers.config import SamplingConfig
from sixfold.tracking.config import MLflowConfig, TrackingConfig
from sixfold_data.config import DataConfig

NetworkConfig = Annotated[
    MoETransformerConfig
    | DiTConfig
    | FeatureHeadsConfig
    | MMDiTConfig
    | ByteTextEncoderConfig
    | HuggingFaceTextConfig
    | NoiseUncertaintyConfig
    | ProjectionConfig
    | UNetConfig
    | CodecConfig
    | PatchDiscriminatorConfig
    | ClassifierConfig
    | LPIPSConfig
    | TrainedConfig,
    Field(discriminator="type"),
]
"""Every network a recipe may name; a new one is added here."""

ObjectiveConfig = Annotated[
    DenoisingConfig
    | NextTokenConfig
    | CodecObjectiveConfig
    | ConsistencyConfig
    | TrigFlowConsistencyConfig
    | MeanFlowConfig
    | DistributionMatchingConfig
    | AdversarialDistillationConfig
    | ReflowConfig
    | ProgressiveConfig,
    Field(discriminator="type"),
]
"""Every objective a recipe may name; a new one is added here."""

_SEGMENT = "[A-Za-z0-9][A-Za-z0-9_.-]*"
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""A name that overrides, file names and metric names can hold."""


class RoleOverrides(Config):
    """Settings of one role (generator, critic, ...) that differ from the recipe's own."""

    optimizer: OptimizerConfig | None = Field(default=None, description="The role's optimizer; null: the recipe's.")
    schedule: ScheduleConfig | None = Field(default=None, description="The role's schedule; null: the recipe's.")
    engine: EngineConfig | None = Field(default=None, description="The role's engine; null: the recipe's.")


class Recipe(Config):
    """What to train, on what, and how: one set of choices, resolved and saved with every run."""

    name: str = Field(
        pattern=rf"^{_SEGMENT}(/{_SEGMENT})*$",
        description="Name of the recipe, such as flow/dit-smoke; its runs lie in runs/<name>/.",
    )
    description: str = Field(default="", description="One line that `sixfold recipes` shows.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed that every random draw derives from.")
    data: DataConfig = Field(description="The data set, its order and its batches.")
    networks: dict[Name, NetworkConfig] = Field(min_length=1, description="The networks, by the names objectives use.")
    objective: ObjectiveConfig = Field(
        description="What is learned: the loss, and which networks have which role in it."
    )
    optimizer: OptimizerConfig = Field(description="How parameters are updated.")
    schedule: ScheduleConfig = Field(
        default_factory=ConstantScheduleConfig, description="How the learning rate moves over the steps."
    )
    engine: EngineConfig = Field(
        default_factory=DDPConfig, description="How networks are sharded, and computed in what."
    )
    train: TrainConfig = Field(description="How long to train.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="When to save, what to keep.")
    tracking: TrackingConfig = Field(default_factory=MLflowConfig, description="Where the run is mirrored for people.")
    sampling: SamplingConfig | None = Field(default=None, description="How samples are drawn. null: none are.")
    evaluation: EvaluationConfig | None = Field(default=None, description="What is measured. null: nothing is.")
    roles: dict[Name, RoleOverrides] = Field(
        default_factory=dict, description="Optimizer, schedule and engine of single roles where they differ."
    )

    @field_validator("networks", "roles", mode="before")
    @classmethod
    def _drop_deleted(cls, entries: Any) -> Any:
        """An override such as ``networks.critic=null`` removes the entry that a base file wrote."""
        return {k: v for k, v in entries.items() if v is not None} if isinstance(entries, dict) else entries

    def optimizer_of(self, role: str) -> AdamWConfig | MuonConfig:
        """The optimizer of a role, its override counted in."""
        override = self.roles.get(role)
        return self.optimizer if override is None or override.optimizer is None else override.optimizer

    def schedule_of(self, role: str) -> ScheduleConfig:
        """The schedule of a role, its override counted in."""
        override = self.roles.get(role)
        return self.schedule if override is None or override.schedule is None else override.schedule

    def engine_of(self, role: str) -> EngineConfig:
        """The engine of a role, its override counted in."""
        override = self.roles.get(role)
        return self.engine if override is None or override.engine is None else override.engine

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, defaults written out, ``type`` first in its section."""
        values: dict[str, Any] = _type_first(self.model_dump(mode="json"))
        return values

    def dump_yaml(self) -> str:
        """The resolved recipe as YAML; :func:`~sixfold.recipe.load.load_recipe` reads it back equal."""
        return dump_yaml(self.resolved())

    @property
    def recipe_hash(self) -> str:
        """SHA-256 of the resolved recipe's canonical JSON: equal recipes, equal hash, whatever files they came from."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _type_first(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _type_first(values[key]) for key in sorted(values, key=lambda key: key != "type")}
    return [_type_first(item) for item in values] if isinstance(values, list) else values
