"""The batch script: pure text, from a profile and a job.

Slurm signals the batch shell alone (``--signal=B:USR1@T``); the shell passes the signal on to every rank, the ranks
save at their step boundary and end, and the job is requeued. ``kill -TERM`` on srun would abort the step unsaved, and
Python in the ranks may hear of a signal only after a collective: hence a flag, a step boundary and a shell that waits.

Requeueing needs a Slurm client on the node: scontrol, else sbatch (which submits the same script once more). Where
there is neither, the job ends with exit code 75, and `sixfold jobs requeue` does it from where the client is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from sixfold_launchers.contract import INTERRUPTED, OUTCOME, REQUEST, JobSpec
from sixfold_launchers.profiles import BaseProfile, ContainerConfig, SlurmAllocation, SlurmProfile, SlurmRayProfile

SCRIPT = "job.sbatch"
NAME_PREFIX = "sixfold-"
_FRUITLESS = "fruitless-turns"
_FIRST_PAUSE_S = 2  # before the first restart; each further pause is four times as long as the last


def job_name(spec: JobSpec) -> str:
    """The name by which the job is found on the cluster, also after a lost confirmation or another submission."""
    return f"{NAME_PREFIX}{spec.job_id}"


def header(profile: SlurmAllocation, spec: JobSpec, own: Sequence[tuple[str, str | None]]) -> str:
    """The ``#SBATCH`` lines of an allocation, with a launcher's own options.

    The job starts without the submitter's environment (``--export=NIL``): what that shell holds, secrets included, is
    neither kept by the controller nor seen by the ranks. The script reads the login files itself, for what sites set up
    there (``module``): with ``--export=NONE`` Slurm would, before the script, and take a slow one for a lost node.
    """
    log = spec.logs / ("%A_%a.out" if len(spec.runs) > 1 else "%j.out")
    options: list[tuple[str, str | None]] = [
        ("job-name", job_name(spec)),
        ("chdir", str(spec.directory)),
        ("output", str(log)),
        ("open-mode", "append"),
        ("export", "NIL"),
        ("nodes", str(profile.nodes)),
        *own,
        ("gpus-per-node", str(profile.gpus_per_node) if profile.gpus_per_node else None),
        ("mem", profile.memory_per_node),
        ("partition", profile.partition),
        ("account", profile.account),
        ("qos", profile.qos),
        ("time", profile.time_limit),
        ("signal", f"B:USR1@{profile.save_before_limit_s}"),
    ]
    lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in options if value is not None]
    lines.append(f"#SBATCH --{'requeue' if profile.requeue else 'no-requeue'}")
    lines.extend(_extra(profile))
    return "\n".join(["#!/bin/bash", *lines])


def _extra(profile: SlurmAllocation) -> Iterator[str]:
    for name, value in profile.sbatch.items():
        if value is True:
            yield f"#SBATCH --{name}"
        elif value is not False:
            yield f"#SBATCH --{name}={shlex.quote(str(value))}"


def environment(profile: BaseProfile, spec: JobSpec) -> str:
    """Shell lines that set what every rank sees; secrets are not among it."""
    variables = {
        "SLURM_EXPORT_ENV": "ALL",
        "PYTHONUNBUFFERED": "1",
        "SIXFOLD_JOB_ID": spec.job_id,
        **profile.environment,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = spec.python_path()
    if path is not None:
        lines.append(f'export PYTHONPATH={shlex.quote(path)}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return "\n".join(lines)


def secret_arguments(profile: BaseProfile) -> list[str]:
    """Arguments that name the secrets to a rank; it reads them on its node."""
    return ["--secrets", profile.secrets_folder, *profile.secrets] if profile.secrets else []


def contained(container: ContainerConfig | None, spec: JobSpec) -> tuple[list[str], list[str]]:
    """What a container adds: options of srun, and a prefix of the command."""
    if container is None:
        return [], []
    own = [spec.folder.parent, *(run.folder.parent for run in spec.runs), spec.directory]
    folders = dict.fromkeys([f"{folder}:{folder}" for folder in own] + list(container.mounts))
    if container.runtime == "pyxis":
        return [f"--container-image={container.image}", f"--container-mounts={','.join(folders)}"], []
    return [], ["apptainer", "exec", "--nv", "--bind", ",".join(folders), container.image]


def render(profile: SlurmProfile, spec: JobSpec) -> str:
    """The batch script that trains a job's run, or one run of its sweep in each task of an array."""
    own: list[tuple[str, str | None]] = [
        ("ntasks-per-node", str(profile.tasks_per_node())),
        ("cpus-per-task", str(profile.cpus_per_rank)),
        ("array", array(profile.array_parallelism, spec)),
    ]
    return script(
        profile,
        spec,
        own=own,
        cpus_per_task=profile.cpus_per_rank,
        worker=[spec.python, "-m", "sixfold_launchers.slurm_task"],
        arguments=secret_arguments(profile),
        max_restarts=profile.max_restarts,
        fruitless_turns=0,
    )


