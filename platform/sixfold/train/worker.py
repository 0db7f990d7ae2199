"""What every rank does with a run folder, from its recipe to the last checkpoint.

Run as ``python -m sixfold.train.worker RUN_FOLDER`` by a launcher, which sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sixfold.checkpoint.checkpointer import Checkpointer
from sixfold.distributed import process_group
from sixfold.distributed.process_group import World
from sixfold.errors import SixfoldError, TrainingError
from sixfold.recipe.facts import tokens_per_sample
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.tracking.environment import collect_environment
from sixfold.tracking.events import EventLog, Status
from sixfold.tracking.tracker import open_tracker
from sixfold.train.assembly import assemble, open_checkpointer, open_stream, progress_at
from sixfold.train.display import Display, open_display
from sixfold.train.evaluator import Evaluator
from sixfold.train.hooks import Checkpoint, Evaluate, Log
from sixfold.train.loop import Training, train
from sixfold.train.performance import peak_flops_per_second, training_flops_per_sample
from sixfold.train.run_folder import RunFolder


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads at step boundaries."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True

    def __call__(self) -> bool:
        """Whether to save and end at the next step boundary."""
        return self.requested


def main() -> None:
    """Work on the run folder named on the command line; leave any error where the launcher looks for it."""
    folder, rank = RunFolder(Path(sys.argv[1])), int(os.environ.get("RANK", "0"))
    _end_with_parent()
    try:
        run(folder)
        process_group.leave()
    except Exception as error:  # the one place that reports for the whole process
        folder.leave_error(rank, str(error) if isinstance(error, SixfoldError) else traceback.format_exc())
        # Other ranks may wait in a collective that will never complete: leave without meeting them.
        _end_now(error.exit_code if isinstance(error, SixfoldError) else 1)


def run(folder: RunFolder) -> Status:
    """Train, or go on training, what the run folder's recipe says; return how it ended."""
    stop_requested = StopRequest()
    recipe = load_recipe(folder.recipe).recipe
    world = process_group.join()
    training = assemble(recipe, world, quarantine=folder.quarantine)
    checkpointer = open_checkpointer(recipe, world, folder.checkpoints)
    notes: list[str] = []
    restore(recipe, world, folder, training, checkpointer, notes)
    status: Status = "failed"
    with _recording(recipe, world, folder, training) as (events, display):
        for note in notes:
            display.note(note)
        try:
            status = _train_with_rollback(
                recipe, world, folder, training, checkpointer, events, display, stop_requested
            )
        finally:
            if events is not None:
                events.finished(step=training.progress.step, status=status)
    checkpointer.close()
    training.stream.close()
    for engine in training.engines.values():
        engine.close()
    return status


def restore(
    recipe: Recipe, world: World, folder: RunFolder, training: Training, checkpointer: Checkpointer, notes: list[str]
) -> bool:
    """Take over the newest checkpoint that verifies, if there is one; every newer one that does not is noted."""
    candidate = checkpointer.newest_verified(notes.append)
    if candidate is None:
        return False
    templates = {role: engine.checkpoint_template() for role, engine in training.engines.items()}
    extra = checkpointer.load(candidate, templates)
    for role, engine in training.engines.items():
        engine.load_checkpoint_state(templates[role])
    saved = extra["progress"]
    assert isinstance(saved, dict)
    assert isinstance(extra["data"], dict)
    training.stream.check_state(extra["data"])
    training.stream.close()
    samples = saved["samples"]
    assert isinstance(samples, int)
    training.stream = open_stream(recipe, world, samples=samples, quarantine=folder.quarantine)
    training.progress = progress_at(recipe, samples)
    notes.append(f"resumed after step {training.progress.step} from {candidate.uri}")
    return True


@contextmanager
def _recording(
    recipe: Recipe, world: World, folder: RunFolder, training: Training
) -> Iterator[tuple[EventLog | None, Display]]:
    """The event log with its tracker, on rank 0 alone, and the display, on all ranks."""
    display = open_display(
        rank=world.rank, total_steps=recipe.train.steps, start_step=training.progress.step, name=recipe.name
    )
    if world.rank != 0:
        yield None, display
        return
    events = EventLog(folder.path)
    events.begin(step=training.progress.step)
    tracker = open_tracker(
        recipe.tracking,
        events,
        run_id=folder.run_id,
        recipe_name=recipe.name,
        params=recipe.model_dump(mode="json"),
        tags=collect_environment().as_tags(),
        recipe_path=folder.recipe,
    )
    try:
        yield events, display
    finally:
        display.close()
        tracker.close()
        display.note(f"tracked at {tracker.where}")
        events.close()


def _train_with_rollback(
    recipe: Recipe,
    world: World,
    folder: RunFolder,
    training: Training,
    checkpointer: Checkpointer,
    events: EventLog | None,
    display: Display,
    stop_requested: StopRequest,
) -> Status:
    """Train; when the budget of skipped steps is spent, go back once to the last good checkpoint, then give up."""
    log = Log(
        events=events,
        display=display,
        every_steps=recipe.train.log_every_steps,
        tokens_per_sample=tokens_per_sample(recipe),
        training_flops_per_sample=training_flops_per_sample(recipe, training),
        peak_flops_per_second=peak_flops_per_second(world, recipe) * world.size,
    )
    evaluator = Evaluator(recipe, world, folder, events, display) if recipe.evaluation is not None else None
    checkpoint = Checkpoint(checkpointer=checkpointer, log=log, every_steps=recipe.checkpoint.every_steps)
    hooks = [*([Evaluate(evaluator=evaluator, log=log)] if evaluator else []), log, checkpoint]
    rolled_back = False
    while True:
        try:
            complete = train(training, hooks, stop_requested)
        except TrainingError:
            spent_at = training.progress.step
            notes: list[str] = []
            if rolled_back or not restore(recipe, world, folder, training, checkpointer, notes):
                raise
            rolled_back = True
            training.consecutive_skips = 0
            if events is not None:
                events.rolled_back(from_step=spent_at, to_step=training.progress.step)
            display.note(f"too many skipped steps by step {spent_at}: {notes[-1]}")
            continue
        checkpointer.wait()
        checkpoint.publish()
        return "finished" if complete else "interrupted"


def _end_with_parent() -> None:
    """End this process when its launcher is gone: an orphan would hold memory and devices for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        _end_now(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _end_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
