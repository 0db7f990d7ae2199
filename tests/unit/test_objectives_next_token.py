"""The next-token objective against plain cross-entropy and against the entropy rate of a Markov chain."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Batch, Phase, Progress
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.objectives.next_token.cross_entropy import chunked_cross_entropy
from sixfold.objectives.next_token.objective import NextToken

PHASE = Phase(name="main", trains=("lm",))
PROGRESS = Progress(samples=0, step=0, total_steps=1)


def head_inputs(tokens=37, width=16, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) < 0.8).float()
    return hidden, weight, targets, mask


def plain_loss(hidden, weight, targets, mask, z_weight):
    logits = (hidden @ weight.T).float()
    z = torch.logsumexp(logits, -1).square()
    return (mask * (F.cross_entropy(logits, targets, reduction="none") + z_weight * z)).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_chunked_cross_entropy_is_the_plain_one_in_value_and_gradients(chunk_tokens, z_weight):
    hidden, weight, targets, mask = head_inputs(dtype=torch.float64)
    expected = plain_loss(hidden, weight, targets, mask, z_weight)
    expected_gradients = torch.autograd.grad(3.0 * expected, [hidden, weight])
    head = chunked_cross_entropy(hidden, weight, targets, mask, z_weight=z_weight, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(3.0 * head.loss, [hidden, weight])
    torch.testing.assert_close(head.loss, expected.float())
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # logits are fp32
    guesses = (hidden @ weight.T).argmax(1)
    assert head.correct == ((guesses == targets) * mask).sum()
    torch.testing.assert_close(head.cross_entropy, plain_loss(hidden, weight, targets, mask, 0.0).float())


def test_under_autocast_products_are_bf16_and_gradients_keep_their_precision():
    hidden, weight, targets, mask = head_inputs()
    exact = torch.autograd.grad(plain_loss(hidden, weight, targets, mask, 0.0), [hidden, weight])
    with torch.autocast("cpu", torch.bfloat16):
        head = chunked_cross_entropy(hidden, weight, targets, mask, chunk_tokens=8)
    gradients = torch.autograd.grad(head.loss, [hidden, weight])
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    assert not torch.equal(gradients[1], exact[1])


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation allocates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


def test_logits_are_never_whole_in_memory():
    hidden, weight, targets, mask = head_inputs(tokens=512, width=8, vocabulary=300)
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, targets, mask, chunk_tokens=32).loss.backward()
    assert largest.elements <= 32 * 300


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden, weight, targets, mask = head_inputs(tokens=64, width=64, vocabulary=128)
    with torch.no_grad(), LargestTensor() as largest:
        head = chunked_cross_entropy(hidden, weight, targets, mask, chunk_tokens=8)
    assert not head.loss.requires_grad
    assert largest.elements <= 64 * 64  # the activations; a weight gradient would be 128 x 64


class Bigram(nn.Module):
    """Logits are the log of a transition matrix: exact for a Markov chain, with activations that are one-hot tokens."""

    def __init__(self, transition, routing=None):
        super().__init__()
        self.weight = nn.Parameter(transition.log().T.contiguous())
        self.routing = routing or {}
        self.biases = []

    def forward(self, tokens, documents=None, readout=None, cache=None):
        hidden = F.one_hot(tokens, self.weight.shape[1]).float()
        routing = self.routing(tokens) if callable(self.routing) else self.routing
        return readout(hidden, self.weight), routing

    def update_expert_bias(self, tokens_per_expert):
        self.biases.append(tokens_per_expert)


TRANSITION = torch.tensor(
    [[0.7, 0.2, 0.05, 0.05], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.1, 0.8]]
)


def chain(sequences=64, length=512):
    """Sequences of the Markov chain, by inverting its distribution function."""
    uniform = PositionRandom(0, torch.arange(sequences)).uniform("chain", (length + 1,))
    cumulative = TRANSITION.cumsum(1)
    tokens = torch.zeros(sequences, length + 1, dtype=torch.int64)
    for step in range(1, length + 1):
        tokens[:, step] = (uniform[:, step, None] > cumulative[tokens[:, step - 1], :-1]).sum(1)
    return tokens


def markov_batch(**fields):
    tokens = chain()
    return Batch({"tokens": tokens, **fields}, torch.arange(len(tokens)))


def entropy_rate():
    values, vectors = torch.linalg.eig(TRANSITION.T)
    stationary = vectors[:, values.real.argmax()].real
    stationary = stationary / stationary.sum()
    return float(-(stationary[:, None] * TRANSITION * TRANSITION.log()).sum())


def mean_loss(network, batch, config=None):
    objective = NextToken(config or NextTokenConfig(), {})
    sums = objective.evaluate({"lm": network}, batch, PositionRandom(0, batch.positions))
    return float(sums["loss"].total / sums["loss"].count)


def test_the_exact_network_reaches_the_entropy_rate_of_a_markov_chain():
    assert mean_loss(Bigram(TRANSITION), markov_batch()) == pytest.approx(entropy_rate(), rel=0.01)


def test_counts_reach_the_empirical_conditional_entropy_and_nothing_goes_below():
    batch = markov_batch()
    pairs = torch.stack([batch["tokens"][:, :-1].flatten(), batch["tokens"][:, 1:].flatten()])
    counts = torch.zeros(4, 4).index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
    estimated = counts / counts.sum(1, keepdim=True)
    entropy = float(-(counts * estimated.log()).sum() / counts.sum())
    assert mean_loss(Bigram(estimated), batch) == pytest.approx(entropy, rel=1e-5)
    assert mean_loss(Bigram(TRANSITION), batch) > entropy
    network = Bigram(estimated)
    objective = NextToken(NextTokenConfig(), {})
    terms = objective({"lm": network}, batch, PHASE, PositionRandom(0, batch.positions))
    (terms.loss / terms.count).backward()
    assert network.weight.grad.abs().max() < 1e-5  # a minimum


def test_predictions_across_documents_do_not_count():
    documents = torch.arange(513)[None].expand(64, -1) // 100
    batch = markov_batch(documents=documents)
    objective = NextToken(NextTokenConfig(), {})
    terms = objective({"lm": Bigram(TRANSITION)}, batch, PHASE, PositionRandom(0, batch.positions))
    assert terms.count == 64 * (512 - 5)
    tokens = batch["tokens"]
    cost = -TRANSITION.log()[tokens[:, :-1], tokens[:, 1:]]
    inside = documents[:, 1:] == documents[:, :-1]
    torch.testing.assert_close(terms.loss, cost[inside].sum(), rtol=1e-5, atol=0)


def test_micro_batches_sum_to_the_whole():
    batch = markov_batch()
    objective = NextToken(NextTokenConfig(z_weight=1e-2), {})
    gradients, losses = [], []
    for micro in (64, 5):
        network = Bigram(TRANSITION)
        terms = [
            objective({"lm": network}, part, PHASE, PositionRandom(0, part.positions)) for part in batch.split(micro)
        ]
        loss = sum(term.loss for term in terms)
        loss.backward()
        gradients.append(network.weight.grad / (64 * 512))
        losses.append(loss.detach())
        assert sum(term.count for term in terms) == 64 * 512
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_bits_per_byte_divide_by_the_source_bytes_of_the_predicted_tokens():
    token_bytes = torch.tensor([3, 1, 2, 4])[chain()]
    batch = markov_batch(token_bytes=token_bytes)
    sums = NextToken(NextTokenConfig(), {}).evaluate(
        {"lm": Bigram(TRANSITION)}, batch, PositionRandom(0, batch.positions)
    )
    bits = float(sums["bits_per_byte"].total / sums["bits_per_byte"].count)
    nats = float(sums["loss"].total)
    assert bits == pytest.approx(nats / math.log(2) / float(token_bytes[:, 1:].sum()))


def test_routing_losses_are_weighted_and_counts_reach_the_bias():
    def routing(tokens):
        return {
            "balance_loss": torch.full((len(tokens),), 7.0, requires_grad=True),
            "z_loss": torch.full((len(tokens),), 3.0, requires_grad=True),
            "tokens_per_expert": torch.tensor([[10.0, 30.0], [20.0, 20.0]]),
        }

    batch = markov_batch()
    config = NextTokenConfig(balance_weight=0.01, router_z_weight=0.001)
    objective, network = NextToken(config, {}), Bigram(TRANSITION, routing)
    random = PositionRandom(0, batch.positions)
    terms = objective({"lm": network}, batch, PHASE, random)
    dense = NextToken(config, {})({"lm": Bigram(TRANSITION)}, batch, PHASE, random)
    torch.testing.assert_close(terms.loss - dense.loss, torch.tensor(64 * (0.07 + 0.003)), rtol=2e-2, atol=0)
    assert not dense.statistics
    peak = terms.metrics["expert_peak_load"]
    assert float(peak.total / peak.count) == pytest.approx(1.25)
    objective.after_step({"lm": network}, terms.statistics, PROGRESS)
    assert torch.equal(network.biases[0], terms.statistics["tokens_per_expert"])
    objective.after_step({"lm": network}, {}, PROGRESS)
    assert len(network.biases) == 1