def script(
    profile: SlurmProfile | SlurmRayProfile,
    spec: JobSpec,
    *,
    own: Sequence[tuple[str, str | None]],
    cpus_per_task: int,
    worker: Sequence[str],
    arguments: Sequence[str],
    max_restarts: int,
    fruitless_turns: int,
    tell: str = 'kill -USR1 "$step"',
) -> str:
    """The batch script whose one step runs ``worker RUN_FOLDER arguments`` in every task.

    Args:
        profile: the allocation.
        spec: the job.
        own: the launcher's own options of sbatch; None leaves one out.
        cpus_per_task: CPU cores of each task.
        worker: the command of a task.
        arguments: what follows the run folder.
        max_restarts: starts of the step inside the allocation after tasks were killed.
        fruitless_turns: requeues in a row after turns that were ended by a kill, and came to no further checkpoint.
        tell: shell command that has the ranks of ``$run`` save and end once ``$step``, their srun, has been started;
            srun passes signals on to every process.
    """
    sruns, prefix = contained(profile.container, spec)
    return _BODY.format(
        header=header(profile, spec, own),
        environment=environment(profile, spec),
        setup="".join(f"{line}\n" for line in profile.setup),
        runs="\n".join(f"  {shlex.quote(str(run.folder))}" for run in spec.runs),
        srun=shlex.join(["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}", *sruns]),
        worker=shlex.join([*prefix, *worker]),
        arguments="".join(f" {shlex.quote(argument)}" for argument in arguments),
        tell=tell,
        max_restarts=max_restarts,
        starts=max_restarts + 1,
        pause_s=_FIRST_PAUSE_S,
        requeue=requeue_lines(profile, spec),
        outcome=OUTCOME,
        request=REQUEST,
        interrupted=INTERRUPTED,
        fruitless=_FRUITLESS,
        fruitless_turns=fruitless_turns,
    )


def array(parallelism: int | None, spec: JobSpec) -> str | None:
    """The option that makes a sweep an array of one task a run; None for a single run."""
    if len(spec.runs) == 1:
        return None
    limit = "" if parallelism is None else f"%{parallelism}"
    return f"0-{len(spec.runs) - 1}{limit}"


def requeue_lines(profile: SlurmAllocation, spec: JobSpec) -> str:
    """Shell function ``requeue``: ask for another turn with whatever client the node has."""
    if not profile.requeue:
        return "requeue() { echo 'saved; this profile does not requeue'; }"
    script = shlex.quote(str(spec.folder / SCRIPT))
    array = ' --array="$SLURM_ARRAY_TASK_ID"' if len(spec.runs) > 1 else ""
    return _REQUEUE.format(again=f"sbatch{array} {script}")


_REQUEUE = """\
requeue() {{
  if command -v scontrol >/dev/null; then
    scontrol requeue "$SLURM_JOB_ID"
  elif command -v sbatch >/dev/null; then
    {again}
  else
    echo "saved; no Slurm client on this node to requeue with: sixfold jobs requeue $SIXFOLD_JOB_ID"
  fi
}}"""

_BODY = """\
{header}

# The shell hears USR1 before the time limit (or from whoever wants the nodes), and TERM when the job is cancelled or
# reaches its limit; a preemption with a grace time tells the ranks alone.
signals=0 heard= step= lost= code=143
tell() {{ {tell}; }}
pass_on() {{ signals=$(( signals + 1 )) heard=$heard$1; [ -z "$step" ] || tell; }}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

for file in /etc/profile ~/.bash_profile; do [ ! -r "$file" ] || . "$file"; done
{environment}
{setup}
runs=(
{runs}
)
run=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}

{requeue}

is_cancelled() {{
  [ "$heard" = TERM ] && [ "$(squeue --noheader --states=all --format=%r --jobs="$SLURM_JOB_ID" 2>&1)" != TimeLimit ]
}}

# Why ranks failed, in their own words; a traceback may only tell of a peer that is gone. Hangs have files of their own.
reasons() {{ for file in "$run"/errors/rank-*.txt; do grep -qs ^Traceback "$file" || cat "$file"; done 2>/dev/null; }}

# Killed ranks start again. So do ranks of several nodes that say nothing: Slurm takes minutes to notice a lost node.
newest=$(cat "$run/checkpoints/latest" 2>/dev/null)
for restart in $(seq 0 {max_restarts}); do
  [ "$signals" = 0 ] || break
  lost=
  rm -f "$run/{outcome}" "$run/{request}" "$run"/errors/*.txt
  export SIXFOLD_ATTEMPT=$(( ${{SLURM_RESTART_COUNT:-0}} * {starts} + restart ))
  {srun} \\
    {worker} "$run"{arguments} &
  step=$!
  [ "$signals" = 0 ] || tell
  # A trapped signal ends a wait early; the next wait returns how srun ended.
  while before=$signals; wait "$step"; code=$?; [ "$before" != "$signals" ]; do :; done
  step=
  if [ "$code" = 0 ] || [ "$signals" != 0 ] || [ -n "$(reasons)" ]; then break; fi
  if [ "$code" -le 128 ] && [ "$SLURM_JOB_NUM_NODES" = 1 ]; then break; fi
  lost=yes
  echo "the ranks ended with code $code and no reason; restarts so far: $restart of {max_restarts}"
  [ "$restart" = {max_restarts} ] || {{ sleep $(( {pause_s} << 2 * restart )) & wait $!; }}
done
[ "$code" = 0 ] || cat "$run"/errors/*.txt 2>/dev/null

# Interrupted: saved on request, or killed; but turns that come to no further checkpoint may only repeat what ends them.
if [ "$newest" != "$(cat "$run/checkpoints/latest" 2>/dev/null)" ]; then
  rm -f "$run/{fruitless}"
elif [ -n "$lost" ]; then
  fruitless=$(( $(cat "$run/{fruitless}" 2>/dev/null || echo 0) + 1 ))
  echo "$fruitless" >"$run/{fruitless}"
  echo "turns without a further checkpoint: $fruitless; the last that is followed by another: {fruitless_turns}"
  [ "$fruitless" -le {fruitless_turns} ] || lost=
fi
if [ "$(cat "$run/{outcome}" 2>/dev/null)" = interrupted ] || [ -n "$lost" ] \\
   || {{ [ "$signals" != 0 ] && [ "$code" -gt 128 ]; }}; then
  is_cancelled || requeue
  exit {interrupted}
fi
exit "$code"
"""
