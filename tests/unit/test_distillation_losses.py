"""What students are trained on, against the equations, and what the full-size recipes make of them."""

import math

import pytest
import torch

from sixfold.errors import RecipeError
from sixfold.models.dit.config import DiTConfig
from sixfold.objectives.distillation.common import Drawn
from sixfold.objectives.distillation.consistency_config import ConsistencyConfig
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.objectives.distillation.trigflow import consistency_tangent
from sixfold.paths.config import RectifiedFlowConfig
from sixfold.planning.trace import phases_of
from sixfold.recipe.catalogue import catalogue
from sixfold.recipe.load import load_recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.codec_identity import check_teachers

FULL_SIZE = [
    entry.name
    for entry in catalogue()
    if entry.name.startswith("distill/") and not entry.name.endswith("-smoke") and entry.name != "distill/teacher"
]
STUDENT = DiTConfig(
    image_size=2, patch_size=1, channels=1, width=4, depth=1, heads=1, classes=3, scalars=("interval", "guidance")
)
FRESH = {"teacher": None, "path": RectifiedFlowConfig(), "prediction": "velocity"}


class Ones(torch.nn.Module):
    """A network that says one."""

    def forward(self, x, time, condition):
        return torch.ones_like(x)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def consistency(**settings):
    config = ConsistencyConfig(**FRESH, **settings)
    return config.load()(config, {"denoiser": STUDENT})


def test_distances_of_consistency_models():
    found, target = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1)
    error, c = (found - target).flatten(1), 0.3

    def distance(**settings):
        return consistency(**settings)._distance(found, target)

    torch.testing.assert_close(distance(), error.square().mean(1))
    torch.testing.assert_close(distance(huber=c), (error.square().sum(1) + 4 * c**2).sqrt() - 2 * c)
    torch.testing.assert_close(distance(huber=c, elementwise=True), ((error**2 + c**2).sqrt() - c).mean(1))
    torch.testing.assert_close(distance(cauchy=c), (1 + error.square().sum(1) / (8 * c**2)).log())
    for settings in ({"huber": c, "cauchy": c}, {"elementwise": True}):
        with pytest.raises(ValueError, match="huber"):
            ConsistencyConfig(**settings)


def test_the_tangent_is_faded_in_by_its_unstable_part_alone():
    """Algorithm 1 of 2410.11081: r multiplies cos sin (x + dF/dt), and cos^2 (F - dx/dt) is there from the start."""
    x, held, driven, change = (normal(4, 3, seed=seed).double() for seed in range(4))
    angle = torch.tensor([0.3, 0.7, 1.1, 1.4], dtype=torch.float64)[:, None]
    cos, sin = angle.cos(), angle.sin()
    for r in (0.0, 0.3, 1.0):
        found = consistency_tangent(cos=cos, sin=sin, x=x, held=held, driven=driven, change=change, faded_in=r)
        torch.testing.assert_close(found, -(cos**2) * (held - driven) - r * (cos * sin * x + change))


def test_a_mean_flow_s_samples_without_condition_keep_their_own_velocity():
    config = MeanFlowConfig(guidance=2.0, **FRESH)
    objective = config.load()(config, {"denoiser": STUDENT})
    label, absent = torch.tensor([0, 3, 2, 3]), torch.full((4,), 3)
    data, noise = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1)
    drawn = Drawn(data, noise, torch.full((4,), 0.5, dtype=torch.float64), {"label": label}, {"label": absent})
    found = objective._velocity({"denoiser": Ones()}, data, torch.ones(4), drawn)
    own = noise - data
    torch.testing.assert_close(found[1::2], own[1::2])
    torch.testing.assert_close(found[::2], 2.0 * own[::2] - 1.0)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_students_know_the_codec_of_their_latents(name):
    recipe = load_recipe(name).recipe
    networks = resolve_networks(recipe, planning=True)
    assert recipe.data.path.endswith("latents")
    assert recipe.objective.latents_of == "codec"
    check_teachers(recipe, networks)
    recipe.objective.load()(recipe.objective, networks)


def test_a_teacher_on_latents_has_no_student_on_images():
    recipe = load_recipe("distill/consistency-distill", ["objective.codec=null", "networks.codec=null"]).recipe
    with pytest.raises(
        RecipeError, match=r"was trained on latents, and objective.codec names no codec(.*\n)*.*fix: add"
    ):
        check_teachers(recipe, resolve_networks(recipe, planning=True))


@pytest.mark.parametrize("name", ["distill/scm-distill", "distill/scm-train", "distill/scm-distill-smoke"])
def test_continuous_time_students_have_a_slow_clock(name):
    """No factor of 1000 on the time, of the teacher either, whose weights the student starts from."""
    networks = resolve_networks(load_recipe(name).recipe, planning=True)
    scales = [networks[role].architecture.time_scale for role in ("denoiser", "teacher") if role in networks]
    assert all(scale <= 8.0 for scale in scales)


def test_phases_that_differ_in_progress_alone_are_planned_once():
    recipe = load_recipe("distill/dmd2").recipe
    objective = recipe.objective.load()(recipe.objective, resolve_networks(recipe, planning=True))
    counted = phases_of(objective, recipe.train.steps)
    assert {phase.name: times for phase, times in counted.items()} == {"fake_score": 1.0, "main": pytest.approx(0.2)}
    assert len(counted) == 2
    assert all(0.99 < phase.done < 1.0 for phase in counted)


def test_warm_ups_that_stand_for_radam_are_as_long_as_its_own():
    for name in ("distill/consistency-train", "distill/consistency-distill"):
        recipe = load_recipe(name).recipe
        assert recipe.schedule.warmup_steps == math.ceil(2 / (1 - recipe.optimizer.betas[1]) - 1e-6)
