"""slurm.py: what is submitted, and the array job on a real SLURM where one can be set up."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import experiments
import m3po
import slurm
from baselines import pearl
from tests.conftest import assert_same_run

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "slurm.sh"
PROGRAMS = "munged slurmctld slurmd sbatch squeue scontrol scancel sinfo".split()
SHORT = "--N 3 --E 200 --G 2 --width 16 --eval-episodes 4".split()


@pytest.fixture
def fake_slurm(monkeypatch):
    """A SLURM that gives job numbers 1, 2, ..; `queue` is what squeue shows, `scripts` its jobs."""
    class Fake:
        queue, scripts = [], []

        def ask(self, *command, text=None):
            if command[0] == "squeue":
                return "".join(f"{task}\n" for task in self.queue)
            self.scripts.append(text)
            return f"{len(self.scripts)};cluster\n"

    fake = Fake()
    fake.queue, fake.scripts = [], []
    monkeypatch.setattr(slurm, "ask", fake.ask)
    return fake


def test_submitting_again_submits_what_is_not_in_the_queue(fake_slurm, tmp_path):
    commands = {tmp_path / "out" / name: ["echo", name] for name in "abc"}
    slurm.submit(TEMPLATE, commands, tmp_path)
    assert "--array=0-2\n" in fake_slurm.scripts[0]
    fake_slurm.queue = ["1_0", "1_2", "11_1", "7_1"]  # b's has ended, somehow
    slurm.submit(TEMPLATE, commands, tmp_path)
    assert "--array=0-0\n" in fake_slurm.scripts[1]
    assert "echo b" in fake_slurm.scripts[1] and "echo a" not in fake_slurm.scripts[1]
    fake_slurm.queue = ["1_0", "1_2", "2_0"]
    slurm.submit(TEMPLATE, commands, tmp_path)
    assert len(fake_slurm.scripts) == 2


def test_a_task_becomes_its_run_and_prints_into_the_runs_log(tmp_path):
    say = [sys.executable, "-c", "import os, sys; print(os.getpid(), *sys.argv[1:])"]
    folders = [tmp_path / "a", tmp_path / "a folder's"]
    text = slurm.script(TEMPLATE, {folders[0]: say, folders[1]: [*say, "$HOME", "it's"]}, tmp_path)
    child = subprocess.Popen(["bash", "-c", text], env=os.environ | {
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "1"})
    assert child.wait() == 0
    assert Path(f"{folders[1]}.log").read_text() == f"{child.pid} $HOME it's\n"
    assert not Path(f"{folders[0]}.log").exists()


def test_a_dry_run_prints_the_script_and_submits_nothing(fake_slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grid = ["--methods", "m3po", "l2a", "--seeds", "3", "4"]
    assert experiments.main([*grid, "--slurm", "--dry-run", "--", "--M", "9"]) == 0
    said = capsys.readouterr()
    assert "Left out: --M 9 for l2a" in said.err and "--array=0-3\n" in said.out
    lines = [line for line in said.out.splitlines() if " exec " in line]
    assert [line.split(")")[0] for line in lines] == ["0", "1", "2", "3"]
    assert "--methods m3po --seeds 3" in lines[0] and lines[0].endswith(
        "-- --M 9 >> runs/experiments/point-fwd-bwd/m3po/seed3.log 2>&1 ;;")
    assert "--methods l2a --seeds 3" in lines[1] and "--M" not in lines[1]
    assert fake_slurm.scripts == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines, says", [
    ("#SBATCH --array={tasks}", "no {commands}"), ("{commands}", "no {tasks}"), (None, "No such")])
def test_a_template_that_cannot_work_is_refused(lines, says, fake_slurm, tmp_path):
    if lines:
        (tmp_path / "mine.sh").write_text(lines)
    with pytest.raises(slurm.SlurmError, match=says):
        slurm.submit(tmp_path / "mine.sh", {tmp_path / "a": ["echo"]}, tmp_path)
    assert fake_slurm.scripts == []


def test_what_slurm_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match="there is no sbatch here"):
        slurm.ask("sbatch")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho no such >&2\necho partition >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o700)
    with pytest.raises(slurm.SlurmError, match="^sbatch: no such partition$"):
        slurm.ask("sbatch", text="")


# ---- a real one ---------------------------------------------------------------------------------


def wait_for(what, limit=240):
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def real_slurm(tmp_path, monkeypatch):
    """A SLURM of one node, while the test runs."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing or os.geteuid():
        pytest.skip("needs root and Debian's slurmctld, slurmd, munge, slurm-client")
    folder = tmp_path / "slurm"
    with open(tmp_path / "slurm.out", "w") as log:
        daemons = subprocess.Popen(["bash", str(ROOT / "tests/slurm.sh"), str(folder)], stdout=log,
                                   stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            if daemons.poll() is not None:
                break
            time.sleep(0.1)
        if not (folder / "ready").exists():
            pytest.skip("SLURM does not start here: " + (tmp_path / "slurm.out").read_text()[-500:])
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    finally:
        daemons.terminate()
        daemons.wait()


def test_preempted_or_cancelled_a_run_ends_on_slurm_as_if_it_had_never_stopped(
        real_slurm, tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "results"
    folders = {name: out / "point-fwd-bwd" / name / "seed0" for name in ("m3po", "pearl")}

    def submit():
        assert experiments.main(["--methods", "m3po", "pearl", "--seeds", "0", "--out", str(out),
                                 "--results", str(results), "--slurm", "--", *SHORT]) == 0
        return capsys.readouterr().out

    def task(name):
        return Path(f"{folders[name]}.job").read_text()

    def queue():
        return dict(line.split() for line in
                    slurm.ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines())

    assert "submitted    2 runs as job" in submit()
    preempted = task("m3po")
    assert "submitted" not in submit()  # they are pending
    for name, folder in folders.items():
        wait_for((folder / "progress.csv").exists)  # the first of three epochs has ended
        if name == "m3po":
            slurm.ask("scontrol", "requeue", preempted)
        else:
            slurm.ask("scancel", task("pearl"))
    wait_for(lambda: task("pearl") not in queue() and queue()[preempted] == "PENDING")
    for folder in folders.values():
        assert "stopped and saved" in Path(f"{folder}.log").read_text()
    assert not results.exists()

    slurm.ask("scontrol", "update", f"JobId={preempted}", "StartTime=now")  # not in two minutes
    assert "submitted    1 runs as job" in submit()
    assert task("m3po") == preempted
    wait_for(lambda: not queue())
    never_stopped = {}
    for name, program in (("m3po", m3po), ("pearl", pearl)):
        never_stopped[name] = tmp_path / f"plain_{name}"
        flags = [*SHORT, "--seed", "0", "--out", str(never_stopped[name])]
        assert program.main(*m3po.parse_args(flags, name)) is None
    for name, folder in folders.items():
        assert_same_run(folder, never_stopped[name])
        kept = results / "point-fwd-bwd" / name / "seed0/progress.csv"
        assert kept.read_bytes() == (folder / "progress.csv").read_bytes()
    capsys.readouterr()
    assert "submitted" not in submit()
