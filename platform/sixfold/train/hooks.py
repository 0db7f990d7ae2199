"""What happens between steps: logging, evaluation with samples, checkpoints.

Every rank calls every hook at every step, in the order evaluate, log, checkpoint: what a step produced is in the event
log before the checkpoint that makes the step final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median

from pydantic import Field

from sixfold.checkpoint.checkpointer import Checkpointer
from sixfold.config.base import Config
from sixfold.evaluation.report import logged, spelled
from sixfold.objectives.contract import Progress
from sixfold.tracking.events import EventLog
from sixfold.train.display import Display
from sixfold.train.evaluator import Evaluator
from sixfold.train.loop import StepRecord, Training

_RANKS_SHOWN = 32


def due(step: int, every: int | None, total: int) -> bool:
    """Whether something done every ``every`` steps, and always after the last, is due after ``step``."""
    return step == total or (every is not None and step % every == 0)


@dataclass(kw_only=True)
class Log:
    """Writes metrics to the event log and the display: the step's own losses, and speed since the last line.

    ``events`` is None on all ranks but the first.
    """

    events: EventLog | None
    display: Display
    every_steps: int
    tokens_per_sample: int | None
    training_flops_per_sample: float
    peak_flops_per_second: float
    checkpoints: int = 0
    _seconds: float = 0.0
    _rank_seconds: list[float] = field(default_factory=list)
    _steps: int = 0
    _pending: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Add another hook's metrics to the next line."""
        self._pending |= values

    def write(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Write a line of metrics now."""
        if self.events is not None:
            self.events.metrics(step=progress.step, samples=progress.samples, values=values)

    def __call__(self, training: Training, record: StepRecord) -> None:
        """Count the step and write a line when it is due."""
        step = record.progress.step
        self._seconds += record.seconds
        self._rank_seconds = [a + b for a, b in zip_longest(self._rank_seconds, record.rank_seconds, fillvalue=0.0)]
        self._steps += 1
        if record.skipped and self.events is not None:
            self.events.skipped(step=step, reason="non-finite loss or gradient")
        if due(step, self.every_steps, record.progress.total_steps) or record.stop_requested:
            performance = self._performance(training)
            values = self._training_metrics(record) | performance | self._pending
            values["train/skipped_steps"] = float(training.skips)
            self._seconds, self._rank_seconds, self._steps, self._pending = 0.0, [], 0, {}
            self.write(record.progress, values)
            self.display.update(step=step, values=values, skips=training.skips, checkpoints=self.checkpoints)

    def _training_metrics(self, record: StepRecord) -> dict[str, float]:
        values = {f"train/{name}": value for name, value in record.metrics.items()}
        for phase, report in record.reports.items():
            prefix = "train/" if phase == "main" else f"train/{phase}/"
            values[f"{prefix}grad_norm"] = report.grad_norm
            values[f"{prefix}learning_rate"] = report.learning_rate
        return values

    def _performance(self, training: Training) -> dict[str, float]:
        samples_per_s = self._steps * training.global_batch / self._seconds
        values = {
            "perf/samples_per_s": samples_per_s,
            "perf/step_s": self._seconds / self._steps,
            # An unknown device has no peak: 0 says so, a guess would not.
            "perf/mfu": samples_per_s * self.training_flops_per_sample / self.peak_flops_per_second
            if self.peak_flops_per_second
            else 0.0,
            "data/wait_s": training.stream.wait_s,
            "data/corrupt_samples": float(training.stream.corrupt_count),
        }
        values |= stragglers(self._rank_seconds, self._steps)
        if self.tokens_per_sample is not None:
            values["perf/tokens_per_s"] = samples_per_s * self.tokens_per_sample
        return values


def stragglers(rank_seconds: Sequence[float], steps: int) -> dict[str, float]:
    """Whom the others wait for: seconds a step that each rank itself takes, the slowest rank and the median one.

    A rank's own seconds end at its first loss; from then on ranks wait for one another, and all take as long as the
    slowest. Of many ranks the slowest are shown.
    """
    if len(rank_seconds) < 2:
        return {}
    ranks = sorted(range(len(rank_seconds)), key=rank_seconds.__getitem__, reverse=True)
    return {
        **{f"perf/step_s/rank_{rank}": rank_seconds[rank] / steps for rank in sorted(ranks[:_RANKS_SHOWN])},
        "perf/slowest_rank": float(ranks[0]),
        "perf/slowest_rank_s": rank_seconds[ranks[0]] / steps,
        "perf/median_rank_s": median(rank_seconds) / steps,
    }


@dataclass(kw_only=True)
class Evaluate:
    """Measures held-out quality and shows samples, both on the averaged weights where the recipe keeps them."""

    evaluator: Evaluator
    log: Log
    folder: Path

    def __call__(self, training: Training, record: StepRecord) -> None:
        """Evaluate when due."""
        step = record.progress.step
        if not due(step, self.evaluator.config.every_steps, record.progress.total_steps):
            return
        with ExitStack() as averages:
            for engine in training.engines.values():
                averages.enter_context(engine.averaged())
            estimates = self.evaluator.measure(training.objective, training.networks)
            samples = self.evaluator.samples_to_show(training.networks)
        self.log.write(record.progress, logged(estimates))
        facts = "  ".join(f"{estimate.name} {spelled(estimate)}" for estimate in estimates)
        self.log.display.note(f"step {step}: {facts}")
        if samples is not None and self.log.events is not None:
            path = samples.write_overview(self.folder, f"step_{step:09d}")
            record_file = self.log.events.image if samples.are_images else self.log.events.text
            record_file(key="samples", step=step, path=path)


@dataclass(kw_only=True)
class Checkpoint:
    """Saves when due and on request, snapshots of averages too, and reports what was committed since."""

    checkpointer: Checkpointer
    log: Log
    every_steps: int
    snapshots: Checkpointer | None = None
    newest: str | None = None

    def __call__(self, training: Training, record: StepRecord) -> None:
        """Save when due; publish checkpoints that were committed meanwhile."""
        progress = record.progress
        # A state that no longer takes steps is not one to go back to; an ending run saves whatever it has.
        ending = record.stop_requested or progress.step == progress.total_steps
        if ending or (due(progress.step, self.every_steps, progress.total_steps) and not record.skipped):
            states = {role: part.checkpoint_state() for role, part in training.saved.items()}
            extra = SavedExtra.of(training)
            report = self.checkpointer.save(progress.step, states, extra.model_dump(mode="json"))
            self.log.add({"ckpt/stall_s": report.stall_s})
            self.take_snapshot(training)
        self.publish()

    def take_snapshot(self, training: Training) -> None:
        """Keep the averages of the present step, where the recipe keeps any."""
        if self.snapshots is not None:
            averages = {role: engine.average_state() for role, engine in training.engines.items()}
            self.snapshots.save(training.progress.step, averages, {})

    def publish(self) -> None:
        """Log every checkpoint committed since the last call; raise what the background writer met."""
        for committed in self.checkpointer.poll():
            self.log.checkpoints += 1
            self.newest = committed.uri
            if self.log.events is not None:
                self.log.events.checkpoint(step=committed.step, uri=committed.uri)


class SavedExtra(Config):
    """What a checkpoint holds besides tensors: progress, and the data state that fixes the samples' order."""

    samples: int = Field(ge=0, description="Samples consumed.")
    skips: int = Field(default=0, ge=0, description="Steps skipped so far.")
    consecutive_skips: int = Field(default=0, ge=0, description="Steps skipped since the last one that was not.")
    data: dict[str, int | str] = Field(description="The stream's state.")

    @classmethod
    def of(cls, training: Training) -> SavedExtra:
        """What must be saved of a training between two steps."""
        return cls(
            samples=training.progress.samples,
            skips=training.skips,
            consecutive_skips=training.consecutive_skips,
            data=training.stream.state(),
        )
