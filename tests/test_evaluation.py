"""evaluation.py: episodes on all cores, and what is said about them."""

import io
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import envs
import evaluation
import logs
import m3po
from policy import MetaPolicy
from tests.conftest import parse, read_rows, run


class CountingEnv:
    """o_t = t, r_t = 10 (t + 1)."""

    class action_space:
        shape = (1,)

    def reset(self, seed=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 10.0 * self.t, self.t == 5, False, {}


def test_evaluation_shows_the_policy_the_tokens_of_the_history_contract():
    """On a CPU a tensor made of obs shares its memory: overwriting obs before the token is made
    would turn tokens into (o_{t+1}, a_t, r_t)."""
    seen = []

    class Policy:
        act_dim = 1

        def act(self, tokens, mask, obs, deterministic):
            seen.append((obs[0, 0].item(), tokens[mask][:, [0, 2]].tolist()))
            return torch.zeros(len(obs), 1)

    evaluation.evaluate(Policy(), evaluation.Group([CountingEnv()]), [0], 2)
    assert seen[0] == (0.0, []) and seen[1] == (1.0, [[0.0, 10.0]])
    assert seen[2] == (2.0, [[0.0, 10.0], [1.0, 20.0]])
    assert seen[3] == (3.0, [[1.0, 20.0], [2.0, 30.0]])


def test_faults_in_evaluation_are_counted(run_env, tmp_path):
    rows = read_rows(run(tmp_path / "a", *run_env(terminate_at=None, truncate_at=9, fail_at=4)))
    assert [row["eval_faults"] for row in rows] == ["2", "2"]  # one in each of two episodes


def test_adaptation_is_the_reward_within_50_steps_after_a_real_switch():
    T = 120
    episodes = {"reward": np.ones((T, 1)), "steps_since_switch": np.arange(T, dtype=float)[:, None],
                "switched": np.zeros((T, 1)), "right_way": np.ones((T, 1)),
                "fault": np.zeros((T, 1))}
    episodes["fault"][7] = 1
    episodes["switched"][60], episodes["steps_since_switch"][60:] = 1, np.arange(60)[:, None]
    episodes["reward"][60:110] = -2
    episodes["right_way"][60:90] = 0
    returns, lengths, found = evaluation.summarise(episodes, 0.5, early=50)
    assert returns[0] == 70 - 100 and lengths[0] == T
    assert found["eval_reward_after_switch"] == -2 and found["eval_reward_otherwise"] == 1
    assert found["eval_right_way"] == 0.75 and found["eval_faults"] == 1
    assert found["eval_discounted_return"] == pytest.approx(2.0)


def test_reward_is_aligned_at_the_switch_and_ends_at_the_next(tmp_path):
    reward = np.arange(100.0)[:, None]
    episodes = {"reward": reward, "switched": np.isin(reward, (3, 30, 50)).astype(float)}
    _, env, _ = parse()
    x = evaluation.span(env)
    assert x.tolist() == list(range(-5, 26))  # the toy's period is 25
    assert evaluation.span(envs.make("ant-fwd-bwd")).tolist() == list(range(-20, 61))
    rows, places = evaluation.around_switches(episodes, x)
    nan = float("nan")
    assert np.array_equal(rows[0], [nan, nan, *range(0, 29)], equal_nan=True)
    assert np.array_equal(rows[1], [*range(25, 50), *[nan] * 6], equal_nan=True)
    assert np.array_equal(rows[2], range(45, 76)) and places == [(0, 3), (0, 30), (0, 50)]

    log = SimpleNamespace(env=env, out=tmp_path)  # and what is written of them
    logs.Log.write_switches(log, episodes)
    steps, mean, n = np.loadtxt(tmp_path / "switches.csv", delimiter=",", skiprows=1).T
    assert np.array_equal(steps, x) and n.tolist() == [2] * 2 + [3] * 23 + [2] * 6
    assert np.allclose(mean, np.nanmean(rows, 0))
    (tmp_path / "switches.csv").unlink()
    logs.Log.write_switches(log, {"reward": reward, "switched": np.full((100, 1), nan)})
    assert not list(tmp_path.iterdir())


def test_an_episode_that_ended_is_not_counted_on():
    episodes = {name: np.array([[1.0, 1.0], [1.0, math.nan]]) for name in
                evaluation.METRICS}
    returns, lengths, _ = evaluation.summarise(episodes, 0.9, early=50)
    assert returns.tolist() == [2, 1] and lengths.tolist() == [2, 1]


class WorkerEnv(gymnasium.Env):
    """r = a t for four steps, seeds 1 and 2 for one and two more; seed 13 breaks at its third."""

    def reset(self, seed=None):
        self.seed, self.t = seed, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        time.sleep(0.002)  # so that no worker plays another's share too
        self.t += 1
        if self.seed == 13 and self.t == 3:
            raise KeyError("the simulator broke")
        info = {"right_way": bool(action[0] > 0), "steps_since_switch": os.getpid()}
        ends = 4 + (self.seed if self.seed in (1, 2) else 0)
        return np.zeros(1, np.float32), action[0] * self.t, False, self.t == ends, info

    def close(self):
        pass


class WorkerPolicy(torch.nn.Module):
    """a = its weight; it notes nothing of the history."""

    act_dim = 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def act(self, tokens, mask, obs, deterministic):
        return self.weight.detach().expand(len(obs), 1)


def test_a_long_evaluation_shows_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    """A planner's takes minutes. The bar is silent where nobody looks, and in a short one."""
    def shown(terminal, show=True):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", screen)
        env = envs.make("point-fwd-bwd")
        evaluation.evaluate(WorkerPolicy(), evaluation.Group([env]), [0], 2, show)
        return screen.getvalue()

    monkeypatch.setattr(evaluation, "BAR_AFTER", 0)
    assert "evaluation" in shown(True) and "/100" in shown(True)
    assert shown(True, show=False) == shown(False) == ""
    monkeypatch.setattr(evaluation, "BAR_AFTER", 5)
    assert shown(True) == ""


def players(n, workers, make_env=WorkerEnv, make_policy=WorkerPolicy, L=3):
    return evaluation.Players(make_env, make_policy, n, workers, L)


def test_each_process_plays_its_share_with_the_weights_of_now():
    some, policy = players(16, 3), WorkerPolicy()
    assert some.workers == 3 and len(some.processes) == 2
    env_seeds = [*range(13), 14, 15, 16]
    for weight in (2.0, -3.0):
        torch.nn.init.constant_(policy.weight, weight)
        found = some.evaluate(policy, env_seeds)
        t = np.arange(1, 5)[:, None]
        assert np.array_equal(found["reward"][:4, 3:], weight * t.repeat(13, 1))
        assert found["reward"].shape == (6, 16) and (
            np.isfinite(found["reward"]).sum(0).tolist() == [4, 5, 6] + [4] * 13)
        assert np.nansum(found["right_way"]) == (weight > 0) * (4 + 5 + 6 + 13 * 4)
    pids = found["steps_since_switch"][0]
    assert set(pids[:6]) == {os.getpid()}
    assert len(set(pids[6:11])) == len(set(pids[11:])) == 1
    assert {*pids[6:]} == {process.pid for process in some.processes}
    some.close()
    assert not any(process.is_alive() for process in some.processes)


def test_an_evaluation_in_processes_is_the_same_and_restores_the_threads():
    policy, threads = MetaPolicy(17, 6, widths=(8, 8)), torch.get_num_threads()
    make = lambda: envs.make("halfcheetah-fwd-bwd")
    several = [players(16, workers, make, lambda: MetaPolicy(17, 6, widths=(8, 8)))
               for workers in (1, 2)]
    env_seeds = list(range(16))
    found = [
        evaluation.evaluate(policy, evaluation.Group([make() for _ in range(16)]), env_seeds, 3)]
    try:
        torch.set_num_threads(2)
        for some in several:
            found.append(some.evaluate(policy, env_seeds))
            assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="at least one array"):
            several[1].evaluate(policy, [])  # seeds for none
        assert torch.get_num_threads() == 2
        assert not several[1].processes[0].is_alive()  # no late answer to take for the next one's
    finally:
        torch.set_num_threads(threads)
        for some in several:
            some.close()
    for name, values in found[0].items():
        assert values.shape == (1000, 16)
        assert np.array_equal(values, found[1][name]), name  # one batch as well
        # In the end it lies still: rounding decides which way 1e-9 m/s is.
        steps = slice(0, 30) if name == "right_way" else slice(None)
        assert np.allclose(values[steps], found[2][name][steps], atol=1e-3), name


