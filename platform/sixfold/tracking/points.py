"""Which points of the event log a store does not hold yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sixfold.tracking.events import Event
from sixfold.tracking.names import NameMap


class Point(NamedTuple):
    """One value of one metric, in the order of the arguments of MLflow's ``Metric``."""

    name: str
    value: float
    time_ms: int
    step: int


class HighWater:
    """The highest step a store holds of each metric; points at or below it are not sent again.

    Steps of a metric rise along the log, except where work was done again after a resume: those are the repetitions.
    """

    def __init__(self, highest_steps: Mapping[str, int]) -> None:
        self._highest = dict(highest_steps)
        self._names = NameMap()

    def above(self, events: Iterable[Event]) -> list[Point]:
        """Return the points above the mark. Infinity becomes NaN: MLflow would store 1.8e308 and ruin the chart."""
        highest, points = dict(self._highest), []
        for event in events:
            for original, encoded in event["metrics"].items():
                name, value, step = self._names[original], float(encoded), int(event["step"])
                if step > highest.get(name, -1):
                    highest[name] = step
                    points.append(Point(name, math.nan if math.isinf(value) else value, milliseconds(event), step))
        return points

    def raise_to(self, points: Iterable[Point]) -> None:
        """Take note that points have arrived, in their order."""
        self._highest |= {point.name: point.step for point in points}


def milliseconds(event: Event) -> int:
    """Return an event's time as MLflow counts it."""
    return int(event["time"] * 1000)
