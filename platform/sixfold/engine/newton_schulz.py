"""Orthogonalisation by matrix products alone: every singular value of a matrix is moved to about 1.

Jordan et al. (2024) iterate one odd quintic. Amsel et al. (arXiv 2505.16932) take for each step the quintic that is
best for the interval which the step before left: the composition is the best one there is, and widens the range of
singular values that n steps bring home from about 3.4^n to 4.2^n. The range is used up sooner the larger the bound is
by which a matrix is divided. The Frobenius norm overestimates the largest of n equal singular values by n^(1/2), that
of (X X^T)^2, which the first step needs anyway, by n^(1/8): a further factor of 6 at n = 128, more than a step's worth.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

STEPS_AT_MOST = 8

_QUINTICS = (
    (4.2149654, -12.5154172, 9.2905508),
    (4.2148490, -12.5144370, 9.2896870),
    (4.2143537, -12.5102651, 9.2860105),
    (4.2122447, -12.4925143, 9.2703686),
    (4.2032650, -12.4171229, 9.2039569),
    (4.1650272, -12.0995103, 8.9245821),
    (4.0033022, -10.8164373, 7.8032341),
    (4.1112288, -8.2285005, 5.3172718),
)
"""(a, b, c) of a x + b x^3 + c x^5, the minimax approximations of 1: the last n rows take [l_n, 1] to [0.8, 1.2].

Every row but the last is divided by its largest value and by ``_MARGIN``, so that the next one starts from at most 1.
"""

SMALLEST = (9.083e-06, 3.867e-05, 1.646e-04, 7.006e-04, 2.981e-03, 1.2654e-02, 5.3207e-02, 2.13491e-01)
"""l_n by row: the smallest singular value, over the largest, that the steps from this row on bring home."""

_MARGIN = 1.01
"""Beyond 1 the quintics grow fast: what rounding adds must not take a singular value there."""


def newton_schulz(matrices: Float[Tensor, "n rows columns"], *, steps: int) -> Float[Tensor, "n rows columns"]:
    """Replace each matrix's singular values by values in about [0.8, 1.2]: U S V^T becomes about U V^T.

    Singular values below ``SMALLEST`` of the largest are lifted as far as the steps reach. Iterates
    X <- (a + b A + c A^2) X with A = X X^T on the smaller side, in the matrices' own precision; it tolerates bf16.

    Args:
        matrices: a batch of one shape.
        steps: at most ``STEPS_AT_MOST``.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    # By the largest entry first: the norm's squares, and eighth powers below, of small gradients would vanish.
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1.0)  # at least 1, but of a matrix of zeros, which stays one
    for step, (a, b, c) in enumerate(_QUINTICS[-steps:]):
        gram = x @ x.mT
        square = gram @ gram
        if step == 0:
            bound = _MARGIN * square.float().norm(dim=(-2, -1), keepdim=True).pow(0.25).to(x.dtype) + 1e-7
            x, gram, square = x / bound, gram / bound**2, square / bound**4
        x = torch.baddbmm(x, gram.mul_(b).add_(square, alpha=c), x, beta=a)
    return x.mT if tall else x
