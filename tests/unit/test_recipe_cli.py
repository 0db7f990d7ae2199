"""The reading commands: what they print, that they import nothing heavy, and the exit codes of the whole command."""

import json
import signal
import subprocess
import sys
import types

import jsonschema
import pytest
import typer

from recipe_texts import FLOW, TEXT, line_of
from sixfold.cli import main as main_module
from sixfold.cli.inspect_commands import leaves
from sixfold.cli.outcome import fail
from sixfold.errors import EnvironmentFault, UserError
from sixfold.recipe.catalogue import catalogue
from sixfold.recipe.load import load_recipe
from sixfold.train.run_folder import RunFolder
from sixfold_launchers.local import Outcome

HEAVY = ("torch", "numpy", "mlflow", "fsspec", "deepspeed", "accelerate", "transformers", "webdataset")


@pytest.fixture
def sixfold(monkeypatch, capsys):
    """Run the command in this process: arguments to (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sixfold", *arguments])
        code = main_module.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes"], ["show", "lm/moe-smoke"], ["help", "engine.fsdp"], ["schema"], ["run", "--help"]],
    ids=" ".join,
)
def test_reading_commands_import_nothing_heavy(arguments):
    program = (
        "import sys; from sixfold.cli.main import main; sys.argv = ['sixfold', *sys.argv[1:]]; code = main(); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_help_lists_every_command_and_each_has_an_example(sixfold):
    app = typer.main.get_command(main_module.build_app())
    code, out, _ = sixfold("--help")
    assert code == 0
    for name, command in app.commands.items():
        assert name in out
        for inner_name, inner in getattr(command, "commands", {name: command}).items():
            prefix = f"Example: sixfold {name if inner is command else f'{name} {inner_name}'}"
            assert prefix in f"{inner.help} {inner.epilog}", f"{name} {inner_name} shows no example"


def test_recipes_lists_the_catalogue(sixfold):
    code, out, _ = sixfold("recipes", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == [entry.name for entry in catalogue()]
    smoke = next(row for row in rows if row["name"] == "flow/dit-smoke")
    assert (smoke["objective"], smoke["networks"], smoke["engine"]) == ("denoising", "dit", "ddp")
    assert all(row["name"] in sixfold("recipes")[1] for row in rows)


def test_a_recipe_that_cannot_be_read_does_not_hide_the_others(sixfold, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/broken.yaml").write_text("a: [")
    (tmp_path / "recipes/_part.yaml").write_text("a: 1")
    monkeypatch.chdir(tmp_path)
    rows = {row["name"]: row for row in json.loads(sixfold("recipes", "--json")[1])}
    assert "not YAML" in rows["broken"]["description"]
    assert "lm/moe-smoke" in rows
    assert "_part" not in rows


def test_show_gives_values_places_and_derived_facts(sixfold, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    code, out, _ = sixfold("show", str(path), "train.steps=7", "engine.micro_batch=2", "--nproc", "2", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["recipe"]["train"]["steps"] == 7
    assert shown["provenance"]["train.steps"] == "override train.steps=7"
    assert shown["provenance"]["objective.type"] == f"{path}:{line_of(TEXT, 'objective')}"
    assert shown["provenance"]["seed"] == "default"
    assert set(shown["provenance"]) == {key for key, _ in leaves(shown["recipe"])}
    facts = shown["facts"]
    assert facts["samples per rank and step"] == 8
    assert facts["gradient accumulation"] == 4
    assert facts["tokens per step"] == 16 * 32
    assert facts["tokens in all"] == 16 * 32 * 7


def test_show_as_a_table_has_a_line_for_every_setting(sixfold, tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    _, out, _ = sixfold("show", str(tmp_path / "r.yaml"))
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "1e-3" not in rows["optimizer.lr"]
    assert "0.001" in rows["optimizer.lr"]
    assert rows["optimizer.lr"].split()[-1].endswith(f"r.yaml:{line_of(FLOW, 'lr: 1e-3')}")
    assert rows["optimizer.eps"].split()[-1] == "default"
    assert rows["evaluation.metrics.1.type"].split()[1] == "fd"


def test_plain_show_is_a_recipe_again(sixfold, tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    _, out, _ = sixfold("show", str(tmp_path / "r.yaml"), "optimizer.lr=3e-5", "--plain")
    (tmp_path / "plain.yaml").write_text(out)
    assert load_recipe(tmp_path / "plain.yaml").recipe == load_recipe(tmp_path / "r.yaml", ["optimizer.lr=3e-5"]).recipe


@pytest.mark.parametrize(
    ("section", "setting", "allowed", "default"),
    [
        ("engine.fsdp", "replicate", "an integer from 1", "1"),
        ("engine.precision", "precision", "one of: auto, fp32, bf16", "auto"),
        ("train", "steps", "an integer from 1", "required"),
        ("networks.dit", "classes", "an integer from 0", "0"),
        ("networks.lm.moe_transformer.experts", "router", "one of: softmax, sigmoid", "softmax"),
        ("objective.denoising.path.vp_linear", "beta_max", "a number greater than 0", "20"),
        ("roles.critic.optimizer.adamw", "betas", "a list of 2, each a number from 0 and less than 1", "[0.9, 0.95]"),
        ("data.mixture", "weight", "a number greater than 0", "required"),
        ("networks", "width", "an integer from 4", "required"),
    ],
)
def test_help_describes_a_setting(sixfold, section, setting, allowed, default):
    code, out, _ = sixfold("help", section, "--json")
    rows = [row for table in json.loads(out) for row in table["rows"] if row.get("setting") == setting]
    assert code == 0
    assert any((row["allowed"], row["default"]) == (allowed, default) for row in rows), rows
    assert all(row["description"] for row in rows)
    assert setting in sixfold("help", section)[1]


def test_help_of_an_unknown_section_suggests_the_nearest(sixfold):
    code, _, err = sixfold("help", "engine.fdsp")
    assert code == 2
    assert "did you mean `engine.fsdp`?" in err
    assert sixfold("help", "train.steps.deeper")[0] == 2


def test_the_schema_admits_every_recipe_file_and_refuses_what_is_wrong(sixfold, tmp_path):
    from sixfold.config.loading import read_yaml
    from sixfold.pipeline.load import is_pipeline

    assert sixfold("schema", "--out", str(tmp_path / "s.json"))[0] == 0
    schema = json.loads((tmp_path / "s.json").read_text())
    assert json.loads(sixfold("schema")[1]) == schema
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for entry in catalogue():
        if not is_pipeline(entry.path):
            validator.validate(read_yaml(entry.path)[0].values)
    for wrong in ({"sede": 1}, {"train": {"steps": "many"}}, {"engine": {"type": "fdsp"}}, {"train": {"steps": 0}}):
        assert not validator.is_valid(wrong), wrong


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError.of("bad input", where="here", fix="mend it"), 2, "here: bad input\n  fix: mend it\n"),
        (EnvironmentFault.of("no room"), 3, "no room\n"),
        (KeyboardInterrupt(), 1, ""),
        (RuntimeError("a fault of the code"), 1, "RuntimeError: a fault of the code\n"),
        (typer.Exit(4), 1, ""),
    ],
    ids=["user", "environment", "interrupt", "unexpected", "exit"],
)
def test_exit_codes(sixfold, monkeypatch, raised, code, said):
    def fail() -> None:
        raise raised

    def register(app: typer.Typer) -> None:
        app.command()(fail)
        app.command()(lambda: None)

    monkeypatch.setitem(sys.modules, "failing_commands", types.SimpleNamespace(register=register))
    monkeypatch.setattr(main_module, "COMMAND_MODULES", ("failing_commands",))
    got, out, err = sixfold("fail")
    assert (got, out) == (code, "")
    assert err.endswith(said)
    assert ("Traceback" in err) == (type(raised) is RuntimeError)


@pytest.mark.parametrize(
    ("of_rank", "code", "said"),
    [(128 + signal.SIGKILL, 3, "rank 1 ended by SIGKILL"), (2, 2, "exit code 2"), (75, 1, "exit code 75")],
)
def test_a_rank_that_a_signal_ended_met_the_environment(sixfold, monkeypatch, tmp_path, of_rank, code, said):
    def register(app: typer.Typer) -> None:
        app.command()(lambda: fail(RunFolder(tmp_path), Outcome(exit_code=of_rank, rank=1)))

    monkeypatch.setitem(sys.modules, "failing_commands", types.SimpleNamespace(register=register))
    monkeypatch.setattr(main_module, "COMMAND_MODULES", ("failing_commands",))
    got, _, err = sixfold()
    assert got == code
    assert said in err


def test_a_wrong_option_is_the_user_s_fault(sixfold):
    assert sixfold("show")[0] == 2
    assert sixfold("show", "lm/moe-smoke", "--nope")[0] == 2
    assert sixfold("nope")[0] == 2


def test_what_the_system_refuses_is_one_screen_too(sixfold, tmp_path):
    code, _, err = sixfold("schema", "--out", str(tmp_path / "missing" / "schema.json"))
    assert code == 3
    assert f"{tmp_path}/missing/schema.json: the system refused: No such file or directory" in err
    assert "Traceback" not in err


def test_a_missing_demo_names_the_command_that_makes_it(sixfold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = sixfold("run", "flow/dit-smoke")
    assert code == 2
    assert "`sixfold data demo digits --out data/digits`" in err
    assert list(tmp_path.iterdir()) == []


def test_an_option_of_another_demo_is_refused(sixfold, tmp_path):
    code, _, err = sixfold("data", "demo", "digits", "--samples", "4", "--out", str(tmp_path / "digits"))
    assert code == 2
    assert "digits has no --samples" in err
    assert list(tmp_path.iterdir()) == []
    code, out, _ = sixfold("data", "demo", "scenes", "--samples", "2", "--out", str(tmp_path / "scenes"))
    assert code == 0
    assert "train: 1 samples" in out
    assert "val: 1 samples" in out


def test_as_many_ranks_are_rehearsed_as_can_share_the_batch(sixfold):
    code, out, err = sixfold("run", "lm/char-cpu", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["world_size"] == 4, "the largest power of two by which 12 samples divide"


def test_a_dry_run_shows_what_no_cluster_is_there_to_check(sixfold, tmp_path, demo_data, monkeypatch):
    words = ("submit", "lm/moe-smoke", f"data.path={demo_data / 'stdlib'}", "--to", "slurm", "--dry-run")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "gone.conf"))
    code, out, err = sixfold(*words, "--with", "snapshot.policy=installed", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert "#SBATCH --nodes=1" in shown["files"]["job.sbatch"]
    assert "sbatch is not installed" in shown["unchecked"] or "does not answer" in shown["unchecked"]


def test_a_file_is_no_run_folder(sixfold, tmp_path, demo_data):
    (tmp_path / "file").touch()
    code, _, err = sixfold(
        "run", "flow/dit-smoke", f"data.path={demo_data / 'digits'}", "--run-dir", str(tmp_path / "file")
    )
    assert code == 2
    assert "this is not an empty folder" in err
