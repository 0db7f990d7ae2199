"""Few-step objectives under sharding: derivatives, gradients that are really summed, and resuming.

That losses and norms are those of one process, recipe by recipe and engine by engine, is in ``test_recipes``.
"""

from itertools import product

import pytest
import torch

from case_runs import prepare
from derivative_cases import derivative_of_student, train_bypassing
from parity_matrix import FULL, MATRIX, compare, trajectories
from ranks import RankFailure, rank_pool
from recipe_cases import FEW_STEP, saved_tensors, train_and_save, train_recipe
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig

DDP = DDPConfig(precision="fp32")
ENGINES = {"ddp": DDP, "fsdp": FSDPConfig(precision="fp32"), "zero2": DeepSpeedConfig(precision="fp32", zero_stage=2)}
SCM, MEAN_FLOW = "distill/scm-distill-smoke", "distill/mean-flow-smoke"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [SCM, MEAN_FLOW])
def test_derivative_under_sharding_is_that_of_one_process(name, engine, demo_data):
    data = prepare(name, demo_data)
    value, derivative = derivative_of_student(DDP, name, data)
    assert derivative.norm() > 0.1
    for others in rank_pool(2).run(derivative_of_student, ENGINES[engine], name, data):
        for found, expected in zip(others, (value, derivative), strict=True):
            assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", [MEAN_FLOW, "distill/dmd2-smoke"])
def test_gradients_are_lost_where_the_wrapper_is_bypassed(name, demo_data):
    """What parity would see if a derivative or a judge called the inner network: DDP sums nothing, FSDP2 breaks."""
    data, steps = prepare(name, demo_data), 2
    reference = train_recipe(MATRIX["1 process"][1], 1, name, data, steps)
    alone = train_bypassing(MATRIX["1 process"][1], 1, name, data, steps)
    assert compare("1 process", 1, reference, [alone]).agrees  # where there is no wrapper nothing is lost
    row = compare("DDP 2", 1, reference, trajectories("DDP 2", train_bypassing, 1, name, data, steps))
    assert row.grad_norm > 0.01
    assert not row.agrees
    with pytest.raises(RankFailure, match="DTensor"):
        trajectories("FSDP2 2", train_bypassing, 1, name, data, steps)


def _train(config, name, data, folder, until):
    return train_and_save(config, name, data, folder, until=until)


ONE_EACH = [
    ("distill/consistency-distill-smoke", "ddp"),
    (SCM, "fsdp"),
    (MEAN_FLOW, "zero2"),
    ("distill/dmd2-smoke", "fsdp"),
    ("distill/ladd-smoke", "zero2"),
]
"""What the suite has time for; ``make parity`` takes them all."""


@pytest.mark.parametrize(("name", "engine"), list(product(FEW_STEP, ENGINES)) if FULL else ONE_EACH)
def test_resumed_equals_undisturbed_bitwise(name, engine, demo_data, tmp_path):
    data = prepare(name, demo_data)

    def run(folder, until):
        results = rank_pool(2).run(_train, ENGINES[engine], name, data, str(tmp_path / folder), until)
        assert all(result == results[0] for result in results)
        return results[0]

    whole = run("whole", 4)
    assert run("halves", 2) + run("halves", 4) == whole
    expected, resumed = (saved_tensors(tmp_path / folder, 4) for folder in ("whole", "halves"))
    assert expected.keys() == resumed.keys()
    assert [key for key, value in expected.items() if not torch.equal(value, resumed[key])] == []
