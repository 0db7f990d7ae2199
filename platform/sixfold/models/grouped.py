"""Products of row groups with a matrix each, as operations of our own around torch's ``grouped_mm``.

Torch's operation is typed for bf16 alone where shapes are propagated without data, so that fp32 networks with experts
could neither be compiled nor rehearsed on fake tensors; and its FLOPs count as zero. These wrappers change no value.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula

_SCHEMA = "(Tensor left, Tensor right, Tensor ends) -> Tensor"


def grouped_linear(
    rows: Float[Tensor, "rows in"], weight: Float[Tensor, "groups out in"], ends: Int32[Tensor, "groups"]
) -> Float[Tensor, "rows out"]:
    """Return y = x W_g^T for each row x of each group g, the rows ``ends[g-1]:ends[g]``; groups may be empty.

    Widths must be multiples of 16 bytes. Rows past the last end, which only the CPU allows, come back undefined.
    """
    result: Tensor = _GroupedLinear.apply(rows, weight, ends)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


@torch.library.custom_op("sixfold::grouped_product", mutates_args=(), schema=_SCHEMA)
def grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Rows ``[rows, in]`` times their group's matrix of ``[groups, in, out]``."""
    return grouped_mm(left, right, offs=ends)


@torch.library.custom_op("sixfold::grouped_outer", mutates_args=(), schema=_SCHEMA)
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum of outer products of the rows of each group: ``[rows, out]`` and ``[rows, in]`` to ``[groups, out, in]``."""
    return grouped_mm(left.t(), right, offs=ends)


@grouped_product.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[2])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


@register_flop_formula([torch.ops.sixfold.grouped_product, torch.ops.sixfold.grouped_outer])
def _(left: torch.Size, right: torch.Size, *unused: Any, out_shape: torch.Size | None = None, **ignored: Any) -> int:
    """Each row meets one matrix: 2 rows in out, whichever the number of groups."""
    rows, inner = left
    return 2 * rows * inner * int(right[-1])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        result: Tensor = grouped_product(rows, weight.transpose(-2, -1), ends)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()  # an expanded one, as after a sum, has strides the kernels refuse
        return grouped_product(gradient, weight, ends), grouped_outer(gradient, rows, ends), None
