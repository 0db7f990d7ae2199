import jaxtyping
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model_helpers import dense, mixture, randomized
from sixfold.models.grouped import grouped_linear
from sixfold.models.moe_transformer.dispatch import gather_rows, plan_dispatch, sum_rows
from sixfold.models.moe_transformer.feed_forward import MixtureOfExperts, SwiGLU
from sixfold.models.moe_transformer.model import MoETransformer
from sixfold.models.network import initialize, parameter_tags


def layer_of(network) -> MixtureOfExperts:
    return network.layers[0].feed_forward


def loop_over_experts(layer, x, config):
    """The definition: every token through each of its experts, one at a time."""
    experts = config.experts
    tokens = x.flatten(0, 1)
    logits = tokens @ layer.router.weight.T
    scores = logits.softmax(-1) if experts.router == "softmax" else logits.sigmoid()
    bias = 0.0 if layer.router.expert_bias is None else layer.router.expert_bias
    rows = []
    for token, score in zip(tokens, scores, strict=True):
        chosen = (score + bias).argsort(descending=True)[: experts.top_k]
        weights = score[chosen]
        if experts.normalize_top_k:
            weights = weights / weights.sum()
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights * experts.routed_scale, strict=True):
            gate, up = (layer.experts.gate_and_up[expert] @ token).chunk(2)
            row = row + weight * (layer.experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row if layer.shared is None else row + layer.shared(token))
    return torch.stack(rows).view_as(x)


CASES = {
    "softmax": {},
    "softmax, weights as they are": {"normalize_top_k": False, "top_k": 3},
    "sigmoid with bias, scale and shared": {
        "router": "sigmoid",
        "bias_update_rate": 0.1,
        "routed_scale": 2.5,
        "shared": 2,
    },
    "one expert a token": {"top_k": 1, "normalize_top_k": False},
}


