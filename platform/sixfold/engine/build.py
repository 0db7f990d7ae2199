"""From settings to an engine."""

from __future__ import annotations

from sixfold.config.base import Component
from sixfold.distributed.process_group import World
from sixfold.engine.averaging_config import AverageConfig
from sixfold.engine.base import RoleSpecification
from sixfold.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from sixfold.engine.contract import Engine


def build_engine(
    config: EngineConfig,
    optimizer_config: OptimizerConfig,
    schedule_config: ScheduleConfig,
    *,
    network_config: Component,
    role: str,
    seed: int,
    total_steps: int,
    average: AverageConfig | None,
    world: World,
) -> Engine:
    """Build one trainable role: its network, sharded and initialised, with optimizer, schedule and average.

    The initial values depend on (seed, role, parameter name) alone: all engines and world sizes start equal.

    Raises:
        EnvironmentFault: the engine's package is not installed.
        RecipeError: the settings do not fit the world size or one another.
    """
    specification = RoleSpecification(
        engine=config,
        optimizer=optimizer_config,
        schedule=schedule_config,
        network=network_config,
        role=role,
        seed=seed,
        total_steps=total_steps,
        average=average,
        world=world,
    )
    engine: Engine = config.load()(specification)
    return engine
