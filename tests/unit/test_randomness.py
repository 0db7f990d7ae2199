"""Draws are pure functions of (seed, purpose, position): known answers, independence, and moments."""

import numpy as np
import pytest
import torch

from sixfold.distributed.randomness import PositionRandom, derive_key, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [  # known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds)
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
@pytest.mark.parametrize("make", [lambda w: torch.full((1,), w), lambda w: np.full(1, w, dtype=np.int64)])
def test_philox_known_answers(word, key, expected, make):
    words = philox((make(word),) * 4, (key, key))
    assert tuple(int(w[0]) for w in words) == expected


def test_draws_do_not_depend_on_how_positions_are_batched():
    positions = torch.arange(1000, 1064)
    whole = PositionRandom(3, positions)
    parts = [PositionRandom(3, part) for part in positions.split(7)]
    for draw in (
        lambda r: r.normal("noise", (3, 5)),
        lambda r: r.uniform("time"),
        lambda r: r.integers("label", 10, (2,)),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_purposes_seeds_and_positions_are_independent_streams():
    positions = torch.arange(4096)
    base = PositionRandom(0, positions).normal("a", (4,)).flatten()
    for other in (PositionRandom(0, positions).normal("b", (4,)), PositionRandom(1, positions).normal("a", (4,))):
        correlation = torch.corrcoef(torch.stack([base, other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / len(base) ** 0.5
    assert derive_key(0, "1/a") != derive_key(0, "1") != derive_key(1, "0")


def test_a_position_beyond_32_bits_has_its_own_draws():
    low, high = PositionRandom(0, torch.tensor([5])), PositionRandom(0, torch.tensor([5 + 2**32]))
    assert not torch.equal(low.uniform("u", (8,)), high.uniform("u", (8,)))


def test_moments_and_range():
    random = PositionRandom(7, torch.arange(20_000))
    normal, uniform = random.normal("n", (11,)).double(), random.uniform("u", (11,)).double()
    n = normal.numel()
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert uniform.min() > 0
    assert uniform.max() < 1
    counts = torch.bincount(random.integers("i", 10, (11,)).flatten(), minlength=10).double()
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 40  # chi-square with 9 degrees of freedom


def test_uniform_excludes_both_ends_even_for_extreme_words(monkeypatch):
    random = PositionRandom(0, torch.arange(1))
    for word, expected in ((0, 2.0**-24), (ONES, 1 - 2.0**-24)):
        monkeypatch.setattr(PositionRandom, "_words", lambda *_, word=word: torch.full((1, 1), word))
        assert random.uniform("u").item() == expected
