"""Drawing text token by token, with cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.models.moe_transformer.cache import KeyValueCache
from sixfold.models.moe_transformer.config import MoETransformerConfig
from sixfold.objectives.contract import Networks
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.samplers.config import AutoregressiveConfig
from sixfold.samplers.contract import SampleRequest


class AutoregressiveSampler:
    """Continues prompts: temperature, then the ``top_k`` likeliest tokens, then the likeliest up to mass ``top_p``.

    A sample's tokens depend on (seed, sample number, step) and its prompt alone, not on the batch it is drawn in.
    """

    def __init__(
        self,
        config: AutoregressiveConfig,
        objective_config: NextTokenConfig,
        networks_config: Mapping[str, MoETransformerConfig],
    ) -> None:
        self.config = config
        self.network_config = networks_config[objective_config.network]

    @torch.no_grad()
    def __call__(self, nets: Networks, request: SampleRequest) -> Mapping[str, Tensor]:
        """Return ``tokens`` ``[n, prompt + new]``, prompts included.

        Without ``prompt`` ``[n, length]`` in the conditions, a sample begins with the vocabulary's last token, which
        ends a text.
        """
        network, numbers = nets["lm"], request.numbers
        new_tokens = self.config.max_new_tokens if request.steps is None else request.steps
        random = PositionRandom(request.seed, numbers)
        tokens = request.conditions.get("prompt")
        if tokens is None:
            tokens = torch.full_like(numbers, self.network_config.vocab_size - 1)[:, None]
        cache = KeyValueCache(self.network_config.depth, capacity=tokens.shape[1] + new_tokens)
        unread = tokens
        for step in range(new_tokens):
            logits, _ = network(unread, readout=_last_logits, cache=cache)
            unread = self._draw(logits, random.uniform(f"token/{step}"))[:, None]
            tokens = torch.cat([tokens, unread], dim=1)
        return {"tokens": tokens}

    def _draw(self, logits: Float[Tensor, "n vocabulary"], uniform: Float[Tensor, "n"]) -> Int64[Tensor, "n"]:
        """Invert the cumulative distribution of the kept tokens at ``uniform``."""
        if self.config.temperature == 0:
            return logits.argmax(-1)
        probabilities, ranked = kept_probabilities(
            logits, temperature=self.config.temperature, top_k=self.config.top_k, top_p=self.config.top_p
        )
        cumulative = probabilities.cumsum(-1)
        below = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
        last_kept = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not reach past the kept tokens
        return ranked.gather(-1, below.minimum(last_kept))[:, 0]


def kept_probabilities(
    logits: Float[Tensor, "n vocabulary"], *, temperature: float, top_k: int | None, top_p: float
) -> tuple[Float[Tensor, "n kept"], Int64[Tensor, "n kept"]]:
    """Return tokens from the likeliest on, with their probabilities, zero where dropped; these need not sum to one.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751) keeps the smallest set of likeliest tokens whose mass reaches
    ``top_p``, measured after temperature and ``top_k``.
    """
    kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    values, ranked = (logits.double() / temperature).topk(kept, dim=-1)
    probabilities = values.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities
    nucleus = likelier < top_p
    nucleus[:, 0] = True
    return probabilities * nucleus, ranked


def _last_logits(
    hidden: Float[Tensor, "n length width"], weight: Float[Tensor, "vocabulary width"]
) -> Float[Tensor, "n vocabulary"]:
    """Read out the last position only: a prompt's other logits are not needed."""
    return torch.nn.functional.linear(hidden[:, -1], weight).float()
