"""REPA: the cosine by its definition, where gradients go, what is refused, and that alignment is learnt."""

import pytest
import torch
from torch import nn

from recipe_cases import advance, close, recipe_on
from sixfold.distributed.process_group import join
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Batch, Phase
from sixfold.objectives.denoising.alignment import cosine_alignment
from sixfold.objectives.denoising.alignment_config import AlignmentConfig
from sixfold.train.assembly import assemble

ALIGNED = (
    "networks.features={type: classifier, image_size: 8, channels: 1, classes: 10, width: 8, steps: 20}",
    "networks.projection={type: projection, input_width: 32, output_width: 16, width: 24}",
    "objective.alignment={features: features, projection: projection, output: map_2, block: 1}",
    *("networks.denoiser.width=32", "networks.denoiser.depth=2", "data.global_batch=16", "schedule.warmup_steps=1"),
)


class Fixed(nn.Module):
    """Returns what it was given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cosine_is_taken_token_by_token_where_the_features_lie():
    hidden, features = normal(0, 2, 4, 6), {"map_1": normal(1, 2, 6, 4, 4), "embedding": normal(2, 2, 6)}
    nets = {"features": Fixed(features), "projection": nn.Identity()}
    config = AlignmentConfig(features="f", projection="p", output="map_1", block=1)
    found = cosine_alignment(config, nets, hidden, torch.zeros(2, 1, 8, 8))
    for sample in range(2):
        cosines = []
        for token in range(4):
            row, column = divmod(token, 2)
            square = features["map_1"][sample, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            one = hidden[sample, token]
            cosines.append(float(one @ square / one.norm() / square.norm()))
        assert float(found[sample]) == pytest.approx(sum(cosines) / 4, abs=1e-6)
    whole = cosine_alignment(config.model_copy(update={"output": "embedding"}), nets, hidden, torch.zeros(2, 1, 8, 8))
    expected = torch.cosine_similarity(hidden.mean(1), features["embedding"])
    torch.testing.assert_close(whole, expected)


def test_it_lowers_the_loss_by_its_weight_trains_both_roles_and_leaves_held_out_loss_alone(demo_data, tmp_path):
    recipe = recipe_on("flow/dit-smoke", str(demo_data), *ALIGNED)
    training = assemble(recipe, join(), cache=tmp_path)
    batch = next(training.stream)
    objective, nets = training.objective, training.networks
    random = PositionRandom(0, batch.positions)
    phase = objective.phases(training.progress)[0]
    assert phase.trains == ("denoiser", "projection")
    terms = objective(nets, batch, phase, random)
    alignment = terms.metrics["alignment"].total
    plain = objective.__class__(objective.config.model_copy(update={"alignment": None}), recipe.networks)
    unaligned = plain(nets, batch, Phase(name="main", trains=("denoiser",)), random)
    torch.testing.assert_close(terms.loss.detach(), unaligned.loss.detach() - 0.5 * alignment)
    assert set(objective.evaluate(nets, batch, random)) == set(plain.evaluate(nets, batch, random))
    bare = training.bare_networks
    for role in ("denoiser", "projection"):
        gradients = torch.autograd.grad(terms.loss, list(bare[role].parameters()), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert not any(value.requires_grad for value in bare["features"].parameters())
    before = _alignment(training, batch)
    for _ in range(20):
        advance(training)
    assert _alignment(training, batch) > before + 0.1
    close(training)


def _alignment(training, batch: Batch) -> float:
    phase = training.objective.phases(training.progress)[0]
    terms = training.objective(training.networks, batch, phase, PositionRandom(0, batch.positions))
    return float(terms.metrics["alignment"].total / terms.metrics["alignment"].count)


def test_what_does_not_fit_is_refused(demo_data, tmp_path):
    def first_loss(*overrides):
        recipe = recipe_on("flow/dit-smoke", str(demo_data), *ALIGNED, *overrides)
        training = assemble(recipe, join(), cache=tmp_path)
        return _alignment(training, next(training.stream))

    def refusal(*overrides):
        with pytest.raises(RecipeError) as raised:
            first_loss(*overrides)
        return str(raised.value)

    assert "block is 3, and networks.denoiser has 2 blocks" in refusal("objective.alignment.block=3")
    assert "input_width is 31" in refusal("networks.projection.input_width=31")
    assert "output_width is 5, and map_2 has 16 channels" in refusal("networks.projection.output_width=5")
    assert "no output 'map_9'" in refusal("objective.alignment.output=map_9")
