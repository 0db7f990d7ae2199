"""Every engine, world size and accumulation factor gives the numbers of one process."""

import pytest

from engine_cases import REFERENCE, largest_difference, train_toy, train_toy_with
from parity_matrix import MATRIX, compare, trajectories
from ranks import rank_pool
from sixfold.engine.config import AdamWConfig, CosineConfig, DDPConfig, DeepSpeedConfig, FSDPConfig, MuonConfig


@pytest.fixture(scope="module")
def reference():
    trace = train_toy(REFERENCE)
    assert max(trace.grad_norms) > 1.5, "clipping at norm 1 must be part of the comparison"
    assert trace.losses[-1] < 0.6 * trace.losses[0]
    return trace


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", list(MATRIX))
def test_engines_follow_one_process(name, accumulation, reference):
    traces = trajectories(name, train_toy, accumulation)
    row = compare(name, accumulation, reference, traces)
    assert row.agrees, row
    for trace in traces:
        assert largest_difference(trace.parameters, reference.parameters) < 1e-5
        assert largest_difference(trace.averages, reference.averages) < 1e-5
        assert largest_difference(trace.averages, trace.parameters) > 1e-3


MUON = {"optimizer": MuonConfig(lr=2e-2, weight_decay=0.1), "schedule": CosineConfig(warmup_steps=2)}


@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        (2, DDPConfig(precision="fp32")),
        (2, FSDPConfig(precision="fp32")),
        (4, FSDPConfig(precision="fp32")),
        (4, FSDPConfig(precision="fp32", replicate=2)),
        *((2, DeepSpeedConfig(precision="fp32", zero_stage=stage)) for stage in (1, 2, 3)),
        *((2, DeepSpeedConfig(precision="fp32", zero_stage=stage, offload_optimizer=True)) for stage in (2, 3)),
    ],
)
def test_muon_is_sharded_without_changing_it(ranks, config):
    # 4 experts: whole matrices are sharded at 2 and 4 ranks; the other matrices have odd sizes.
    settings = {**MUON, "experts": 4, "steps": 20}
    alone = train_toy(REFERENCE, **settings)
    for trace in rank_pool(ranks).run(train_toy_with, config, settings):
        assert compare("muon", 1, alone, [trace]).agrees
        assert largest_difference(trace.parameters, alone.parameters) < 1e-4


def test_muon_with_a_stack_cut_inside_its_matrices():
    settings = {**MUON, "experts": 3, "steps": 10}  # 3 experts of 12 rows on 2 ranks: cut along the rows
    alone = train_toy(REFERENCE, **settings)
    for trace in rank_pool(2).run(train_toy_with, FSDPConfig(precision="fp32"), settings):
        assert compare("muon", 1, alone, [trace]).agrees


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_offloaded_to_the_cpu(stage, reference):
    config = DeepSpeedConfig(precision="fp32", zero_stage=stage, offload_optimizer=True)
    for trace in rank_pool(2).run(train_toy, config, 2):
        assert compare("offload", 2, reference, [trace]).agrees


@pytest.mark.parametrize(
    "config",
    [
        DDPConfig(precision="bf16"),
        FSDPConfig(precision="bf16"),
        *(DeepSpeedConfig(precision="bf16", zero_stage=stage) for stage in (1, 2, 3)),
    ],
    ids=lambda config: f"{config.type}{getattr(config, 'zero_stage', '')}",
)
def test_bfloat16_keeps_fp32_masters(config, reference):
    for trace in rank_pool(2).run(train_toy, config, 2):
        row = compare("bf16", 2, reference, [trace])
        assert 1e-4 < row.loss < 0.05
        # bf16 has 8 bits: updates of 1e-3 of a weight would be lost without fp32 masters.
        assert any((value != value.bfloat16().float()).any() for value in trace.parameters.values())
        assert largest_difference(trace.parameters, reference.parameters) < 0.1


SHARDED = {
    "FSDP2": (2, FSDPConfig(precision="fp32")),
    "HSDP": (4, FSDPConfig(precision="fp32", replicate=2)),
    **{f"ZeRO-{stage}": (2, DeepSpeedConfig(precision="fp32", zero_stage=stage)) for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("name", SHARDED)
def test_recomputation_changes_nothing_under_sharding(name, checkpointing, reference):
    ranks, config = SHARDED[name]
    config = config.model_copy(update={"activation_checkpointing": checkpointing})
    for trace in rank_pool(ranks).run(train_toy, config, 2):
        assert compare(checkpointing, 2, reference, [trace]).agrees


def test_first_moment_with_zero_betas_is_the_gradient():
    """Adam with betas 0 after one step: exp_avg in the canonical state is the mean gradient, on every engine."""
    from state_probes import gradient_by_name, gradients_through_adam

    optimizer = AdamWConfig(lr=1e-3, betas=(0.0, 0.0))
    expected = gradient_by_name()
    for config in (FSDPConfig, DeepSpeedConfig):
        for found in rank_pool(2).run(gradients_through_adam, config(precision="fp32", clip_grad_norm=None), optimizer):
            assert largest_difference(found, expected) < 1e-6
