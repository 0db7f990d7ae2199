"""Small students from end to end: trained and sampled from what other runs left, and refused where it does not fit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latent_cases import codec_run, make_scenes, train_run
from sixfold.cli.main import build_app, main
from sixfold.distributed.process_group import World
from sixfold.errors import RecipeError, UserError
from sixfold.recipe.load import load_recipe
from sixfold.recipe.trained import locate_run, network_of_run, resolve_networks
from sixfold.samplers.config import FewStepConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.train.assembly import assemble
from sixfold.train.codec_identity import check_teachers
from sixfold.train.fitting import check_data_fits
from sixfold.train.sampling import SampleOptions, sample_run
from sixfold_data.describe import describe

TINY = ("data.global_batch=16", "tracking.type=jsonl", "evaluation=null", "train.ema=null")
WIDTHS = tuple(f"networks.denoiser.{part}" for part in ("width=16", "depth=2", "heads=2", "time_scale=8.0"))


@pytest.fixture(scope="module")
def ddpm_teacher(demo_data, tmp_path_factory):
    """A teacher by DDPM: the cosine path, predicting the noise."""
    path = ("objective.path.type=vp_cosine", "objective.prediction=noise")
    recipe = load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *TINY, *WIDTHS, *path]).recipe
    return train_run(recipe, tmp_path_factory.mktemp("ddpm") / "teacher", steps=2)


def student_of(teacher, demo_data, *overrides, name="distill/consistency-distill-smoke"):
    """A student's recipe, wider than its teacher, on the rectified path."""
    scalars = "[guidance]" if "lcm" in name else "[]"
    shape = "image_size: 8, patch_size: 4, channels: 1, width: 32, depth: 1, heads: 2, classes: 10"
    chosen = ("objective.start=fresh", "objective.path={type: rectified_flow}", "objective.prediction=velocity")
    where = (f"data.path={demo_data / 'digits'}", f"networks.teacher.run={teacher}")
    return load_recipe(
        name, [*where, f"networks.denoiser={{type: dit, {shape}, scalars: {scalars}}}", *chosen, *TINY, *overrides]
    ).recipe


def test_a_ddpm_teacher_teaches_a_wider_student_on_the_rectified_path(ddpm_teacher, demo_data, tmp_path):
    recipe = student_of(ddpm_teacher, demo_data)
    networks = resolve_networks(recipe)
    taught, known = recipe.objective.as_denoising(networks), recipe.objective.teacher_as_denoising(networks)
    assert (taught.path.type, taught.prediction) == ("rectified_flow", "velocity")
    assert (known.path.type, known.prediction) == ("vp_cosine", "noise")
    run = train_run(recipe, tmp_path / "student", steps=2)
    drawn = sample_run(run, SampleOptions(count=4, steps=2, out=tmp_path / "out"))
    assert drawn.step == 2
    images = np.load(tmp_path / "out" / "samples.npz")["image"]
    assert images.shape == (4, 1, 8, 8)
    assert np.isfinite(images).all()


def test_the_guidance_that_a_student_was_told_reaches_it_by_the_command(ddpm_teacher, demo_data, tmp_path):
    recipe = student_of(ddpm_teacher, demo_data, name="distill/lcm-smoke")
    run = train_run(recipe, tmp_path / "student", steps=2)
    words = ["sample", str(run), "--n", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "out" / "samples.npz")["image"].shape == (2, 1, 8, 8)