@pytest.mark.parametrize("experts", CASES.values(), ids=CASES)
def test_mixture_equals_a_loop_over_experts_with_gradients(experts):
    config = mixture(experts=experts)
    layer = layer_of(randomized(config))
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.tensor([0.5, -0.5, 0.2, -0.2]))
    x = torch.randn(3, 5, config.width, requires_grad=True)
    ours, _ = layer(x)
    theirs = loop_over_experts(layer, x, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    direction, wanted = torch.randn_like(ours), [x, *layer.parameters()]
    for got, expected in zip(
        torch.autograd.grad(ours, wanted, direction), torch.autograd.grad(theirs, wanted, direction), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_zero_gradient():
    config = mixture(experts={"count": 8})
    layer = layer_of(randomized(config))
    with torch.no_grad():
        layer.router.weight[2:] = -layer.router.weight[:1]  # all others score below whichever of 0 and 1 is up
        layer.router.weight[1] = layer.router.weight[0]
    x = layer.router.weight[0].detach().expand(2, 3, -1) + 0.01 * torch.randn(2, 3, config.width)
    mixed, routing = layer(x)
    assert routing["tokens_per_expert"].tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(mixed, loop_over_experts(layer, x, config), rtol=1e-5, atol=1e-5)
    mixed.backward(torch.randn_like(mixed))
    assert layer.experts.down.grad[2:].abs().max() == 0
    assert layer.experts.down.grad[:2].abs().min() > 0


@pytest.mark.parametrize("multiple", [1, 4])
def test_gathering_and_adding_rows_have_right_gradients(multiple):
    torch.manual_seed(0)
    experts = torch.tensor([[3, 0], [0, 1], [3, 1]])
    plan = plan_dispatch(experts, torch.tensor([2.0, 2.0, 0.0, 2.0]), multiple)
    assert plan.ends.tolist() == ([2, 4, 4, 6] if multiple == 1 else [4, 8, 8, 12])
    tokens = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(plan.token_of_row), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    gathered = gather_rows(tokens, plan)
    for token in range(3):
        for choice in range(2):
            row = plan.rows_of_token[token, choice]
            assert torch.equal(gathered[row], tokens[token])
            assert (row < plan.ends).nonzero()[0] == experts[token, choice]
    summed = torch.einsum("tk,tkd->td", weights, rows[plan.rows_of_token])
    torch.testing.assert_close(sum_rows(rows, weights, plan), summed)
    assert torch.autograd.gradcheck(lambda rows, weights: sum_rows(rows, weights, plan), (rows, weights))
    # Rows that pad carry no gradient in training, since `sum_rows` gives them none and no expert reads past its end.
    kept = torch.zeros(len(plan.token_of_row), 1).index_fill_(0, plan.rows_of_token.flatten(), 1.0)
    assert torch.autograd.gradcheck(lambda tokens: gather_rows(tokens, plan) * kept, tokens)


def test_padded_rows_change_nothing(monkeypatch):
    config = mixture()
    layer = layer_of(randomized(config))
    x = torch.randn(2, 9, config.width, requires_grad=True)

    def run():
        mixed, _ = layer(x)
        return [mixed, *torch.autograd.grad(mixed, [x, *layer.parameters()], torch.ones_like(mixed) / 7)]

    expected = run()
    monkeypatch.setattr("sixfold.models.moe_transformer.feed_forward.row_multiple", lambda dtype, device: 16)
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_and_z_losses_follow_their_formulas_with_gradients(router):
    config = mixture(experts={"router": router, "count": 6, "top_k": 2})
    layer = layer_of(randomized(config))
    x = torch.randn(3, 7, config.width)
    _, routing = layer(x)
    logits = x @ layer.router.weight.T
    scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(2, -1).indices, 1.0)
    fraction = chosen.mean(1) * 6 / 2
    balance = 7 * (fraction * shares.mean(1)).sum(-1)
    z = torch.logsumexp(logits, -1).square().sum(-1)
    assert routing["tokens_per_expert"].tolist() == chosen.sum((0, 1)).tolist()
    for got, expected in ((routing["balance_loss"], balance), (routing["z_loss"], z)):
        torch.testing.assert_close(got, expected)
        weights = torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(
            torch.autograd.grad(got, layer.router.weight, weights, retain_graph=True)[0],
            torch.autograd.grad(expected, layer.router.weight, weights, retain_graph=True)[0],
        )


def test_losses_of_a_sequence_do_not_depend_on_its_neighbours():
    network = randomized(mixture())
    tokens = torch.randint(0, 31, (4, 9))
    _, together = network(tokens)
    parts = [network(tokens[part])[1] for part in (slice(0, 1), slice(1, 4))]
    for name in ("balance_loss", "z_loss"):
        torch.testing.assert_close(together[name], torch.cat([part[name] for part in parts]))
    assert torch.equal(together["tokens_per_expert"], sum(part["tokens_per_expert"] for part in parts))


def test_bias_update_follows_its_rule_and_evens_out_loads():
    network = randomized(mixture(experts={"count": 8, "bias_update_rate": 0.01}))
    network.update_expert_bias(torch.tensor([[4.0] * 4 + [0.0] * 4, [1.0] * 8]))
    first, second = (block.feed_forward.router.expert_bias for block in network.layers)
    torch.testing.assert_close(first, torch.tensor([-0.01] * 4 + [0.01] * 4))
    assert second.tolist() == [0.0] * 8

    tokens = torch.randint(0, 31, (16, 32))

    def peak_load():
        counts = network(tokens)[1]["tokens_per_expert"]
        return (counts.amax(1) / counts.mean(1)).max().item()

    with torch.no_grad():
        before = peak_load()
        for _ in range(20):
            network.update_expert_bias(network(tokens)[1]["tokens_per_expert"])
    assert before > 1.5
    assert peak_load() < 1.2
    assert abs(first.mean().item()) < 1e-6


def test_counts_survive_recomputation():
    network = randomized(mixture(experts={"bias_update_rate": 0.1}))
    tokens = torch.randint(0, 31, (2, 8))
    context = network._context(tokens, None, None)
    x = network.embedding(tokens)
    _, routing = torch.utils.checkpoint.checkpoint(network.layers[0], x, context, use_reentrant=False)
    routing["balance_loss"].sum().backward()
    assert routing["tokens_per_expert"].sum() == 2 * 8 * 2
    assert network.layers[0].feed_forward.router.expert_bias.abs().max() == 0


def test_first_layers_are_dense_and_dense_networks_have_no_routing():
    network = randomized(mixture(depth=3, experts={"first_dense_layers": 1}))
    assert [isinstance(block.feed_forward, SwiGLU) for block in network.layers] == [True, False, False]
    _, routing = network(torch.randint(0, 31, (2, 8)))
    assert routing["tokens_per_expert"].shape == (2, 4)
    assert network(torch.randint(0, 31, (2, 8)), readout=lambda hidden, weight: hidden.shape)[0] == (2, 8, 32)


def test_tied_head_is_the_embedding_and_its_gradient_is_the_sum_of_both_uses():
    network = randomized(mixture(tie_embeddings=True))
    assert not any(name.startswith("head") for name in network.state_dict())
    tokens = torch.randint(0, 31, (2, 8))
    weight = network.embedding.weight

    logits, _ = network(tokens)
    direction = torch.randn_like(logits)
    (total,) = torch.autograd.grad(logits, weight, direction)
    hidden, _ = network(tokens, readout=lambda hidden, weight: hidden)
    (as_embedding,) = torch.autograd.grad(hidden, weight, direction @ weight, retain_graph=True)
    as_head = torch.einsum("nsv,nsd->vd", direction, hidden)
    torch.testing.assert_close(total, as_embedding + as_head, rtol=1e-4, atol=1e-4)


def test_zero_output_projections_start_as_the_embedding_alone():
    network = MoETransformer(mixture(zero_output_projections=True))
    initialize(network, parameter_tags(network), seed=0, role="lm")
    tokens = torch.randint(0, 31, (2, 8))
    hidden, _ = network(tokens, readout=lambda hidden, weight: hidden)
    assert torch.equal(hidden, network.norm(network.embedding(tokens)))


def test_mixed_precision_routes_in_fp32_and_stays_near():
    network = randomized(mixture())
    tokens = torch.randint(0, 31, (2, 16))
    exact, _ = network(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough, routing = network(tokens)
    assert rough.dtype == torch.bfloat16
    assert {value.dtype for value in routing.values()} == {torch.float32}
    agreement = torch.nn.functional.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0)
    assert agreement > 0.99


def test_flops_of_a_published_network_count_active_parameters():
    # DeepSeekMoE 16B (arXiv 2401.06066): 16.4B parameters, 2.8B of them active.
    experts = {
        "count": 64,
        "top_k": 6,
        "hidden_width": 1408,
        "shared": 2,
        "first_dense_layers": 1,
        "normalize_top_k": False,
    }
    config = mixture(
        vocab_size=102_400, width=2048, depth=28, heads=16, kv_heads=16, hidden_width=10_944, experts=experts
    )
    with torch.device("meta"):
        network = MoETransformer(config)
    assert round(sum(value.numel() for value in network.parameters()) / 1e9, 1) == 16.4
    active = network.forward_flops({"tokens": (1, 2)}) / 2 - 2 * 28 * 2048
    assert round((active + 102_400 * 2048) / 1e9, 1) == 2.8


def test_every_parameter_is_tagged_and_meta_construction_draws_nothing():
    with torch.device("meta"):
        network = MoETransformer(mixture(qk_norm=True, experts={"shared": 1, "bias_update_rate": 0.1}))
    tags = parameter_tags(network)
    assert set(tags) == {name for name, _ in network.named_parameters()}
    network.to_empty(device="cpu")
    initialize(network, tags, seed=0, role="lm")
    logits, _ = network(torch.randint(0, 31, (1, 4)))
    assert logits.isfinite().all()
    assert network.layers[0].feed_forward.router.expert_bias.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "config",
    [mixture(qk_norm=True, experts={"shared": 1, "router": "sigmoid", "bias_update_rate": 0.1}), dense()],
    ids=["mixture", "dense"],
)
def test_blocks_are_one_graph_without_changing_a_value(config, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks cannot be traced
    network = randomized(config)
    tokens, documents = torch.randint(0, 31, (2, 12)), torch.arange(12).expand(2, -1) // 5

    def run():
        logits, routing = network(tokens, documents)
        weights = [torch.arange(logits.numel()).view_as(logits) / 999, *(torch.ones(2),) * (2 if routing else 0)]
        outputs = [logits, routing["balance_loss"], routing["z_loss"]] if routing else [logits]
        return [*outputs, *torch.autograd.grad(outputs, list(network.parameters()), weights)]

    expected = run()
    for block in network.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_a_step_can_be_rehearsed_without_data_and_its_products_are_counted(half):
    config = mixture(depth=1, experts={"shared": 0})
    with FakeTensorMode():
        network = MoETransformer(config)
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits, _ = network(torch.zeros(2, 16, dtype=torch.int64))
        logits.sum().backward()
    padding = 4 * 63 if half else 0
    products = counter.get_flop_counts()["Global"][torch.ops.sixfold.grouped_product]
    assert products == 2 * (2 * 16 * 2 + padding) * 3 * 24 * 32
    assert network.layers[0].feed_forward.experts.down.grad.shape == (4, 32, 24)


def test_expanded_gradients_are_taken():
    rows, weight = torch.randn(6, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    grouped_linear(rows, weight, torch.tensor([2, 6], dtype=torch.int32)).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(1).detach().repeat_interleave(torch.tensor([2, 4]), 0))
