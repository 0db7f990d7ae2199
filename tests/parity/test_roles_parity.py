"""Several trainable roles in one phase, roles that take turns, frozen and tracking ones: the same on every engine."""

import pytest
import torch

from engine_cases import REFERENCE, largest_difference
from parity_matrix import MATRIX, compare, trajectories
from ranks import rank_pool
from role_cases import DECAY, train_roles
from sixfold.engine.config import DeepSpeedConfig, FSDPConfig


@pytest.fixture(scope="module")
def reference():
    return train_roles(REFERENCE)


def moved(trace, role, step):
    before, after = trace.parameters[step][role], trace.parameters[step + 1][role]
    return largest_difference(before, after) > 0


def test_each_phase_moves_its_own_roles_alone(reference):
    for step in range(20):
        assert moved(reference, "encoder", step)
        assert moved(reference, "head", step)
        assert moved(reference, "critic", step) == (step % 2 == 1)
        assert not moved(reference, "teacher", step)


def test_tracking_is_the_moving_average_of_what_it_follows(reference):
    average = {name: value.double() for name, value in reference.parameters[0]["head"].items()}
    assert largest_difference(reference.parameters[0]["target"], reference.parameters[0]["head"]) == 0
    for held in reference.parameters[1:]:
        average = {name: DECAY * value + (1 - DECAY) * held["head"][name] for name, value in average.items()}
        assert largest_difference({n: v.double() for n, v in held["target"].items()}, average) < 1e-6


def test_gradient_passes_through_frozen_networks(reference):
    """The gradient norm of the joint phase is that of plain autograd on copies of the networks."""
    from role_cases import EveryRole, Perceptron, PerceptronConfig, batches

    nets = {role: Perceptron(PerceptronConfig()) for role in EveryRole.roles}
    for role, network in nets.items():
        network.load_state_dict(reference.parameters[0][role])
    objective, batch = EveryRole(), next(batches(0, 1))
    terms = objective(nets, batch, objective.phases(_start())[0], None)
    trained = [*nets["encoder"].parameters(), *nets["head"].parameters()]
    squares = [gradient.square().sum() for gradient in torch.autograd.grad(terms.loss / terms.count, trained)]
    norms = reference.grad_norms[:2]
    assert sum(norm**2 for norm in norms) == pytest.approx(float(sum(squares)), rel=1e-5)


def _start():
    from sixfold.objectives.contract import Progress

    return Progress(samples=0, step=0, total_steps=20)


@pytest.mark.parametrize("name", [name for name in MATRIX if name != "1 process"])
def test_engines_follow_one_process(name, reference):
    for trace in trajectories(name, train_roles, 2):
        row = compare(name, 2, reference, [trace])
        assert row.agrees, row
        for role, values in reference.parameters[-1].items():
            assert largest_difference(trace.parameters[-1][role], values) < 1e-5, role


@pytest.mark.parametrize("config", [FSDPConfig(precision="bf16"), DeepSpeedConfig(precision="bf16", zero_stage=2)])
def test_a_role_trained_after_its_first_forward_keeps_its_precision(config, reference):
    for trace in rank_pool(2).run(train_roles, config, 1):
        for role, values in reference.parameters[-1].items():
            assert all(value.dtype == torch.float32 for value in trace.parameters[-1][role].values())
            assert 0 <= largest_difference(trace.parameters[-1][role], values) < 0.1, role
        critic = trace.parameters[-1]["critic"]
        assert any((value != value.bfloat16().float()).any() for value in critic.values())
