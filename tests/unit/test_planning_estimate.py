"""Estimates against closed forms, partitions against sums over all ranks, and the search against what it must find."""

import math
from collections import Counter

import pytest
import torch

from sixfold.engine.config import AdamWConfig, DDPConfig, DeepSpeedConfig, FSDPConfig, MuonConfig
from sixfold.models.network import constant, normal
from sixfold.planning.devices import ACCELERATORS
from sixfold.planning.estimate import Assumptions, estimate, seconds_of
from sixfold.planning.meter import Collective, StepMeter, bytes_by_kind
from sixfold.planning.partition import Held, Parameter, held_by_rank, sent_by_replica, shard_elements
from sixfold.planning.search import candidates

H100 = ACCELERATORS["h100"]
IDEAL = Assumptions(compute_efficiency=1.0, link_efficiency=1.0, overlap=1.0, latency_s=0.0)
CPU = torch.device("cpu")
SHAPES = [
    Parameter(shape=(1000, 64), tag=normal(1.0)),
    Parameter(shape=(64,), tag=constant(1.0)),
    Parameter(shape=(8, 64, 32), tag=normal(1.0)),
]
ELEMENTS = 1000 * 64 + 64 + 8 * 64 * 32


def message(kind, ranks, size=1 << 30):
    return Collective(kind=kind, ranks=tuple(ranks), message_bytes=size)


def test_a_ring_within_a_node_takes_the_textbook_time():
    gather = seconds_of(message("all_gather", range(8)), ranks_per_node=8, device=H100, assumptions=IDEAL)
    assert gather == pytest.approx((1 << 30) * 7 / 8 / 450e9)
    total = seconds_of(message("all_reduce", range(8)), ranks_per_node=8, device=H100, assumptions=IDEAL)
    assert total == pytest.approx(2 * gather)


def test_a_group_over_nodes_is_bound_by_the_ports_of_its_ranks():
    wide = seconds_of(message("all_gather", range(16)), ranks_per_node=8, device=H100, assumptions=IDEAL)
    assert wide == pytest.approx((1 << 30) * 15 / 16 / (8 * 50e9))
    replicas = seconds_of(message("all_gather", (0, 8)), ranks_per_node=8, device=H100, assumptions=IDEAL)
    assert replicas == pytest.approx((1 << 30) / 2 / 50e9)
    assert seconds_of(message("all_reduce", (3,)), ranks_per_node=8, device=H100, assumptions=IDEAL) == 0.0


def test_an_ideal_step_is_all_arithmetic():
    found = estimate(
        flops=2 * H100.peak_flops_per_s,
        model_flops=H100.peak_flops_per_s,
        collectives={message("all_gather", range(8)): 1},
        held=Held(),
        steps=43200,
        ranks=8,
        ranks_per_node=8,
        device=H100,
        assumptions=IDEAL,
    )
    assert found.step_s == pytest.approx(2.0)
    assert found.mfu == pytest.approx(0.5)
    assert found.days == pytest.approx(1.0)
    assert found.cost == pytest.approx(8 * 24 * H100.price_per_hour)


def test_what_is_offloaded_is_updated_at_the_links_pace():
    shared = {"flops": 0.0, "model_flops": 0.0, "collectives": {}, "steps": 1, "ranks": 1, "ranks_per_node": 1}
    held = Held(parameters=10**9, optimizer=2 * 10**9, gradients=10**9)
    fast = estimate(held=held, device=H100, assumptions=IDEAL, **shared)
    slow = estimate(held=held + Held(on_host=10**9), device=H100, assumptions=IDEAL, **shared)
    assert fast.update_s == pytest.approx(7e9 / H100.memory_bytes_per_s)
    assert slow.update_s == pytest.approx(7e9 / IDEAL.host_bytes_per_s)


def held(engine, optimizer=None, world_size=4, averages=0, accumulates=False):
    return held_by_rank(
        SHAPES,
        engine,
        optimizer or AdamWConfig(lr=1.0),
        world_size=world_size,
        averages=averages,
        accumulates=accumulates,
        device=CPU,
    )


