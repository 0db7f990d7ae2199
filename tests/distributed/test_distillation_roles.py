"""Students, judges and teachers in turn: who is stepped when, who stays as it is, and what the frozen do not hold."""

import pytest
import torch

from case_runs import prepare
from ranks import rank_pool
from role_updates import watch
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig

STEPS = 10
DDP = DDPConfig(precision="fp32")
SHARDED = {"ddp": DDP, "fsdp": FSDPConfig(precision="fp32"), "zero2": DeepSpeedConfig(precision="fp32", zero_stage=2)}
JUDGED = {
    "distill/dmd2-smoke": ("fake_score", "discriminator"),
    "distill/ladd-smoke": ("discriminator",),
}
"""Recipes whose student is judged, and the roles that judge."""


def steps_of(watched, role):
    return [update.step for update in watched.updates if update.role == role]


@pytest.mark.parametrize(
    ("name", "every", "overrides"),
    [
        ("distill/dmd2-smoke", 2, ()),
        ("distill/dmd2-smoke", 5, ("objective.fake_updates=5",)),
        ("distill/ladd-smoke", 1, ()),
    ],
)
def test_roles_are_stepped_in_the_stated_ratios_and_frozen_in_between(name, every, overrides, demo_data):
    watched = watch(DDP, name, prepare(name, demo_data), STEPS, *overrides)
    judges = JUDGED[name]
    for role in judges:
        assert steps_of(watched, role) == list(range(STEPS))
    assert steps_of(watched, "denoiser") == list(range(every - 1, STEPS, every))
    for update in watched.updates:
        own = judges if update.role in judges else ("denoiser",)
        assert set(update.with_gradients) <= set(own)
        assert update.role in update.with_gradients
        # All of what is trained moves and nothing else: a class that the batch lacks is a row, not a tensor.
        assert {role: count for role, count in update.changed.items() if count} == {
            update.role: watched.tensors[update.role]
        }


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("name", ["distill/dmd2-smoke", "distill/consistency-distill-smoke"])
def test_frozen_roles_hold_no_gradients_and_no_optimizer_state(name, engine, demo_data):
    for watched in rank_pool(2).run(watch, SHARDED[engine], name, prepare(name, demo_data), 2):
        trained = set(watched.moved)
        assert "teacher" not in watched.saved
        for update in watched.updates:
            assert set(update.with_gradients) <= trained
            assert ("denoiser" in update.with_gradients) <= (update.role == "denoiser")
        for role, names in watched.saved.items():
            assert any(part.startswith("optimizer/") for part in names) == (role in trained)


@pytest.mark.parametrize("name", JUDGED)
def test_roles_first_called_by_others_keep_their_precision(name, demo_data):
    """The student is called in its judges' phase first, where it is frozen: trained later, its masters stay fp32."""
    data = prepare(name, demo_data)
    expected = watch(DDP, name, data, 4)
    for watched in rank_pool(2).run(watch, FSDPConfig(precision="bf16"), name, data, 4):
        assert steps_of(watched, "denoiser") == steps_of(expected, "denoiser")
        for role, moved in watched.moved.items():
            assert moved.dtype == torch.float32
            # Masters of half precision would not have moved at all: steps of the warm-up are below its resolution.
            assert torch.cosine_similarity(moved, expected.moved[role], dim=0) > 0.8, role
