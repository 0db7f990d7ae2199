"""The codec objective against its formulas, differentiated without its shortcut; perceptual features; measures."""

import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d, relu

from model_helpers import randomized
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError, RecipeError, TrainingError
from sixfold.models.codec.config import CodecConfig, FSQConfig, KLConfig, VQConfig
from sixfold.models.discriminator.config import PatchDiscriminatorConfig
from sixfold.models.network import reset_buffers
from sixfold.models.perceptual.classifier import trained_weights
from sixfold.models.perceptual.config import ClassifierConfig, LPIPSConfig
from sixfold.models.perceptual.features import EMBEDDING, perceptual_distance
from sixfold.models.perceptual.vgg import STAGES, read_weights
from sixfold.objectives.codec.config import AdversarialLossConfig, CodecObjectiveConfig, PerceptualLossConfig
from sixfold.objectives.codec.measures import code_measures, feature_measures, peak_signal_to_noise
from sixfold.objectives.contract import Batch, Progress, add_sums, means_of

NETWORKS = {
    "codec": CodecConfig(
        image_size=8, channels=1, width=8, multipliers=[1, 2], depth=1, groups=4, bottleneck=KLConfig(channels=2)
    ),
    "discriminator": PatchDiscriminatorConfig(image_size=8, channels=1, layers=1, width=8, groups=4),
    "perceptual": ClassifierConfig(image_size=8, channels=1, classes=3, width=4, features=6),
}
OBJECTIVE = CodecObjectiveConfig(
    kl_weight=0.01,
    perceptual=PerceptualLossConfig(weight=0.7),
    adversarial=AdversarialLossConfig(weight=0.5, discriminator_from_step=3, from_step=5),
)


def training(objective=OBJECTIVE, **networks):
    settings = NETWORKS | networks
    nets = {name: randomized(config, seed=seed) for seed, (name, config) in enumerate(settings.items())}
    nets["perceptual"].requires_grad_(False)
    return objective.load()(objective, settings), nets


def batch(n=4, size=8, channels=1):
    images = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch({"image": images}, torch.arange(n))


def at(objective, step):
    return objective.phases(Progress(samples=0, step=step, total_steps=10))


def test_the_discriminator_leads():
    objective, _ = training()
    names = [[phase.name for phase in at(objective, step)] for step in (2, 3, 5)]
    assert names == [["main"], ["discriminator", "main"], ["discriminator", "main"]]
    assert [at(objective, step)[-1].adversarial for step in (2, 4, 5)] == [False, False, True]
    with pytest.raises(ValueError, match="must learn before the codec learns from it"):
        AdversarialLossConfig(discriminator_from_step=6, from_step=5)


def test_the_codec_gets_the_gradient_of_the_whole_loss():
    objective, nets = training()
    data, random = batch(), PositionRandom(0, torch.arange(4))
    terms = objective(nets, data, at(objective, 5)[-1], random)
    weights = dict(nets["codec"].named_parameters())
    gradients = torch.autograd.grad(terms.loss, list(weights.values()))

    images = data["image"]
    made = nets["codec"](images, noise=random.normal("codec/posterior", (2, 4, 4)))
    reconstruction = (made["image"] - images).abs().mean((1, 2, 3))
    reconstruction = reconstruction + 0.7 * perceptual_distance(
        nets["perceptual"](images), nets["perceptual"](made["image"])
    )
    adversarial = -nets["discriminator"](made["image"]).mean((1, 2, 3))
    ratios = []
    for sample in range(4):
        pulls = [
            torch.autograd.grad(loss[sample], made["image"], retain_graph=True)[0][sample].norm()
            for loss in (reconstruction, adversarial)
        ]
        ratios.append(0.5 * pulls[0] / pulls[1])
    adaptive = torch.stack(ratios).detach()
    loss = (reconstruction + adaptive * adversarial + 0.01 / 64 * made["kl"]).sum()
    torch.testing.assert_close(terms.loss, loss)
    assert terms.count == 4
    for got, expected in zip(gradients, torch.autograd.grad(loss, list(weights.values())), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert all(value.grad is None for value in nets["discriminator"].parameters())


def test_the_discriminator_gets_the_hinge_loss_of_reconstructions_that_do_not_move():
    objective, nets = training()
    data, random = batch(), PositionRandom(0, torch.arange(4))
    terms = objective(nets, data, at(objective, 3)[0], random)
    with torch.no_grad():
        made = nets["codec"](data["image"], noise=random.normal("codec/posterior", (2, 4, 4)))["image"]
    real, fake = nets["discriminator"](data["image"]), nets["discriminator"](made)
    expected = sum((relu(1 - r).mean() + relu(1 + f).mean()) / 2 for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(terms.loss, expected)
    torch.autograd.backward(terms.loss)
    assert all(value.grad is None for value in nets["codec"].parameters())
    assert nets["discriminator"].output.weight.grad.abs().max() > 0


@pytest.mark.parametrize("bottleneck", [VQConfig(channels=3, codes=6), FSQConfig(levels=[4, 3])], ids=["vq", "fsq"])
def test_discrete_codecs_learn_and_count_their_codes(bottleneck):
    codec = NETWORKS["codec"].model_copy(update={"bottleneck": bottleneck})
    objective, nets = training(codec=codec)
    data, random = batch(), PositionRandom(0, torch.arange(4))
    terms = objective(nets, data, at(objective, 0)[-1], random)
    torch.autograd.backward(terms.loss)
    assert nets["codec"].encoder.input.weight.grad.abs().max() > 0
    assert ("code_counts" in terms.statistics) == (bottleneck.type == "vq")
    if bottleneck.type == "vq":
        before = nets["codec"].bottleneck.codebook().clone()
        objective.after_step(nets, terms.statistics, Progress(samples=4, step=1, total_steps=10))
        assert not torch.equal(nets["codec"].bottleneck.codebook(), before)
    values = means_of(objective.evaluate(nets, data, random))
    assert set(values) == {"loss", "psnr", "codebook_use", "perplexity", "feature_distance", "feature_fd"}
    assert 0 < values["codebook_use"] <= 1
    assert 1 <= values["perplexity"] <= bottleneck.codebook_size


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        (batch(size=7), "multiples of 2"),
        (batch(channels=3), "1 channels"),
        (Batch({}, torch.arange(2)), "the data have"),
    ],
)
def test_images_that_do_not_fit_are_refused(data, allowed):
    objective, nets = training()
    with pytest.raises(DataError, match=allowed):
        objective(nets, data, at(objective, 0)[0], PositionRandom(0, data.positions))


