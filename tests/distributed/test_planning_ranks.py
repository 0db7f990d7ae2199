"""What a plan predicts from fake tensors is what two real ranks hold, compute and send."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from planning_cases import PLANNED, measure, payload, traced
from ranks import rank_pool
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.planning.partition import ZERO_BUCKET_ELEMENTS

CASES: dict[str, tuple[EngineConfig, int | None]] = {
    "DDP": (DDPConfig(precision="fp32"), None),
    "FSDP2": (FSDPConfig(precision="fp32"), 4),
    "FSDP2 bf16, blocks recomputed": (FSDPConfig(precision="bf16", activation_checkpointing="full"), None),
    "FSDP2, products kept": (FSDPConfig(precision="fp32", activation_checkpointing="selective"), None),
    "ZeRO-2": (DeepSpeedConfig(precision="fp32", zero_stage=2), None),
    "ZeRO-3 bf16": (DeepSpeedConfig(precision="bf16", zero_stage=3), None),
}
BUCKET_BYTES = 2 * ZERO_BUCKET_ELEMENTS
"""What DeepSpeed sets aside in half precision, whatever the network; far more than everything else here."""


@pytest.fixture(scope="module")
def planner() -> Iterator[ProcessPoolExecutor]:
    """A process without a process group, in which steps can be traced."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLANNED)
def test_memory_arithmetic_and_messages_are_predicted(
    name: str, case: str, demo_data: Path, planner: ProcessPoolExecutor
) -> None:
    config, micro_batch = CASES[case]
    planned = planner.submit(traced, config, name, str(demo_data), micro_batch, 2)
    found = rank_pool(2).run(measure, config, name, str(demo_data), micro_batch)[0]
    trace = planned.result()
    assert payload(found.step.collectives) == payload(trace.collectives)
    assert found.step.flops == pytest.approx(trace.flops, rel=0.01)
    assert found.step.most["activations"] == pytest.approx(trace.most["activations"], rel=0.05)
    held = trace.held
    resident = held.parameters + held.working + held.optimizer + held.average
    if isinstance(config, DDPConfig) or getattr(config, "zero_stage", 0) == 3:
        resident += held.gradients  # others free them after the update
    assert found.held_bytes % BUCKET_BYTES == pytest.approx(resident, rel=0.05)
