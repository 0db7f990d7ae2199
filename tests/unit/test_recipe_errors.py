"""Malformed recipes: each gives one screen that names the fault, the place and the fix, exit code 2, no traceback."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from recipe_texts import FLOW, TEXT, line_of, replaced
from sixfold.cli import main as main_module
from sixfold.cli.screen import _error_lines
from sixfold.errors import Fault, RecipeError
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.load import load_recipe

LINES_OF_A_SCREEN = 40


@dataclass(frozen=True)
class Malformed:
    """A spoilt recipe and what the screen must say: the fault, the place and the fix."""

    text: str
    what: str
    place: str  # "@fragment" stands for the line of r.yaml that holds the fragment
    fix: str
    arguments: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def spoilt(text, old, new, what, place, fix, *arguments):
    return Malformed(replaced(text, old, new), what, place, fix, arguments)


def given(what, place, fix, *arguments, text=FLOW):
    return Malformed(text, what, place, fix, arguments)


CASES = {
    "misspelt key": spoilt(
        FLOW,
        "    width: 32",
        "    widht: 32",
        "networks.denoiser.widht: unknown key",
        "@widht",
        "did you mean `width`?",
    ),
    "misplaced key": spoilt(
        FLOW, "warmup_steps: 5}", "warmup_steps: 5, precision: bf16}", "unknown key", "@precision", "move it to engine"
    ),
    "unknown section": spoilt(FLOW, "schedule:", "shedule:", "shedule: unknown key", "@shedule", "`schedule`"),
    "missing key": spoilt(
        FLOW,
        "train:\n  steps: 100",
        "train:\n  ema_decay: 0.9",
        "train.steps is missing",
        "@train:",
        "add `steps: ...`",
    ),
    "missing section": spoilt(
        FLOW, "data: {path: data/digits, global_batch: 64}\n", "", "data is missing", "r.yaml", "data: ..."
    ),
    "value not among the literals": spoilt(
        FLOW,
        "  type: ddp",
        "  precision: fp16\n  type: ddp",
        "engine.precision: got 'fp16'",
        "@fp16",
        "did you mean `bf16`?",
    ),
    "out of bounds": spoilt(
        FLOW, "label_drop: 0.1", "label_drop: 1.5", "got 1.5", "@label_drop", "sixfold help objective.denoising"
    ),
    "negative": spoilt(
        FLOW, "lr: 1e-3", "lr: -1e-3", "optimizer.lr: got -0.001", "@lr", "sixfold help optimizer.adamw"
    ),
    "text for a number": spoilt(FLOW, "lr: 1e-3", "lr: fast", "optimizer.lr: got 'fast'", "@fast", "an allowed value"),
    "quoted number": spoilt(FLOW, "steps: 100", 'steps: "100"', "got '100'", '@steps: "', "write `100` without quotes"),
    "float for an integer": spoilt(FLOW, "steps: 100", "steps: 1e2", "got 100", "@1e2", "write `100`, an integer"),
    "number for text": spoilt(FLOW, "path: data/digits", "path: 5", "data.path: got 5", "@path: 5", "an allowed value"),
    "yes for true": spoilt(
        FLOW, "  type: ddp", "  type: ddp\n  compile: yes", "got 'yes'", "@yes", "`true` or `false`"
    ),
    "null where none may be": spoilt(FLOW, "steps: 100", "steps: null", "got null", "@steps: null", "an allowed value"),
    "unknown type": spoilt(FLOW, "type: ddp", "type: fdsp", "engine.type: got 'fdsp'", "@fdsp", "did you mean `fsdp`?"),
    "type left out": spoilt(
        FLOW, "  type: adamw\n", "", "optimizer.type is missing", "@optimizer:", "write `type: adamw`"
    ),
    "scalar for a section": spoilt(FLOW, "train:\n  steps: 100", "train: 100", "train: got 100", "@train: 100", "help"),
    "scalar for a list": spoilt(FLOW, "[loss, fd]", "fd", "metrics: got 'fd'", "@metrics: fd", "in brackets: [fd]"),
    "list of the wrong length": spoilt(
        FLOW, "lr: 1e-3", "lr: 1e-3\n  betas: [0.9]", "optimizer.betas: got [0.9]", "@betas", "an allowed value"
    ),
    "bad name of a network": spoilt(
        FLOW, "  denoiser:", "  De.noiser:", "'De.noiser' cannot be a name", "@De.noiser", "small letters"
    ),
    "bad name of the recipe": spoilt(
        FLOW, "flow/tiny", "../tiny", "name: got '../tiny'", "@../tiny", "an allowed value"
    ),
    "duplicate key": spoilt(
        FLOW, "train:\n  steps: 100", "train:\n  steps: 100\n  steps: 200", "written twice", "@steps: 200", "keep one"
    ),
    "no YAML": spoilt(FLOW, "  steps: 100", "  steps: [100", "this is not YAML", "r.yaml", "brackets"),
    "tab": spoilt(FLOW, "  steps: 100", "\tsteps: 100", "this is not YAML", "@\tsteps", "indentation"),
    "no mapping": Malformed("- name: x\n", "a recipe is a mapping", "r.yaml:1", "name: ..."),
    "empty": Malformed(
        "", "name, data, networks, objective, optimizer, train are missing", "r.yaml", "add `name: ...`"
    ),
    "tag": spoilt(FLOW, "steps: 100", "steps: !!python/int 100", "the tag", "@python", "remove the tag"),
    "base that is not there": Malformed("base: nope.yaml\n" + FLOW, "nope.yaml does not exist", "r.yaml:1", "relative"),
    "base that is no file name": Malformed("base: 3\n" + FLOW, "base must name a file", "r.yaml:1", "relative"),
    "bases in a cycle": Malformed(
        "base: other.yaml\n" + FLOW, "cycle: ", "other.yaml:1", "remove one", files={"other.yaml": "base: r.yaml\n"}
    ),
    "fault in a base": Malformed(
        "base: other.yaml\n" + FLOW, "sede: unknown key", "other.yaml:2", "`seed`", files={"other.yaml": "\nsede: 1\n"}
    ),
    "patch by image size": spoilt(
        FLOW, "patch_size: 2", "patch_size: 3", "divisible by patch_size", "@image_size", "change"
    ),
    "heads by KV heads": spoilt(
        TEXT, "kv_heads: 2", "kv_heads: 3", "divisible by kv_heads", "@    heads", "change kv_heads"
    ),
    "more active experts than experts": spoilt(
        TEXT, "top_k: 2", "top_k: 5", "top_k must not exceed", "@top_k", "lower top_k"
    ),
    "lanes by batch": spoilt(
        FLOW,
        "global_batch: 64",
        "global_batch: 64, lanes: 48",
        "expected lanes to divide global_batch",
        "@lanes",
        "choose",
    ),
    "micro-batch": spoilt(
        FLOW, "micro_batch: 32", "micro_batch: 24", "whole micro-batches", "@micro_batch", "set engine.micro_batch=16"
    ),
    "ranks by lanes": given("3 ranks cannot share 64 lanes", "@global_batch", "multiple of 3", "--nproc", "3"),
    "replicas by ranks": given(
        "replicas must divide the ranks",
        "override engine={type: fsdp, replicate: 3}",
        "engine.replicate=1",
        "engine={type: fsdp, replicate: 3}",
        "--nproc",
        "4",
    ),
    "no such network": given(
        "needs a network 'generator'", "@networks:", "objective.network=denoiser", "objective.network=generator"
    ),
    "network of another family": given(
        "cannot train this type",
        "@type: moe_transformer",
        "networks.lm.type=dit",
        "objective={type: denoising, network: lm}",
        "sampling=null",
        "evaluation=null",
        text=TEXT,
    ),
    "no such role": given("no such role", "override roles.denoisr", "roles.denoiser?", "roles.denoisr.engine.type=ddp"),
    "sampler of another family": given(
        "cannot draw",
        "override sampling={type: autoregressive}",
        "sampling.type=euler",
        "sampling={type: autoregressive}",
    ),
    "guidance without label drop": spoilt(
        FLOW, "label_drop: 0.1", "label_drop: 0.0", "trained without its condition", "@guidance", "label_drop=0.1"
    ),
    "metric of another family": spoilt(
        FLOW, "[loss, fd]", "[loss, bits_per_byte]", "does not apply", "@bits_per_byte", "remove bits_per_byte"
    ),
    "metrics of samples without sampling": given(
        "no sampling section", "@[loss, fd]", "add a sampling", "sampling=null"
    ),
    "text without a sequence length": spoilt(
        TEXT, ", sequence_length: 32", "", "data.sequence_length is missing", "@data:", "data.sequence_length=256"
    ),
    "pictures of another size": given(
        "pictures do not fit", "override data.image_size=16", "data.image_size=8", "data.image_size=16"
    ),
    "milestones never saved": given(
        "milestones", "override checkpoint={", "keep_every=2000", "checkpoint={every_steps: 1000, keep_every: 1500}"
    ),
    "unknown key of an override": given(
        "unknown key", "override train.step=5", "did you mean `steps`?", "train.step=5"
    ),
    "override without a value": given("not an override", "override train.steps", "an equals sign", "train.steps"),
    "override into a number": given("got a mapping", "override train.steps.x=1", "an allowed value", "train.steps.x=1"),
    "override that is no YAML": given("this is not YAML", "override a=[1", "quote the value", "a=[1"),
}


def screen_of(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sixfold", *arguments])
    code = main_module.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_malformed_recipe_gives_one_screen_with_fault_place_and_fix(case, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(case.text)
    for name, text in case.files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    code, out, err = screen_of(["show", "r.yaml", *case.arguments], monkeypatch, capsys)
    place = f"r.yaml:{line_of(case.text, case.place[1:])}" if case.place.startswith("@") else case.place
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) <= LINES_OF_A_SCREEN
    blocks = [block for block in blocks_of(err) if case.what in block]
    assert len(blocks) == 1, err
    assert blocks[0].startswith(place), err
    assert case.fix in blocks[0].partition("  fix: ")[2], err


def blocks_of(screen):
    """The faults of a screen: a line at the margin and the indented ones below it."""
    blocks = []
    for line in screen.splitlines(keepends=True):
        if line.startswith("  "):
            blocks[-1] += line
        else:
            blocks.append(line)
    return blocks


@pytest.mark.parametrize("name", ["misspelt key", "duplicate key", "no such network"])
def test_the_installed_command_says_the_same_in_a_process_of_its_own(name, tmp_path):
    case = CASES[name]
    (tmp_path / "r.yaml").write_text(case.text)
    command = [sys.executable, "-m", "sixfold.cli.main", "show", "r.yaml", *case.arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert case.what in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_faults_of_a_recipe_are_reported_at_once(tmp_path):
    text = FLOW
    for old, new in (
        ("    width: 32", "    widht: 32"),
        ("lr: 1e-3", "lr: fast"),
        ("type: cosine", "type: cosin"),
        ("  type: ddp", "  type: ddp\n  compile: yes"),
        ("  steps: 100", "  stepz: 100"),
        ("[loss, fd]", "[loss, fdd]"),
    ):
        text = replaced(text, old, new)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "r.yaml", ["seed=-1"])
    whats = " | ".join(fault.what for fault in raised.value.faults)
    for key in (
        "widht",
        "denoiser.width is missing",
        "optimizer.lr",
        "schedule.type",
        "engine.compile",
        "train.stepz",
        "train.steps is missing",
        "evaluation.metrics.1",
        "seed",
    ):
        assert key in whats, key
    assert all(fault.where and fault.fix for fault in raised.value.faults)


def test_all_cross_checks_are_reported_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    changes = ["engine.micro_batch=3", "data.sequence_length=null", "checkpoint.keep_every=7", "roles.x={}"]
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "r.yaml", changes)
    assert len(raised.value.faults) == 4


def test_a_fault_shared_by_roles_and_recipe_is_said_once_and_only_rank_checks_need_ranks(tmp_path):
    (tmp_path / "r.yaml").write_text(FLOW)
    loaded = load_recipe(tmp_path / "r.yaml")
    check_recipe(loaded.recipe, 2, provenance=loaded.provenance)
    with pytest.raises(RecipeError) as raised:
        check_recipe(loaded.recipe, 128)
    assert [fault.where for fault in raised.value.faults] == ["recipe flow/tiny"]  # without provenance: the name


def test_a_micro_batch_larger_than_a_rank_s_share_is_no_fault(tmp_path):
    """The same recipe runs on more ranks without a change: what would not fit is simply one micro-batch."""
    (tmp_path / "r.yaml").write_text(FLOW)
    check_recipe(load_recipe(tmp_path / "r.yaml").recipe, 64)


def test_more_faults_than_fit_are_counted_and_the_screen_stays_one():
    faults = [Fault(what=f"fault {n}", where="r.yaml:1", allowed="a", fix="b") for n in range(100)]
    lines = [line for line, _ in _error_lines(faults, columns=80, lines=20)]
    assert len(lines) == 19
    assert lines[-1] == "... and 94 more; mend these first"
    assert len(_error_lines([Fault(what="x" * 5000)], columns=80, lines=20)) == 1


def test_a_recipe_that_is_not_there_suggests_the_nearest_name(monkeypatch, capsys):
    code, _, err = screen_of(["show", "moe-smok"], monkeypatch, capsys)
    assert code == 2
    assert "did you mean `lm/moe-smoke`?" in err
    assert "sixfold recipes" in err


def test_a_recipe_that_is_no_text_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00name")
    code, _, err = screen_of(["show", str(tmp_path / "r.yaml")], monkeypatch, capsys)
    assert code == 2
    assert "is not UTF-8 text" in err


def test_compiled_roles_share_one_budget_of_activations():
    def engine(role, share, *, compiled=True):
        budget = f"activation_checkpointing: budget, activation_memory_budget: {share}, " if share else ""
        return f"roles.{role}.engine={{type: ddp, {budget}compile: {str(compiled).lower()}}}"

    def check(*engines):
        check_recipe(load_recipe("codec/vq-smoke", engines).recipe)

    for other in (0.5, None):
        with pytest.raises(RecipeError, match=r"differ in activation_memory_budget \(codec: 0.25, discriminator: "):
            check(engine("codec", 0.25), engine("discriminator", other))
    check(engine("codec", 0.25), engine("discriminator", 0.25))
    check(engine("codec", 0.25), engine("discriminator", None, compiled=False))
