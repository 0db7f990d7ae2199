"""YAML with places, composition, overrides and provenance."""

from pathlib import Path

import pytest

from recipe_texts import FLOW, TEXT, line_of
from sixfold.config.composition import compose_file, merge
from sixfold.config.loading import parse_yaml
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Layer, Provenance
from sixfold.errors import RecipeError
from sixfold.pipeline.load import is_pipeline, load_pipeline
from sixfold.pipeline.runner import plan
from sixfold.recipe.catalogue import catalogue
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.train.assembly import identity_of

ROOT = Path(__file__).resolve().parents[2]


def values_of(text):
    layer, faults = parse_yaml(text, "x.yaml")
    assert not faults, faults
    return layer.values


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("12", 12),
        ("-3", -3),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_mean_what_they_look_like(spelled, meant):
    value = values_of(f"key: {spelled}")["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_keys_are_always_text():
    assert values_of("on: 1\nno: 2\n3: 3\nnull: 4") == {"on": 1, "no": 2, "3": 3, "null": 4}


def test_every_node_knows_its_line():
    layer, _ = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "f.yaml")
    places = {".".join(path): str(place) for path, place in layer.places.items() if path}
    assert places == {
        "a": "f.yaml:1",
        "a.b": "f.yaml:2",
        "a.c": "f.yaml:3",
        "a.c.0": "f.yaml:4",
        "a.c.1": "f.yaml:5",
        "a.c.1.y": "f.yaml:5",
    }


def test_anchors_and_merge_keys_keep_the_place_of_what_was_written():
    text = "one: &one\n  a: 1\n  b: 2\ntwo:\n  <<: *one\n  b: 3\nthree: *one\n"
    layer, faults = parse_yaml(text, "f.yaml")
    assert not faults
    assert layer.values == {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3}, "three": {"a": 1, "b": 2}}
    assert str(layer.places["two", "a"]) == "f.yaml:2"
    assert str(layer.places["two", "b"]) == "f.yaml:6"


def test_an_anchor_that_contains_itself_is_a_fault():
    _, faults = parse_yaml("a: &a\n  b: *a\n", "f.yaml")
    assert [fault.where for fault in faults] == ["f.yaml:1"]


def test_all_duplicate_keys_are_reported_with_both_lines():
    _, faults = parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", "f.yaml")
    assert [(fault.where, fault.what) for fault in faults] == [
        ("f.yaml:4", "b.c is written twice, first on line 3"),
        ("f.yaml:5", "a is written twice, first on line 1"),
    ]


def layer_of(text):
    return parse_yaml(text, "f.yaml")[0]


def test_merging_is_deep_and_leaves_its_arguments_alone():
    below, above = layer_of("a: {x: 1, y: 2}\nl: [1, 2]"), layer_of("a: {y: 3, z: 4}\nl: [9]")
    merged = merge(below, above)
    assert merged.values == {"a": {"x": 1, "y": 3, "z": 4}, "l": [9]}
    assert below.values == {"a": {"x": 1, "y": 2}, "l": [1, 2]}
    assert ("l", "1") not in merged.places  # what was replaced left no provenance behind


def test_a_changed_type_replaces_the_whole_section():
    below = layer_of("opt: {type: adamw, lr: 1, betas: [0.9, 0.95]}")
    assert merge(below, layer_of("opt: {type: muon, lr: 2}")).values == {"opt": {"type": "muon", "lr": 2}}
    assert merge(below, layer_of("opt: {type: adamw, lr: 2}")).values["opt"]["betas"] == [0.9, 0.95]
    assert merge(below, layer_of("opt: {lr: 2}")).values["opt"]["type"] == "adamw"


def test_overrides_apply_at_once_whatever_their_order():
    below = layer_of("opt: {type: adamw, lr: 1, eps: 3}")
    for arguments in (["opt.lr=2", "opt.type=muon"], ["opt.type=muon", "opt.lr=2"]):
        above, faults = parse_overrides(arguments)
        assert not faults
        assert merge(below, above).values == {"opt": {"type": "muon", "lr": 2}}


def test_the_later_override_of_a_key_wins_and_keeps_its_place():
    layer, _ = parse_overrides(["a.b=1", "a={c: 2}", "a.c=3"])
    assert layer.values == {"a": {"c": 3}}
    assert {".".join(path): str(place) for path, place in layer.places.items()} == {
        "a": "override a={c: 2}",
        "a.c": "override a.c=3",
    }


def test_overrides_reach_into_lists():
    above, _ = parse_overrides(["m.1.w=5"])
    merged = merge(layer_of("m:\n  - {p: a, w: 1}\n  - {p: b, w: 2}"), above)
    assert merged.values == {"m": [{"p": "a", "w": 1}, {"p": "b", "w": 5}]}
    assert Provenance("f.yaml", merged.places).where("m.1.w") == "override m.1.w=5"
    assert Provenance("f.yaml", merged.places).where("m.1.p") == "f.yaml:3"


