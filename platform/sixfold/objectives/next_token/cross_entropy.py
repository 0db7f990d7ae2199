"""Cross-entropy of a language-model head without ever holding all logits.

Logits of 8 x 4096 tokens over 128k words are 16 GB in fp32; chunk by chunk they are as small as one likes. As the
loss is a *sum*, its gradient does not depend on anything after it but a scalar: each chunk's gradient is taken while
its logits exist, in the forward pass, and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadLoss(NamedTuple):
    """Sums over tokens, each 0-dimensional fp32; only ``loss`` has a gradient.

    Attributes:
        loss: cross-entropy plus the weighted z-loss.
        cross_entropy: in nats.
        z_loss: squared log-partitions, unweighted.
        correct: tokens whose target was the most likely (ties count).
    """

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    correct: Float[Tensor, ""]


def chunked_cross_entropy(
    hidden: Float[Tensor, "... d"],
    weight: Float[Tensor, "v d"],
    targets: Int64[Tensor, "..."],
    mask: Float[Tensor, "..."],
    *,
    z_weight: float = 0.0,
    chunk_tokens: int = 1024,
) -> HeadLoss:
    """Return the summed next-token loss of logits ``hidden @ weight.T``, ``chunk_tokens`` tokens at a time.

    Args:
        hidden: final activations, any leading shape.
        weight: the head's full weight.
        targets: the right tokens, shaped like ``hidden`` without its last dimension.
        mask: 1 where a token counts and 0 elsewhere, shaped like ``targets``.
        z_weight: factor on the squared log-partition (PaLM, 2204.02311, section 5).
        chunk_tokens: how many tokens' logits are held at once.
    """
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    task = _Task(
        targets=targets.flatten(),
        mask=mask.flatten().float(),
        z_weight=z_weight,
        chunk_tokens=chunk_tokens,
        with_gradient=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    with torch.autocast(device, enabled=False):
        rows = hidden.flatten(0, -2).to(compute)
        apply: Callable[..., tuple[Tensor, ...]] = _ChunkedCrossEntropy.apply  # torch leaves it untyped
        sums = apply(rows, weight, task)
    return HeadLoss(*sums)


class _Task(NamedTuple):
    """What the loss is of, besides the two tensors that receive gradients."""

    targets: Int64[Tensor, " t"]
    mask: Float[Tensor, " t"]
    z_weight: float
    chunk_tokens: int
    with_gradient: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sums forward; the gradients, found on the way, backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "t d"], weight: Float[Tensor, "v d"], task: _Task
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four sums of :class:`HeadLoss`."""
        table = weight.to(hidden.dtype)
        sums = torch.zeros(3, device=hidden.device)
        if task.with_gradient:
            grad_hidden = torch.empty_like(hidden)
            # fp32 whatever the weight's precision, since it sums over chunks
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        for start in range(0, len(hidden), task.chunk_tokens):
            part = slice(start, start + task.chunk_tokens)
            rows = hidden[part]
            logits = (rows @ table.T).float()
            targets, mask = task.targets[part], task.mask[part]
            log_partition = _add_sums(sums, logits, targets, mask)
            if task.with_gradient:
                grad_logits = _gradient_of_logits(logits, log_partition, targets, mask, task.z_weight)
                low = grad_logits.to(hidden.dtype)
                torch.mm(low, table, out=grad_hidden[part])
                if low.dtype == torch.float32:
                    grad_weight.addmm_(low.T, rows)
                else:
                    grad_weight += low.T @ rows
        cross_entropy, z_loss, correct = (value.clone() for value in sums)
        ctx.mark_non_differentiable(cross_entropy, z_loss, correct)
        return cross_entropy + task.z_weight * z_loss, cross_entropy, z_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass found."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), (grad_weight * grad_loss).to(ctx.weight_dtype), None


def _add_sums(
    sums: Float[Tensor, "3"], logits: Float[Tensor, "c v"], targets: Int64[Tensor, " c"], mask: Float[Tensor, " c"]
) -> Float[Tensor, " c"]:
    """Add a chunk's cross-entropy, squared log-partition and right guesses to ``sums``; return its log-partition."""
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    log_partition = torch.logsumexp(logits, 1)
    per_token = (log_partition - target_logit, log_partition.square(), (target_logit >= logits.amax(1)).float())
    sums += torch.stack([torch.dot(mask, value) for value in per_token])
    return log_partition


def _gradient_of_logits(
    logits: Float[Tensor, "c v"],
    log_partition: Float[Tensor, " c"],
    targets: Int64[Tensor, " c"],
    mask: Float[Tensor, " c"],
    z_weight: float,
) -> Float[Tensor, "c v"]:
    """Return softmax (1 + 2 z_weight log_partition) - onehot, in the memory of the logits."""
    gradient = logits.sub_(log_partition[:, None]).exp_()
    gradient *= (mask * (1.0 + 2.0 * z_weight * log_partition))[:, None]
    return gradient.scatter_add_(1, targets[:, None], -mask[:, None])
