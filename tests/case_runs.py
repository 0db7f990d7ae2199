"""The runs that recipes under test start from, made once beside the demo data: a teacher, a codec, its latents."""

from __future__ import annotations

from pathlib import Path

from latent_cases import codec_run, encode_run, train_run
from recipe_cases import CASES, SMALL_DENOISER
from sixfold.recipe.load import load_recipe

TEACHER, CODEC = "teacher", "codec"


def prepare(name: str, data: Path) -> str:
    """Make what a case starts from; return the folder of the data as ranks are told it."""
    makers = {TEACHER: make_teacher, CODEC: make_latents}
    for run in set(CASES[name].runs.values()):
        makers[run](data)
    return str(data)


def make_teacher(data: Path) -> None:
    """Leave a run of a small flow on the digits in ``data/teacher``, trained in this process until it is no mere noise.

    Hardly trained, its last layer is near zero, and what students of it have to learn is near rounding.
    """
    if (data / TEACHER).exists():
        return
    small = [f"networks.denoiser.{setting}" for setting in SMALL_DENOISER]
    fast = ("optimizer.lr=5e-3", "schedule.warmup_steps=5", "train.ema={type: constant, decay: 0.8}")
    overrides = [f"data.path={data}/digits", "data.global_batch=32", "tracking.type=jsonl", *fast, *small]
    train_run(load_recipe("flow/dit-smoke", overrides).recipe, data / TEACHER, steps=40)


def make_latents(data: Path) -> None:
    """Leave a small codec's run in ``data/codec`` and its latents of the scenes in ``data/latents``."""
    if (data / CODEC).exists():
        return
    codec_run(data / "scenes", data / CODEC, "networks.codec.image_size=16")
    encode_run(data / CODEC, data / "scenes", data / "latents")
