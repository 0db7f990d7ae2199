"""The n-gram model against a dictionary implementation of its definition."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sixfold.evaluation.ngram import NGram


def kneser_ney(history, word, grams, vocabulary):
    """p(word | history) from the list of the highest order's grams (tuples), recursively and slowly."""
    order = len(history) + 1
    counts = Counter(grams)
    once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
    discount = min(once / (once + 2 * twice) if once else 0.1, 0.9)
    lower = 1 / vocabulary if order == 1 else kneser_ney(history[1:], word, [gram[1:] for gram in counts], vocabulary)
    total = sum(count for gram, count in counts.items() if gram[:-1] == history)
    if total == 0:
        return lower
    types = sum(gram[:-1] == history for gram in counts)
    return (max(counts[(*history, word)] - discount, 0) + discount * types * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_the_definition(order):
    generator = np.random.default_rng(0)
    training, held_out = generator.choice(5, 80, p=[0.5, 0.3, 0.1, 0.06, 0.04]), generator.integers(0, 6, 40)
    model = NGram(training.astype(np.int64), vocabulary=6, order=order)
    grams = [tuple(training[i : i + order]) for i in range(len(training) - order + 1)]
    nats = model.nats(held_out)
    for place in range(order - 1, len(held_out)):
        history = tuple(held_out[place - order + 1 : place])
        expected = kneser_ney(history, held_out[place], grams, 6)
        assert math.exp(-nats[place]) == pytest.approx(expected, rel=1e-9)


def test_probabilities_sum_to_one_after_any_history():
    training = np.random.default_rng(1).integers(0, 7, 300)
    model = NGram(training, vocabulary=9, order=3)
    for history in [(0, 1), (8, 8), (3, 8), (8, 3)]:
        total = sum(math.exp(-model.nats(np.array([*history, word]))[-1]) for word in range(9))
        assert total == pytest.approx(1.0)


def test_on_a_long_markov_chain_it_approaches_the_entropy_rate():
    transition = np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    generator = np.random.default_rng(2)
    uniform, tokens = generator.random(60_000), np.zeros(60_000, dtype=np.int64)
    cumulative = transition.cumsum(1)
    for step in range(1, len(tokens)):
        tokens[step] = np.searchsorted(cumulative[tokens[step - 1]], uniform[step])
    values, vectors = np.linalg.eig(transition.T)
    stationary = vectors[:, values.real.argmax()].real
    stationary /= stationary.sum()
    rate = -(stationary[:, None] * transition * np.log2(transition)).sum()
    model = NGram(tokens[:50_000], vocabulary=3)
    assert model.bits_per_byte(tokens[50_000:]) == pytest.approx(rate, rel=0.02)
    assert model.bits_per_byte(tokens[50_000:], bytes_per_token=2.0) == pytest.approx(rate / 2, rel=0.02)


def test_histories_help_on_real_text_and_the_unseen_keeps_a_probability():
    text = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.int64)
    held_out = text[::-1]
    unigram, trigram = (NGram(text, vocabulary=256, order=order) for order in (1, 3))
    assert trigram.bits_per_byte(text) < 0.7 * unigram.bits_per_byte(text)
    assert np.isfinite(trigram.nats(held_out)).all()
