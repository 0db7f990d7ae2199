"""Learning-rate schedules as pure functions of the update's number; no torch, no state."""

from __future__ import annotations

import math
from typing import assert_never

from sixfold.engine.config import ConstantScheduleConfig, CosineConfig, ScheduleConfig, WSDConfig


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the factor on the peak rate for update ``step`` (0-based) of ``total_steps``.

    Warm-up is ``(step + 1) / warmup_steps``: the first update moves, update ``warmup_steps - 1`` has the peak rate.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    match config:
        case ConstantScheduleConfig():
            return 1.0
        case CosineConfig():
            return _cosine(config, step, total_steps)
        case WSDConfig():
            return _warmup_stable_decay(config, step, total_steps)
        case _:
            assert_never(config)


def _cosine(config: CosineConfig, step: int, total_steps: int) -> float:
    """f + (1 - f) (1 + cos(pi p)) / 2 at progress p after warm-up (Loshchilov and Hutter, 2017)."""
    progress = _progress(step, config.warmup_steps, total_steps)
    return config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _warmup_stable_decay(config: WSDConfig, step: int, total_steps: int) -> float:
    """1 until the decay, then 1 - (1 - f) d(p), d(p) = p or sqrt(p) (Hu et al., 2024; Haegele et al., 2024)."""
    start = total_steps - round(config.decay_fraction * total_steps)
    progress = _progress(step, max(start, config.warmup_steps), total_steps)
    decayed = math.sqrt(progress) if config.decay == "sqrt" else progress
    return 1.0 - (1.0 - config.final_fraction) * decayed


def _progress(step: int, start: int, end: int) -> float:
    """How far ``step`` is between ``start`` and ``end``, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
