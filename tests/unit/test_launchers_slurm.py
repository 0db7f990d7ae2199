"""What would be submitted to Slurm, word for word, and the shell in it against a real shell."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sixfold_launchers.contract import INTERRUPTED, JobSpec, RunSpec, launcher_of, port_of
from sixfold_launchers.profile_files import list_profiles, load_profile
from sixfold_launchers.slurm_client import Task, read_end
from sixfold_launchers.slurm_task import hosts, rank_variables

GOLDEN = Path(__file__).parent / "golden"


def spec(folder=Path("/shared/runs"), runs=1, python="/opt/python", code=None):
    """A job whose every path is known."""
    folders = [folder / "lm/moe-smoke" / (f"j1-{index}" if runs > 1 else "j1") for index in range(runs)]
    return JobSpec(
        job_id="j1",
        folder=folder / ".jobs/j1",
        runs=tuple(RunSpec(folder=each, recipe="lm/moe-smoke") for each in folders),
        directory=folder.parent,
        python=python,
        code=code,
    )


CASES = {
    "slurm": (["nodes=2", "time_limit=00:30:00"], spec(code=Path("/shared/runs/.code/c-t"))),
    "slurm-array": (["array_parallelism=2"], spec(runs=3)),
    "site-h200": ([], spec()),
    "site-preemptible": (["requeue=false"], spec()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name):
    settings, job = CASES[name]
    profile = load_profile(name.removesuffix("-array"), settings).profile
    submission = launcher_of(profile).render(job)
    assert submission == launcher_of(profile).render(job), "rendering is pure"
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("SIXFOLD_REWRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(submission.files["job.sbatch"])
    assert submission.files["job.sbatch"] == golden.read_text()
    assert subprocess.run(["bash", "-n", golden], check=False).returncode == 0


def test_every_profile_that_ships_is_sound_and_no_example_names_a_secret_s_value():
    assert {"local", "ray", "slurm", "slurm-ray", "site-h200", "site-preemptible"} <= set(list_profiles())
    for name in list_profiles():
        assert load_profile(name).profile.description


def test_secrets_and_hostile_words_reach_the_script_by_name_and_quoted():
    profile = load_profile("slurm", ["secrets=[API_TOKEN]", 'environment.NOTE=a\'b $(touch /tmp/pwned) "c"']).profile
    script = launcher_of(profile).render(spec()).files["job.sbatch"]
    assert "--secrets '~/.config/sixfold/secrets' API_TOKEN" in script
    line = next(line for line in script.splitlines() if line.startswith("export NOTE="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$NOTE"'], capture_output=True, text=True, check=True)
    assert shown.stdout == 'a\'b $(touch /tmp/pwned) "c"'


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,20],gpu3", ["n08", "n09", "n10", "n11", "n20", "gpu3"]),
        ("r[1-2]n[0-1],x", ["r1n0", "r1n1", "r2n0", "r2n1", "x"]),
        ("a-b[1,3]-ib", ["a-b1-ib", "a-b3-ib"]),
    ],
)
def test_node_lists_expand_as_scontrol_does(nodelist, names):
    assert hosts(nodelist) == names


@pytest.mark.parametrize(
    ("state", "end", "read"),
    [
        ("FAILED", "19200", "interrupted"),
        ("FAILED", "75:0", "interrupted"),
        ("TIMEOUT", "75", "interrupted"),
        ("FAILED", "9", "interrupted"),  # the batch shell was killed
        ("FAILED", "0:9", "interrupted"),
        ("FAILED", "35072", "failed"),  # the script itself ended with 137: ranks were killed too often
        ("FAILED", "256", "failed"),
        ("COMPLETED", "0", "finished"),
        ("COMPLETED", "", "finished"),
    ],
)
def test_what_slurm_calls_failed_may_be_interrupted(state, end, read):
    exit_code, killed = read_end(end)
    assert Task(job_id="1", index=None, state=state, exit_code=exit_code, killed=killed).read_state() == read


def test_a_step_s_variables_become_a_rank_s():
    slurm = {
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "no-such-node-[1-2]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
        "SLURM_JOB_ID": "12345",
        "SLURM_CPUS_PER_TASK": "6",
    }
    assert rank_variables(slurm) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": str(port_of(12345)),
        "OMP_NUM_THREADS": "6",
    }
    assert rank_variables({**slurm, "SLURM_STEP_NODELIST": "localhost"})["MASTER_ADDR"] == "localhost"
    assert rank_variables({**slurm, "SIXFOLD_ATTEMPT": "1"})["MASTER_PORT"] != str(port_of(12345))
    assert rank_variables({**slurm, "SLURM_NTASKS": "1"}) == {"OMP_NUM_THREADS": "6"}


def test_ports_of_neighbouring_jobs_and_attempts_do_not_meet():
    ports = {port_of(job, attempt, offset=offset) for job in range(50) for attempt in (0, 1) for offset in range(16)}
    assert len(ports) == 50 * 2 * 16
    assert min(ports) >= 10000
    assert max(ports) < 30000


class Shell:
    """The batch script under a real shell, with an `srun` of ours on a PATH of few programs."""

    def __init__(self, folder, srun, programs=("scontrol",), nodes="1", settings=(), profile="slurm"):
        self.folder, self.run = folder, folder / "lm/moe-smoke/j1"
        for part in ("errors", "checkpoints"):
            (self.run / part).mkdir(parents=True)
        self.path = folder / "bin"
        self.path.mkdir()
        for name in ("cat", "seq", "rm", "grep", "sleep"):
            (self.path / name).symlink_to(shutil.which(name))
        self.program("srun", srun)
        for name in programs:
            self.program(name, f'echo "{name} $*" >> {folder}/called')
        profile = load_profile(profile, [f"environment.PATH={self.path}", *settings]).profile
        script = folder / "job.sbatch"
        script.write_text(launcher_of(profile).render(spec(folder)).files["job.sbatch"])
        self.environment = {"PATH": str(self.path), "HOME": str(folder), "SLURM_JOB_ID": "77"}
        self.environment["SLURM_JOB_NUM_NODES"] = nodes
        self.start()

    def start(self):
        """Start the script, once more if it has ended."""
        command = [shutil.which("bash"), self.folder / "job.sbatch"]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return self

    def program(self, name, body):
        path = self.path / name
        path.write_text(f"#!{shutil.which('bash')}\nRUN={self.run}\n{body}\n")
        path.chmod(0o755)

    def wait_for(self, name):
        deadline = time.monotonic() + 20
        while not (self.run / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self):
        """Exit code, what was printed, and which Slurm programs were called."""
        output, _ = self.process.communicate(timeout=60)
        called = self.folder / "called"
        return self.process.returncode, output, called.read_text().splitlines() if called.exists() else []


SAVING = """
trap 'sleep 0.6; echo interrupted > $RUN/outcome; exit 0' USR1
echo started > $RUN/started
while :; do sleep 0.05; done
"""
KILLED = "echo start >> $RUN/starts; exit 137"


def test_a_finished_run_ends_the_job(tmp_path):
    assert Shell(tmp_path, "echo finished > $RUN/outcome").end()[::2] == (0, [])


@pytest.mark.parametrize(
    ("sent", "programs", "called"),
    [
        ([signal.SIGUSR1], ("scontrol", "sbatch"), ["scontrol requeue 77"]),
        ([signal.SIGUSR1, signal.SIGUSR1], ("scontrol",), ["scontrol requeue 77"]),
        ([signal.SIGUSR1, signal.SIGTERM], ("scontrol",), ["scontrol requeue 77"]),
        ([signal.SIGUSR1], ("sbatch",), ["sbatch {folder}/.jobs/j1/job.sbatch"]),
        ([signal.SIGUSR1], (), []),
        ([signal.SIGTERM], ("scontrol",), []),
    ],
    ids=["limit", "twice", "limit then kill", "no scontrol", "no client", "cancelled"],
)
def test_a_signal_to_the_shell_saves_and_requeues_unless_cancelled(tmp_path, sent, programs, called):
    shell = Shell(tmp_path, SAVING, programs)
    shell.wait_for("started")
    for number in sent:
        shell.process.send_signal(number)
        time.sleep(0.2)  # bash may hear one of two signals that come at once
    code, output, calls = shell.end()
    assert (code, calls) == (INTERRUPTED, [call.format(folder=tmp_path) for call in called]), output
    assert ("sixfold jobs requeue j1" in output) == (programs == ())


ASKED_BY_FILE = """
echo started > $RUN/started
until grep -qs stop $RUN/request; do sleep 0.05; done
echo interrupted > $RUN/outcome
"""


def test_ray_s_ranks_are_asked_by_a_file_that_the_next_turn_does_not_find(tmp_path):
    shell = Shell(tmp_path, ASKED_BY_FILE, profile="slurm-ray")
    shell.wait_for("started")
    shell.process.send_signal(signal.SIGUSR1)
    code, output, calls = shell.end()
    assert (code, calls) == (INTERRUPTED, ["scontrol requeue 77"]), output
    shell.program("srun", "[ -e $RUN/request ] && exit 9; echo finished > $RUN/outcome")
    assert shell.start().end()[0] == 0


def test_a_limit_that_comes_unannounced_is_no_cancellation(tmp_path):
    shell = Shell(tmp_path, SAVING)
    shell.program("squeue", "echo TimeLimit")
    shell.wait_for("started")
    shell.process.send_signal(signal.SIGTERM)
    assert shell.end()[::2] == (INTERRUPTED, ["scontrol requeue 77"])


def test_a_signal_before_the_ranks_start_requeues_at_once(tmp_path):
    (tmp_path / ".bash_profile").write_text("touch $HOME/reading; while [ -e $HOME/reading ]; do sleep 0.05; done\n")
    shell = Shell(tmp_path, "echo start >> $RUN/starts")
    wait = time.monotonic() + 20
    while not (tmp_path / "reading").exists():
        assert time.monotonic() < wait
        time.sleep(0.01)
    shell.process.send_signal(signal.SIGUSR1)
    (tmp_path / "reading").unlink()
    assert shell.end()[::2] == (INTERRUPTED, ["scontrol requeue 77"])
    assert not (tmp_path / "lm/moe-smoke/j1/starts").exists()


def test_a_preemption_that_tells_the_ranks_alone_is_requeued(tmp_path):
    assert Shell(tmp_path, "echo interrupted > $RUN/outcome").end()[::2] == (INTERRUPTED, ["scontrol requeue 77"])


def test_killed_ranks_start_again_with_another_port(tmp_path):
    srun = f"[ -f $RUN/starts ] && {{ echo $SIXFOLD_ATTEMPT > $RUN/attempt; exit 0; }}; {KILLED}"
    code, output, _ = Shell(tmp_path, srun).end()
    assert code == 0, output
    assert "ended with code 137" in output
    assert (tmp_path / "lm/moe-smoke/j1/attempt").read_text() == "1\n"


def test_ranks_that_hung_start_again_as_if_killed(tmp_path):
    srun = """
