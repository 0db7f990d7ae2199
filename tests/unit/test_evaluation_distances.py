"""Frechet and kernel distances and the nearest-neighbour ratio against closed forms and independent computations."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from sixfold.evaluation.frechet import Moments, frechet_distance, half_split_fd, moments
from sixfold.evaluation.kernel_distance import kernel_distance
from sixfold.evaluation.nearest_neighbour import nearest_distances, nearest_neighbour_ratio


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, size, rank=None):
    factor = normal(seed, size, rank or size)
    return factor @ factor.T / size


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    first, second = torch.tensor([1.0, 4.0, 0.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0, 0.25]).double()
    mean = torch.tensor([0.5, 0.0, -1.0, 2.0]).double()
    rotation = torch.linalg.qr(normal(0, 4, 4)).Q
    expected = mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    distance = frechet_distance(
        Moments(torch.zeros(4).double(), rotation @ first.diag() @ rotation.T),
        Moments(mean, rotation @ second.diag() @ rotation.T),
    )
    assert distance == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_distance_agrees_with_the_root_of_the_product(rank):
    """The usual formula with scipy's general square root, for full and for singular covariances."""
    first, second = covariance(1, 6, rank), covariance(2, 6)
    root = scipy.linalg.sqrtm((first @ second).numpy())
    expected = np.trace(first) + np.trace(second) - 2 * np.trace(root).real
    zero = torch.zeros(6, dtype=torch.float64)
    assert frechet_distance(Moments(zero, first), Moments(zero, second)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(Moments(zero, first), Moments(zero, first)) == pytest.approx(0.0, abs=1e-6)


def test_moments_are_numpys():
    features = normal(3, 50, 5)
    fitted = moments(features.float())
    np.testing.assert_allclose(fitted.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fitted.mean, features.numpy().mean(0), rtol=1e-5, atol=1e-6)


def test_halves_of_a_split_are_as_far_apart_as_two_new_draws_of_their_size():
    features = normal(4, 2000, 8)
    halves = half_split_fd(features, seed=0, splits=8)
    fresh = [frechet_distance(moments(normal(10 + i, 1000, 8)), moments(normal(50 + i, 1000, 8))) for i in range(8)]
    assert halves == pytest.approx(sum(fresh) / 8, rel=0.15)
    assert halves == half_split_fd(features, seed=0, splits=8)
    assert halves != half_split_fd(features, seed=1, splits=8)


def kernel_distance_by_loops(first, second):
    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def within(points):
        pairs = [kernel(x, y) for (i, x), (j, y) in itertools.product(enumerate(points), repeat=2) if i != j]
        return sum(pairs) / len(pairs)

    return within(first) + within(second) - 2 * np.mean([kernel(x, y) for x in first for y in second])


def test_kernel_distance_is_the_double_sum_over_different_pairs():
    first, second = normal(5, 7, 3), normal(6, 9, 3) + 0.5
    expected = kernel_distance_by_loops(first, second)
    assert kernel_distance(first, second) == pytest.approx(expected)
    assert kernel_distance(first, second, block=2) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_at_any_size():
    """Its mean over many draws of five is zero for equal distributions, and what many samples say for others."""
    equal = torch.tensor([kernel_distance(normal(2 * i, 5, 4), normal(2 * i + 1, 5, 4)) for i in range(800)])
    assert abs(equal.mean()) < 3 * equal.std() / 800**0.5
    shifted = torch.tensor([kernel_distance(normal(2 * i, 5, 4), normal(2 * i + 1, 5, 4) + 0.5) for i in range(800)])
    truth = kernel_distance(normal(-1, 4000, 4), normal(-2, 4000, 4) + 0.5)
    assert abs(shifted.mean() - truth) < 3 * shifted.std() / 800**0.5 + 0.02
    assert truth > 10 * abs(equal.mean())


def test_nearest_distances_are_the_smallest_of_all():
    queries, references = normal(7, 30, 2, 3), normal(8, 40, 2, 3)
    brute = torch.tensor([min(float((q - r).norm()) for r in references) for q in queries], dtype=torch.float64)
    torch.testing.assert_close(nearest_distances(queries, references, block=7), brute)


def test_the_nearest_neighbour_ratio_tells_new_from_memorised():
    training, held_out, new = normal(9, 500, 6), normal(10, 500, 6), normal(11, 500, 6)
    assert nearest_neighbour_ratio(new, held_out, training) == pytest.approx(1.0, abs=0.05)
    copies = training[:250] + 0.05 * normal(12, 250, 6)
    assert nearest_neighbour_ratio(copies, held_out, training) < 0.2
