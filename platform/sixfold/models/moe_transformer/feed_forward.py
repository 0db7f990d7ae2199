"""Feed-forward layers: SwiGLU, and a dropless mixture of SwiGLU experts."""

from __future__ import annotations

from jaxtyping import Float, Int32
from torch import Tensor, nn

from sixfold.models.grouped import grouped_linear
from sixfold.models.moe_transformer.config import ExpertsConfig, MoETransformerConfig
from sixfold.models.moe_transformer.dispatch import gather_rows, plan_dispatch, row_multiple, sum_rows
from sixfold.models.moe_transformer.router import Router, Routing, routing_losses
from sixfold.models.network import Linear, ParameterTag, normal, parameter
from sixfold.models.precision import compute_dtype


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, tag: ParameterTag, output_tag: ParameterTag) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, tag=tag)
        self.up = Linear(width, hidden, tag=tag)
        self.down = Linear(hidden, width, tag=output_tag)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply the layer to each token."""
        mapped: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return mapped


class Experts(nn.Module):
    """SwiGLU experts over rows sorted by expert, with stacked weights ``[experts, out, in]``."""

    def __init__(self, count: int, width: int, hidden: int, *, tag: ParameterTag, output_tag: ParameterTag) -> None:
        super().__init__()
        self.gate_and_up = parameter(count, 2 * hidden, width, tag=tag)
        self.down = parameter(count, width, hidden, tag=output_tag)

    def forward(self, rows: Float[Tensor, "rows width"], ends: Int32[Tensor, "experts"]) -> Float[Tensor, "rows width"]:
        """Map rows ``ends[e-1]:ends[e]`` by expert e; an expert may have no rows."""
        dtype = compute_dtype(rows)  # autocast does not know grouped products
        gate_and_up, down = self.gate_and_up.to(dtype), self.down.to(dtype)
        gate, up = grouped_linear(rows.to(dtype), gate_and_up, ends).chunk(2, dim=-1)
        return grouped_linear(nn.functional.silu(gate) * up, down, ends)


class MixtureOfExperts(nn.Module):
    """Each token passes its top-k routed experts, and all shared ones; no token is dropped."""

    def __init__(self, config: MoETransformerConfig, experts: ExpertsConfig, *, output_tag: ParameterTag) -> None:
        super().__init__()
        tag, hidden = normal(config.init_scale), config.expert_hidden_width
        self.router = Router(config.width, experts, scale=config.init_scale)
        self.experts = Experts(experts.count, config.width, hidden, tag=tag, output_tag=output_tag)
        self.shared = (
            SwiGLU(config.width, experts.shared * hidden, tag=tag, output_tag=output_tag) if experts.shared else None
        )

    def forward(
        self, x: Float[Tensor, "n length width"]
    ) -> tuple[Float[Tensor, "n length width"], dict[str, Float[Tensor, "..."]]]:
        """Return the mixture, and the terms of :func:`~sixfold.models.moe_transformer.router.routing_losses`."""
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens)
        losses = routing_losses(routing, sequences=len(x))
        plan = plan_dispatch(routing.experts, losses["tokens_per_expert"], row_multiple(compute_dtype(x), x.device))
        rows = self.experts(gather_rows(tokens, plan), plan.ends)
        mixed = sum_rows(rows, routing.weights, plan).view_as(x)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, losses
