"""Moving tokens to experts and back, without a scatter in either direction.

A token's k copies are rows; ``token_of_row`` and ``rows_of_token`` say which is whose. Copying tokens to rows and
adding rows to tokens are each other's transpose, so the backward of one is the forward of the other. Autograd's own
backward of a gather is an atomic scatter-add, slower and, on CUDA, different from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def gather_rows(
    tokens: Float[Tensor, "tokens width"],
    token_of_row: Int64[Tensor, "rows"],
    rows_of_token: Int64[Tensor, "tokens k"],
) -> Float[Tensor, "rows width"]:
    """Return row r = token ``token_of_row[r]``."""
    result: Tensor = _Gather.apply(tokens, token_of_row, rows_of_token)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def sum_rows(
    rows: Float[Tensor, "rows width"],
    token_of_row: Int64[Tensor, "rows"],
    rows_of_token: Int64[Tensor, "tokens k"],
) -> Float[Tensor, "tokens width"]:
    """Return token t = the sum of its rows, ``rows_of_token[t]``, in that order."""
    result: Tensor = _Sum.apply(rows, token_of_row, rows_of_token)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def _copy(tokens: Tensor, token_of_row: Tensor) -> Tensor:
    return tokens.index_select(0, token_of_row)


def _add(rows: Tensor, rows_of_token: Tensor) -> Tensor:
    return rows.index_select(0, rows_of_token.flatten()).view(*rows_of_token.shape, -1).sum(1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_row: Tensor, rows_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_token)
        return _copy(tokens, token_of_row)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        return _add(gradient, rows_of_token), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, rows_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _add(rows, rows_of_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return _copy(gradient, token_of_row), None, None
