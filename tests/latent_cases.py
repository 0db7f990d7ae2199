"""A small codec trained for a moment, its run folder, and latents that it made: what tests of latents stand on."""

from __future__ import annotations

from pathlib import Path

from recipe_cases import save
from sixfold.distributed.process_group import World
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.tracking.events import EventLog
from sixfold.train.assembly import assemble, open_checkpointer
from sixfold.train.encoding import encode_in, plan_job
from sixfold.train.loop import train_step
from sixfold.train.run_folder import prepare_run_folder, take_up
from sixfold.train.worker import Job
from sixfold_data.build import BuildOptions
from sixfold_data.encode import finish_job, open_job
from sixfold_data.scenes import build_scenes

TINY_CODEC = (
    "data.global_batch=8",
    "networks.codec.width=4",
    "networks.codec.groups=2",
    "networks.codec.multipliers=[1,1,2]",
    "tracking.type=jsonl",
    "evaluation=null",
)


def make_scenes(folder: Path, samples: int = 40, image_size: int = 32) -> Path:
    """Build captioned scenes."""
    build_scenes(BuildOptions(out=folder, shard_bytes=1 << 16), samples, image_size)
    return folder


def train_run(recipe: Recipe, folder: Path, steps: int) -> Path:
    """Train a recipe in this process and leave a run folder with one checkpoint."""
    run = prepare_run_folder(recipe, folder, resume=False)
    take_up(run, recipe)
    training, world = assemble(recipe, World()), World()
    checkpointer = open_checkpointer(recipe, world, run.checkpoints)
    job = Job(recipe=recipe, world=world, folder=run, training=training, checkpointer=checkpointer)
    for _ in range(steps):
        training.progress = train_step(training, next(training.stream)).progress
    save(job)
    events = EventLog(run.path)  # what tells a run folder from others
    events.begin(step=0)
    events.close()
    job.close()
    return folder


def codec_run(data: Path, folder: Path, *overrides: str, steps: int = 2) -> Path:
    """Train a tiny codec on scenes for a few steps."""
    recipe = load_recipe("codec/kl-scenes-smoke", [f"data.path={data}", *TINY_CODEC, *overrides]).recipe
    return train_run(recipe, folder, steps)


def encode_run(codec: Path, data: Path, out: Path) -> Path:
    """Write the latents that a codec's run makes of a data set, in this process."""
    job = plan_job(codec, str(data), batch=8, piece_samples=64, corrupt_budget=0)
    staging = open_job(job, out)
    encode_in(staging, progress=lambda samples: None)
    finish_job(job, staging, out)
    return out
