"""REPA on several engines: a denoiser that is read inside, a head that trains along, and a frozen network."""

import pytest
import torch

from ranks import rank_pool
from recipe_cases import advance, close, made_once, recipe_on, with_engine
from sixfold.distributed.process_group import join
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig
from sixfold.train.assembly import assemble

OVERRIDES = (
    "networks.features={type: classifier, image_size: 8, channels: 1, classes: 10, width: 8, steps: 20}",
    "networks.projection={type: projection, input_width: 32, output_width: 16, width: 24}",
    "objective.alignment={features: features, projection: projection, output: map_2, block: 1}",
    *("networks.denoiser.width=32", "networks.denoiser.depth=2", "data.global_batch=16"),
)
REFERENCE = DDPConfig(precision="fp32")
STEPS = 8


def _train(config, data, accumulation):
    world, recipe = join(), recipe_on("flow/dit-smoke", data, *OVERRIDES)
    local = with_engine(recipe, config, recipe.data.global_batch // world.size // accumulation)
    training = assemble(local, world, cache=made_once(data))
    done = [pair for _ in range(STEPS) for pair in advance(training)]
    close(training)
    return done


@pytest.mark.parametrize(
    "config",
    [REFERENCE, FSDPConfig(precision="fp32"), *(DeepSpeedConfig(precision="fp32", zero_stage=n) for n in (2, 3))],
    ids=["ddp", "fsdp", "zero2", "zero3"],
)
def test_alignment_is_the_same_on_every_engine(config, demo_data):
    (alone,) = rank_pool(1).run(_train, REFERENCE, str(demo_data), 1)
    for found in rank_pool(2).run(_train, config, str(demo_data), 2):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-5, atol=0)
