"""The description of a run in MLflow: its newest samples, on the first page that one opens.

MLflow's image grid starts at step 0 and below a list of all parameters: the newest samples would be two moves away.
What a person wrote into the description stays: only the part between the two marks is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

_BEGIN, _END = "<!-- newest samples -->", "<!-- end of newest samples -->"
_OURS = re.compile(rf"{_BEGIN}.*{_END}", re.DOTALL)
_TEXT_LIMIT = 1500


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The newest sample under a key: an image's artifact path, or a text."""

    step: int
    image: str | None = None
    text: str | None = None


def describe(note: str, samples: Mapping[str, Sample], mlflow_run_id: str) -> str:
    """Return the Markdown description ``note`` with our part brought up to date."""
    parts = [_show(key, sample, mlflow_run_id) for key, sample in sorted(samples.items())]
    ours = "\n\n".join((_BEGIN, *parts, _END))
    if _OURS.search(note):
        return _OURS.sub(lambda _: ours, note)
    return f"{note}\n\n{ours}" if note else ours


def _show(key: str, sample: Sample, mlflow_run_id: str) -> str:
    title = f"**{key}** at step {sample.step}"
    if sample.image is not None:
        return f"{title}\n\n![{key}](get-artifact?path={quote(sample.image, safe='')}&run_uuid={mlflow_run_id})"
    text = (sample.text or "").replace("```", "'''")
    shown = text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]} ..."
    return f"{title}\n\n```\n{shown}\n```"
