"""Power-function averages, sharded like the weights: equal on every engine, resumed bitwise, reconstructed."""

from pathlib import Path

import pytest
import torch

from engine_cases import REFERENCE, continue_toy, toy_engine, whole_state
from ranks import rank_pool
from recipe_cases import recipe_on, with_engine
from sixfold.distributed.process_group import join
from sixfold.engine.averaging_config import PowerAverageConfig
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig
from sixfold.errors import UserError
from sixfold.train.assembly import assemble, open_snapshots
from sixfold.train.loop import train_step
from sixfold.train.reconstruction import reconstruct_run, write_reconstructed
from sixfold.train.run_folder import RunFolder

POWER = PowerAverageConfig(widths=(0.05, 0.10))
HALF = 4
ENGINES = {
    "ddp": DDPConfig(precision="fp32"),
    "fsdp": FSDPConfig(precision="fp32"),
    "zero2": DeepSpeedConfig(precision="fp32", zero_stage=2),
    "zero3": DeepSpeedConfig(precision="fp32", zero_stage=3),
}
each_engine = pytest.mark.parametrize("config", ENGINES.values(), ids=ENGINES)


def _legs(config, *ends):
    """Train to each end in turn, in a new engine that takes over the state; return the averages and what they held."""
    engine, start, state = toy_engine(config, average=POWER), 0, {}
    for end in ends:
        if start:
            template = engine.checkpoint_state()
            fresh = toy_engine(config, average=POWER)
            fresh.load_checkpoint_state(template)
            engine.close()
            engine = fresh
        continue_toy(engine, start, end, 1, {})
        start = end
    state = whole_state(engine)
    with engine.averaged():
        held = dict(engine.full_parameters(averaged=False))
    alone = {name for name in engine.average_state() if name.startswith("ema")}
    engine.close()
    return {name: value for name, value in state.items() if name in alone}, held


@each_engine
def test_averages_are_equal_on_every_engine_and_resumed_bitwise(config):
    expected, _ = _legs(REFERENCE, 2 * HALF)
    assert {name.split("/")[0] for name in expected} == {"ema", "ema_0.1"}
    whole = rank_pool(2).run(_legs, config, 2 * HALF)
    resumed = rank_pool(2).run(_legs, config, HALF, 2 * HALF)
    for (averages, held), (again, _) in zip(whole, resumed, strict=True):
        assert averages.keys() == expected.keys()
        for name, value in averages.items():
            assert (value - expected[name]).abs().max() < 1e-5
            assert torch.equal(value, again[name]), f"{name} changed by the restart"
        assert all(
            torch.equal(value, averages[f"ema/{name}"]) for name, value in held.items() if f"ema/{name}" in averages
        )
        assert not torch.equal(averages["ema/head.weight"], averages["ema_0.1/head.weight"])


def _keep_snapshots(config, data, folder):
    recipe = with_engine(
        recipe_on("flow/dit-smoke", data, "train.ema={type: power}", "data.global_batch=16"), config, None
    )
    world, run = join(), RunFolder(Path(folder))
    if world.rank == 0:
        run.path.mkdir(parents=True, exist_ok=True)
        run.recipe.write_text(recipe.dump_yaml())
    training = assemble(recipe, world)
    snapshots = open_snapshots(recipe, world, run.snapshots)
    for step in range(1, 7):
        training.progress = train_step(training, next(training.stream)).progress
        if step % 2 == 0:
            snapshots.save(step, {role: each.average_state() for role, each in training.engines.items()}, {})
    snapshots.close()
    kept = whole_state(training.engines["denoiser"])
    training.close()
    return kept


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_kept_averages_come_back_from_snapshots_of_shards(name, demo_data, tmp_path):
    kept, *_ = rank_pool(2).run(_keep_snapshots, ENGINES[name], str(demo_data), str(tmp_path))
    for length, kind in ((0.05, "ema"), (0.10, "ema_0.1")):
        (made,) = reconstruct_run(tmp_path, length=length)
        assert made.snapshots == 3
        assert made.error < 1e-6
        for parameter, value in made.parameters.items():
            expected = kept.get(f"{kind}/{parameter}", kept.get(f"buffers/{parameter}"))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    ((earlier, path),) = write_reconstructed(tmp_path, length=0.08, step=4)
    assert earlier.newest.step == 4
    assert path.exists()
    with pytest.raises(UserError, match="no snapshot of step 3"):
        reconstruct_run(tmp_path, length=0.1, step=3)
