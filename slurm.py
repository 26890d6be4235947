"""Runs as one array job of SLURM: what `python experiments.py --slurm` submits.

A task is the command of one run, which goes on from its checkpoint wherever it is started. So what
SLURM stops costs nothing:

    preemption, a lost node   SIGTERM, on which the run saves; --requeue starts the task again
    the time limit            SIGTERM two minutes before (--signal); submit once more
    scancel, a full disk      submit once more

Submitting again submits what is neither finished nor in the queue. FOLDER.job remembers the task,
JOB_INDEX, that a run was submitted as, and squeue is asked which of them it still has.
"""

import shlex
import subprocess
from pathlib import Path


class SlurmError(Exception):
    """SLURM, or the template, said no. The message is one line."""


def ask(*command, text=None):
    """What a command of SLURM prints."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SlurmError(f"there is no {command[0]} here: run this where SLURM's jobs are "
                         "submitted, or see --print") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def in_queue(folders):
    """Those of the run folders whose task is pending, running or just ending."""
    jobs = {folder: Path(f"{folder}.job") for folder in folders}
    tasks = {folder: job.read_text() for folder, job in jobs.items() if job.exists()}
    if not tasks:
        return set()
    there = ask("squeue", "--me", "--noheader", "--array", "--format=%i").split()
    return {folder for folder, task in tasks.items() if task in there}


def script(template, commands, out):
    """The template as an array job: task i is the i-th of commands {run folder: command}. `exec`
    makes the run the process that SLURM signals."""
    try:
        text = Path(template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SlurmError(f"{template}: {error}") from None
    cases = [f"{i}) exec {shlex.join(command)} >> {shlex.quote(f'{folder}.log')} 2>&1 ;;"
             for i, (folder, command) in enumerate(commands.items())]
    parts = {"{tasks}": f"0-{len(cases) - 1}", "{out}": str(out),
             "{commands}": "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"])}
    for name in ("{tasks}", "{commands}"):
        if name not in text:
            raise SlurmError(f"{template}: there is no {name}; slurm.sh shows how it is used")
    for name, value in parts.items():
        text = text.replace(name, value)
    return text


def submit(template, commands, out, dry_run=False):
    """Submits commands {run folder: command} that are not in the queue as one array job, and says
    so; dry_run prints the script instead."""
    queued = in_queue(commands)
    commands = {folder: line for folder, line in commands.items() if folder not in queued}
    print(f"# {len(queued)} runs are in the queue, {len(commands)} are not")
    if not commands:
        return
    text = script(template, commands, out)
    if dry_run:
        print(text, end="")
        return
    for folder in commands:
        folder.parent.mkdir(parents=True, exist_ok=True)  # for its log
    job = ask("sbatch", "--parsable", text=text).strip().split(";")[0]
    for i, folder in enumerate(commands):
        Path(f"{folder}.job").write_text(f"{job}_{i}")
    print(f"submitted    {len(commands)} runs as job {job}; once more when it has ended, for what "
          "is left")
