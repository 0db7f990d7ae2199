"""What a plan predicts from fake tensors is what two real ranks hold, compute and send.

``make parity`` plans every recipe in every way; the suite takes one recipe in every way, and the others in some.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from case_runs import prepare
from parity_matrix import FULL
from planning_cases import PHASED, PLANNED, Measured, measure, payload, traced
from ranks import rank_pool
from recipe_cases import LATENT
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.planning.partition import ZERO_BUCKET_ELEMENTS

CASES: dict[str, tuple[EngineConfig, int | None]] = {
    "DDP": (DDPConfig(precision="fp32"), None),
    "FSDP2": (FSDPConfig(precision="fp32"), 4),
    "FSDP2 bf16, blocks recomputed": (FSDPConfig(precision="bf16", activation_checkpointing="full"), None),
    "FSDP2, products kept": (FSDPConfig(precision="fp32", activation_checkpointing="selective"), None),
    "replicas of FSDP2 in two micro-batches": (FSDPConfig(precision="fp32", replicate=2), 4),
    "ZeRO-2": (DeepSpeedConfig(precision="fp32", zero_stage=2), None),
    "ZeRO-3 bf16": (DeepSpeedConfig(precision="bf16", zero_stage=3), None),
}
IN_TWO = "FSDP2 in two micro-batches"
CONSISTENCY = "distill/consistency-distill-smoke"
SEVERAL_ROLES: dict[str, tuple[EngineConfig, int | None, int]] = {
    "DDP": (DDPConfig(precision="fp32"), None, 2),
    IN_TWO: (FSDPConfig(precision="fp32"), 4, 2),
    "HSDP": (FSDPConfig(precision="fp32", replicate=2), None, 4),
    "ZeRO-1": (DeepSpeedConfig(precision="fp32", zero_stage=1), None, 2),
    "ZeRO-2": (DeepSpeedConfig(precision="fp32", zero_stage=2), None, 2),
}
SOME = [
    *(("lm/moe-smoke", case) for case in CASES),
    *(("flow/dit-smoke", case) for case in ("FSDP2", "ZeRO-3 bf16")),
    ("flow/unet-smoke", "FSDP2 bf16, blocks recomputed"),
    *(("flow/mmdit-smoke", case) for case in ("FSDP2, products kept", "replicas of FSDP2 in two micro-batches")),
]
SOME_OF_SEVERAL_ROLES = [
    *(("distill/dmd2-smoke", case) for case in SEVERAL_ROLES),
    *(("codec/kl-smoke", case) for case in ("HSDP", "ZeRO-2")),
    *((name, IN_TWO) for name in (LATENT, CONSISTENCY)),
    ("distill/ladd-smoke", "HSDP"),
]
BUCKET_BYTES = 2 * ZERO_BUCKET_ELEMENTS
"""What DeepSpeed sets aside in half precision, whatever the network; far more than everything else here."""


@pytest.fixture(scope="module")
def planner() -> Iterator[ProcessPoolExecutor]:
    """A process without a process group, in which steps can be traced."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize(("name", "case"), list(product(PLANNED, CASES)) if FULL else SOME)
def test_memory_arithmetic_and_messages_are_predicted(
    name: str, case: str, demo_data: Path, planner: ProcessPoolExecutor
) -> None:
    config, micro_batch = CASES[case]
    found, planned = compare(config, name, str(demo_data), micro_batch, planner)
    assert found == pytest.approx(planned, rel=1e-9)


@pytest.mark.parametrize(("name", "case"), list(product(PHASED, SEVERAL_ROLES)) if FULL else SOME_OF_SEVERAL_ROLES)
def test_recipes_of_several_roles_are_predicted(
    name: str, case: str, demo_data: Path, planner: ProcessPoolExecutor
) -> None:
    config, micro_batch, ranks = SEVERAL_ROLES[case]
    data = prepare(name, demo_data)
    found, planned = compare(config, name, data, micro_batch, planner, ranks)
    assert found == pytest.approx(planned, rel=1e-9)


def compare(
    config: EngineConfig, name: str, data: str, micro_batch: int | None, planner: ProcessPoolExecutor, ranks: int = 2
) -> tuple[dict[str, float], dict[str, float]]:
    """Hold the plan's arithmetic and memory to real steps; return the bytes of messages that were sent and planned."""
    planned = planner.submit(traced, config, name, data, micro_batch, ranks)
    found: Measured = rank_pool(ranks).run(measure, config, name, data, micro_batch)[0]
    trace = planned.result()
    assert found.flops == pytest.approx(trace.flops, rel=0.01)
    if getattr(config, "replicate", 1) < ranks:  # else sums of micro-batches count as activations, or as exchanged
        assert found.most["activations"] == pytest.approx(trace.most["activations"], rel=0.05)
    if isinstance(config, FSDPConfig):  # other engines exchange in buckets of their own
        assert found.peak_bytes == pytest.approx(sum(trace.at_peak.values()), rel=0.05)
    held = trace.held
    resident = held.parameters + held.working + held.optimizer + held.average + trace.companion_bytes
    if isinstance(config, DDPConfig) or getattr(config, "zero_stage", 0) == 3:
        resident += held.gradients  # others free them after the update
    assert found.held_bytes % BUCKET_BYTES == pytest.approx(resident, rel=0.05)
    return payload(found.collectives), payload(trace.collectives)
