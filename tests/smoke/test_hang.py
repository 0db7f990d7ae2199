"""A rank that sleeps in a step is found, every rank leaves its stacks, and the launcher starts all of them again."""

import json
from pathlib import Path

import pytest

from sixfold.recipe.load import load_recipe
from sixfold.tracking.events import last_status, read_metrics
from sixfold.train.run_folder import prepare_run_folder, take_up
from sixfold_launchers.local import launch

SETTINGS = [
    "train.steps=5",
    "train.log_every_steps=1",
    "train.hang_after_s=15",
    "checkpoint.every_steps=1",
    "data.global_batch=16",
    "networks.denoiser.depth=1",
    "networks.denoiser.width=32",
    "tracking.type=jsonl",
    "evaluation=null",
    "sampling=null",
]


def test_a_hang_leaves_stacks_and_ends_in_a_restart(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    recipe = load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *SETTINGS]).recipe
    folder = prepare_run_folder(recipe, tmp_path / "run", resume=True)
    take_up(folder, recipe)
    restarts: list[str] = []

    def note_restart(why: str) -> None:
        restarts.append(f"{why}\n{folder.failure(1, 134)}")

    outcome = launch(folder.path, ranks=2, max_restarts=1, on_restart=note_restart, module="hanging_rank")
    assert outcome.exit_code == 0
    assert len(restarts) == 1
    assert "SIGABRT" in restarts[0]
    assert "hung: no step within 15 s after step 2" in restarts[0]

    hangs = folder.path / "hangs" / "after-step-2"
    assert "fall_asleep" in (hangs / "rank-1.stacks.txt").read_text()
    assert "fall_asleep" not in (hangs / "rank-0.stacks.txt").read_text()
    records = [json.loads((hangs / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(record["rank"], record["last_step"]) for record in records] == [(0, 2), (1, 2)]
    assert all(record["still_s"] > 15 for record in records)
    assert list((folder.path / "errors").iterdir()) == [], "what another attempt mended is no failure"
    assert last_status(folder.path) == "finished"
    assert sorted(read_metrics(folder.path)["train/loss"]) == [1, 2, 3, 4, 5]