def test_measures_agree_with_their_definitions_however_the_data_are_divided():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    made = (images + 0.1 * torch.randn(6, 1, 4, 4, generator=generator)).clamp(-1, 1)
    for sample, got in enumerate(peak_signal_to_noise(made, images)):
        error = ((made[sample] - images[sample]) ** 2).mean()
        assert got.item() == pytest.approx((20 * torch.log10(2.0 / error.sqrt())).item(), rel=1e-5)
    codes = torch.tensor([[[0, 0], [3, 3]], [[0, 3], [3, 0]], [[3, 3], [0, 0]]])
    features, others = torch.randn(40, 3, generator=generator), 2.0 * torch.randn(40, 3, generator=generator) + 1.0
    totals = {}
    for part in (slice(0, 1), slice(1, 3)):
        add_sums(totals, code_measures(codes[part], 8))
    for part in (slice(0, 15), slice(15, 40)):
        add_sums(totals, feature_measures(features[part], others[part]))
    values = means_of(totals)
    assert values["codebook_use"] == 2 / 8
    assert values["perplexity"] == pytest.approx(2.0)
    first, second = (torch.cov(x.double().t(), correction=0) for x in (features, others))
    roots = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    mean = (features.double().mean(0) - others.double().mean(0)).square().sum()
    assert values["feature_fd"] == pytest.approx((mean + first.trace() + second.trace() - 2 * roots).item(), rel=1e-6)


def test_features_that_are_not_finite_are_an_error():
    sums = feature_measures(torch.full((3, 2), float("nan")), torch.ones(3, 2))
    with pytest.raises(TrainingError, match="not finite"):
        means_of(sums)


def test_the_classifier_learns_its_classes_and_gives_gradients():
    config = ClassifierConfig(image_size=8, channels=1, classes=3, width=6, features=8, steps=40)
    labels = torch.arange(120) % 3
    images = 0.3 * torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[torch.arange(120), 0, 2 * labels + 1] += 1.0
    weights = trained_weights(config, lambda: (images, labels))
    again = trained_weights(config, lambda: (images, labels))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    network = config.load()(config)
    network.load_state_dict(weights)
    network.requires_grad_(False)
    assert (network.logits(images).argmax(1) == labels).float().mean() > 0.95
    check_gradient(network, images[:2])


def check_gradient(network, images):
    """The distance's gradient by the second image is that of finite differences, and is not nothing."""
    moved = (images + 0.05).requires_grad_()
    with torch.no_grad():
        features = network(images)
    (gradient,) = torch.autograd.grad(perceptual_distance(features, network(moved)).sum(), moved)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        step = 1e-2 * direction
        sides = [perceptual_distance(features, network(moved + sign * step)).sum() for sign in (1, -1)]
    assert gradient.norm() > 1e-3
    assert (sides[0] - sides[1]).item() / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.fixture
def lpips_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    vgg, linear, inputs, number = {}, {}, 3, 0
    for stage, outputs in enumerate(STAGES):
        for width in outputs:
            scale = (2.0 / (9 * inputs)) ** 0.5
            vgg[f"features.{number}.weight"] = scale * torch.randn(width, inputs, 3, 3, generator=generator)
            vgg[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
            inputs, number = width, number + 2
        number += 1
        linear[f"lin{stage}.model.1.weight"] = torch.rand(1, inputs, 1, 1, generator=generator)
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "lpips.pth")
    return LPIPSConfig(vgg=str(tmp_path / "vgg16.pth"), weights=str(tmp_path / "lpips.pth")), vgg, linear


def test_lpips_is_its_formula_and_gives_gradients(lpips_files):
    config, vgg, linear = lpips_files
    network = config.load()(config)
    network.load_state_dict(read_weights(config, lambda: None))
    reset_buffers(network)
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    images, others = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))

    def maps(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        taps, number = [], 0
        for stage, outputs in enumerate(STAGES):
            x = max_pool2d(x, 2) if stage else x
            for _ in outputs:
                x = relu(conv2d(x, vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"], padding=1))
                number += 2
            number += 1
            taps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return taps

    expected = sum(
        conv2d((a - b) ** 2, linear[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
        for stage, (a, b) in enumerate(zip(maps(images), maps(others), strict=True))
    )
    torch.testing.assert_close(perceptual_distance(network(images), network(others)), expected, rtol=1e-4, atol=1e-6)
    assert network(images)[EMBEDDING].shape == (2, 512)
    check_gradient(network, images)


def test_lpips_without_its_files_says_which(tmp_path):
    missing = LPIPSConfig(vgg=str(tmp_path / "none.pth"))
    with pytest.raises(RecipeError, match=r"there is no file .*none\.pth"):
        read_weights(missing, lambda: None)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(RecipeError, match=r"holds no 'features\.0\.weight'"):
        read_weights(LPIPSConfig(vgg=str(tmp_path / "other.pth")), lambda: None)
