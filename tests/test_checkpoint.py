"""checkpoint.py: resume, kills and signals, files that are no checkpoint. More in test_m3po.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import envs
import evaluation
import faults
import logs
import m3po
import speed
from tests.conftest import (
    TINY, assert_same_run, parse, read_rows, resume_run, run, state_differences,
)


def test_resuming_into_another_folder_leaves_the_first_alone(tmp_path):
    a = run(tmp_path / "a")
    before = (a / "progress.csv").read_bytes()
    m3po.main(*parse("--resume", a, "--N", 3, "--out", tmp_path / "b"))
    assert (a / "progress.csv").read_bytes() == before
    assert [row["epoch"] for row in read_rows(tmp_path / "b")] == ["1", "2", "3"]


def test_rows_past_the_checkpoint_and_half_lines_are_cut(tmp_path):
    a = run(tmp_path / "a", "--N", 3)
    b = run(tmp_path / "b")
    with open(b / "progress.csv", "a") as f:
        f.write((a / "progress.csv").read_text().splitlines()[-1] + "\n3,12")
    with open(b / "eval.csv", "a") as f:
        f.write("120,0,1.5,100\r\n120,")
    assert_same_run(a, resume_run(b, "--N", 3))


@pytest.mark.parametrize("flags, says", [
    (["--gamma", "0.5"], "--gamma"), (["--env", "ant-fwd-bwd"], "--env"),
    (["--N", "1"], "--N"), (["--seed", "7"], "--seed")])
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(flags, says, tmp_path, capsys):
    run(tmp_path / "a")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse("--resume", tmp_path / "a", *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and says in message and message.count("\n") == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "code", "version", "agent"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_and_runs_no_code(
        damage, tmp_path, capsys):
    run(tmp_path / "a")
    path = tmp_path / "a/checkpoint.pt"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "agent":
        path.write_bytes((tmp_path / "a/agent.pt").read_bytes())
    else:
        torch.save({"foreign": {"a": 1}, "code": Bomb(),
                    "version": {"kind": "run", "version": 99}}[damage], path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse("--resume", tmp_path / "a")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "checkpoint.pt" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("flags"), "'flags' is missing"),
    (lambda state: state.pop("rng"), "'rng' is missing"),
    (lambda state: state.update(progress=[1]), "'progress' is missing or no dict"),
    (lambda state: state.pop("D_env"), "lacks 'D_env'"),
    (lambda state: state.pop("rng_cuda"), "lacks 'rng_cuda'"),
    (lambda state: state["D_model"].pop("written"), "lacks 'written'"),
    (lambda state: state["progress"].update(note="mine"), "progress has note"),
    (lambda state: state.update(policy=3), "does not fit"),
    (lambda state: state.update(rng=torch.zeros(3)), "does not fit"),
])
def test_a_checkpoint_edited_by_hand_is_one_line(change, says, tmp_path, capsys, monkeypatch):
    run(tmp_path / "a")
    path = tmp_path / "a/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    monkeypatch.setattr(sys, "argv", ["m3po.py", "--resume", str(tmp_path / "a"), "--N", "3"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        m3po.command_line()
    line = capsys.readouterr().err or str(stop.value.code)
    assert says in line and line.startswith("m3po.py: error: ") and line.strip().count("\n") == 0


def test_a_checkpoint_that_does_not_fit_is_refused_naming_the_field(tmp_path):
    run(tmp_path / "a")
    args, env, state = parse("--resume", tmp_path / "a", "--N", 3)
    state["policy"].pop("log_alpha")
    with pytest.raises(checkpoint.CheckpointError, match="log_alpha"):
        m3po.main(args, env, state)


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before(where, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_atomically(path, lambda f: f.write(b"old"))

    def full(*args):
        raise OSError(28, "No space left on device")

    def write(f):
        f.write(b"new")
        if where == "save":
            raise RuntimeError("PytorchStreamWriter failed writing file")

    if where != "save":
        monkeypatch.setattr(checkpoint.os, where, full)
    with pytest.raises(checkpoint.CheckpointError, match="still valid"):
        checkpoint.write_atomically(path, write)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_at_the_first_checkpoint_does_not_say_that_there_is_one(tmp_path):
    def full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.write_atomically(tmp_path / "checkpoint.pt", full)
    assert "No space" in str(error.value) and "valid" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_best_agent_is_kept_beside_the_last_also_through_a_resume(tmp_path, monkeypatch):
    returns = {40: 1.0, 80: 5.0, 120: 3.0, 160: 5.0, 200: 4.0}  # of two equal ones, the later

    def summarise(log):
        metrics = {"eval_return_std": 0.0, "eval_return_mean": returns[log.progress.step]}
        return torch.zeros(2), torch.ones(2), metrics

    evaluate = logs.Log.evaluate

    def scripted(self, *args):
        monkeypatch.setattr(logs, "summarise", lambda *_: summarise(self))
        return evaluate(self, *args)

    monkeypatch.setattr(logs.Log, "evaluate", scripted)
    agent = lambda folder, name: checkpoint.read(folder / name, "agent")
    nets = lambda state: {name: state[name] for name in ("step", "policy", "model")}
    same = lambda a, b: state_differences(nets(a), nets(b)) == []
    a = run(tmp_path / "a")
    second = agent(a, "best.pt")
    assert second["step"] == 80 and same(second, agent(a, "agent.pt"))
    m3po.main(*parse("--resume", a, "--N", 3, "--out", tmp_path / "b"))
    assert same(agent(tmp_path / "b", "best.pt"), second)
    assert not same(agent(tmp_path / "b", "agent.pt"), second)
    assert same(agent(resume_run(a, "--N", 4), "best.pt"), agent(a, "agent.pt"))
    resume_run(a, "--N", 5)
    at_once = run(tmp_path / "c", "--N", 5)
    assert agent(a, "best.pt")["step"] == 160 != agent(a, "agent.pt")["step"]
    assert same(agent(a, "best.pt"), agent(at_once, "best.pt"))
    assert_same_run(a, at_once)
    policy, *_ = m3po.load(a / "best.pt")
    assert state_differences(policy.state_dict(), agent(a, "best.pt")["policy"]) == []


def test_without_an_evaluation_there_is_no_best_agent(tmp_path):
    assert not (run(tmp_path / "a", "--eval-episodes", 0) / "best.pt").exists()


def test_a_checkpoint_has_the_same_names_compiled_and_eager(tmp_path):
    args, env, _ = parse(*TINY)
    for part in m3po.build(args, env, "cpu"):
        names = list(part.state_dict())
        speed.compile_methods(part)
        assert list(part.state_dict()) == names


def test_a_loaded_agent_evaluates_exactly_as_the_live_one(tmp_path):
    run(tmp_path / "a", "--env", "halfcheetah-pier")
    policy, model, env, args = m3po.load(tmp_path / "a")
    env_seeds = envs.seeds(args.seed, 1, args.N, 2)
    group = evaluation.Group([env, m3po.make_env(args)])
    episodes = evaluation.evaluate(policy, group, env_seeds, args.L)
    live = [float(row["return"]) for row in read_rows(tmp_path / "a", "eval.csv")[-2:]]
    assert evaluation.summarise(episodes, args.gamma, early=50)[0].tolist() == live


KILLED_AGAIN = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import m3po
folder, kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
devnull = os.open(os.devnull, os.O_WRONLY)
for attempt in range(kills + 1):
    child = os.fork()
    if child == 0:
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        resume = os.path.exists(folder + "/checkpoint.pt")
        if not resume and os.path.exists(folder):
            os.system("rm -r " + folder)  # killed before its first checkpoint: begin again
        m3po.main(*m3po.parse_args(["--resume", folder] if resume else [*flags, "--out", folder]))
        os._exit(0)
    if attempt < kills:
        time.sleep(random.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", flush=True)
"""


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    flags = [*TINY, "--N", "40", "--eval-episodes", "1", "--seed", "3"]
    m3po.main(*parse(*flags, "--out", tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", KILLED_AGAIN, tmp_path / "b", "20", *flags],
                          text=True, cwd=Path(m3po.__file__).parent, capture_output=True,
                          check=True)
    ends = done.stdout.split()
    assert ends == 20 * ["9"] + ["done"]
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_within_a_step_and_resuming_equals_never_stopping(name, status, tmp_path):
    flags = [*TINY, "--N", "200", "--E", "20"]
    child = subprocess.Popen([sys.executable, m3po.__file__, *flags, "--out", tmp_path / "b"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "b/checkpoint.pt").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(getattr(signal, name))
    out, err = child.communicate()
    assert child.returncode == status and "--resume" in out and "Traceback" not in err
    step = checkpoint.read(tmp_path / "b/checkpoint.pt", "run")["step"]
    end = str(step // 20 + 1)
    m3po.main(*parse(*flags, "--N", end, "--out", tmp_path / "a"))
    args, env, state = parse("--resume", tmp_path / "b", "--N", end)
    m3po.main(args, env, state)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_log_without_even_its_first_line_does_not_stop_a_resume(tmp_path):
    run(tmp_path / "a")
    (tmp_path / "a/eval.csv").write_text("")
    resume_run(tmp_path / "a", "--N", 3)
    assert [row["global_step"] for row in read_rows(tmp_path / "a", "eval.csv")] == ["120", "120"]


def test_after_the_first_signal_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with faults.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)  # caught: the loop will see it and save
        assert stop.received == signal.SIGINT
        assert {signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) is before
