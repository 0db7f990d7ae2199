"""Distillation that cannot be: every misfit of teacher, student, heads and data is said before anything trains."""

import pytest
import torch

from sixfold.errors import RecipeError
from sixfold.models.dit.config import DiTConfig
from sixfold.models.feature_heads.config import FeatureHeadsConfig
from sixfold.models.mmdit.config import MMDiTConfig
from sixfold.models.network import reset_buffers
from sixfold.models.trained.network import TrainedNetwork
from sixfold.models.unet.config import UNetConfig
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.distillation.adversarial_config import AdversarialDistillationConfig
from sixfold.objectives.distillation.consistency_config import ConsistencyConfig
from sixfold.objectives.distillation.derivatives import directional_derivative
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.load import load_recipe

DIT = DiTConfig(image_size=4, patch_size=2, channels=1, width=16, depth=2, heads=2)
UNET = UNetConfig(image_size=4, channels=1, width=8, multipliers=[1], attention_sizes=[], head_width=8, groups=4)


def build(config, teacher=DIT, student=None, heads=2, features=16):
    """An objective of those settings; a student is a copy of its teacher unless it is given."""
    trained = TrainedNetwork(
        architecture=teacher, objective=DenoisingConfig(), run=None, role="denoiser", averaged=False
    )
    discriminator = FeatureHeadsConfig(heads=heads, features=features)
    return config.load()(config, {"teacher": trained, "denoiser": student or trained, "discriminator": discriminator})


@pytest.mark.parametrize("kind", [AdversarialDistillationConfig, DistributionMatchingConfig])
@pytest.mark.parametrize("read_after", [(), (0,), (0, 2), (1, 0), (-1, 0), (1, 1)])
def test_heads_read_blocks_that_are_there(kind, read_after):
    with pytest.raises(RecipeError, match="different blocks from 0 to 1, in order"):
        build(kind(discriminator="discriminator", read_after=read_after))
    build(kind(discriminator="discriminator", read_after=(0, 1)))


def test_heads_read_tokens_of_their_width_from_a_network_that_has_some():
    config = AdversarialDistillationConfig(read_after=(0, 1))
    with pytest.raises(RecipeError, match=r"networks.discriminator.features is 8.*\n.*allowed: 16"):
        build(config, features=8)
    with pytest.raises(RecipeError, match=r"networks\.teacher does not give"):
        build(config, teacher=UNET)


@pytest.mark.parametrize(
    ("config", "scalar"),
    [(ConsistencyConfig(embed_guidance=(1.0, 3.0)), "guidance"), (MeanFlowConfig(teacher="teacher"), "interval")],
    ids=["guidance", "interval"],
)
def test_a_student_takes_the_numbers_that_it_is_told(config, scalar):
    for network in (DIT, UNET):
        with pytest.raises(RecipeError, match=rf"no input for it(.*\n)*.*scalars: \['{scalar}'\]"):
            build(config, teacher=network)
    build(config, student=DIT.model_copy(update={"scalars": (scalar,)}))


def test_a_discriminator_sees_more_than_one_sample_at_a_time():
    name = "distill/ladd-smoke"
    with pytest.raises(RecipeError, match=r"micro_batch = 1 .*one sample at a time(.*\n)*.*micro_batch=2"):
        load_recipe(name, ["engine.micro_batch=1"])
    with pytest.raises(RecipeError, match=r"roles.discriminator.engine.micro_batch = 1"):
        load_recipe(name, ["roles.discriminator.engine={type: ddp, micro_batch: 1}"])
    recipe = load_recipe(name, ["data.global_batch=8"]).recipe
    check_recipe(recipe, 4)
    with pytest.raises(RecipeError, match="on 8 ranks: the discriminator would see one sample on each"):
        check_recipe(recipe, 8)
    load_recipe("distill/consistency-distill-smoke", ["engine.micro_batch=1"])


def test_an_mmdit_gives_hidden_tokens_and_is_told_numbers():
    config = MMDiTConfig(
        image_size=4, patch_size=2, channels=1, width=16, depth=3, heads=2, text_tokens=3, text_width=8, pooled_width=8,
        time_scale=1.0, scalars=("interval",),
    )  # fmt: skip
    assert "hidden_tokens" in config.provides
    network = config.load()(config)
    reset_buffers(network)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    for parameter in network.parameters():
        parameter.data = 0.3 * drawn(*parameter.shape)
    x, time = drawn(2, 1, 4, 4), torch.tensor([0.3, 0.7])
    text = {"text": drawn(2, 3, 8), "pooled": drawn(2, 8)}
    plain = network(x, time, text)
    prediction, (first, last) = network(x, time, text, read_after=(0, 2))
    torch.testing.assert_close(prediction, plain)
    assert first.shape == last.shape == (2, 4, 16)
    assert (first - last).abs().max() > 0.1
    torch.testing.assert_close(network(x, time, {**text, "interval": torch.zeros(2)}), plain)
    interval = torch.tensor([0.2, 0.5])

    def told(interval):
        return network(x, time, {**text, "interval": interval})

    _, slope = directional_derivative(told, (interval,), (torch.ones(2),))
    with torch.no_grad():
        expected = (told(interval + 1e-2) - told(interval - 1e-2)) / 2e-2
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(slope, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