class Told(torch.nn.Module):
    """A student that believes in the data 0.25 everywhere, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, time, condition):
        self.asked.append((x, time[0].item(), condition))
        return (x - 0.25) / time.clamp(min=1e-6).reshape(-1, 1, 1, 1)


def draw(student, *overrides, **settings):
    config = FewStepConfig(**settings)
    recipe = load_recipe("distill/lcm-smoke", overrides).recipe
    networks = resolve_networks(recipe, planning=True)
    sampler = config.load()(config, recipe.objective, networks)
    request = SampleRequest(seed=3, numbers=torch.arange(2), conditions={"label": torch.tensor([1, 2])})
    return sampler({"denoiser": student}, request)["image"]


def test_multistep_consistency_noises_the_data_anew_at_given_times():
    student = Told()
    torch.testing.assert_close(draw(student, times=(1.0, 0.6, 0.2)), torch.full((2, 1, 8, 8), 0.25))
    assert [round(time, 6) for _, time, _ in student.asked] == [1.0, 0.6, 0.2]
    noises = [(x - (1 - time) * 0.25) / time for x, time, _ in student.asked]
    assert all(abs(noise.std().item() - 1.0) < 0.3 for noise in noises)
    assert (noises[1] - noises[0]).abs().max() > 1.0
    assert (noises[2] - noises[1]).abs().max() > 1.0
    kept = Told()
    draw(kept, times=(1.0, 0.6, 0.2), stochastic=False)
    noises = [(x - (1 - time) * 0.25) / time for x, time, _ in kept.asked]
    torch.testing.assert_close(noises[1], noises[0], rtol=1e-4, atol=1e-4)


def test_jumps_start_where_students_are_trained():
    student = Told()
    draw(student, steps=4)
    assert [round(time, 6) for _, time, _ in student.asked] == [1.0, 0.75, 0.5, 0.25]
    student = Told()
    edm = ("objective.start=fresh", "objective.path.type=edm", "objective.prediction=v")
    draw(student, *edm, steps=2)
    middle = (0.5 * (80.0 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
    assert [time for _, time, _ in student.asked] == pytest.approx([80.0, middle], rel=1e-5)


def test_a_student_is_told_its_guidance():
    student = Told()
    draw(student, steps=2, told_guidance=7.5)
    assert [condition["guidance"].tolist() for _, _, condition in student.asked] == [[7.5, 7.5]] * 2
    silent = Told()
    draw(silent, steps=1)
    assert "guidance" not in silent.asked[0][2]


def test_a_run_is_found_by_its_recipe_and_the_newest_is_latest(ddpm_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = json.loads((ddpm_teacher / "run.json").read_text())["recipe"]
    for number, name in enumerate(("20260101-000000-aaaa", "20260102-000000-bbbb")):
        copy = tmp_path / "runs" / recipe / name
        shutil.copytree(ddpm_teacher, copy)
        lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
        times = [{**line, "time": line["time"] + 1000 * number} if "time" in line else line for line in lines]
        (copy / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    dashed = recipe.replace("/", "-")
    assert locate_run(f"run://{recipe}@latest").name == "20260102-000000-bbbb"
    assert locate_run(f"run://{dashed}@latest") == locate_run(f"run://{recipe}")
    assert locate_run(f"run://{recipe}@20260101-000000-aaaa").name == "20260101-000000-aaaa"
    for missing in ("run://nothing@latest", f"run://{recipe}@20260103-000000-cccc"):
        with pytest.raises(UserError, match=rf"there is no run(.*\n)*.*run://{recipe}@latest"):
            locate_run(missing)


def test_a_missing_teacher_stops_the_command_before_it_makes_a_run(demo_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sixfold", "run", "distill/consistency-distill-smoke", f"data.path={demo_data / 'digits'}"]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 2
    said = capsys.readouterr().err
    assert "networks.teacher" in said
    assert "no such run" in said
    assert "fix: train it first" in said
    assert not (tmp_path / "runs").exists()


def test_a_teacher_on_another_path_stops_a_student_that_cannot_have_it(ddpm_teacher, demo_data):
    where = [
        f"data.path={demo_data / 'digits'}",
        *(f"networks.{n}.run={ddpm_teacher}" for n in ("teacher", "denoiser")),
    ]
    recipe = load_recipe("distill/consistency-distill-smoke", [*where, *TINY]).recipe
    with pytest.raises(RecipeError, match="boundary condition"):
        assemble(recipe, World())


def test_a_teacher_of_other_classes_is_refused(ddpm_teacher, demo_data):
    recipe = student_of(ddpm_teacher, demo_data)
    info = describe(recipe.data)
    check_data_fits(recipe, info)
    renamed = replace(info, classes=("nought", *info.classes[1:]))
    with pytest.raises(
        RecipeError, match=r"trained on other classes: number 0 is .* 'nought' in this data set \(1 of 10"
    ):
        check_data_fits(recipe, renamed)


def test_a_teacher_of_another_latent_space_is_refused(tmp_path):
    scenes = make_scenes(tmp_path / "scenes")
    own, other = (codec_run(scenes, tmp_path / f"codec{seed}", f"seed={seed}", steps=1) for seed in (0, 1))
    recipe = load_recipe("distill/consistency-distill", [f"networks.codec.run={own}"]).recipe
    networks = resolve_networks(recipe, planning=True)

    def taught_on(codec):
        return {**networks, "teacher": replace(networks["teacher"], codec=network_of_run(codec, "codec"))}

    check_teachers(recipe, taught_on(own))
    check_teachers(recipe, taught_on(shutil.copytree(own, tmp_path / "copy")))
    with pytest.raises(RecipeError, match=r"networks.teacher was trained on latents of codec .*another latent space"):
        check_teachers(recipe, taught_on(other))
