"""Few-step objectives on every engine: forward-mode derivatives, several roles, phases in turn, and resuming."""

import pytest
import torch

from parity_matrix import MATRIX, compare, trajectories
from ranks import rank_pool
from recipe_cases import DISTILLED, make_teacher, recipe_on, saved_tensors, train_and_save, train_recipe, with_engine
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig
from sixfold.errors import RecipeError
from sixfold.recipe.checks import check_recipe

STEPS = 8
FORWARD_MODE = ("distill/scm-distill-smoke", "distill/mean-flow-smoke")


@pytest.fixture(scope="module")
def data(demo_data):
    make_teacher(demo_data)
    return str(demo_data)


@pytest.mark.parametrize("name", list(DISTILLED))
def test_engines_follow_one_process(name, data):
    reference = train_recipe(MATRIX["1 process"][1], 1, name, data, STEPS)
    assert all(norm > 0 for norm in reference.grad_norms)
    for way in ("DDP 2", "FSDP2 2", "ZeRO-2 2", *(() if name in FORWARD_MODE else ("ZeRO-3 2",))):
        for trajectory in trajectories(way, train_recipe, 2, name, data, STEPS):
            row = compare(way, 2, reference, [trajectory])
            assert row.agrees, row


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_where_parameters_are_partitioned(name, data):
    with pytest.raises(RecipeError, match="forward-mode"):
        check_recipe(with_engine(recipe_on(name, data), DeepSpeedConfig(precision="fp32", zero_stage=3), None))


def _train(config, name, data, folder, until):
    return train_and_save(config, name, data, folder, until=until)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("distill/consistency-distill-smoke", DDPConfig(precision="fp32")),
        ("distill/scm-distill-smoke", FSDPConfig(precision="fp32")),
        ("distill/mean-flow-smoke", DeepSpeedConfig(precision="fp32", zero_stage=2)),
        ("distill/dmd2-smoke", FSDPConfig(precision="fp32")),
        ("distill/ladd-smoke", DeepSpeedConfig(precision="fp32", zero_stage=2)),
    ],
)
def test_resumed_equals_undisturbed_bitwise(name, config, data, tmp_path):
    def run(folder, until):
        results = rank_pool(2).run(_train, config, name, data, str(tmp_path / folder), until)
        assert all(result == results[0] for result in results)
        return results[0]

    whole = run("whole", 6)
    assert run("halves", 3) + run("halves", 6) == whole
    expected, resumed = (saved_tensors(tmp_path / folder, 6) for folder in ("whole", "halves"))
    assert expected.keys() == resumed.keys()
    assert [key for key, value in expected.items() if not torch.equal(value, resumed[key])] == []