def test_bases_compose_relative_to_the_file_and_later_ones_win(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/one.yaml").write_text("a: 1\nb: 1\nc: 1\n")
    (tmp_path / "parts/two.yaml").write_text("base: one.yaml\nb: 2\n")
    (tmp_path / "three.yaml").write_text("c: 3\nd: 3\n")
    (tmp_path / "top.yaml").write_text("base: [parts/two.yaml, three.yaml]\nd: 4\n")
    layer = compose_file(tmp_path / "top.yaml")
    assert layer.values == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert str(layer.places[("b",)]).endswith("parts/two.yaml:2")


def test_two_files_may_share_a_base(tmp_path):
    (tmp_path / "root.yaml").write_text("a: 1\n")
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text(f"base: root.yaml\n{name}: 1\n")
    (tmp_path / "top.yaml").write_text("base: [left.yaml, right.yaml]\n")
    assert compose_file(tmp_path / "top.yaml").values == {"a": 1, "left": 1, "right": 1}


def test_faults_of_all_files_are_reported_together(tmp_path):
    (tmp_path / "below.yaml").write_text("a: 1\na: 2\n")
    (tmp_path / "top.yaml").write_text("base: [below.yaml, missing.yaml]\nb: [\n")
    with pytest.raises(RecipeError) as raised:
        compose_file(tmp_path / "top.yaml")
    assert len(raised.value.faults) == 1  # a file that is no YAML has no bases to follow
    (tmp_path / "top.yaml").write_text("base: [below.yaml, missing.yaml]\nb: 1\nb: 2\n")
    with pytest.raises(RecipeError) as raised:
        compose_file(tmp_path / "top.yaml")
    assert [str(fault.where).rpartition("/")[2] for fault in raised.value.faults] == [
        "top.yaml:3",
        "below.yaml:2",
        "top.yaml:1",
    ]


def test_provenance_tells_file_base_override_and_default(tmp_path):
    (tmp_path / "base.yaml").write_text(FLOW)
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {steps: 7}\n")
    loaded = load_recipe(tmp_path / "top.yaml", ["optimizer.lr=2e-4"])
    where = loaded.provenance.where
    assert loaded.recipe.train.steps == 7
    assert loaded.recipe.optimizer.lr == 2e-4
    assert where("train.steps") == f"{tmp_path}/top.yaml:2"
    assert where("networks.denoiser.width") == f"{tmp_path}/base.yaml:{line_of(FLOW, 'width')}"
    assert where("optimizer.lr") == "override optimizer.lr=2e-4"
    assert where("optimizer.eps") == "default"


def test_an_override_of_null_deletes_an_entry(tmp_path):
    extra = FLOW.replace(
        "objective:",
        "  spare: {type: dit, image_size: 8, patch_size: 2, channels: 1, width: 32, depth: 1, heads: 4}\nobjective:",
    )
    (tmp_path / "r.yaml").write_text(extra)
    with pytest.raises(RecipeError, match=r"networks\.spare is used by nothing"):
        load_recipe(tmp_path / "r.yaml")
    assert list(load_recipe(tmp_path / "r.yaml", ["networks.spare=null"]).recipe.networks) == ["denoiser"]
    assert (
        load_recipe(tmp_path / "r.yaml", ["networks.spare=null", "sampling=null", "evaluation=null"]).recipe.sampling
        is None
    )
    with pytest.raises(RecipeError, match=r"train\.steps: got null"):
        load_recipe(tmp_path / "r.yaml", ["networks.spare=null", "train.steps=null"])


def test_a_role_may_have_its_own_optimizer_schedule_and_engine(tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    recipe = load_recipe(
        tmp_path / "r.yaml", ["roles.denoiser.optimizer={type: muon, lr: 0.02}", "roles.denoiser.engine.type=fsdp"]
    ).recipe
    assert (recipe.optimizer.type, recipe.optimizer_of("denoiser").type) == ("adamw", "muon")
    assert (recipe.engine.type, recipe.engine_of("denoiser").type) == ("ddp", "fsdp")
    assert recipe.schedule_of("denoiser") is recipe.schedule


def test_a_section_without_its_type_is_of_the_default_type(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT + "engine: {micro_batch: 4}\ntracking: {tags: {a: b}}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["schedule.warmup_steps=3"]).recipe
    assert (recipe.engine.type, recipe.engine.micro_batch) == ("ddp", 4)
    assert (recipe.tracking.type, recipe.tracking.tags) == ("mlflow", {"a": "b"})
    assert (recipe.schedule.type, recipe.schedule.warmup_steps) == ("constant", 3)
    with pytest.raises(RecipeError, match=r"schedule\.final_fraction: unknown key of type constant"):
        load_recipe(tmp_path / "r.yaml", ["schedule.final_fraction=0.5"])


def test_lists_are_taken_for_tuples_while_values_stay_strict(tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    assert load_recipe(tmp_path / "r.yaml", ["optimizer.betas=[0.5, 0.75]"]).recipe.optimizer.betas == (0.5, 0.75)
    with pytest.raises(RecipeError, match="got '100'"):
        load_recipe(tmp_path / "r.yaml", ["train.steps='100'"])


def test_the_hash_follows_the_settings_and_not_the_files(tmp_path):
    (tmp_path / "a.yaml").write_text(TEXT)
    (tmp_path / "b.yaml").write_text("base: a.yaml\nseed: 0\n")
    one, two = load_recipe(tmp_path / "a.yaml").recipe, load_recipe(tmp_path / "b.yaml").recipe
    assert one.recipe_hash == two.recipe_hash
    assert load_recipe(tmp_path / "a.yaml", ["seed=1"]).recipe.recipe_hash != one.recipe_hash


PIPELINES = [entry for entry in catalogue() if is_pipeline(entry.path)]
RECIPES = [entry for entry in catalogue() if entry not in PIPELINES]


@pytest.mark.parametrize("entry", RECIPES, ids=lambda entry: entry.name)
def test_every_recipe_of_the_catalogue_loads_under_its_own_name_and_is_read_back_equal(entry, tmp_path):
    loaded = load_recipe(entry.name)
    assert loaded.recipe.name == entry.name
    assert loaded.recipe.description
    (tmp_path / "resolved.yaml").write_text(loaded.recipe.dump_yaml())
    assert load_recipe(tmp_path / "resolved.yaml").recipe == loaded.recipe


@pytest.mark.parametrize("entry", PIPELINES, ids=lambda entry: entry.name)
def test_every_pipeline_loads_under_its_own_name_with_recipes_that_load(entry, tmp_path):
    pipeline = load_pipeline(entry.path)
    assert pipeline.name == entry.name
    assert pipeline.description
    assert [stage.name for stage in plan(pipeline, tmp_path)] == list(pipeline.stages)
    with pytest.raises(RecipeError, match="is a pipeline"):
        load_recipe(entry.name)


def test_the_catalogue_is_complete_and_its_readme_names_every_recipe():
    names = [entry.name for entry in catalogue()]
    files = [path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")]
    on_disk = [path for path in files if not any(part.startswith("_") for part in path.parts)]
    assert {"lm/moe-smoke", "lm/char-cpu", "lm/moe-16b-a3b", "flow/dit-smoke", "flow/dit-xl-2-imagenet256"} <= set(
        names
    )
    assert len(names) == len(on_disk)
    readme = (ROOT / "recipes/README.md").read_text()
    assert all(f"`{name}`" in readme for name in names)


def test_a_project_s_own_recipes_come_before_the_packaged_ones(tmp_path, monkeypatch):
    (tmp_path / "recipes/lm").mkdir(parents=True)
    (tmp_path / "recipes/lm/moe-smoke.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("lm/moe-smoke").recipe.name == "lm/tiny"
    assert load_recipe("flow/dit-smoke").recipe.name == "flow/dit-smoke"


def test_every_setting_is_described():
    """`sixfold help` and the JSON Schema are made of descriptions; a setting without one is a hole in both."""
    missing = [
        f"{kind.__name__}.{name}"
        for kind in kinds_below(Recipe, set())
        for name, field in kind.model_fields.items()
        if not field.description and name != "type"
    ]
    assert missing == []


def kinds_below(kind, seen):
    from sixfold.config.schema import Slot

    if kind not in seen:
        seen.add(kind)
        for field in kind.model_fields.values():
            slot = Slot.of_field(field)
            entry = slot.entry()
            for inner in [*slot.kinds().values(), *(entry.kinds().values() if entry else ())]:
                kinds_below(inner, seen)
    return seen


def test_provenance_falls_back_to_entries_sections_and_the_recipe():
    layer = merge(Layer(), layer_of("a:\n  b: 1\n"))
    above, _ = parse_overrides(["c.d.e=1"])
    provenance = Provenance("f.yaml", merge(layer, above).places)
    assert provenance.nearest(("a", "zz")) == "f.yaml:1"
    assert provenance.nearest(("c", "d")) == "override c.d.e=1"
    assert Provenance("f.yaml").nearest(("x", "y")) == "f.yaml"


@pytest.mark.parametrize("types", [("adamw", "adamw"), ("adamw", "muon"), ("muon", "muon")])
def test_a_checkpoint_is_bound_to_the_optimizers_of_its_roles(types):
    of_roles = [
        f"roles.{role}.optimizer={{type: {kind}, lr: 0.01}}"
        for role, kind in zip(("codec", "discriminator"), types, strict=True)
    ]
    bound = identity_of(load_recipe("codec/vq-smoke", of_roles).recipe)["optimizer.type"]
    assert bound == (types[0] if len({*types}) == 1 else {"codec": "adamw", "discriminator": "muon"})
