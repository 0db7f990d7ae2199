"""What a denoiser can predict, and how one prediction becomes another.

Every prediction y is linear in the endpoints: scale y = data_part x0 + noise_part e. Together with x = alpha x0 +
sigma e that is a 2x2 system, so a single table and Cramer's rule give all conversions; no pair needs a formula of its
own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.paths.affine import Coefficients
from sixfold.paths.config import Prediction

Quantity = Prediction | Literal["score"]
"""A prediction, or the score of p(x_t), -e / sigma: something to convert to, too singular to train on."""


LARGEST_RATIO_FOR_NOISE = 150.0
"""Noise-to-signal ratio at which a predicted noise is asked at most (VP's own at t=1): where there is nothing but noise
it tells nothing of the data."""

_SEEN_RATIOS = (1e-4, 1e4)
"""Noise-to-signal ratios between which EDM's networks are told the logarithm: at the ends of a path it is infinite."""


class Endpoints(NamedTuple):
    """Estimates of both ends of the path that a noisy x lies on."""

    data: Float[Tensor, "..."]
    noise: Float[Tensor, "..."]


class Row(NamedTuple):
    """The linear form of a prediction y: scale y = data_part x0 + noise_part e."""

    scale: Tensor
    data_part: Tensor
    noise_part: Tensor


def linear_form(quantity: Quantity, at: Coefficients, data_std: float) -> Row:
    """Return the linear form of a prediction at given times.

    EDM's F solves D = c_skip x + c_out F (2206.00364, eq. 7); with x / alpha in place of x, so that it is defined on
    every path, it is (sigma x0 / sd - alpha sd e) / sqrt(sigma^2 + alpha^2 sd^2): the negative of v where sd = 1 and
    variance is preserved.
    """
    one, zero = torch.ones_like(at.alpha), torch.zeros_like(at.alpha)
    match quantity:
        case "data":
            return Row(one, one, zero)
        case "noise":
            return Row(one, zero, one)
        case "velocity":
            return Row(one, at.alpha_rate, at.sigma_rate)
        case "v":
            return Row(one, -at.sigma, at.alpha)
        case "score":
            return Row(at.sigma, zero, -one)
        case "edm":
            norm = torch.sqrt(at.sigma**2 + (at.alpha * data_std) ** 2)
            return Row(norm, at.sigma / data_std, -at.alpha * data_std)
    assert_never(quantity)


def express(endpoints: Endpoints, quantity: Quantity, at: Coefficients, data_std: float) -> Float[Tensor, "n ..."]:
    """Return the prediction that corresponds to known endpoints ``[n, ...]``: the training target."""
    row = linear_form(quantity, at.broadcast(endpoints.data), data_std)
    return (row.data_part * endpoints.data + row.noise_part * endpoints.noise) / row.scale


def endpoints_of(
    value: Float[Tensor, "n ..."],
    quantity: Quantity,
    x: Float[Tensor, "n ..."],
    at: Coefficients,
    data_std: float,
) -> Endpoints:
    """Return the data and the noise that a prediction ``value`` made at ``x`` implies.

    Predicting the data says nothing of the noise where sigma = 0, nor the noise (or score) of the data where alpha =
    0: the other endpoint is not finite there, and samplers keep away from such times.
    """
    at = at.broadcast(x)
    row = linear_form(quantity, at, data_std)
    determinant = at.alpha * row.noise_part - at.sigma * row.data_part
    scaled = row.scale * value
    data = value if quantity == "data" else (row.noise_part * x - at.sigma * scaled) / determinant
    noise = value if quantity == "noise" else (at.alpha * scaled - row.data_part * x) / determinant
    return Endpoints(data, noise)


def convert(
    value: Float[Tensor, "n ..."],
    x: Float[Tensor, "n ..."],
    at: Coefficients,
    *,
    source: Quantity,
    target: Quantity,
    data_std: float = 0.5,
) -> Float[Tensor, "n ..."]:
    """Turn a prediction of one kind, made at noisy ``x [n, ...]`` and times ``[n]``, into another kind."""
    if source == target:
        return value
    return express(endpoints_of(value, source, x, at, data_std), target, at, data_std)


def squared_error_scale(quantity: Quantity, at: Coefficients, data_std: float) -> Float[Tensor, " n"]:
    """Return |error of x0|^2 / |error of the prediction|^2, which moves a weighting from one to the other."""
    row = linear_form(quantity, at, data_std)
    if quantity == "data":
        return torch.ones_like(at.alpha)
    return (at.sigma * row.scale / (at.alpha * row.noise_part - at.sigma * row.data_part)) ** 2


def network_input(
    x: Float[Tensor, "n ..."], time: Float[Tensor, " n"], at: Coefficients, quantity: Quantity, data_std: float
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"]]:
    """Return what the network sees: x and t, or under EDM c_in x and c_noise = ln(sigma / alpha) / 4."""
    if quantity != "edm":
        return x, time
    wide = at.broadcast(x)
    c_in = torch.rsqrt(wide.sigma**2 + (wide.alpha * data_std) ** 2)
    return c_in * x, 0.25 * torch.log((at.sigma / at.alpha).clamp(*_SEEN_RATIOS))
