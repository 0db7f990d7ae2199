"""Precision, recall, density, coverage, CMMD and the bootstrap against independent computations and known answers."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sixfold.evaluation.bootstrap import margin_of, mean_margin, resample_weights
from sixfold.evaluation.frechet import frechet_distance, moments
from sixfold.evaluation.kernel_distance import (
    cubic_kernel,
    gaussian_kernel,
    kernel_distance,
    weighted_distances,
    within_second,
)
from sixfold.evaluation.manifolds import balls_around, balls_holding


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radii_by_sklearn(points, neighbours):
    return NearestNeighbors(n_neighbors=neighbours + 1).fit(points).kneighbors(points)[0][:, -1]


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_manifold_counts_are_those_of_loops_over_sklearns_neighbours(neighbours):
    """By the definitions of 1904.06991 (equation 1) and 2002.09797 (section 3)."""
    data, samples = normal(0, 60, 4).numpy(), (0.7 * normal(1, 45, 4) + 0.3).numpy()
    data_radii, sample_radii = radii_by_sklearn(data, neighbours), radii_by_sklearn(samples, neighbours)

    def inside(point, centre, radius):
        return np.linalg.norm(point - centre) <= radius

    precision = np.mean([any(inside(s, r, q) for r, q in zip(data, data_radii, strict=True)) for s in samples])
    recall = np.mean([any(inside(r, s, q) for s, q in zip(samples, sample_radii, strict=True)) for r in data])
    pairs = [inside(s, r, q) for s in samples for r, q in zip(data, data_radii, strict=True)]
    density = sum(pairs) / (neighbours * len(samples))
    coverage = np.mean([any(inside(s, r, q) for s in samples) for r, q in zip(data, data_radii, strict=True)])

    reference, drawn = torch.from_numpy(data), torch.from_numpy(samples)
    balls = balls_around(reference, neighbours=neighbours, block=7)
    counts, holding = balls_holding(drawn, balls, block=7)
    in_samples, _ = balls_holding(reference, balls_around(drawn, neighbours=neighbours))
    np.testing.assert_allclose(balls.radii, data_radii, rtol=1e-12)
    assert float((counts > 0).double().mean()) == pytest.approx(precision)
    assert float((in_samples > 0).double().mean()) == pytest.approx(recall)
    assert float(counts.double().mean()) / neighbours == pytest.approx(density)
    assert float(holding.double().mean()) == pytest.approx(coverage)
    assert 0 < precision < 1 or 0 < recall < 1, "the case must tell the sets apart"


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_what_lies_on_a_ball_is_held_however_products_round(offset):
    """Points of the set itself lie on the balls that reach to them; copies of a point make balls of no size."""
    lattice = 0.1 * torch.cartesian_prod(*[torch.arange(8.0, dtype=torch.float64)] * 2)
    points = torch.cat([lattice, lattice[:5], lattice[:5]]) + offset
    exact = torch.linalg.vector_norm(points[:, None] - points[None], dim=-1)
    for neighbours in (1, 2, 6):
        radii = exact.kthvalue(neighbours + 1, dim=1).values
        balls = balls_around(points, neighbours=neighbours, block=11)
        torch.testing.assert_close(balls.radii, radii, rtol=1e-15, atol=0.0)
        counts, holding = balls_holding(points, balls, block=11)
        assert torch.equal(counts, (exact <= radii).sum(1))
        assert torch.equal(holding, (exact <= radii).any(0))


def test_fidelity_and_variety_are_told_apart():
    """Samples of one of two modes are precise and lack recall; samples of both and noise the other way round."""
    far = torch.tensor([20.0] + [0.0] * 3, dtype=torch.float64)
    data = torch.cat([normal(2, 200, 4), normal(3, 200, 4) + far])
    balls = balls_around(data, neighbours=3)
    one_mode, noisy = normal(4, 200, 4), torch.cat([data + 0.01, 60 * normal(5, 400, 4)])
    assert (balls_holding(one_mode, balls)[0] > 0).double().mean() > 0.8
    assert (balls_holding(data, balls_around(one_mode, neighbours=3))[0] > 0).double().mean() < 0.55
    assert (balls_holding(noisy, balls)[0] > 0).double().mean() < 0.6
    assert (balls_holding(data, balls_around(noisy, neighbours=3))[0] > 0).double().mean() > 0.95


def test_cmmd_is_the_double_sum_and_its_expectation_the_closed_form():
    first, second = normal(6, 8, 3), normal(7, 6, 3) + 0.5

    def kernel(x, y):
        return math.exp(-float((x - y).square().sum()) / (2 * 1.5**2))

    def within(points):
        pairs = [kernel(x, y) for (i, x), (j, y) in itertools.product(enumerate(points), repeat=2) if i != j]
        return sum(pairs) / len(pairs)

    expected = within(first) + within(second) - 2 * np.mean([kernel(x, y) for x in first for y in second])
    assert kernel_distance(first, second, kernel=gaussian_kernel(1.5), block=3) == pytest.approx(expected, rel=1e-9)
    # of N(0, 1) and N(m, 1) in d dimensions: 2 (s^2 / (s^2 + 2))^(d/2) (1 - exp(-d m^2 / (2 (s^2 + 2))))
    shifted = kernel_distance(normal(8, 4000, 3), normal(9, 4000, 3) + 0.5, kernel=gaussian_kernel(1.5))
    scale = 1.5**2
    exact = 2 * (scale / (scale + 2)) ** 1.5 * (1 - math.exp(-3 * 0.25 / (2 * (scale + 2))))
    assert shifted == pytest.approx(exact, rel=0.1)


def test_counting_features_is_the_same_as_repeating_them_without_pairs_of_copies():
    first, second = normal(10, 7, 3), normal(11, 9, 3)
    weights = torch.tensor([[2.0, 0, 1, 1, 3, 0, 0], [1.0] * 7], dtype=torch.float64)
    found = weighted_distances(first, weights, second, within_second(second, cubic_kernel), cubic_kernel, block=2)
    index = [0, 0, 2, 3, 4, 4, 4]
    pairs = [
        float(cubic_kernel(first[i : i + 1], first[j : j + 1])) for i, j in itertools.product(index, repeat=2) if i != j
    ]
    between = float(cubic_kernel(first[index], second).mean())
    expected = sum(pairs) / len(pairs) + within_second(second, cubic_kernel) - 2 * between
    assert float(found[0]) == pytest.approx(expected)
    assert float(found[1]) == pytest.approx(kernel_distance(first, second))


def test_weighted_moments_are_those_of_repeated_features():
    features, weights = normal(12, 6, 3), torch.tensor([3.0, 1, 0, 2, 1, 1], dtype=torch.float64)
    repeated = moments(features.repeat_interleave(weights.long(), dim=0))
    found = moments(features, weights)
    torch.testing.assert_close(found.mean, repeated.mean)
    torch.testing.assert_close(found.covariance, repeated.covariance)


def test_resamples_are_of_full_size_and_the_margin_of_a_mean_is_the_standard_error():
    weights = resample_weights(400, 300)
    assert torch.equal(weights.sum(1), torch.full((300,), 400.0).double())
    assert weights.var(1).mean() == pytest.approx(1.0, abs=0.05)  # nearly Poisson
    values = normal(13, 400)
    assert mean_margin(values, 300) == pytest.approx(1.96 * float(values.std()) / 20, rel=0.15)
    assert mean_margin(values, 0) is None
    assert mean_margin(values, 300) == mean_margin(values, 300)


def test_intervals_of_a_distance_are_as_wide_as_it_varies_between_draws():
    """The spread over fresh draws of what the bootstrap says from one of them."""
    reference = moments(normal(14, 5000, 4))
    fresh = torch.tensor([frechet_distance(reference, moments(normal(20 + i, 150, 4) + 0.4)) for i in range(150)])
    drawn = normal(15, 150, 4) + 0.4
    resampled = torch.tensor([frechet_distance(reference, moments(drawn, w)) for w in resample_weights(150, 150)])
    assert margin_of(resampled) == pytest.approx(1.96 * float(fresh.std()), rel=0.35)
