import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_helpers import dense, mixture, randomized
from sixfold.models.attention import causal_attention, continuation_mask, document_mask, full_attention
from sixfold.models.kernels import kernels_of
from sixfold.models.moe_transformer.attention import rotary_table, rotate


def test_attention_is_the_softmax_formula_with_shared_key_heads():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    attended = causal_attention(query, key, value)
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].transpose(1, 2) / 8**0.5
        weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
        torch.testing.assert_close(attended[:, head], weights @ value[:, head // 2])


def test_document_mask_keeps_to_earlier_tokens_of_the_same_document():
    mask = document_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_continuation_mask_is_the_end_of_the_causal_one():
    assert continuation_mask(2, 5, torch.device("cpu"))[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_position, key_position):
        turned = [
            rotate(x, *rotary_table(position, 1, 16, 10_000.0, x.device))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize("config", [dense(qk_norm=True), mixture()], ids=["dense", "mixture"])
def test_packed_documents_give_the_same_logits_and_gradients_as_separate_ones(config):
    network = randomized(config)
    first, second = torch.randint(0, 31, (1, 5)), torch.randint(0, 31, (1, 7))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed, _ = network(torch.cat([first, second], 1), documents)
    apart = torch.cat([network(first)[0], network(second)[0]], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(packed)
    packed_gradient = torch.autograd.grad(packed, list(network.parameters()), direction)
    apart_gradient = torch.autograd.grad(apart, list(network.parameters()), direction)
    for ours, theirs in zip(packed_gradient, apart_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_without_documents_a_later_text_does_read_the_earlier_one():
    network = randomized(dense())
    tokens = torch.randint(0, 31, (1, 12))
    apart = network(tokens, torch.tensor([[0] * 5 + [1] * 7]))[0]
    assert (network(tokens)[0] - apart)[:, 5:].abs().max() > 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_queries_give_the_output_and_gradients_of_the_whole(packed):
    torch.manual_seed(0)
    length = 150  # two blocks and a shorter one
    documents = torch.randint(0, 3, (2, length)).sort(dim=1).values
    mask = document_mask(documents if packed else torch.zeros_like(documents))
    inputs = [torch.randn(2, length, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    ours = causal_attention(*inputs, mask if packed else None)
    key, value = (x.repeat_interleave(2, dim=1) for x in inputs[1:])
    scores = (inputs[0] @ key.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    theirs = scores.softmax(-1) @ value
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_attention_of_short_sequences_gives_the_formulas_output_and_gradients(dtype, masked):
    torch.manual_seed(0)
    exact = [torch.randn(3, length, 2, 8).to(dtype).double().transpose(1, 2) for length in (20, 33, 33)]
    mask = torch.rand(3, 1, 1, 33) < 0.7 if masked else None
    inputs = [x.to(dtype).requires_grad_() for x in exact]
    ours = full_attention(*inputs, mask)
    query, key, value = (x.requires_grad_() for x in exact)
    scores = query @ key.mT / 8**0.5
    theirs = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ value
    direction = torch.randn_like(ours)
    found = [ours, *torch.autograd.grad(ours, inputs, direction)]
    expected = [theirs, *torch.autograd.grad(theirs, (query, key, value), direction.double())]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_products_are_kept_to_training_on_the_cpu():
    """Forward-mode derivatives go through SDPA, which has them; plans for accelerators keep no probabilities."""
    inputs = [torch.randn(2, 2, 16, 8) for _ in range(3)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, rate = torch.func.jvp(lambda x: full_attention(x, *inputs[1:]), (inputs[0],), (inputs[1],))
    assert value.shape == rate.shape
    query = inputs[0].clone().requires_grad_()
    assert "Batched" in full_attention(query, *inputs[1:]).grad_fn.name()
    with kernels_of(torch.device("cuda")):
        assert "ScaledDotProduct" in full_attention(query, *inputs[1:]).grad_fn.name()
