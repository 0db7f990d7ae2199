"""Estimates as metrics of the event log, and as the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable

from sixfold.evaluation.contract import Estimate

HEADINGS = ("metric", "value", "95% interval", "better", "samples", "reference", "features")


def logged(estimates: Iterable[Estimate]) -> dict[str, float]:
    """Return values by logged name, ``val/<name>``, and half the widths of intervals as ``val/<name>_margin``."""
    values: dict[str, float] = {}
    for estimate in estimates:
        values[f"val/{estimate.name}"] = estimate.value
        if estimate.margin is not None:
            values[f"val/{estimate.name}_margin"] = estimate.margin
    return values


def spelled(estimate: Estimate) -> str:
    """A value with its margin: ``1.59 ± 0.08``."""
    margin = "" if estimate.margin is None else f" ± {estimate.margin:.2g}"
    return f"{estimate.value:.4g}{margin}"


def table_rows(estimates: Iterable[Estimate]) -> list[tuple[str, ...]]:
    """Return one line an estimate, under :data:`HEADINGS`."""
    return [
        (
            estimate.name,
            f"{estimate.value:.6g}",
            ""
            if estimate.margin is None
            else f"{estimate.value - estimate.margin:.4g} to {estimate.value + estimate.margin:.4g}",
            estimate.better or "",
            f"{estimate.samples:,}",
            "" if estimate.reference is None else f"{estimate.reference:,}",
            estimate.space or "",
        )
        for estimate in estimates
    ]
