"""The event log: what a crash, a resume and a full disk leave behind."""

import json
import math
import resource
import signal
import subprocess
import sys

import pytest

from sixfold.errors import EnvironmentFault, UserError
from sixfold.tracking.events import EVENTS, SUPERSEDED, EventLog, EventTail, read_events, read_metrics


def log_steps(log, first, last, offset=0.0):
    for step in range(first, last + 1):
        log.metrics(step=step, samples=8 * step, values={"train/loss": 1 / step + offset})


def test_lines_have_the_documented_form(tmp_path):
    log = EventLog(tmp_path)
    log.metrics(step=3, samples=24, values={"train/loss": 0.5})
    line = json.loads((tmp_path / EVENTS).read_text())
    assert {"time", "step", "samples", "metrics"} <= line.keys()
    assert (line["step"], line["samples"], line["metrics"]) == (3, 24, {"train/loss": 0.5})


def test_floats_survive_exactly_and_nonfinite_ones_stay_valid_json(tmp_path):
    values = {"a": 0.1 + 0.2, "nan": math.nan, "plus": math.inf, "minus": -math.inf, "tiny": 5e-324}
    EventLog(tmp_path).metrics(step=1, samples=1, values=values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / EVENTS).read_text(), parse_constant=refuse)
    read = {name: points[1] for name, points in read_metrics(tmp_path).items()}
    assert math.isnan(read.pop("nan"))
    values.pop("nan")
    assert read == values


@pytest.mark.parametrize(
    "tear", [b'{"time": 1.0, "step": 4, "sam', b"\0" * 5000, b'{"step": 4}\n', b"{" + b"x" * 200_000]
)
def test_a_torn_tail_is_cut_and_the_log_goes_on(tmp_path, tear):
    log_steps(EventLog(tmp_path), 1, 3)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(tear)
    assert tear.endswith(b"\n") or len(read_metrics(tmp_path)["train/loss"]) == 3  # a reader beside a living writer
    log = EventLog(tmp_path)
    log_steps(log, 4, 4)
    events = list(read_events(tmp_path))
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert [event["sequence"] for event in events] == [1, 2, 3, 4]


def test_a_first_line_that_was_torn_leaves_an_empty_log(tmp_path):
    (tmp_path / EVENTS).write_bytes(b'{"time": 1')
    log_steps(EventLog(tmp_path), 1, 1)
    assert list(read_metrics(tmp_path)["train/loss"]) == [1]


def test_a_foreign_file_is_refused_and_not_emptied(tmp_path):
    (tmp_path / EVENTS).write_text("hello\nworld\n")
    log = EventLog(tmp_path)
    with pytest.raises(UserError, match=r"events\.jsonl:1"):
        log.begin(step=0)
    assert (tmp_path / EVENTS).read_text() == "hello\nworld\n"


def test_resume_sets_later_points_aside_and_loses_none(tmp_path):
    log = EventLog(tmp_path)
    assert log.begin(step=0) == 1
    log_steps(log, 1, 10)
    log.checkpoint(step=5, uri="file:///five")
    log.skipped(step=8, reason="loss is not finite")
    log.close()

    log = EventLog(tmp_path)
    assert log.begin(step=5) == 2
    log_steps(log, 6, 10, offset=1.0)
    log.finished(step=10, status="finished")

    points = read_metrics(tmp_path)["train/loss"]
    assert points == {step: 1 / step + (step > 5) for step in range(1, 11)}
    events = list(read_events(tmp_path))
    assert [event["event"] for event in events if "event" in event] == ["started", "checkpoint", "resumed", "finished"]
    sequences = [event["sequence"] for event in events]
    assert sequences == sorted(set(sequences))
    superseded = [json.loads(line) for line in (tmp_path / SUPERSEDED).read_text().splitlines()]
    assert [event["step"] for event in superseded] == [6, 7, 8, 9, 10, 8]
    everything = sequences + [event["sequence"] for event in superseded]
    assert sorted(everything) == list(range(1, len(everything) + 1))


