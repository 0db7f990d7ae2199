"""Where paths begin and end: pure noise and clean data, where ratios, rates and logarithms are infinite."""

import pytest
import torch

from exact_denoisers import ExactDenoiser, gaussian_posterior
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.models.dit.config import DiTConfig
from sixfold.models.trained.network import TrainedNetwork
from sixfold.objectives.contract import Batch, Phase
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.distillation.common import Drawn
from sixfold.objectives.distillation.consistency_config import ConsistencyConfig, GridPairsConfig
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.trajectory_config import ReflowConfig
from sixfold.objectives.distillation.trigflow_config import TrigFlowConsistencyConfig
from sixfold.objectives.distillation.view import View
from sixfold.paths.config import (
    EDMPathConfig,
    RectifiedFlowConfig,
    VEConfig,
    VPCosineConfig,
    VPDiscreteConfig,
    VPLinearConfig,
)

MEAN, STD, SIZE = 0.3, 0.5, 2
PATHS = [
    RectifiedFlowConfig(),
    VPLinearConfig(),
    VPDiscreteConfig(),
    VPCosineConfig(),
    VPCosineConfig(offset=0.0),
    VEConfig(),
    EDMPathConfig(),
]
NAMES = ["rectified", "vp_linear", "vp_discrete", "vp_cosine", "vp_cosine_0", "ve", "edm"]
every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def settings(path, prediction):
    return DenoisingConfig(path=path, prediction=prediction, data_std=STD)


def drawn(count=64):
    positions = torch.arange(count)
    random = PositionRandom(7, positions)
    data = MEAN + STD * random.normal("data", (1, SIZE, SIZE)).double()
    return Batch({"image": data}, positions)


def objective_of(config, teacher, **student):
    """An objective whose teacher is an exact denoiser of those settings."""
    network = DiTConfig(image_size=SIZE, patch_size=1, channels=1, width=4, depth=1, heads=1)
    taught = TrainedNetwork(architecture=network, objective=teacher, run=None, role="denoiser", averaged=False)
    config = config.model_copy(update={"teacher": "teacher", **student})
    return config.load()(config, {"denoiser": network, "teacher": taught})


class Off(torch.nn.Module):
    """A denoiser that is wrong by a constant, and finite like a network where what it should say is not."""

    def __init__(self, denoiser, by):
        super().__init__()
        self.denoiser, self.by = denoiser, by

    def forward(self, *inputs):
        return self.denoiser(*inputs).nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0) + self.by


def exact(trained_for, by=0.0):
    return Off(ExactDenoiser(trained_for, gaussian_posterior(MEAN, STD)).double(), by)


@every_path
@pytest.mark.parametrize("prediction", ["velocity", "noise", "v", "edm"])
def test_any_network_answers_at_the_ends_of_any_path(path, prediction):
    trained_for = settings(path, prediction)
    view, x = View.of(trained_for), torch.randn(5, 1, SIZE, SIZE, dtype=torch.float64)
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    clean = view(exact(trained_for), x, one, zero, {})
    least = view.path.coefficients(torch.tensor([view.path.time_data], dtype=torch.float64)).sigma.item()
    torch.testing.assert_close(clean.data, x, rtol=0, atol=2 * least + 1e-6)
    assert clean.noise.isfinite().all()
    for sigma in (0.5, 1.0, 80.0):
        ends = view(exact(trained_for), sigma * x, zero, sigma * one, {})
        torch.testing.assert_close(ends.data, torch.full_like(x, MEAN), rtol=0, atol=0.02)
        torch.testing.assert_close(ends.noise, x, rtol=0, atol=0.02)


@pytest.mark.parametrize("path", [VPCosineConfig(), VPLinearConfig(), VEConfig()], ids=lambda path: path.type)
def test_a_teacher_that_predicts_noise_a_little_wrong_teaches_from_pure_noise(path):
    teacher = settings(path, "noise")
    config = ConsistencyConfig(start="fresh", pairs=GridPairsConfig(first_steps=10, last_steps=10))
    student = {"path": RectifiedFlowConfig(), "prediction": "velocity", "data_std": STD}
    objective = objective_of(config, teacher, **student)
    batch, random = drawn(), PositionRandom(3, torch.arange(64))
    noise = random.normal("noise", (1, SIZE, SIZE)).double()
    at, nearer = (objective.student.path.coefficients(torch.full((64,), t, dtype=torch.float64)) for t in (1.0, 0.9))
    quantile = torch.full((64,), 0.99, dtype=torch.float64)
    found, right = (
        objective._solve(
            {"teacher": exact(teacher, by)}, noise, at, nearer, Drawn(batch["image"], noise, quantile, {}, {}), 1.0
        )
        for by in (0.01, 0.0)
    )
    assert (found - right).abs().max() < 0.2


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (path, prediction)
        for path in PATHS
        for prediction in ("velocity", "v", "edm")
        if not (isinstance(path, VEConfig | EDMPathConfig) and prediction == "velocity")
    ],
    ids=str,
)
def test_every_student_that_is_admitted_has_a_finite_loss_and_meets_the_boundary_condition(path, prediction):
    student = settings(path, prediction)
    objective = objective_of(ConsistencyConfig(pairs=GridPairsConfig(first_steps=4, last_steps=4)), student)
    batch = drawn()
    networks = {"denoiser": exact(student, 0.1), "teacher": exact(student)}
    terms = objective(networks, batch, Phase(name="main", trains=("denoiser",)), PositionRandom(3, batch.positions))
    assert terms.loss.isfinite()
    end = objective.student.path.coefficients(torch.full((64,), objective.student.path.time_data, dtype=torch.float64))
    torch.testing.assert_close(
        objective.lead_to(networks["denoiser"], batch["image"], end, {}), batch["image"], rtol=0, atol=1e-7
    )


def test_students_without_a_boundary_condition_are_refused():
    for config in (ConsistencyConfig(), TrigFlowConsistencyConfig()):
        with pytest.raises(RecipeError, match="boundary condition"):
            objective_of(config, settings(VPLinearConfig(), "noise"))


@every_path
def test_reflow_follows_every_teacher_s_flow_in_few_steps(path):
    """Eight Heun steps reach the exact flow map within a few hundredths, whatever path the teacher knows."""
    teacher = settings(path, "edm")
    student = {"path": RectifiedFlowConfig(), "prediction": "velocity", "start": "fresh"}
    objective = objective_of(ReflowConfig(solver_steps=8), teacher, **student)
    batch, random = drawn(512), PositionRandom(3, torch.arange(512))
    noise = random.normal("noise", (1, SIZE, SIZE)).double()
    quantile = torch.full((512,), 0.5, dtype=torch.float64)
    carried = objective._carried({"teacher": exact(teacher)}, Drawn(batch["image"], noise, quantile, {}, {}))
    error = (carried - (MEAN + STD * noise)).square().mean().sqrt() / STD
    assert error < 0.03


def test_scores_are_compared_at_noise_levels_of_every_size():
    """On EDM's path even levels would nearly all lie far above the data."""
    objective = objective_of(DistributionMatchingConfig(), settings(EDMPathConfig(), "edm"))
    batch = drawn(512)
    random = PositionRandom(3, batch.positions)
    nothing = torch.full((512,), 0.5, dtype=torch.float64)
    alpha, sigma, _ = objective._renoised(Drawn(batch["image"], batch["image"], nothing, {}, {}), random, "student")
    assert 0.3 < (sigma / alpha < 1.0).double().mean() < 0.7
