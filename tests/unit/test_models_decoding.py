import pytest
import torch

from model_helpers import dense, mixture, randomized
from sixfold.models.moe_transformer.cache import KeyValueCache
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.samplers.autoregressive import AutoregressiveSampler, kept_probabilities
from sixfold.samplers.config import AutoregressiveConfig
from sixfold.samplers.contract import SampleRequest

CONFIGS = {"dense": dense(qk_norm=True), "mixture": mixture(experts={"shared": 1})}


def draw(network, *, numbers, prompt=None, seed=0, **settings):
    sampler = AutoregressiveSampler(AutoregressiveConfig(**settings), NextTokenConfig(), {"lm": network.config})
    conditions = {} if prompt is None else {"prompt": prompt}
    request = SampleRequest(seed=seed, numbers=torch.tensor(numbers), conditions=conditions)
    return sampler({"lm": network}, request)["tokens"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("pieces", [(12,), (5, 1, 1, 5), (1,) * 12, (4, 8)], ids=str)
def test_cached_logits_equal_those_of_the_whole_sequence(config, pieces):
    network = randomized(config)
    tokens = torch.randint(0, 31, (3, 12))
    cache = KeyValueCache(config.depth, capacity=12)
    with torch.no_grad():
        whole, _ = network(tokens)
        parts = [network(piece, cache=cache)[0] for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == 12


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_decoding_equals_argmax_without_cache(config):
    network = randomized(config)
    tokens = prompt = torch.randint(0, 31, (2, 3))
    for _ in range(10):
        tokens = torch.cat([tokens, network(tokens)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(draw(network, numbers=[0, 1], prompt=prompt, temperature=0.0, max_new_tokens=10), tokens)


def test_a_sample_is_a_function_of_its_number():
    network = randomized(dense())
    together = draw(network, numbers=[5, 6, 7, 8], max_new_tokens=12)
    assert torch.equal(draw(network, numbers=[8, 5], max_new_tokens=12), together[[3, 0]])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(draw(network, numbers=[5], seed=1, max_new_tokens=12), together[:1])
    assert together[:, 0].tolist() == [30] * 4  # a new document begins after the end of text


def test_frequencies_follow_the_kept_probabilities():
    network = randomized(dense(depth=1), scale=0.3)
    with torch.no_grad():
        logits = network(torch.tensor([[30]]))[0][0, -1]
    expected = (logits / 0.8).softmax(-1)
    top = expected.topk(6).indices
    expected = torch.zeros(31).scatter(0, top, expected[top])
    drawn = draw(network, numbers=list(range(20_000)), max_new_tokens=1, temperature=0.8, top_k=6)[:, 1]
    observed = drawn.bincount(minlength=31) / len(drawn)
    expected = expected / expected.sum()
    assert (observed[expected == 0] == 0).all()
    deviation = (observed - expected).abs() / (expected * (1 - expected) / len(drawn)).sqrt().clamp(min=1e-9)
    assert deviation[expected > 0].max() < 4.5


def test_nucleus_is_the_smallest_set_that_reaches_its_mass():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()

    def kept(top_k=None, top_p=1.0):
        probabilities, ranked = kept_probabilities(logits, temperature=1.0, top_k=top_k, top_p=top_p)
        return ranked[probabilities > 0].tolist()

    assert kept() == [1, 3, 2, 0]
    assert kept(top_p=0.74) == [1, 3]
    assert kept(top_p=0.76) == [1, 3, 2]
    assert kept(top_p=1e-9) == [1]
    assert kept(top_k=3, top_p=0.6) == [1, 3]
    assert kept(top_k=100) == [1, 3, 2, 0]
