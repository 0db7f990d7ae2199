"""Softmax attention: SDPA or batched products on the CPU, flash or flex attention on CUDA.

A causal mask is prepared once a forward pass and shared by all layers. Without documents there is none, and SDPA's own
causal kernel runs on every device. With documents, CUDA takes flex attention, which skips masked blocks; it has no
backward on the CPU, where SDPA takes an explicit mask. Short sequences that train on the CPU take neither: see
``batched_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sixfold.models.batched_attention import batched_attention
from sixfold.models.kernels import takes_cpu_kernels

_LONGEST = 512
"""Tokens beyond which the probabilities that batched products keep would outweigh a layer's other activations."""

_LONGEST_FULL_FP32 = 64
"""The same for full attention in fp32, where SDPA's kernel is as fast as the products from there on."""

AttentionMask = BlockMask | Bool[Tensor, "#n 1 queries keys"]


def document_mask(documents: Int64[Tensor, "n length"]) -> AttentionMask:
    """Return the mask by which a token sees itself and earlier tokens of its own document."""
    if documents.is_cuda:
        n, length = documents.shape

        def same_document(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents[sequence, query] == documents[sequence, key])

        mask: BlockMask = _compiled(create_block_mask)(same_document, n, None, length, length, device=documents.device)
        return mask
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def continuation_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 queries keys"]:
    """Return the causal mask of the last ``queries`` of ``keys`` positions."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_attention(
    query: Float[Tensor, "n heads queries features"],
    key: Float[Tensor, "n kv_heads keys features"],
    value: Float[Tensor, "n kv_heads keys features"],
    mask: AttentionMask | None = None,
) -> Float[Tensor, "n heads queries features"]:
    """Softmax attention; several query heads may share a key and value head (arXiv 2305.13245).

    Without a mask there are as many queries as keys and attention is causal, or one query at the last position.
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        attended: Tensor = _compiled(flex_attention)(query, key, value, block_mask=mask, enable_gqa=grouped)
        return attended
    if query.shape[2] == key.shape[2] > 1 and _takes_products(query, key, _LONGEST):
        return batched_attention(query, key, value, mask, causal=True)
    causal = mask is None and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def full_attention(
    query: Float[Tensor, "n heads queries features"],
    key: Float[Tensor, "n heads keys features"],
    value: Float[Tensor, "n heads keys features"],
    mask: Bool[Tensor, "#n 1 #queries keys"] | None = None,
) -> Float[Tensor, "n heads queries features"]:
    """Softmax attention of every query to every key, or to those that ``mask`` allows."""
    longest = _LONGEST_FULL_FP32 if query.dtype == torch.float32 else _LONGEST
    if _takes_products(query, key, longest):
        return batched_attention(query, key, value, mask, causal=False)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _takes_products(query: Tensor, key: Tensor, longest: int) -> bool:
    """Whether batched products beat SDPA's kernel: short sequences on the CPU whose backward will follow."""
    if not takes_cpu_kernels(query.device) or not query.requires_grad:
        return False
    return query.dtype in (torch.float32, torch.bfloat16) and max(query.shape[2], key.shape[2]) <= longest


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile once: uncompiled, flex attention would materialise the scores."""
    return torch.compile(function)