def test_replicas_hold_everything_and_shards_their_part():
    whole, shard = held(DDPConfig(precision="fp32"), averages=2), held(FSDPConfig(precision="fp32"), averages=2)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (4 * ELEMENTS, 4 * ELEMENTS, 8 * ELEMENTS)
    assert whole.average == 8 * ELEMENTS
    assert shard.on_device * 4 == whole.on_device, "these shapes divide evenly"
    assert held(DDPConfig(precision="fp32"), accumulates=True).gradients == 8 * ELEMENTS
    assert held(FSDPConfig(precision="fp32", replicate=2)).parameters == 2 * shard.parameters


def test_muon_keeps_one_slot_of_a_matrix():
    assert held(DDPConfig(), MuonConfig(lr=1.0)).optimizer == 4 * (ELEMENTS - 64) + 8 * 64


@pytest.mark.parametrize(("shape", "shards", "expected"), [((10, 3), 4, 9), ((6, 8, 5), 4, 60), ((6, 7, 5), 4, 70)])
def test_the_first_shard_is_the_largest(shape, shards, expected):
    """Rows are cut as by torch.chunk; uneven stacks of experts along their matrices' rows where those divide."""
    assert shard_elements(shape, shards) == expected
    assert expected >= math.prod(shape) / shards


@pytest.mark.parametrize(("stage", "working", "masters"), [(1, 4, 1), (2, 2, 1), (3, 0.5, 1)])
def test_zero_keeps_working_copies_beside_masters(stage, working, masters):
    engine = DeepSpeedConfig(precision="bf16", zero_stage=stage)
    found = held(engine)
    assert found.working == working * ELEMENTS
    assert found.parameters == masters * ELEMENTS
    offloaded = held(engine.model_copy(update={"offload_optimizer": True}))
    assert offloaded.on_device < found.on_device
    assert offloaded.on_device + offloaded.on_host == found.on_device


def test_zero_sends_what_it_partitions():
    sent = {
        stage: bytes_by_kind(
            sent_by_replica(
                SHAPES,
                DeepSpeedConfig(precision="fp32", zero_stage=stage),
                world_size=4,
                device=CPU,
                micro_batches=3,
            )
        )
        for stage in (1, 2, 3)
    }
    assert sent[1] == {"all_reduce": 4 * ELEMENTS, "all_gather": 4 * ELEMENTS}
    assert sent[2] == {"all_reduce": 12 * ELEMENTS, "all_gather": 4 * ELEMENTS}
    assert sent[3] == {"all_gather": 12 * ELEMENTS, "reduce_scatter": 12 * ELEMENTS}


def test_every_sharding_and_micro_batch_is_tried():
    found = Counter(
        (engine.replicate, engine.micro_batch)
        for engine in candidates(FSDPConfig(), ranks=32, ranks_per_node=8, rank_batch=6)
    )
    assert found == Counter((replicate, size) for replicate in (1, 2, 4) for size in (1, 2, 3, 6))
    stages = {
        (engine.zero_stage, engine.offload_optimizer)
        for engine in candidates(DeepSpeedConfig(), ranks=8, ranks_per_node=8, rank_batch=1)
    }
    assert len(stages) == 6


def test_the_meter_counts_products_and_what_backward_needs():
    weight, x = torch.randn(32, 64, requires_grad=True), torch.randn(8, 64)
    with StepMeter() as meter:
        hidden = (x @ weight.t()).exp()  # backward needs x and exp's result
        after_forward = meter.readings()
        hidden.sum().backward()
        meter.keep([weight.grad])
        del hidden
    found = meter.readings()
    assert found.flops == 2 * (2 * 8 * 32 * 64), "one product forward, and one for the weight's gradient"
    assert after_forward.left_bytes == 4 * 8 * 32, "exp's result stays, its argument does not"
    assert after_forward.most["activations"] == 2 * 4 * 8 * 32
    assert found.left_bytes == found.at_peak["gradients"] == 4 * 32 * 64
    assert not found.collectives
