"""Our autoencoder against the public implementation on copied random weights."""

import pytest
import torch

from model_helpers import randomized
from sixfold.models.codec.config import CodecConfig, KLConfig

diffusers = pytest.importorskip("diffusers")

WIDTHS = (16, 32, 32)


def copy_residual(theirs, ours):
    pairs = [
        (theirs.norm1, ours.norm_1),
        (theirs.conv1, ours.convolution_1),
        (theirs.norm2, ours.norm_2),
        (theirs.conv2, ours.convolution_2),
    ]
    assert (theirs.conv_shortcut is None) == (ours.shortcut is None)
    return pairs + ([] if ours.shortcut is None else [(theirs.conv_shortcut, ours.shortcut)])


def middle_pairs(theirs, ours):
    attention = theirs.attentions[0]
    return [
        *copy_residual(theirs.resnets[0], ours.first),
        *copy_residual(theirs.resnets[1], ours.second),
        (attention.group_norm, ours.attention.norm),
        (attention.to_q, ours.attention.query),
        (attention.to_k, ours.attention.key),
        (attention.to_v, ours.attention.value),
        (attention.to_out[0], ours.attention.output),
    ]


def half_pairs(theirs, blocks, ours, resamplers):
    pairs = [
        (theirs.conv_in, ours.input),
        (theirs.conv_norm_out, ours.norm),
        (theirs.conv_out, ours.output),
        *middle_pairs(theirs.mid_block, ours.middle),
    ]
    for block, stage in zip(blocks, ours.stages, strict=True):
        for residual, mine in zip(block.resnets, stage.residual, strict=True):
            pairs += copy_residual(residual, mine)
        resampler = getattr(block, resamplers)
        assert (resampler is None) == (stage.resample is None)
        pairs += [] if resampler is None else [(resampler[0].conv, stage.resample.convolution)]
    return pairs


@torch.no_grad()
def copy_weights(ours, theirs):
    pairs = [
        *half_pairs(theirs.encoder, theirs.encoder.down_blocks, ours.encoder, "downsamplers"),
        *half_pairs(theirs.decoder, theirs.decoder.up_blocks, ours.decoder, "upsamplers"),
        (theirs.quant_conv, ours.before),
        (theirs.post_quant_conv, ours.after),
    ]
    copied = 0
    for target, source in pairs:
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)
        copied += target.weight.numel() + target.bias.numel()
    assert copied == sum(value.numel() for value in theirs.parameters())
    assert copied == sum(value.numel() for value in ours.parameters())


def test_kl_autoencoder_equals_diffusers():
    config = CodecConfig(
        image_size=24,
        channels=3,
        width=16,
        multipliers=[1, 2, 2],
        depth=2,
        groups=8,
        latent_convolutions=True,
        bottleneck=KLConfig(channels=4),
    )
    ours = randomized(config, scale=0.1)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    copy_weights(ours, theirs)
    images = torch.randn(2, 3, 24, 24).clamp(-1, 1)
    encoded = ours(images, task="encode")
    posterior = theirs.encode(images).latent_dist
    for got, expected in [
        (encoded["mean"], posterior.mean),
        (encoded["log_variance"], posterior.logvar),
        (encoded["kl"], posterior.kl()),
        (ours(encoded["mean"], task="decode")["image"], theirs.decode(posterior.mean).sample),
        (ours(images)["image"], theirs(images).sample),
    ]:
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    direction = torch.randn_like(images)
    (our_gradient,) = torch.autograd.grad(ours(images)["image"], ours.encoder.input.weight, direction)
    (their_gradient,) = torch.autograd.grad(theirs(images).sample, theirs.encoder.conv_in.weight, direction)
    assert (our_gradient - their_gradient).abs().max() < 1e-4 * their_gradient.abs().max()


def test_a_sample_of_the_posterior_is_diffusers_own():
    config = CodecConfig(
        image_size=8, channels=1, width=8, multipliers=[1, 1], groups=4, bottleneck=KLConfig(channels=2)
    )
    ours, images, noise = randomized(config), torch.randn(3, 1, 8, 8), torch.randn(3, 2, 4, 4)
    encoded = ours(images, task="encode", noise=noise)
    moments = torch.cat([encoded["mean"], encoded["log_variance"]], dim=1)
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(encoded["latents"], posterior.mean + posterior.std * noise)
