"""Our transformer against the public implementations on copied random weights."""

import pytest
import torch

from model_helpers import dense, mixture, randomized

transformers = pytest.importorskip("transformers")


def copy_common(ours, theirs):
    pairs = {
        "model.embed_tokens": ours.embedding,
        "model.norm": ours.norm,
        "lm_head": ours.head,
    }
    for index, block in enumerate(ours.layers):
        prefix = f"model.layers.{index}"
        pairs |= {
            f"{prefix}.input_layernorm": block.attention_norm,
            f"{prefix}.post_attention_layernorm": block.feed_forward_norm,
            f"{prefix}.self_attn.q_proj": block.attention.query,
            f"{prefix}.self_attn.k_proj": block.attention.key,
            f"{prefix}.self_attn.v_proj": block.attention.value,
            f"{prefix}.self_attn.o_proj": block.attention.output,
        }
    with torch.no_grad():
        for name, module in pairs.items():
            theirs.get_submodule(name).weight.copy_(module.weight)


def common_settings(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 64,
    }


def assert_same_loss_gradients(ours, theirs, tokens, pairs):
    """Compare logits below 1e-5 and some gradients through the whole network."""
    our_logits, their_logits = ours(tokens)[0], theirs(tokens).logits
    assert (our_logits - their_logits).abs().max() < 1e-5 * their_logits.abs().max()
    direction = torch.randn_like(our_logits)
    our_gradients = torch.autograd.grad(our_logits, [a for a, _ in pairs], direction)
    their_gradients = torch.autograd.grad(their_logits, [b for _, b in pairs], direction)
    for got, expected in zip(our_gradients, their_gradients, strict=True):
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_dense_equals_llama():
    config = dense(rope_theta=500.0)
    ours = randomized(config)
    settings = transformers.LlamaConfig(**common_settings(config), intermediate_size=config.dense_hidden_width)
    theirs = transformers.LlamaForCausalLM(settings)
    copy_common(ours, theirs)
    with torch.no_grad():
        for block, layer in zip(ours.layers, theirs.model.layers, strict=True):
            layer.mlp.gate_proj.weight.copy_(block.feed_forward.gate.weight)
            layer.mlp.up_proj.weight.copy_(block.feed_forward.up.weight)
            layer.mlp.down_proj.weight.copy_(block.feed_forward.down.weight)
    tokens = torch.randint(0, 31, (2, 20))
    pairs = [
        (ours.embedding.weight, theirs.model.embed_tokens.weight),
        (ours.layers[0].attention.key.weight, theirs.model.layers[0].self_attn.k_proj.weight),
    ]
    assert_same_loss_gradients(ours, theirs, tokens, pairs)


def test_mixture_equals_mixtral():
    config = mixture()
    ours = randomized(config)
    settings = transformers.MixtralConfig(
        **common_settings(config), intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    )
    theirs = transformers.MixtralForCausalLM(settings)
    copy_common(ours, theirs)
    with torch.no_grad():
        for block, layer in zip(ours.layers, theirs.model.layers, strict=True):
            layer.mlp.gate.weight.copy_(block.feed_forward.router.weight)
            layer.mlp.experts.gate_up_proj.copy_(block.feed_forward.experts.gate_and_up)
            layer.mlp.experts.down_proj.copy_(block.feed_forward.experts.down)
    tokens = torch.randint(0, 31, (2, 20))
    mixture_layer, their_layer = ours.layers[0].feed_forward, theirs.model.layers[0].mlp
    pairs = [
        (ours.embedding.weight, theirs.model.embed_tokens.weight),
        (mixture_layer.router.weight, their_layer.gate.weight),
        (mixture_layer.experts.down, their_layer.experts.down_proj),
        (mixture_layer.experts.gate_and_up, their_layer.experts.gate_up_proj),
    ]
    assert_same_loss_gradients(ours, theirs, tokens, pairs)


def test_sigmoid_routing_with_bias_and_shared_experts_equals_deepseek_v3():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = mixture(
        experts={
            "count": 8,
            "top_k": 3,
            "router": "sigmoid",
            "routed_scale": 2.5,
            "shared": 2,
            "bias_update_rate": 0.001,
        }
    )
    layer = randomized(config).layers[0].feed_forward
    layer.router.expert_bias.copy_(0.3 * torch.randn(8))
    settings = transformers.DeepseekV3Config(
        hidden_size=config.width,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    theirs = DeepseekV3MoE(settings)
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.gate.e_score_correction_bias.copy_(layer.router.expert_bias)
        theirs.experts.gate_up_proj.copy_(layer.experts.gate_and_up)
        theirs.experts.down_proj.copy_(layer.experts.down)
        theirs.shared_experts.gate_proj.weight.copy_(layer.shared.gate.weight)
        theirs.shared_experts.up_proj.weight.copy_(layer.shared.up.weight)
        theirs.shared_experts.down_proj.weight.copy_(layer.shared.down.weight)
    x = torch.randn(2, 16, config.width)
    ours, expected = layer(x)[0], theirs(x)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    direction = torch.randn_like(ours)
    for got, wanted in zip(
        torch.autograd.grad(ours, [layer.router.weight, layer.experts.down], direction),
        torch.autograd.grad(expected, [theirs.gate.weight, theirs.experts.down_proj], direction),
        strict=True,
    ):
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
