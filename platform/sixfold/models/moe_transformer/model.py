"""The mixture-of-experts transformer language model, and its dense special case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.attention import continuation_mask, document_mask
from sixfold.models.moe_transformer.attention import Attention, AttentionContext, rotary_table
from sixfold.models.moe_transformer.cache import KeyValueCache, LayerCache
from sixfold.models.moe_transformer.config import MoETransformerConfig
from sixfold.models.moe_transformer.feed_forward import MixtureOfExperts, SwiGLU
from sixfold.models.network import ZERO_MATRIX, Network, ParameterTag, normal, parameter
from sixfold.models.normalization import RMSNorm

Readout = Callable[[Float[Tensor, "n length width"], Float[Tensor, "vocabulary width"]], Any]
"""What to compute from the last hidden states and the head's weight; plain logits by default."""

Routing = dict[str, Float[Tensor, "..."]]


class Vocabulary(nn.Module):
    """A vector for each token ``[vocabulary, width]``: looked up by number, or compared with hidden states.

    Both uses are calls of this module, so that hooks which gather its weight see either one. A network with tied
    embeddings calls the same instance twice.
    """

    def __init__(self, vocabulary: int, width: int, *, scale: float, weight_decay: bool) -> None:
        super().__init__()
        self.weight = parameter(
            vocabulary, width, tag=ParameterTag(init="normal", scale=scale, weight_decay=weight_decay)
        )

    def forward(self, x: Tensor, readout: Readout | None = None) -> Any:
        """Return vectors of integer tokens ``[n, length]``, or what ``readout`` makes of hidden states."""
        if not x.is_floating_point():
            return nn.functional.embedding(x, self.weight)
        return (readout or nn.functional.linear)(x, self.weight)


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: MoETransformerConfig, layer: int) -> None:
        super().__init__()
        output_tag = (
            ZERO_MATRIX
            if config.zero_output_projections
            else normal(
                config.init_scale / math.sqrt(2 * config.depth)
            )  # keeps the residual stream's variance in depth
        )
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, output_tag=output_tag)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward: SwiGLU | MixtureOfExperts
        if config.experts is None or layer < config.dense_layers:
            self.feed_forward = SwiGLU(
                config.width, config.dense_hidden_width, tag=normal(config.init_scale), output_tag=output_tag
            )
        else:
            self.feed_forward = MixtureOfExperts(config, config.experts, output_tag=output_tag)

    def forward(
        self, x: Float[Tensor, "n length width"], context: AttentionContext, cache: LayerCache | None = None
    ) -> tuple[Float[Tensor, "n length width"], Routing]:
        """Return the residual stream after this block, and the layer's routing (empty when dense)."""
        x = x + self.attention(self.attention_norm(x), context, cache)
        normalized = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SwiGLU):
            return x + self.feed_forward(normalized), {}
        mixed, routing = self.feed_forward(normalized)
        return x + mixed, routing


class MoETransformer(Network):
    """Decoder-only transformer; see :class:`~sixfold.models.moe_transformer.config.MoETransformerConfig`."""

    def __init__(self, config: MoETransformerConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.init_scale
        self.embedding = Vocabulary(config.vocab_size, config.width, scale=scale, weight_decay=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = (
            None
            if config.tie_embeddings
            else Vocabulary(config.vocab_size, config.width, scale=scale, weight_decay=True)
        )
        self._flops_per_token = 2.0 * _active_parameters(self)  # counted here: sharding may empty parameters

    def forward(
        self,
        tokens: Int64[Tensor, "n length"],
        documents: Int64[Tensor, "n length"] | None = None,
        readout: Readout | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Any, Routing]:
        """Return the head's result and the routing.

        Args:
            tokens: the inputs; with a cache, those after the cached ones.
            documents: a document number for each token; attention stays within a document.
            readout: makes the first result from hidden states and the head's weight, inside the head's forward.
            cache: keys and values of earlier tokens; this call's are added.

        Returns:
            Logits ``[n, length, vocabulary]`` or what ``readout`` returned; and the routing, empty when dense:
            counts ``tokens_per_expert`` ``[mixture layers, experts]``, and ``balance_loss`` and ``z_loss`` ``[n]``,
            summed over the sequence's tokens and over layers (divide by the global token count).
        """
        context = self._context(tokens, documents, cache)
        x = self.embedding(tokens)
        routings: list[Routing] = []
        for index, block in enumerate(self.layers):
            x, routing = block(x, context, None if cache is None else cache.layers[index])
            if routing:
                routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        head = self.embedding if self.head is None else self.head
        return head(self.norm(x), readout), _collect(routings)

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks in order."""
        return iter(self.layers)

    def update_expert_bias(self, tokens_per_expert: Float[Tensor, "layers experts"]) -> None:
        """Even out loads without a loss: call once a step, with counts over the global batch, on the bare network."""
        mixtures = [block.feed_forward for block in self.layers if isinstance(block.feed_forward, MixtureOfExperts)]
        for mixture, counts in zip(mixtures, tokens_per_expert, strict=True):
            mixture.router.update_bias(counts)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a token for each active parameter except the embedding, and 2 L H (d_qk + d_v) S for attention.

        ``tokens`` ``[n, length + 1]`` are inputs and successors: the network reads ``length`` of them.
        """
        n, length = batch_fields["tokens"][0], batch_fields["tokens"][1] - 1
        config = self.config
        attention = 4.0 * config.depth * config.heads * config.features_per_head * length
        return n * length * (self._flops_per_token + attention)

    def _context(self, tokens: Tensor, documents: Tensor | None, cache: KeyValueCache | None) -> AttentionContext:
        """Prepare what all layers share: the rotary table and the mask."""
        length, start = tokens.shape[1], 0 if cache is None else cache.length
        table = rotary_table(start, length, self.config.features_per_head, self.config.rope_theta, tokens.device)
        mask = None
        if documents is not None:
            assert cache is None, "packed documents are for training; a cache holds one document a sequence"
            mask = document_mask(documents)
        elif start and length > 1:
            mask = continuation_mask(length, start + length, tokens.device)
        return AttentionContext(*table, mask, start)


def _collect(routings: list[Routing]) -> Routing:
    """Stack the layers' counts and add their losses."""
    if not routings:
        return {}
    return {
        "tokens_per_expert": torch.stack([routing["tokens_per_expert"] for routing in routings]),
        "balance_loss": torch.stack([routing["balance_loss"] for routing in routings]).sum(0),
        "z_loss": torch.stack([routing["z_loss"] for routing in routings]).sum(0),
    }


def _active_parameters(network: MoETransformer) -> float:
    """Parameters that one token meets: k of the routed experts, and of the two vocabularies only the head."""
    config = network.config
    total = float(sum(value.numel() for value in network.parameters()))
    if network.head is not None:
        total -= network.embedding.weight.numel()
    if config.experts is not None:
        routed = sum(
            value.numel()
            for block in network.layers
            if isinstance(block.feed_forward, MixtureOfExperts)
            for value in block.feed_forward.experts.parameters()
        )
        total -= routed * (1.0 - config.experts.top_k / config.experts.count)
    return total
