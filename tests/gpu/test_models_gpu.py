"""The kernels that only CUDA has give the numbers of the CPU's."""

import pytest
import torch

from model_helpers import dense, mixture, randomized
from sixfold.models.dit.config import DiTConfig
from sixfold.models.grouped import grouped_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        dense(width=128, heads=4, qk_norm=True),
        mixture(width=128, heads=4, experts={"shared": 1, "bias_update_rate": 0.1, "router": "sigmoid"}),
    ],
    ids=["dense", "mixture"],
)
def test_flex_attention_and_grouped_products_agree_with_the_cpu(config, compiled, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # shape checks cannot be traced
    network = randomized(config, scale=0.1)
    tokens, documents = torch.randint(0, 31, (2, 256)), (torch.arange(256) // 100).expand(2, -1)
    expected, _ = network(tokens, documents)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(network.parameters()), direction)
    network.cuda()
    for block in network.blocks() if compiled else ():
        block.compile(fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        got, _ = network(tokens.cuda(), documents.cuda())
    gradients = torch.autograd.grad(got, list(network.parameters()), direction.cuda().to(got.dtype))
    pairs = [(got, expected), *zip(gradients, wanted, strict=True)]
    for ours, reference in pairs:
        assert torch.nn.functional.cosine_similarity(ours.float().cpu().flatten(), reference.flatten(), dim=0) > 0.97


def test_groups_may_be_empty_or_of_any_size():
    rows = torch.randn(37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([0, 3, 3, 36, 37], device="cuda", dtype=torch.int32)
    group = torch.tensor([1] * 3 + [3] * 33 + [4], device="cuda")
    result = grouped_linear(rows, weight, ends)
    expected = torch.einsum("rd,rod->ro", rows.float(), weight.float()[group])
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=1e-1)
    result.float().sum().backward()
    assert weight.grad[[0, 2]].abs().max() == 0
    torch.testing.assert_close(weight.grad[3].float(), rows[3:36].float().sum(0).expand(32, -1), rtol=2e-2, atol=1e-1)


def test_routing_is_the_same_every_time():
    network = randomized(mixture(width=128, heads=4)).cuda()
    tokens = torch.randint(0, 31, (4, 128), device="cuda")

    def gradients():
        logits, _ = network(tokens)
        return torch.autograd.grad(logits.square().sum(), list(network.layers.parameters()))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_dit_compiles_and_agrees_with_the_cpu(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    config = DiTConfig(image_size=16, patch_size=2, channels=4, width=128, depth=2, heads=4, classes=10, qk_norm=True)
    network = randomized(config, scale=0.1)
    inputs = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([3, 10])
    expected = network(inputs[0], inputs[1], {"label": inputs[2]})
    network.cuda()
    for block in network.blocks():
        block.compile(fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = network(inputs[0].cuda(), inputs[1].cuda(), {"label": inputs[2].cuda()})
    assert torch.nn.functional.cosine_similarity(got.float().cpu().flatten(), expected.flatten(), dim=0) > 0.99
