"""The train loop, on one screen, and the one optimizer step it repeats.

The loop knows nothing of families, shards or clusters: a batch comes from the stream, phases and losses from the
objective, gradients and updates from the engines. Everything that happens now and then (logging, sampling,
evaluation, checkpoints) is a hook.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sixfold.distributed.collectives import sum_over_ranks
from sixfold.distributed.randomness import PositionRandom
from sixfold.engine.companion import Companion
from sixfold.engine.contract import Engine, StepReport
from sixfold.errors import TrainingError
from sixfold.objectives.contract import Batch, LossTerms, Networks, Objective, Phase, Progress, Sum, add_sums, means_of
from sixfold_data.stream import TrainStream


@dataclass(kw_only=True)
class Training:
    """All state of a run on this rank; ``progress``, the skips, engines and the stream must survive a restart."""

    objective: Objective
    engines: Mapping[str, Engine]
    companions: Mapping[str, Companion]  # frozen and tracking roles
    tracked: Mapping[str, Sequence[str]]  # by trainable role: the roles that track it
    stream: TrainStream
    progress: Progress
    device: torch.device
    seed: int
    global_batch: int
    micro_batch: Mapping[str, int]  # by trainable role: samples this rank takes at once
    max_consecutive_skips: int
    rank: int = 0
    ranks: int = 1
    skips: int = 0  # steps skipped so far
    consecutive_skips: int = 0  # those since the last step that was not
    step_started: float = 0.0
    own_s: float | None = None  # seconds of this step before the first loss: the batch, and forward

    @property
    def networks(self) -> Networks:
        """Networks by role, wrapped, as objectives call them."""
        return {**{role: engine.module for role, engine in self.engines.items()}, **self._companion_networks}

    @property
    def bare_networks(self) -> Networks:
        """Networks by role without their wrappers, for updates of buffers."""
        return {**{role: engine.network for role, engine in self.engines.items()}, **self._companion_networks}

    @property
    def saved(self) -> dict[str, Engine | Companion]:
        """What checkpoints hold, by role."""
        return {**self.engines, **{role: part for role, part in self.companions.items() if part.is_saved}}

    @contextmanager
    def networks_in(self, phase: Phase) -> Iterator[Networks]:
        """Networks by role as one phase calls them: gradients reach the parameters of the roles it trains alone."""
        with ExitStack() as untrained:
            yield {
                **{
                    role: engine.module if role in phase.trains else untrained.enter_context(engine.untrained())
                    for role, engine in self.engines.items()
                },
                **self._companion_networks,
            }

    def close(self) -> None:
        """Release the stream and every network."""
        self.stream.close()
        for companion in self.companions.values():
            companion.close()
        for engine in self.engines.values():
            engine.close()

    @property
    def _companion_networks(self) -> Networks:
        return {role: companion.network for role, companion in self.companions.items()}


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one training step did: mean metrics, one engine report a phase, whether to stop; equal on all ranks.

    ``seconds`` alone is this rank's own: from asking for the batch to the end of the update. That is about the same
    everywhere, since ranks wait for one another; ``rank_seconds``, each rank's from asking for the batch to its first
    loss, tells who is waited for.
    """

    progress: Progress
    metrics: Mapping[str, float]
    reports: Mapping[str, StepReport]
    stop_requested: bool
    rank_seconds: Sequence[float] = ()
    seconds: float = 0.0

    @property
    def skipped(self) -> bool:
        """Whether any phase was skipped for a non-finite loss or gradient."""
        return any(report.skipped for report in self.reports.values())


class Hook(Protocol):
    """Something done after a step; every rank calls every hook at every step, so that collectives agree."""

    def __call__(self, training: Training, record: StepRecord) -> None:
        """Act on the step just taken, or return at once."""
        ...


def train(training: Training, hooks: Sequence[Hook], stop_requested: Callable[[], bool]) -> bool:
    """Train until the recipe's last step or until any rank asks to stop; return whether training is complete."""
    while training.progress.step < training.progress.total_steps:
        training.step_started = time.perf_counter()
        batch = next(training.stream).to(training.device)
        record = train_step(training, batch, stop_requested())
        record = replace(record, seconds=time.perf_counter() - training.step_started)
        training.progress = record.progress
        enforce_skip_budget(training, record)
        for hook in hooks:
            hook(training, record)
        if record.stop_requested:
            break
    return training.progress.step >= training.progress.total_steps


