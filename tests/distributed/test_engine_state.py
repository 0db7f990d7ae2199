"""States move between engines and world sizes by value, and all ranks skip a bad step together without a trace."""

import math

import pytest
import torch

from engine_cases import (
    REFERENCE,
    continue_toy,
    largest_difference,
    saved_state,
    this_world,
    toy_engine,
    toy_leg,
    toy_step,
    train_toy,
    whole_state,
)
from parity_matrix import largest_relative_difference
from ranks import rank_pool
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, FSDPConfig, MuonConfig

FSDP = FSDPConfig(precision="fp32")
DDP = DDPConfig(precision="fp32")


def _zero(stage: int, **settings) -> DeepSpeedConfig:
    return DeepSpeedConfig(precision="fp32", zero_stage=stage, **settings)


@pytest.mark.parametrize(
    "legs",
    [
        [(2, FSDP), (1, _zero(3)), (2, DDP)],
        [(2, _zero(3)), (4, FSDPConfig(precision="fp32", replicate=2)), (2, _zero(2))],
        [(2, _zero(1, offload_optimizer=True)), (2, FSDP), (2, _zero(3, offload_optimizer=True))],
    ],
    ids=["fsdp2@2 zero3@1 ddp@2", "zero3@2 hsdp@2x2 zero2@2", "zero1-offload fsdp zero3-offload"],
)
def test_a_run_continues_on_other_engines(legs, tmp_path):
    straight = train_toy(REFERENCE, 1, 12)
    losses: list[float] = []
    source = None
    for number, (ranks, config) in enumerate(legs):
        target = str(tmp_path / f"leg{number}")
        answers = rank_pool(ranks).run(toy_leg, config, source, target, 4 * number, 4 * number + 4)
        if source is not None:
            before = saved_state(source)
            for _, loaded in answers:
                assert loaded.keys() == before.keys()
                assert all(torch.equal(loaded[name], before[name]) for name in before), "loading must not change a bit"
        losses += answers[0][0].losses
        source = target
    assert largest_relative_difference(losses, straight.losses) < 1e-5
    assert largest_difference(answers[0][0].parameters, straight.parameters) < 1e-5
    assert largest_difference(answers[0][0].averages, straight.averages) < 1e-5
    final = saved_state(source)
    assert final["optimizer_step"].item() == 12
    assert {name.split("/")[0] for name in final} == {"parameters", "buffers", "optimizer", "ema", "optimizer_step"}
    assert any(name.endswith("shift") for name in final)
    assert not any(name.endswith("phase") for name in final), "buffers that are not persistent are recomputed"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_resumes_bitwise_under_zero_and_moves_to_other_engines(stage, tmp_path):
    settings = {"optimizer": MuonConfig(lr=2e-2, weight_decay=0.1), "experts": 4}
    pool, config, folder = rank_pool(2), _zero(stage), str(tmp_path)
    whole, _ = pool.run(toy_leg, config, None, f"{folder}/whole", 0, 8, settings)[0]
    pool.run(toy_leg, config, None, f"{folder}/half", 0, 4, settings)
    resumed, _ = pool.run(toy_leg, config, f"{folder}/half", f"{folder}/resumed", 4, 8, settings)[0]
    assert resumed.losses == whole.losses[4:]
    expected, found = (saved_state(f"{folder}/{name}") for name in ("whole", "resumed"))
    assert any(name.endswith("/momentum_buffer") for name in expected)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    moved, loaded = pool.run(toy_leg, FSDP, f"{folder}/half", f"{folder}/moved", 4, 8, settings)[0]
    half = saved_state(f"{folder}/half")
    assert loaded.keys() == half.keys()
    assert all(torch.equal(loaded[name], half[name]) for name in half), "loading must not change a bit"
    assert largest_relative_difference(moved.losses, whole.losses[4:]) < 1e-5


def _skip_probe(config, poison):
    engine = toy_engine(config)
    for step in range(3):
        toy_step(engine, step)
    before = whole_state(engine)
    _, report = toy_step(engine, 3, 2, poison=poison)
    untouched = all(torch.equal(value, before[name]) for name, value in whole_state(engine).items())
    trace = continue_toy(engine, 4, 8, 1, {})
    engine.close()
    return report, untouched, trace


@pytest.mark.parametrize(
    ("config", "poison"),
    [
        (DDP, math.nan),
        (FSDP, math.nan),
        (FSDP, math.inf),
        (_zero(1), math.nan),
        (_zero(2), math.inf),
        (_zero(3), math.nan),
        (_zero(2, offload_optimizer=True), math.nan),
        (_zero(3, offload_optimizer=True), math.inf),
    ],
)
def test_all_ranks_skip_a_non_finite_step_and_go_on(config, poison):
    alone, untouched_alone, expected = _skip_probe(REFERENCE, poison)
    assert alone.skipped
    assert untouched_alone
    for report, untouched, trace in rank_pool(2).run(_skip_probe, config, poison):
        assert report.skipped
        assert not math.isfinite(report.grad_norm)
        assert untouched, "parameters, optimizer state, averages and counts must not change"
        assert trace.skipped == [False] * 4
        assert largest_relative_difference(trace.losses, expected.losses) < 1e-5


def _flagged_probe(config):
    """A finite gradient, but one rank says that its loss was not finite."""
    engine = toy_engine(config)
    toy_step(engine, 0)
    before = whole_state(engine)
    tokens = torch.tensor([1, 2, 3])
    for last in (False, True):
        with engine.accumulate(last=last):
            engine.backward(engine.module(tokens).square().sum())
    report = engine.step(torch.tensor(3.0), finite=torch.tensor(this_world().rank != 1))
    untouched = all(torch.equal(value, before[name]) for name, value in whole_state(engine).items())
    trace = continue_toy(engine, 1, 4, 2, {})
    engine.close()
    return report.skipped, untouched, trace.losses


@pytest.mark.parametrize(
    "config", [FSDP, *(_zero(stage, offload_optimizer=offload) for stage in (1, 2, 3) for offload in (False, True))]
)
def test_one_rank_s_word_is_enough(config):
    expected = train_toy(REFERENCE, 1, 4).losses[1:]
    for skipped, untouched, losses in rank_pool(2).run(_flagged_probe, config):
        assert skipped
        assert untouched
        assert largest_relative_difference(losses, expected) < 1e-5


def _averaged_probe(config):
    engine = toy_engine(config)
    for step in range(4):
        toy_step(engine, step)
    tokens = torch.arange(7)
    with torch.no_grad():
        own = engine.module(tokens).float()
        with engine.averaged():
            averaged = engine.module(tokens).float()
        again = engine.module(tokens).float()
    _, report = toy_step(engine, 4)  # the first forward after averages were held must see the role's own parameters
    engine.close()
    return own, averaged, again, report.grad_norm


@pytest.mark.parametrize("config", [DDP, FSDP, _zero(2), _zero(3)])
def test_averages_are_held_for_a_while(config):
    own, averaged, again, grad_norm = _averaged_probe(REFERENCE)
    assert (own - averaged).abs().max() > 1e-3
    assert torch.equal(own, again)
    for theirs in rank_pool(2).run(_averaged_probe, config):
        torch.testing.assert_close(theirs[0], own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs[1], averaged, rtol=1e-5, atol=1e-5)
        assert torch.equal(theirs[2], theirs[0])
        assert theirs[3] == pytest.approx(grad_norm, rel=1e-5)