def test_an_error_in_a_process_of_evaluation_reaches_the_main_process_with_its_place():
    some = players(16, 2)
    with pytest.raises(KeyError, match="the simulator broke") as raised:
        some.evaluate(WorkerPolicy(), list(range(16)))
    assert 'raise KeyError("the simulator broke")' in str(raised.value.__cause__)
    some.close()


def test_an_error_that_cannot_be_sent_says_in_words_what_it_was():
    class Picky(Exception):
        def __init__(self, part, number):
            super().__init__(f"{part} {number} broke")

    class Breaks(WorkerEnv):
        def step(self, action):
            raise Picky("leg", 3)

    some = players(16, 2, make_env=lambda: (
        Breaks() if multiprocessing.parent_process() else WorkerEnv()))
    with pytest.raises(RuntimeError, match="leg 3 broke") as raised:
        some.evaluate(WorkerPolicy(), list(range(16)))
    assert 'raise Picky("leg", 3)' in str(raised.value.__cause__)
    some.close()


def test_a_worker_sees_that_the_main_process_was_dead_before_it_began():
    """Its parent is another then, and a signal at its death would never come."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=evaluation.start_worker, args=(1, None, None))
    process.start()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["fork", "sched_setaffinity"])
def test_where_the_system_cannot_do_it_one_process_plays_all(name, monkeypatch):
    monkeypatch.delattr(os, name)
    some = players(16, 4)
    assert some.workers == 1 and some.pool is None
    found = some.evaluate(WorkerPolicy(), list(range(20, 36)))
    assert set(found["steps_since_switch"][0]) == {os.getpid()}
    some.close()


def test_a_worker_that_dies_is_one_line_and_one_that_is_told_to_stop_goes_on():
    some, env_seeds = players(16, 2), list(range(20, 36))
    some.evaluate(WorkerPolicy(), env_seeds)
    for process in some.processes:  # `timeout` and batch systems signal every process of a run
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    some.evaluate(WorkerPolicy(), env_seeds)
    some.processes[0].kill()
    some.processes[0].join()
    with pytest.raises(OSError, match="evaluation's episodes died"):
        some.evaluate(WorkerPolicy(), env_seeds)
    some.close()


def test_an_error_that_is_one_line_here_is_one_line_from_a_worker():
    class Refuses(WorkerEnv):
        def step(self, action):
            raise envs.EnvError("no such leg") if self.seed == 15 else KeyError("and no place")

    some = players(16, 2, make_env=Refuses)
    with pytest.raises(KeyError):  # its own first
        some.evaluate(WorkerPolicy(), list(range(16)))
    some = players(2 * 8, 2, make_env=lambda: (
        Refuses() if multiprocessing.parent_process() else WorkerEnv()))
    with pytest.raises(envs.EnvError, match="^no such leg$"):
        some.evaluate(WorkerPolicy(), [20] * 8 + [15] * 8)
    some.close()


def test_an_error_here_does_not_wait_for_workers_that_still_play():
    """A second for all of them, not for each."""
    class Slow(WorkerEnv):
        def step(self, action):
            if multiprocessing.parent_process():
                time.sleep(60)
            raise ConnectionError("the robot is gone")

    some = players(16, 8, make_env=Slow)
    start = time.time()
    with pytest.raises(ConnectionError, match="the robot is gone"):
        some.evaluate(WorkerPolicy(), list(range(16)))
    assert time.time() - start < 5 and not any(process.is_alive() for process in some.processes)


def test_no_process_for_less_than_two_episodes_nor_for_none():
    assert players(3, 4).workers == 1
    assert players(4, 4).workers == 2
    assert players(0, 4).own.group.envs == []


WORKERS_LEFT = """
import time
import evaluation
from tests import test_evaluation
class Slow(test_evaluation.WorkerEnv):
    def step(self, action):
        time.sleep(60 if WHEN == "playing" else 0.2)
        return super().step(action)