def train_step(training: Training, batch: Batch, stop_requested: bool = False) -> StepRecord:
    """Take one step: for each phase accumulate the micro-batches' sums, then let the role's engine update."""
    metrics: dict[str, float] = {}
    reports: dict[str, StepReport] = {}
    statistics: dict[str, Tensor] = {}
    stop = torch.tensor(float(stop_requested), device=training.device)
    rank_seconds = torch.zeros(training.ranks, dtype=torch.float64, device=training.device)
    training.own_s = None
    for phase in training.objective.phases(training.progress):
        totals = _accumulate(training, batch, phase).over_ranks(stop)
        rank_seconds += totals.rank_seconds
        for role in phase.trains:
            report = training.engines[role].step(totals.count, finite=torch.isfinite(totals.loss))
            reports[phase.name if len(phase.trains) == 1 else f"{phase.name}/{role}"] = report
            for follower in () if report.skipped else training.tracked.get(role, ()):
                training.companions[follower].update()
        prefix = "" if phase.name == "main" else f"{phase.name}/"
        metrics |= {f"{prefix}{name}": value for name, value in totals.means().items()}
        statistics |= totals.statistics
        stop = totals.stop
    done = replace(
        training.progress, step=training.progress.step + 1, samples=training.progress.samples + training.global_batch
    )
    if not any(report.skipped for report in reports.values()):
        training.objective.after_step(training.bare_networks, statistics, done)
    return StepRecord(
        progress=done,
        metrics=metrics,
        reports=reports,
        stop_requested=bool(stop.item()),
        rank_seconds=rank_seconds.tolist(),
    )


def enforce_skip_budget(training: Training, record: StepRecord) -> None:
    """Count skipped steps and end training when the recipe's budget of consecutive ones is spent.

    Raises:
        TrainingError: more than ``train.max_consecutive_skips`` steps in a row were non-finite.
    """
    training.skips += record.skipped
    training.consecutive_skips = training.consecutive_skips + 1 if record.skipped else 0
    if training.consecutive_skips > training.max_consecutive_skips:
        raise TrainingError.of(
            f"{training.consecutive_skips} consecutive steps had a non-finite loss or gradient",
            where=f"step {record.progress.step}",
            allowed=f"train.max_consecutive_skips = {training.max_consecutive_skips}",
            fix="lower optimizer.lr, lengthen schedule.warmup_steps, or use engine.precision: fp32",
        )


@dataclass(kw_only=True)
class _Totals:
    """Sums over the micro-batches of one phase, first of this rank and then of all."""

    loss: Tensor
    count: Tensor
    metrics: dict[str, Sum] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    stop: Tensor
    rank_seconds: Tensor  # [ranks], of this rank alone before the sum

    def add(self, terms: LossTerms) -> None:
        self.loss = self.loss + terms.loss.detach().double()
        self.count = self.count + terms.count.double()
        add_sums(self.metrics, terms.metrics)
        for name, statistic in terms.statistics.items():
            self.statistics[name] = self.statistics[name] + statistic if name in self.statistics else statistic

    def over_ranks(self, stop: Tensor) -> _Totals:
        """Sum everything over all ranks in one collective; a non-finite loss anywhere makes the sum non-finite."""
        flat: dict[str, Tensor] = {"loss": self.loss, "count": self.count, "stop": stop}
        flat["rank_seconds"] = self.rank_seconds
        flat |= {f"total/{name}": value.total for name, value in self.metrics.items()}
        flat |= {f"count/{name}": value.count for name, value in self.metrics.items()}
        flat |= {f"statistic/{name}": value for name, value in self.statistics.items()}
        summed = sum_over_ranks(flat)
        return _Totals(
            loss=summed["loss"],
            count=summed["count"],
            stop=summed["stop"],
            rank_seconds=summed["rank_seconds"],
            metrics={
                name: value.holding(summed[f"total/{name}"], summed[f"count/{name}"])
                for name, value in self.metrics.items()
            },
            statistics={name: summed[f"statistic/{name}"] for name in self.statistics},
        )

    def means(self) -> dict[str, float]:
        return means_of({"loss": Sum(self.loss, self.count), **self.metrics})


def _accumulate(training: Training, batch: Batch, phase: Phase) -> _Totals:
    """Sum the losses of the rank's micro-batches, and their gradients in the engines of the roles that train."""
    engines = [training.engines[role] for role in phase.trains]
    zero = torch.zeros((), dtype=torch.float64, device=training.device)
    nothing = torch.zeros(training.ranks, dtype=torch.float64, device=training.device)
    totals = _Totals(loss=zero, count=zero, stop=zero, rank_seconds=nothing)
    micro_batches = list(batch.split(min(training.micro_batch[role] for role in phase.trains)))
    with training.networks_in(phase) as networks:
        for index, micro in enumerate(micro_batches):
            with ExitStack() as accumulating:
                for engine in engines:
                    accumulating.enter_context(engine.accumulate(last=index == len(micro_batches) - 1))
                terms = training.objective(networks, micro, phase, PositionRandom(training.seed, micro.positions))
                if training.own_s is None:
                    training.own_s = time.perf_counter() - training.step_started
                    totals.rank_seconds[training.rank] = training.own_s
                loss = terms.loss
                for engine in engines[1:]:
                    loss = engine.join_backward(loss)
                engines[0].backward(loss)  # one pass through all networks
            totals.add(terms)
    return totals
