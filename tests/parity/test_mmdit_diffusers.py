"""Our MMDiT against the public implementation of Stable Diffusion 3's transformer on copied random weights."""

import pytest
import torch

from model_helpers import randomized
from sixfold.models.mmdit.config import MMDiTConfig

diffusers = pytest.importorskip("diffusers")


def linear_pairs(theirs, ours):
    """(their linear, our linear) of everything but the two modulations that they store scale first."""
    yield theirs.context_embedder, ours.text
    yield theirs.time_text_embed.timestep_embedder.linear_1, ours.time.inner
    yield theirs.time_text_embed.timestep_embedder.linear_2, ours.time.outer
    yield theirs.time_text_embed.text_embedder.linear_1, ours.pooled.inner
    yield theirs.time_text_embed.text_embedder.linear_2, ours.pooled.outer
    yield theirs.proj_out, ours.projection
    for layer, block in zip(theirs.transformer_blocks, ours.layers, strict=True):
        attention, image, text = layer.attn, block.image, block.text
        yield layer.norm1.linear, image.modulation
        yield from ((attention.to_q, image.query), (attention.to_k, image.key), (attention.to_v, image.value))
        yield from ((attention.add_q_proj, text.query), (attention.add_k_proj, text.key))
        yield from ((attention.add_v_proj, text.value), (attention.to_out[0], image.output))
        yield from ((layer.ff.net[0].proj, image.up), (layer.ff.net[2], image.down))
        if not text.ends:
            yield from ((layer.norm1_context.linear, text.modulation), (attention.to_add_out, text.output))
            yield from ((layer.ff_context.net[0].proj, text.up), (layer.ff_context.net[2], text.down))


def copy_weights(theirs, ours):
    with torch.no_grad():
        projection = theirs.pos_embed.proj
        projection.weight.copy_(ours.patches.projection.weight.view_as(projection.weight))
        projection.bias.copy_(ours.patches.projection.bias)
        for target, source in linear_pairs(theirs, ours):
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)
        scale_first = [(theirs.norm_out.linear, ours.modulation)]
        scale_first.append((theirs.transformer_blocks[-1].norm1_context.linear, ours.layers[-1].text.modulation))
        for target, source in scale_first:
            target.weight.copy_(torch.cat(source.weight.chunk(2)[::-1]))
            target.bias.copy_(torch.cat(source.bias.chunk(2)[::-1]))
        for layer, block in zip(theirs.transformer_blocks, ours.layers, strict=True):
            if layer.attn.norm_q is not None:
                layer.attn.norm_q.weight.copy_(block.image.query_norm.weight)
                layer.attn.norm_k.weight.copy_(block.image.key_norm.weight)
                layer.attn.norm_added_q.weight.copy_(block.text.query_norm.weight)
                layer.attn.norm_added_k.weight.copy_(block.text.key_norm.weight)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sides", [(8, 8), (12, 6)])
def test_mmdit_equals_diffusers(qk_norm, sides):
    config = MMDiTConfig(
        image_size=8,
        patch_size=2,
        channels=3,
        width=48,
        depth=3,
        heads=4,
        text_tokens=5,
        text_width=20,
        pooled_width=12,
        qk_norm=qk_norm,
        position_grid=6,
    )
    ours = randomized(config, scale=0.1)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=3,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pooled_projection_dim=12,
        out_channels=3,
        pos_embed_max_size=6,
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()
    copy_weights(theirs, ours)
    x, steps = torch.randn(4, 3, *sides), torch.tensor([0, 137, 500, 999])
    text, pooled = torch.randn(4, 5, 20), torch.randn(4, 12)
    got = ours(x, steps / 1000.0, {"text": text, "pooled": pooled})
    expected = theirs(x, text, pooled, steps).sample
    assert expected.abs().max() > 0.1
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    direction = torch.randn_like(got)
    for ours_part, their_part in (
        (ours.layers[0].image.query.weight, theirs.transformer_blocks[0].attn.to_q.weight),
        (ours.layers[-1].text.key.weight, theirs.transformer_blocks[-1].attn.add_k_proj.weight),
        (ours.text.weight, theirs.context_embedder.weight),
    ):
        (ours_gradient,) = torch.autograd.grad(got, ours_part, direction, retain_graph=True)
        (their_gradient,) = torch.autograd.grad(expected, their_part, direction, retain_graph=True)
        assert (ours_gradient - their_gradient).abs().max() < 1e-4 * their_gradient.abs().max()
