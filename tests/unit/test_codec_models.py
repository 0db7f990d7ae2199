"""Codecs, their bottlenecks and discriminators against definitions written out independently."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from model_helpers import randomized
from sixfold.models.codec.bottlenecks import FSQBottleneck, KLBottleneck
from sixfold.models.codec.config import CodecConfig, FSQConfig, KLConfig, VQConfig
from sixfold.models.codec.layers import ChannelToSpace, SpaceToChannel
from sixfold.models.codec.vector_quantizer import VectorQuantizer, assignment_statistics, nearest
from sixfold.models.discriminator.config import PatchDiscriminatorConfig
from sixfold.models.network import initialize, parameter_tags


def codec(**changes) -> CodecConfig:
    settings = {"image_size": 16, "width": 8, "multipliers": [1, 2, 2], "depth": 1, "groups": 4}
    return CodecConfig(**(settings | {"bottleneck": KLConfig(channels=4)} | changes))


BOTTLENECKS = {
    "kl": KLConfig(channels=4),
    "vq": VQConfig(channels=4, codes=12),
    "vq by loss": VQConfig(channels=4, codes=12, codebook="loss"),
    "fsq": FSQConfig(levels=[4, 3, 5, 2]),
}


@pytest.mark.parametrize("resampling", ["strided", "space_to_channel"])
@pytest.mark.parametrize("name", list(BOTTLENECKS))
def test_a_codec_has_the_shapes_its_settings_tell(name, resampling):
    config = codec(bottleneck=BOTTLENECKS[name], resampling=resampling, attention_stages=1, latent_convolutions=True)
    network, images = randomized(config), torch.randn(3, 3, 16, 16)
    made = network(images)
    assert made["image"].shape == images.shape
    assert made["latents"].shape == (3, config.latent_channels, config.latent_size, config.latent_size)
    assert config.values == math.prod(made["latents"].shape[1:]) if name == "kl" else made["codes"][0].numel()
    again = network(made["latents"], task="decode")["image"]
    torch.testing.assert_close(again, made["image"])
    if "codes" in made:
        assert made["codes"].min() >= 0
        assert made["codes"].max() < config.codebook_size
        torch.testing.assert_close(network(made["codes"], task="decode_codes")["image"], made["image"])


def test_the_stated_flops_are_those_that_are_counted():
    for config in (codec(middle_attention=False), codec(resampling="space_to_channel", middle_attention=False)):
        network, images = randomized(config), torch.randn(2, 3, 16, 16)
        with FlopCounterMode(display=False) as counter:
            network(images)
        assert network.forward_flops({"image": (2, 3, 16, 16)}) == counter.get_total_flops()
    discriminator = randomized(PatchDiscriminatorConfig(image_size=16, layers=2, width=8, groups=4))
    with FlopCounterMode(display=False) as counter:
        logits = discriminator(images)
    assert logits.shape[2:] == (discriminator.config.patches,) * 2
    assert discriminator.forward_flops({"image": (2, 3, 16, 16)}) == counter.get_total_flops()


def test_shortcuts_move_pixels_to_channels_and_back():
    halve, double = SpaceToChannel(3, 12), ChannelToSpace(12, 3)
    with torch.no_grad():
        for value in (*halve.parameters(), *double.parameters()):
            value.zero_()
    x = torch.randn(2, 3, 4, 6)
    moved = halve(x)
    for channel, dy, dx in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(moved[:, 4 * channel + 2 * dy + dx], x[:, channel, dy::2, dx::2])
    assert torch.equal(double(moved), x)


def test_fsq_rounds_to_every_level_and_numbers_them():
    levels = [4, 3, 5, 2]
    bottleneck = FSQBottleneck(FSQConfig(levels=levels))
    features = torch.linspace(-8, 8, 401)[:, None, None, None].expand(-1, 4, 1, 1)
    made = bottleneck(features)
    for channel, level in enumerate(levels):
        half = level // 2
        expected = torch.arange(level) - half
        assert torch.equal((made["latents"][:, channel].unique() * half).round().long(), expected)
    every = torch.arange(math.prod(levels)).view(-1, 1, 1)
    latents = bottleneck.look_up(every)
    assert torch.equal(bottleneck.codes_of(latents), every)
    digits = torch.tensor(list(itertools.product(*(range(level) for level in reversed(levels)))))
    by_hand = (digits.flip(1) - torch.tensor([level // 2 for level in levels])) / torch.tensor(
        [level // 2 for level in levels]
    )
    torch.testing.assert_close(latents[:, :, 0, 0], by_hand)


def test_fsq_passes_the_gradient_of_its_bound():
    bottleneck = FSQBottleneck(FSQConfig(levels=[5]))
    z = torch.tensor([-1.3, -0.2, 0.4, 2.0]).view(4, 1, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(bottleneck(z)["latents"].sum(), z)
    # five levels: half the width is 2, widened by a thousandth, and latents are scaled by 1 / 2
    expected = (1.0 - torch.tanh(z.detach()) ** 2) * 2.0 * 1.001 / 2.0
    torch.testing.assert_close(gradient, expected)


def test_kl_is_the_divergence_by_integration():
    mean, log_variance = 0.7, -0.8
    made = KLBottleneck(KLConfig(channels=1))(torch.tensor([mean, log_variance]).view(1, 2, 1, 1))
    posterior = torch.distributions.Normal(torch.tensor(mean).double(), math.exp(0.5 * log_variance))
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    integrand = posterior.log_prob(x).exp() * (posterior.log_prob(x) - prior.log_prob(x))
    assert made["kl"].item() == pytest.approx(torch.trapezoid(integrand, x).item(), rel=1e-5)


@pytest.mark.parametrize("learned", ["ema", "loss"])
def test_vq_takes_the_nearest_vector_and_passes_gradients_straight_through(learned):
    quantizer = VectorQuantizer(VQConfig(channels=3, codes=7, codebook=learned))
    if learned == "loss":
        initialize(quantizer, parameter_tags(quantizer), seed=0, role="codec")
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    made, vectors = quantizer(z), quantizer.codebook()
    cells = z.permute(0, 2, 3, 1)
    distances = (cells[..., None, :] - vectors).square().sum(-1)
    assert torch.equal(made["codes"], distances.argmin(-1))
    torch.testing.assert_close(made["latents"].permute(0, 2, 3, 1), vectors[made["codes"]].detach())
    torch.testing.assert_close(made["error"], distances.min(-1).values)
    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((made["latents"] * weights).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weights)
    (gradient,) = torch.autograd.grad(made["commitment"].sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, 2.0 * (z - made["latents"]).detach() / z[0].numel())
    assert ("codebook" in made) == (learned == "loss")
    if learned == "loss":
        (gradient,) = torch.autograd.grad(made["codebook"].sum(), quantizer.vectors)
        expected = torch.zeros_like(gradient)
        errors = 2.0 * (vectors[made["codes"]] - cells) / z[0].numel()
        expected.index_add_(0, made["codes"].flatten(), errors.flatten(0, 2))
        torch.testing.assert_close(gradient, expected.detach())


def statistics(z, vectors, offered_to, priority):
    codes = nearest(z, vectors)
    error = (z.permute(0, 2, 3, 1) - vectors[codes]).square().sum(-1)
    return assignment_statistics(z, codes, len(vectors), error=error, offered_to=offered_to, priority=priority)


def test_codebook_averages_follow_their_latents_and_do_not_depend_on_the_division():
    config = VQConfig(channels=2, codes=5, decay=0.8, revive_below=0.0)
    quantizer, z = VectorQuantizer(config), torch.randn(6, 2, 3, 3)
    before = quantizer.codebook().clone()
    offered_to, priority = torch.randint(5, (6, 9)), torch.rand(6, 9)
    whole = statistics(z, before, offered_to, priority)
    halves = [statistics(z[s], before, offered_to[s], priority[s]) for s in (slice(0, 2), slice(2, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value)
    quantizer.update(whole)
    codes, cells = nearest(z, before).flatten(), z.permute(0, 2, 3, 1).flatten(0, 2)
    for code in range(5):
        members = cells[codes == code]
        share = 0.8 + 0.2 * len(members) * 5 / 54
        mean = (0.8 * before[code] + 0.2 * members.sum(0) * 5 / 54) / share
        torch.testing.assert_close(quantizer.codebook()[code], mean)


def test_unused_codes_move_next_to_latents_that_are_represented_badly():
    quantizer = VectorQuantizer(VQConfig(channels=2, codes=4))
    z = torch.zeros(8, 2, 4, 4)
    z[5] = torch.tensor([30.0, -20.0])[:, None, None]  # far from everything else
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        offered_to, priority = torch.randint(4, (8, 16), generator=generator), torch.rand(8, 16, generator=generator)
        quantizer.update(statistics(z, quantizer.codebook(), offered_to, priority))
    error = quantizer(z)["error"]
    assert error[5].max() < 0.05 * (30.0**2 + 20.0**2)
    assert len(quantizer.codebook().unique(dim=0)) == 4


def test_a_discriminator_judges_every_image_by_itself():
    network = randomized(PatchDiscriminatorConfig(image_size=16, layers=2, width=8, groups=4))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: codec(image_size=18), "image_size must be divisible by 4.*set image_size=16"),
        (lambda: codec(groups=3), "groups must divide.*groups=3 and 8 channels; set groups=8"),
        (lambda: codec(resampling="space_to_channel", multipliers=[1, 8, 8]), "four times a stage's channels"),
        (
            lambda: codec(resampling="space_to_channel", bottleneck=KLConfig(channels=3)),
            "a multiple of what the bottleneck takes and gives, got 16 for 6 and 3",
        ),
        (lambda: PatchDiscriminatorConfig(image_size=8, layers=3), "too small for layers=3"),
        (
            lambda: PatchDiscriminatorConfig(image_size=32, width=8, groups=32),
            "groups=32 and 16 channels; set groups=16",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(build, expected):
    with pytest.raises(ValidationError, match=expected):
        build()
