"""What every rank does with a run folder, from its recipe to the last checkpoint.

Launchers start :mod:`sixfold.train.rank`, which comes here, and set RANK and WORLD_SIZE.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sixfold.checkpoint.checkpointer import Checkpointer
from sixfold.distributed import process_group
from sixfold.distributed.process_group import World
from sixfold.errors import TrainingError, user_facing
from sixfold.recipe.facts import tokens_per_sample
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.tracking.environment import collect_environment
from sixfold.tracking.events import EventLog, Status
from sixfold.tracking.system import sampling
from sixfold.tracking.tracker import open_tracker
from sixfold.train.assembly import assemble, open_checkpointer, open_snapshots, open_stream, progress_at
from sixfold.train.display import Display, open_display
from sixfold.train.evaluator import Evaluator
from sixfold.train.health import HangDetector
from sixfold.train.hooks import Checkpoint, Evaluate, Log, SavedExtra
from sixfold.train.loop import Hook, Training, train
from sixfold.train.performance import peak_flops_per_second, training_flops_per_sample
from sixfold.train.preflight import preflight
from sixfold.train.rank import StopRequest
from sixfold.train.run_folder import RunFolder

# from glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def main(stop_requested: Callable[[], bool]) -> None:
    """Work on the run folder named on the command line; leave any error where the launcher looks for it."""
    folder, rank = RunFolder(Path(sys.argv[1])), int(os.environ.get("RANK", "0"))
    _end_with_parent()
    _keep_freed_memory()
    try:
        run(folder, stop_requested)
        process_group.leave()
    except Exception as error:  # the one place that reports for the whole process
        known = user_facing(error)
        folder.leave_error(rank, traceback.format_exc() if known is None else str(known))
        # Other ranks may wait in a collective that will never complete: leave without meeting them.
        _end_now(1 if known is None else known.exit_code)


def run(folder: RunFolder, stop_requested: Callable[[], bool] | None = None) -> Status:
    """Train, or go on training, what the run folder's recipe says; return how it ended.

    ``stop_requested`` is asked at every step whether this rank wants all to save and end; by default signals say so.
    """
    stop_requested = stop_requested or StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    folder.forget_failure(rank)
    with HangDetector(folder, rank) as detector:
        return _run(folder, stop_requested, detector)


def _run(folder: RunFolder, stop_requested: Callable[[], bool], detector: HangDetector) -> Status:
    recipe = load_recipe(folder.recipe).recipe
    world = process_group.join()
    notes = preflight(world, folder)
    job = Job(
        recipe=recipe,
        world=world,
        folder=folder,
        training=assemble(recipe, world, quarantine=folder.quarantine, cache=folder.features),
        checkpointer=open_checkpointer(recipe, world, folder.checkpoints),
        snapshots=open_snapshots(recipe, world, folder.snapshots),
    )
    status: Status = "failed"
    job.restore(notes.append)
    with job.recording() as (events, display):
        for note in notes:
            display.note(note)
        try:
            status = job.train(events, display, stop_requested, detector)
        finally:
            if events is not None:
                events.finished(step=job.training.progress.step, status=status)
    job.close()
    return status


@dataclass(kw_only=True)
class Job:
    """One attempt of a run on this rank."""

    recipe: Recipe
    world: World
    folder: RunFolder
    training: Training
    checkpointer: Checkpointer
    snapshots: Checkpointer | None = None

    def restore(self, note: Callable[[str], None], *, later_than: int = -1) -> bool:
        """Take over the newest checkpoint that verifies; ``note`` hears which, and why newer ones were passed over.

        Returns:
            Whether there was one of a step after ``later_than``.
        """
        candidate = self.checkpointer.newest_verified(note)
        if candidate is None or candidate.step <= later_than:
            return False
        parts = self.training.saved
        templates = {role: part.checkpoint_template() for role, part in parts.items()}
        extra = self.checkpointer.load(candidate, templates)
        for role, part in parts.items():
            part.load_checkpoint_state(templates[role])
        saved = SavedExtra.model_validate(extra)
        self.training.stream.check_state(saved.data)
        self.training.stream.close()
        samples = saved.samples
        self.training.stream = open_stream(self.recipe, self.world, samples=samples, quarantine=self.folder.quarantine)
        self.training.progress = progress_at(self.recipe, samples)
        self.training.skips, self.training.consecutive_skips = saved.skips, saved.consecutive_skips
        note(f"resumed after step {self.training.progress.step} from {candidate.uri}")
        return True

    @contextmanager
    def recording(self) -> Iterator[tuple[EventLog | None, Display]]:
        """The event log with its tracker, on rank 0 alone, and the display, on all ranks."""
        recipe, start_step = self.recipe, self.training.progress.step
        display = open_display(
            rank=self.world.rank, total_steps=recipe.train.steps, start_step=start_step, name=recipe.name
        )
        if self.world.rank != 0:
            yield None, display
            return
        events = EventLog(self.folder.path)
        environment = collect_environment()
        self.folder.record_environment(events.begin(step=start_step), environment.as_dict())
        tracker = open_tracker(
            recipe.tracking,
            events,
            run_id=self.folder.run_id,
            recipe_name=recipe.name,
            params=recipe.model_dump(mode="json"),
            tags=environment.as_tags(),
            recipe_path=self.folder.recipe,
        )
        try:
            yield events, display
        finally:
            display.close()
            tracker.close()
            display.note(f"tracked at {tracker.where}")
            events.close()

    def train(
        self, events: EventLog | None, display: Display, stop_requested: Callable[[], bool], detector: HangDetector
    ) -> Status:
        """Train; when the budget of skipped steps is spent, go back to the last good checkpoint.

        Give up when no later one was saved since the last time: what spent the budget is no accident then.
        """
        hooks, checkpoint = self._hooks(events, display)
        sampler = nullcontext() if events is None else sampling(self.recipe.tracking, events)
        with sampler, detector.during_steps(self.recipe.train.hang_after_s, after=self.training.progress.step):
            return self._train([*hooks, detector], checkpoint, events, display, stop_requested)

    def _train(
        self,
        hooks: Sequence[Hook],
        checkpoint: Checkpoint,
        events: EventLog | None,
        display: Display,
        stop_requested: Callable[[], bool],
    ) -> Status:
        gone_back_to = -1
        while True:
            try:
                complete = train(self.training, hooks, stop_requested)
            except TrainingError:
                spent_at = self.training.progress.step
                if not self.restore(display.note, later_than=gone_back_to):
                    raise
                gone_back_to = self.training.progress.step
                self.training.consecutive_skips = 0
                if events is not None:
                    events.rolled_back(from_step=spent_at, to_step=gone_back_to)
                continue
            self.checkpointer.wait()
            if self.snapshots is not None:
                self.snapshots.wait()
            checkpoint.publish()
            status: Status = "finished" if complete else "interrupted"
            saved = "" if checkpoint.newest is None else f"; newest checkpoint: {checkpoint.newest}"
            display.note(f"{status} after step {self.training.progress.step}{saved}")
            return status

    def _hooks(self, events: EventLog | None, display: Display) -> tuple[list[Hook], Checkpoint]:
        recipe, world = self.recipe, self.world
        log = Log(
            events=events,
            display=display,
            every_steps=recipe.train.log_every_steps,
            tokens_per_sample=tokens_per_sample(recipe),
            training_flops_per_sample=training_flops_per_sample(recipe, self.training),
            peak_flops_per_second=peak_flops_per_second(world, recipe) * world.size,
        )
        checkpoint = Checkpoint(
            checkpointer=self.checkpointer,
            log=log,
            every_steps=recipe.checkpoint.every_steps,
            snapshots=self.snapshots,
        )
        if recipe.evaluation is None:
            return [log, checkpoint], checkpoint
        evaluator = Evaluator(recipe, world, self.folder.features, self.folder.quarantine)
        if self.training.progress.step < recipe.train.steps:
            evaluator.prepare()
        evaluate = Evaluate(evaluator=evaluator, log=log, folder=self.folder.samples)
        return [evaluate, log, checkpoint], checkpoint

    def close(self) -> None:
        """Release everything that communicates or holds tensors, so that the job can be left cleanly."""
        self.checkpointer.close()
        if self.snapshots is not None:
            self.snapshots.close()
        self.training.close()


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step, where it is glibc.

    By default it returns large tensors to the system and faults their pages in again at every step, about 5% of a step
    of a small model on the CPU. The process then stays as large as it was at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


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
