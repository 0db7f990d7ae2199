"""``sixfold data encode``: a codec's latents of a data set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sixfold.cli.data_commands import JsonOption, OutOption, SourceArgument, print_build, progress
from sixfold.cli.outcome import fail

if TYPE_CHECKING:
    from sixfold_data.encode import EncodeJob

_POLL_S = 0.5


def encode(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A codec's run folder or run id.", show_default=False)],
    source: SourceArgument,
    *,
    out: OutOption,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images encoded at once, by each process.")] = 128,
    piece_samples: Annotated[
        int, typer.Option(min=1, help="Images in a shard: the most that a stopped process loses.")
    ] = 4096,
    corrupt_budget: Annotated[int, typer.Option(min=0, help="Unreadable images of a shard passed over.")] = 10,
    bucket_area: Annotated[
        int | None,
        typer.Option(min=1, help="Bring images to several sizes, each of at most so many pixels.", show_default="one"),
    ] = None,
    bucket_step: Annotated[int, typer.Option(min=1, help="With --bucket-area: what sides are multiples of.")] = 64,
    bucket_ratio: Annotated[float, typer.Option(min=1.0, help="With --bucket-area: longest side over shortest.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Write a codec's latents of a data set, with its labels and captions; the same command goes on after a stop."""
    from sixfold.recipe.trained import locate_run
    from sixfold.train.encoding import encode_in, plan_job
    from sixfold_data.config import BucketsConfig
    from sixfold_data.encode import finish_job, finished_samples, open_job, pieces_of

    buckets = None
    if bucket_area is not None:
        buckets = BucketsConfig(area=bucket_area, step=bucket_step, max_aspect_ratio=bucket_ratio)
    job = plan_job(
        locate_run(run),
        source,
        batch=batch,
        piece_samples=piece_samples,
        corrupt_budget=corrupt_budget,
        buckets=buckets,
    )
    staging = open_job(job, out)
    in_all = sum(len(piece.samples) for piece in pieces_of(job))
    with progress("images") as told:
        if nproc > 1:
            with _watched(job, staging, lambda done: told(done, in_all)):
                _encode_on_ranks(staging, nproc)
        else:
            done = finished_samples(job, staging)

            def count(samples: int) -> None:
                nonlocal done
                done += samples
                told(done, in_all)

            encode_in(staging, progress=count)
    print_build(finish_job(job, staging, out), as_json)


def encode_text(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN", help="A recipe, or a run's folder: whose frozen text encoders.", show_default=False
        ),
    ],
    source: SourceArgument,
    *,
    out: OutOption,
    batch: Annotated[int, typer.Option(min=1, help="Captions encoded at once.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Write a captioned data set, or latents of one, again with what frozen text encoders make of its captions."""
    from sixfold.recipe.load import load_recipe
    from sixfold.tracking.runs import is_run
    from sixfold.train.run_folder import RunFolder
    from sixfold.train.text_cache import encode_text as write

    folder = Path(recipe)
    loaded = load_recipe(str(RunFolder(folder).recipe) if is_run(folder) else recipe).recipe
    with progress("captions") as told:
        report = write(loaded, source, out, batch=batch, progress=told)
    print_build(report, as_json)


def _encode_on_ranks(staging: Path, nproc: int) -> None:
    from sixfold.train.run_folder import RunFolder
    from sixfold_launchers.local import launch

    outcome = launch(staging, ranks=nproc, module="sixfold.train.encoding")
    if outcome.exit_code:
        fail(RunFolder(staging), outcome)


@contextmanager
def _watched(job: EncodeJob, staging: Path, told: Callable[[int], None]) -> Iterator[None]:
    """Tell now and then how many samples are in finished pieces."""
    from sixfold_data.encode import finished_samples

    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            told(finished_samples(job, staging))

    watcher = threading.Thread(target=watch, name="watch-pieces", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
