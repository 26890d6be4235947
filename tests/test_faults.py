"""faults.py: what stops a run before its end, and what is then saved and said."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gymnasium as gym
import pytest

import checkpoint
import envs
import faults
import m3po
from env_checks import EnvError
from tests.conftest import RunEnv, TINY, assert_same_run, read_rows, resume_run, run


class Breaks(RunEnv):
    """Raises at step t (0: in reset) of the episode that begins with a given seed."""

    breaks, error = None, KeyError("the robot's own bug")

    def broken(self, *now):
        if now == self.breaks:
            raise self.error

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        self.broken(seed, 0)
        return super().reset(seed=seed)

    def step(self, action):
        self.broken(self.seed, self.t + 1)
        return super().step(action)


@pytest.fixture
def breaking_env(monkeypatch):
    """A function that sets where Breaks does, and returns the flag that names it."""
    def where(breaks):
        monkeypatch.setattr(Breaks, "terminate_at", 6)
        monkeypatch.setattr(Breaks, "breaks", breaks)
        return ["--env", "Breaks-v0", "--eval-episodes", 1]
    if "Breaks-v0" not in gym.registry:
        gym.register("Breaks-v0", entry_point=Breaks)
    return where


@pytest.mark.parametrize("stream, index, t, step, epoch", [
    (0, 10, 1, 60, 1),  # training's first step in its 11th episode, which are 6 steps long
    (0, 10, 0, 60, 1),  # the reset before that
    (1, 1, 4, 40, 0),  # in the first evaluation
])
def test_an_own_envs_exception_is_saved_first_placed_in_a_line_and_keeps_its_traceback(
        stream, index, t, step, epoch, breaking_env, tmp_path, capsys):
    flags = breaking_env((envs.seeds(0, stream, index)[0], t))
    with pytest.raises(KeyError, match="own bug") as raised:
        run(tmp_path / "a", *flags)
    assert raised.traceback[-1].name == "broken"  # the place in the user's own file
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error in Breaks-v0 at env step {step}, " in line and "--resume" in line
    state = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")
    assert (state["step"], state["progress"]["epoch"]) == (step, epoch)
    breaking_env(None)  # mended
    resume_run(tmp_path / "a")
    assert [row["global_step"] for row in read_rows(tmp_path / "a")] == ["40", "80"]
    assert [row["global_step"] for row in read_rows(tmp_path / "a", "eval.csv")] == ["40", "80"]
    if stream == 1:  # between two steps: as if it had never been
        assert_same_run(tmp_path / "a", run(tmp_path / "b", *flags))


def test_an_overflow_that_numpy_raises_in_an_own_env_is_its_exception_and_no_divergence(
        breaking_env, monkeypatch, tmp_path):
    monkeypatch.setattr(Breaks, "error", FloatingPointError("overflow encountered in square"))
    flags = breaking_env((envs.seeds(0, 0, 10)[0], 1))
    with pytest.raises(FloatingPointError), faults.in_one_line("m3po"):
        run(tmp_path / "a", *flags)
    assert checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["step"] == 60
    with pytest.raises(SystemExit), faults.in_one_line("m3po"):
        raise FloatingPointError("q_loss is not finite at env step 84")


def test_a_bug_of_a_fork_is_saved_first_and_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    def update(*batch):
        raise ValueError("could not broadcast")

    monkeypatch.setattr(m3po.MetaPolicy, "update", update)
    with pytest.raises(ValueError, match="could not broadcast"):
        run(tmp_path / "a")
    assert "point-fwd-bwd at env step 41" in capsys.readouterr().err
    monkeypatch.undo()
    resume_run(tmp_path / "a")
    assert len(read_rows(tmp_path / "a")) == 2


def test_weights_that_are_not_finite_are_not_saved_by_a_bug_either(tmp_path, monkeypatch, capsys):
    def update(self, *batch):
        self.log_alpha.data.fill_(float("nan"))
        raise ValueError("could not broadcast")

    run(tmp_path / "a")
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    monkeypatch.setattr(m3po.MetaPolicy, "update", update)
    with pytest.raises(ValueError, match="could not broadcast"):
        resume_run(tmp_path / "a", "--N", 3)
    assert "not saved: a parameter" in capsys.readouterr().err
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


def test_from_the_shell_a_line_stands_above_the_traceback_and_the_status_is_1(tmp_path):
    (tmp_path / "bad_robot.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Bad(gym.Env):\n"
        "    observation_space = action_space = gym.spaces.Box(-1, 1, (1,), np.float32)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        self.t = 0\n"
        "        return np.zeros(1, np.float32), {}\n"
        "    def step(self, action):\n"
        "        self.t += 1\n"
        "        assert self.t < 20, 'a leg is gone'\n"
        "        return np.zeros(1, np.float32), 1.0, False, False, {}\n"
        "gym.register('Bad-v0', entry_point=Bad)\n")
    done = subprocess.run(
        [sys.executable, m3po.__file__, *TINY, "--env", "bad_robot:Bad-v0", "--out", "a"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
        capture_output=True, check=False)
    line, *traceback = done.stderr.splitlines()
    assert done.returncode == 1 and (tmp_path / "a/checkpoint.pt").exists()
    assert line.startswith("m3po.py: error in bad_robot:Bad-v0 at env step 19, step 19 of episode")
    assert traceback[0].startswith("Traceback") and "a leg is gone" in traceback[-1]
    assert any("bad_robot.py" in text for text in traceback)


def test_a_full_disk_while_logging_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerows", full)
    with pytest.raises(checkpoint.CheckpointError, match="eval.csv could not be written.*No space"):
        run(tmp_path / "a")


@pytest.mark.parametrize("program", [["m3po.py"], ["-m", "baselines.pearl"]])
def test_ctrl_c_in_the_first_seconds_while_torch_is_imported_prints_nothing(program, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run([sys.executable, *program], cwd=Path(m3po.__file__).parent, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_importing_m3po_or_a_baseline_leaves_ctrl_c_alone():
    code = ("import signal, m3po, baselines.pearl\n"
            "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n")
    subprocess.run([sys.executable, "-c", code], cwd=Path(m3po.__file__).parent, check=True)


def test_ctrl_c_before_training_is_no_traceback(monkeypatch, capsys):
    def main(*_):
        raise KeyboardInterrupt

    closed = []
    env = Namespace(close=lambda: closed.append(True))
    monkeypatch.setattr(m3po, "main", main)
    monkeypatch.setattr(m3po, "parse_args", lambda: (None, env, None))
    with pytest.raises(SystemExit) as stop:
        m3po.command_line()
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped before training began\n"
    assert closed  # it may be a robot


def test_an_env_that_cannot_go_on_is_saved_first_and_said_in_one_line(tmp_path, breaking_env,
                                                                     monkeypatch, capsys):
    monkeypatch.setattr(Breaks, "error", EnvError("Breaks-v0: reset returned no numbers"))
    flags = breaking_env((envs.seeds(0, 0, 10)[0], 0))
    with pytest.raises(SystemExit) as stop, faults.in_one_line("m3po"):
        run(tmp_path / "a", *flags)
    assert stop.value.code == "m3po.py: error: Breaks-v0: reset returned no numbers"
    assert "saved; go on with: python m3po.py --resume" in capsys.readouterr().err


def test_torchs_words_for_no_memory_are_told_from_an_envs_about_memory():
    for words in ("CUDA out of memory. Tried to allocate 2 GiB",
                  "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: "
                  "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"):
        assert faults.out_of_memory(RuntimeError(words))
    assert not faults.out_of_memory(RuntimeError("gripper: shared memory segment not mapped"))
