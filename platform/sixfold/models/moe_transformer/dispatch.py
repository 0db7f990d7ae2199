"""Moving tokens to experts and back, without a scatter in either direction.

A token's k copies are *rows*, sorted by expert. Copying tokens to rows and adding rows to tokens are each other's
transpose, so the backward of one is the forward of the other. Autograd's own backward of a gather is an atomic
scatter-add, slower and, on CUDA, different from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sixfold.models.kernels import takes_cpu_kernels


class DispatchPlan(NamedTuple):
    """Which row is whose.

    Attributes:
        token_of_row: ``[rows]``; rows that only pad name token 0.
        rows_of_token: ``[tokens, k]``.
        ends: ``[experts]``, where each expert's rows end. Rows past the last end are nobody's: no one reads them.
    """

    token_of_row: Int64[Tensor, "rows"]
    rows_of_token: Int64[Tensor, "tokens k"]
    ends: Int32[Tensor, "experts"]


def row_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Return what each expert's number of rows should be a multiple of.

    On the CPU, products in half precision are compiled for each new shape, which takes as long as the product itself
    for a few hundred rows: experts' loads must fall on few different numbers.
    """
    return 64 if takes_cpu_kernels(device) and dtype in (torch.bfloat16, torch.float16) else 1


def plan_dispatch(
    experts: Int64[Tensor, "tokens k"], tokens_per_expert: Float[Tensor, "experts"], multiple: int = 1
) -> DispatchPlan:
    """Sort the (token, choice) pairs by expert, and pad each expert's rows to a ``multiple``."""
    flat, k = experts.flatten(), experts.shape[1]
    order = flat.argsort(stable=True)
    counts = tokens_per_expert.long()
    place = torch.arange(len(flat), device=flat.device)
    if multiple == 1:
        token_of_row, ends = order // k, counts.cumsum(0)
    else:
        padded = -(-counts // multiple) * multiple
        ends = padded.cumsum(0)
        place = place + ((ends - padded) - (counts.cumsum(0) - counts))[flat[order]]
        most = len(flat) + len(counts) * (multiple - 1)  # the number of rows must not depend on the data
        token_of_row = order.new_zeros(most).scatter_(0, place, order // k)
    rows_of_token = torch.empty_like(order).scatter_(0, order, place).view_as(experts)
    return DispatchPlan(token_of_row, rows_of_token, ends.to(torch.int32))


def gather_rows(tokens: Float[Tensor, "tokens width"], plan: DispatchPlan) -> Float[Tensor, "rows width"]:
    """Return each row's token."""
    rows: Tensor = _Gather.apply(tokens, plan.token_of_row, plan.rows_of_token)  # type: ignore[no-untyped-call]  # torch's
    return rows


def sum_rows(
    rows: Float[Tensor, "rows width"], weights: Float[Tensor, "tokens k"], plan: DispatchPlan
) -> Float[Tensor, "tokens width"]:
    """Return for each token the weighted sum of its rows, in the type of ``rows``."""
    tokens: Tensor = _WeightedSum.apply(rows, weights, plan.token_of_row, plan.rows_of_token)  # type: ignore[no-untyped-call]  # torch's
    return tokens


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_row: Tensor, rows_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_token)
        return tokens.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        return gradient.index_select(0, rows_of_token.flatten()).view(*rows_of_token.shape, -1).sum(1), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token_of_row: Tensor, rows_of_token: Tensor) -> Tensor:
        chosen = rows.index_select(0, rows_of_token.flatten()).view(*rows_of_token.shape, -1)
        ctx.save_for_backward(chosen, weights, token_of_row, rows_of_token)
        return (chosen * weights[:, :, None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chosen, weights, token_of_row, rows_of_token = ctx.saved_tensors
        row_weights = weights.new_zeros(len(token_of_row)).scatter_(0, rows_of_token.flatten(), weights.flatten())
        rows_gradient = gradient.index_select(0, token_of_row) * row_weights[:, None]  # zero for rows that pad
        weights_gradient = (chosen * gradient[:, None]).sum(-1, dtype=weights.dtype)
        return rows_gradient.to(chosen.dtype), weights_gradient, None, None
