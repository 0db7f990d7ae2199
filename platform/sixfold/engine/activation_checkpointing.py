"""What backward recomputes instead of keeping: nothing, whole blocks, all but costly products, or by budget.

A block's ``forward`` is replaced on the instance: parameter names stay as they are, and hooks that gather sharded
parameters run around the recomputation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sixfold.engine.config import EngineConfig
from sixfold.models.network import Network

COSTLY_OPERATIONS = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten.bmm.default",
        "aten.baddbmm.default",
        # the experts' products, which torch's own list of costly operations lacks, and our operation around them
        "aten._grouped_mm.default",
        "sixfold.grouped_product.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_fused_attention_overrideable.default",
        # Attention within documents on CUDA, in compiled blocks; in eager ones it is compiled alone, and no policy sees
        # inside. A higher-order operator has no namespace.
        "flex_attention",
    }
)
"""Operations whose results selective checkpointing keeps: recomputing them costs more than their memory is worth."""


def apply_activation_checkpointing(network: Network, config: EngineConfig) -> None:
    """Checkpoint every block as ``config.activation_checkpointing`` says.

    ``budget`` only hands the share to the compiler's partitioner, which acts on graphs compiled after this call. The
    setting is one a process, and blocks of one shape share a graph whatever their role: recipes whose compiled roles
    differ in it are refused.
    """
    match config.activation_checkpointing:
        case "none":
            return
        case "budget":
            assert config.activation_memory_budget is not None  # validated with the config
            # The partitioner reads its budget from this module-wide setting; there is no argument for it.
            import torch._functorch.config as functorch_config

            functorch_config.activation_memory_budget = config.activation_memory_budget
        case "full":
            _replace_forwards(network)
        case "selective":
            _replace_forwards(network, context_fn=partial(create_selective_checkpoint_contexts, _keep_costly))


def _replace_forwards(network: Network, **options: Any) -> None:
    for block in network.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def _keep_costly(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in COSTLY_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