some = evaluation.Players(Slow, test_evaluation.WorkerPolicy, 24, 3, 2)
print(*(process.pid for process in some.processes), flush=True)
if WHEN == "playing":
    some.evaluate(test_evaluation.WorkerPolicy(), list(range(20, 44)))
# Not at once: Python's own pool may write to a pipe that it has just closed (Python 3.11).
time.sleep(0.5 if WHEN == "ended" else 60)
"""


@pytest.mark.parametrize("when", ["idle", "playing", "ended"])
def test_workers_end_with_the_main_process_and_without_a_word(when):
    code = WORKERS_LEFT.replace("WHEN", repr(when))
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, cwd=Path(m3po.__file__).parent)
    pids = [int(pid) for pid in main.stdout.readline().split()]
    assert len(pids) == 2
    if when != "ended":
        time.sleep(0.3)
        main.kill()
    assert main.communicate(timeout=20)[1] == ""  # the workers hold its stderr until they end
    gone = lambda pid: (not Path(f"/proc/{pid}").exists()
                        or ") Z" in Path(f"/proc/{pid}/stat").read_text())
    deadline = time.time() + 10  # a process closes its files a moment before it is gone
    while not all(map(gone, pids)):
        assert time.time() < deadline, "a worker outlived its main process"
        time.sleep(0.05)


def test_an_env_that_cannot_be_made_twice_ends_the_run():
    code = ("import evaluation\n"
            "from tests import test_evaluation\n"
            "made = []\n"
            "def make():\n"
            "    made.append(0)\n"
            "    if len(made) == 2: raise SystemExit('only one robot here')\n"
            "    return test_evaluation.WorkerEnv()\n"
            "evaluation.Players(make, test_evaluation.WorkerPolicy, 16, 4, 2)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(m3po.__file__).parent, timeout=60,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "only one robot here\n")