echo start >> $RUN/starts
[ $(grep -c . $RUN/starts) = 2 ] && exit 0
echo 'rank 0 hung: no step within 15 s' > $RUN/errors/hang-of-rank-0.txt; exit 134
"""
    code, output, _ = Shell(tmp_path, srun).end()
    assert code == 0, output
    assert "ended with code 134" in output
    assert list((tmp_path / "lm/moe-smoke/j1/errors").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "nodes", "starts"),
    [("the disk is full", "2", 1), ("Traceback: a peer is gone", "1", 1), ("Traceback: a peer is gone", "2", 2)],
    ids=["a reason", "a trace on one node", "a trace on two"],
)
def test_only_what_may_be_a_lost_node_starts_again(tmp_path, said, nodes, starts):
    srun = f"""
echo start >> $RUN/starts
[ $(grep -c . $RUN/starts) = 2 ] && exit 0
echo '{said}' > $RUN/errors/rank-0.txt; exit 3
"""
    code, output, called = Shell(tmp_path, srun, nodes=nodes).end()
    assert len((tmp_path / "lm/moe-smoke/j1/starts").read_text().splitlines()) == starts
    assert (code, called) == (3 if starts == 1 else 0, [])
    assert (said in output) == (starts == 1)


@pytest.mark.parametrize("saves", [True, False])
def test_killed_once_more_than_allowed_it_is_requeued_only_if_it_saved_meanwhile(tmp_path, saves):
    srun = f"{'echo step_5 > $RUN/checkpoints/latest;' if saves else ''} exit 137"
    code, output, called = Shell(tmp_path, srun, settings=["max_restarts=0"]).end()
    assert (code, called) == ((INTERRUPTED, ["scontrol requeue 77"]) if saves else (137, [])), output


def test_ray_that_keeps_dying_is_given_up_after_some_turns_without_a_checkpoint(tmp_path):
    shell = Shell(tmp_path, KILLED, profile="slurm-ray")
    ends = [shell.end()[0], *(shell.start().end()[0] for _ in range(2))]
    assert ends == [INTERRUPTED, INTERRUPTED, 137]
    shell.program("srun", "echo step_5 > $RUN/checkpoints/latest; exit 137")
    assert shell.start().end()[0] == INTERRUPTED, "it came further"
    shell.program("srun", KILLED)
    assert shell.start().end()[0] == INTERRUPTED, "and is counted anew"
