"""Our DiT against the public implementation on copied random weights."""

import pytest
import torch

from model_helpers import randomized
from sixfold.models.dit.config import DiTConfig

diffusers = pytest.importorskip("diffusers")


def copy_weights(ours, theirs):
    with torch.no_grad():
        projection = theirs.pos_embed.proj
        projection.weight.copy_(ours.patches.projection.weight.view_as(projection.weight))
        projection.bias.copy_(ours.patches.projection.bias)
        pairs = [(theirs.proj_out_1, ours.final.modulation), (theirs.proj_out_2, ours.final.projection)]
        for layer, block in zip(theirs.transformer_blocks, ours.layers, strict=True):
            embedding = layer.norm1.emb
            # They start the frequencies at 1 and end at 1/10000; the paper's code, and ours, ends one step earlier.
            embedding.time_proj.downscale_freq_shift = 0
            embedding.class_embedder.embedding_table.weight.copy_(ours.label.weight)
            pairs += [
                (embedding.timestep_embedder.linear_1, ours.time.inner),
                (embedding.timestep_embedder.linear_2, ours.time.outer),
                (layer.norm1.linear, block.modulation),
                (layer.attn1.to_q, block.attention.query),
                (layer.attn1.to_k, block.attention.key),
                (layer.attn1.to_v, block.attention.value),
                (layer.attn1.to_out[0], block.attention.output),
                (layer.ff.net[0].proj, block.up),
                (layer.ff.net[2], block.down),
            ]
        for target, source in pairs:
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)


def test_dit_equals_diffusers():
    config = DiTConfig(image_size=8, patch_size=2, channels=3, width=48, depth=2, heads=4, classes=10)
    ours = randomized(config, scale=0.1)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()  # in training they drop labels at random
    copy_weights(ours, theirs)
    x, steps, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 137, 500, 999]), torch.tensor([0, 4, 9, 10])
    got = ours(x, steps / 1000.0, {"label": labels})
    expected = theirs(x, timestep=steps, class_labels=labels).sample
    assert expected.abs().max() > 0.1
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    direction = torch.randn_like(got)
    (ours_gradient,) = torch.autograd.grad(got, ours.layers[0].attention.query.weight, direction)
    (their_gradient,) = torch.autograd.grad(expected, theirs.transformer_blocks[0].attn1.to_q.weight, direction)
    assert (ours_gradient - their_gradient).abs().max() < 1e-4 * their_gradient.abs().max()
