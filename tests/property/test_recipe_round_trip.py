"""What is dumped is read back equal: any text, any number, any setting."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe_texts import FLOW, TEXT
from sixfold.config.composition import merge
from sixfold.config.dumping import dump_yaml
from sixfold.config.loading import parse_yaml
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Layer, Provenance
from sixfold.recipe.load import load_recipe, validate_recipe


def mappings(values):
    return st.dictionaries(texts, values, max_size=4)


TRICKY = st.sampled_from(
    ["no", "null", "~", "1e-4", "1_0", "<<", "*a", "!x", "- a", "a: b", "#", "", " ", ".inf", "\x85"]
)
texts = st.text(max_size=12) | TRICKY
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | mappings(inner), max_leaves=8)
untimed = settings(max_examples=30, deadline=None)


@untimed
@given(mappings(trees))
def test_plain_values_survive_dump_and_load(values):
    layer, faults = parse_yaml(dump_yaml(values), "dumped.yaml")
    assert not faults
    assert layer.values == values
    assert repr(layer.values) == repr(values)  # 1 is not 1.0 and -0.0 is not 0.0


@untimed
@given(mappings(trees), mappings(trees))
def test_merging_puts_every_value_of_the_upper_layer_on_top(below, above):
    merged = merge(Layer(below), Layer(above)).values
    assert set(merged) == set(below) | set(above)
    assert all(merged[key] == above[key] for key in above if not isinstance(above[key], dict))
    assert merge(Layer(below), Layer()).values == below
    assert merge(Layer(), Layer(above)).values == above


@untimed
@given(scalars)
def test_an_override_reads_a_value_as_a_file_does(value):
    spelled = dump_yaml({"key": value}).removeprefix("key: ")
    layer, faults = parse_overrides([f"a.b={spelled}"])
    assert not faults
    assert layer.values == {"a": {"b": value}}


positive = st.floats(min_value=0, exclude_min=True, max_value=1e300, allow_subnormal=True)
changes = st.fixed_dictionaries(
    {},
    optional={
        "description": texts,
        "seed": st.integers(0, 2**63 - 1),
        "data": st.fixed_dictionaries({"path": st.text(min_size=1)}),
        "optimizer": st.fixed_dictionaries({"lr": positive, "weight_decay": positive}),
        "tracking": st.fixed_dictionaries(
            {"type": st.just("mlflow"), "tags": mappings(texts), "experiment": st.none() | st.just("1e3")}
        ),
        "train": st.fixed_dictionaries(
            {"steps": st.integers(100, 10**12), "ema_decay": st.none() | st.floats(0, 1, exclude_max=True)}
        ),
        "schedule": st.sampled_from(
            [{"type": "constant"}, {"type": "wsd", "decay_fraction": 0.25}, {"type": "cosine"}]
        ),
        "engine": st.sampled_from([{"type": "fsdp", "replicate": 2}, {"type": "ddp", "clip_grad_norm": None}]),
        "evaluation": st.none() | st.sampled_from([{"metrics": ["loss"]}, {"samples": 5}, {"samples": "split"}]),
    },
)


@pytest.mark.parametrize("text", [FLOW, TEXT], ids=["flow", "text"])
@untimed
@given(changed=changes)
def test_a_recipe_survives_dump_and_load(text, changed):
    base = parse_yaml(text, "base.yaml")[0]
    recipe = validate_recipe(merge(base, Layer(changed)).values, Provenance("base.yaml"))
    again = validate_recipe(parse_yaml(recipe.dump_yaml(), "dumped.yaml")[0].values, Provenance("dumped.yaml"))
    assert again == recipe
    assert again.recipe_hash == recipe.recipe_hash
    assert again.dump_yaml() == recipe.dump_yaml()


def test_infinite_settings_are_spelled_as_yaml_spells_them(tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    recipe = load_recipe(tmp_path / "r.yaml", ["optimizer.weight_decay=.inf"]).recipe
    assert math.isinf(recipe.optimizer.weight_decay)
    assert "weight_decay: .inf" in recipe.dump_yaml()
