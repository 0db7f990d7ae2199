"""The search for the cheapest setting against traces of every setting there is."""

import dataclasses

import pytest
import torch

from sixfold.planning.devices import ACCELERATORS
from sixfold.planning.plan import CHECKPOINTING, Cluster, Planner
from sixfold.planning.search import candidates, with_engine
from sixfold.planning.trace import trace_step
from sixfold.recipe.load import load_recipe

RANKS = 4
H100 = ACCELERATORS["h100"]


def recipe_on_four(name, *overrides):
    return load_recipe(name, ["engine.type=fsdp", "data.global_batch=16", *overrides]).recipe


def shallow(*overrides):
    return recipe_on_four("flow/dit-smoke", "data.global_batch=8", "networks.denoiser.depth=1", *overrides)


def cluster_of(usable_bytes):
    device = dataclasses.replace(H100, memory_bytes=usable_bytes + H100.reserved_bytes)
    return Cluster(nodes=2, ranks_per_node=2, device=device)


@pytest.fixture
def traced_modes(monkeypatch):
    """The modes of checkpointing that are traced, in order."""
    modes = []

    def noted(recipe, *args, **options):
        modes.append(recipe.engine.activation_checkpointing)
        return trace_step(recipe, *args, **options)

    monkeypatch.setattr("sixfold.planning.plan.trace_step", noted)
    return modes


@pytest.mark.parametrize("name", ["distill/consistency-distill-smoke", "lm/moe-smoke"])
def test_recomputation_sends_nothing(name):
    recipe = recipe_on_four(name, "engine.micro_batch=2")
    sent = []
    for mode in CHECKPOINTING:
        engine = recipe.engine.model_copy(update={"activation_checkpointing": mode})
        sent.append(trace_step(with_engine(recipe, engine), RANKS).collectives)
    assert sent[0] == sent[1] == sent[2]
    assert {message.kind for message in sent[0]} >= {"all_gather", "reduce_scatter"}


def every_plan(planner):
    """Every setting, traced as it would run."""
    found = []
    for mode in CHECKPOINTING:
        base = planner.recipe.engine.model_copy(update={"activation_checkpointing": mode})
        for engine in candidates(base, ranks=RANKS, ranks_per_node=2, rank_batch=2):
            recipe = with_engine(planner.recipe, engine)
            found.append(planner._plan(recipe, trace_step(recipe, RANKS, device=planner.cluster.torch_device)))
    return found


def test_the_fastest_of_all_settings_is_found_where_memory_is_plenty(traced_modes):
    planner = Planner(shallow(), cluster_of(10**10))
    found = planner.cheapest()
    assert set(traced_modes) == {"none"}, "nothing that recomputes can be faster"
    assert found.estimate.step_s == pytest.approx(min(plan.estimate.step_s for plan in every_plan(planner)))


@pytest.mark.parametrize("share", [0.999, 0.7, 0.4])
def test_the_fastest_that_fits_is_found_where_memory_is_short(share):
    recipe = shallow("data.global_batch=4096")  # so large that activations decide
    whole = Planner(recipe, cluster_of(10**10)).plan().peak_bytes
    planner = Planner(recipe, cluster_of(int(whole * share)))
    found = planner.cheapest()
    assert found.fits
    assert found.peak_bytes <= whole * share
    again = trace_step(with_engine(planner.recipe, found.engine), RANKS, device=torch.device("cuda"))
    assert found.trace == again


def test_a_setting_that_fits_on_paper_alone_is_not_shown():
    """Muon's temporaries do not shrink with the micro-batch, as paper has it."""
    recipe = shallow("optimizer.type=muon", "optimizer.lr=0.01")
    smallest = min(plan.peak_bytes for plan in every_plan(Planner(recipe, cluster_of(10**10))))
    planner = Planner(recipe, cluster_of(smallest - 1))
    assert list(planner._fitting_on_paper())
    assert planner.cheapest() is None


def test_no_setting_is_proposed_that_the_objective_refuses():
    """A discriminator's batch of one is refused, though nothing is smaller."""
    recipe = recipe_on_four("distill/ladd-smoke")
    plans = Planner(recipe, cluster_of(10**10))._variants(recipe)
    assert {plan.engine.micro_batch for plan in plans} == {2, 4}