def test_death_between_setting_aside_and_replacing_repeats_nothing(tmp_path, monkeypatch):
    log = EventLog(tmp_path)
    log_steps(log, 1, 6)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", die)
        with pytest.raises(KeyboardInterrupt):
            log.begin(step=3)
    assert len(read_metrics(tmp_path)["train/loss"]) == 6
    EventLog(tmp_path).begin(step=3)
    assert list(read_metrics(tmp_path)["train/loss"]) == [1, 2, 3]
    superseded = [json.loads(line)["step"] for line in (tmp_path / SUPERSEDED).read_text().splitlines()]
    assert superseded == [4, 5, 6]


def test_attempts_are_counted_even_when_training_goes_back_to_the_start(tmp_path):
    for attempt in (1, 2, 3):
        log = EventLog(tmp_path)
        assert log.begin(step=0) == attempt
        log_steps(log, 1, 3)
        log.close()
    assert list(read_metrics(tmp_path)["train/loss"]) == [1, 2, 3]


def test_a_tail_follows_a_log_through_a_rewind_without_repeating(tmp_path):
    log, tail = EventLog(tmp_path), EventTail(tmp_path, after=0)
    log.begin(step=0)
    log_steps(log, 1, 6)
    assert [event["step"] for event in tail.read(4)] == [0, 1, 2, 3]
    log.rolled_back(from_step=6, to_step=2)
    log_steps(log, 3, 4)
    assert [(event["step"], event.get("event")) for event in tail.read(100)] == [
        (2, "rolled_back"),
        (3, None),
        (4, None),
    ]
    assert tail.read(100) == []
    tail.close()
    again = EventTail(tmp_path, after=tail.sequence - 1)
    assert [event["step"] for event in again.read(100)] == [4]
    again.close()


def test_a_tail_waits_for_the_rest_of_a_line(tmp_path):
    line = b'{"step": 1, "sequence": 1, "metrics": {}}\n'
    path = tmp_path / EVENTS
    path.write_bytes(line[:10])
    tail = EventTail(tmp_path, after=0)
    assert tail.read(1) == []
    path.write_bytes(line)
    assert [event["step"] for event in tail.read(1)] == [1]
    tail.close()


def test_files_are_named_by_their_place_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = EventLog(tmp_path / "run")
    log.image(key="samples", step=1, path=tmp_path / "run/samples/1.png")
    log.text(key="samples", step=1, path=(tmp_path / "run/samples/1.txt").relative_to(tmp_path))
    assert [event["path"] for event in read_events(tmp_path / "run")] == ["samples/1.png", "samples/1.txt"]


def test_a_killed_writer_loses_nothing_it_logged(tmp_path):
    program = (
        "import sys; from pathlib import Path; from sixfold.tracking.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for step in range(1, 10**9):\n"
        "    log.metrics(step=step, samples=step, values={'train/loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 100:
                break
        process.send_signal(signal.SIGKILL)
        acknowledged = [100, *(int(line) for line in process.stdout if line.endswith("\n"))][-1]
    points = read_metrics(tmp_path)["train/loss"]
    assert acknowledged <= len(points) <= acknowledged + 1
    assert list(points) == list(range(1, len(points) + 1))


def test_a_full_disk_is_a_clear_error_and_tears_no_line(tmp_path):
    log = EventLog(tmp_path)
    log_steps(log, 1, 5)
    size = (tmp_path / EVENTS).stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, unlimited[1]))
    try:
        with pytest.raises(EnvironmentFault, match="cannot be written"):
            log_steps(log, 6, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, ignored)
    log_steps(log, 6, 6)
    assert list(read_metrics(tmp_path)["train/loss"]) == [1, 2, 3, 4, 5, 6]


def test_no_log_is_told(tmp_path):
    with pytest.raises(UserError, match="no event log"):
        read_metrics(tmp_path)
    assert not list(tmp_path.iterdir())
