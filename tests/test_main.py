"""Whole runs of m3po.py: what they promise, faults in the env and in the numbers, variants."""

import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import checkpoint
import envs
import m3po
from rollouts import Batch
from tests.conftest import RunEnv, TINY, parse, read_rows, resume_run, run, state_differences


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_moves_every_parameter_and_writes_what_it_promises(tmp_path, capsys):
    args, env, _ = parse(*TINY, "--diagnose-every", 1, "--out", tmp_path / "a")
    torch.manual_seed(args.seed)
    policy, model = m3po.build(args, env, "cpu")
    m3po.main(args, env)
    trained, trained_model, _, _ = m3po.load(tmp_path / "a")
    for before, after in ((policy, trained), (model, trained_model)):
        for (name, p), q in zip(before.named_parameters(), after.parameters()):
            assert not torch.equal(p, q), name
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["flags"]["G"] == 2 and config["versions"]["torch"] == torch.__version__
    rows = read_rows(tmp_path / "a")
    assert [row["global_step"] for row in rows] == ["40", "80"]
    for name in ("eval_return_mean", "q_loss", "alpha", "model_nll", "model_explained_reward",
                 "td_error", "kl_pi", "eps_m", "gap_full", "gap_branched", "nll_depth_5",
                 "rmse_reward_depth_1"):
        assert math.isfinite(float(rows[1][name])), name
    assert int(rows[1]["imagined"]) == 40 * 20  # E x M x k
    assert len(read_rows(tmp_path / "a", "eval.csv")) == 4
    said = capsys.readouterr().out
    for word in ("dir * a", "redrawn every 25", "800 model rollouts", "80 policy updates", "best"):
        assert word in said


@pytest.mark.parametrize("env", ["point-fwd-bwd", "ant-fwd-bwd"])
def test_evaluation_and_diagnostics_do_not_disturb_training(env, tmp_path):
    a = run(tmp_path / "a", "--env", env, "--diagnose-every", 1, "--eval-episodes", 4)
    b = run(tmp_path / "b", "--env", env, "--eval-episodes", 0)
    weights = [checkpoint.read(folder / "agent.pt", "agent") for folder in (a, b)]
    assert state_differences(weights[0]["policy"], weights[1]["policy"]) == []
    assert state_differences(weights[0]["model"], weights[1]["model"]) == []


def test_training_never_touches_rendering_nor_optional_packages(tmp_path):
    code = ("import sys\n"
            "for name in ('matplotlib', 'tensorboard'): sys.modules[name] = None\n"
            "import m3po\n"
            "from gymnasium.envs.mujoco import mujoco_rendering\n"
            "mujoco_rendering.MujocoRenderer.render = "
            "mujoco_rendering.MujocoRenderer._get_viewer = None\n"
            "m3po.main(*m3po.parse_args("
            f"{TINY + ['--env', 'ant-fwd-bwd', '--out', str(tmp_path / 'a')]!r}))\n")
    environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(m3po.__file__).parent, env=environ,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr and (tmp_path / "a/agent.pt").exists()


@pytest.mark.parametrize("name", [name for name in envs.ENVS if name != "point-fwd-bwd"])
def test_every_environment_trains_end_to_end(name, tmp_path):
    rows = read_rows(run(tmp_path / "a", "--env", name, "--E", 100, "--warmup", 100,
                         "--fit-every", 100, "--G", 1, "--eval-episodes", 1))
    assert math.isfinite(float(rows[-1]["q_loss"])) and int(rows[-1]["imagined"]) > 0


# --- faults in the env and in the numbers ---------------------------------------------------------


def test_a_failed_simulator_step_is_dropped_counted_and_ends_the_episode(run_env, tmp_path):
    flags = run_env(terminate_at=None, truncate_at=9, fail_at=4)
    rows = read_rows(run(tmp_path / "a", *flags))
    assert rows[-1]["dropped_transitions"] == "20"  # every 4th of 80 steps
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    assert D_env["total"] == 60 and D_env["age"].max() == 2 and (
        bool(torch.isfinite(D_env["tokens"]).all()))


@pytest.mark.parametrize("terminate_at, truncate_at, cut", [
    (3, None, 1.0), (None, 3, 0.0), (3, 3, 1.0), (None, None, 0.0)])
def test_only_termination_cuts_the_bootstrap(terminate_at, truncate_at, cut, run_env, tmp_path):
    flags = run_env(terminate_at=terminate_at, truncate_at=truncate_at)
    run(tmp_path / "a", *flags, "--eval-episodes", 0)
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    assert D_env["terminated"][2] == cut and D_env["terminated"].sum() == cut * (80 // 3)


def test_reset_every_shortens_the_episodes_of_training_alone_and_never_cuts_the_bootstrap(tmp_path):
    folder = run(tmp_path / "a", "--N", 1, "--reset-every", 7, "--eval-episodes", 2)
    D_env = checkpoint.read(folder / "checkpoint.pt", "run")["D_env"]
    assert D_env["age"][:40].tolist() == [i % 7 for i in range(40)]
    assert not D_env["terminated"][:40].any()
    assert [row["length"] for row in read_rows(folder, "eval.csv")] == ["100"] * 2
    assert parse("--env", "ant-fwd-bwd", "--reset-every", 0)[0].reset_every is None


def test_episodes_of_one_step_and_a_constant_observation_train(run_env, tmp_path):
    rows = read_rows(run(tmp_path / "a", *run_env(terminate_at=1), "--rollout", "full"))
    assert math.isfinite(float(rows[-1]["q_loss"])) and float(rows[-1]["eval_length_mean"]) == 1


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_the_checkpoint_before_stays(
        tmp_path, monkeypatch):
    run(tmp_path / "a")
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    update = m3po.MetaPolicy.update
    calls = []

    def broken(self, *batch):
        calls.append(1)
        return update(self, *batch) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(m3po.MetaPolicy, "update", broken)
    with pytest.raises(FloatingPointError, match="q_loss is not finite at env step 84"):
        resume_run(tmp_path / "a", "--N", 3)
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


def test_a_signal_after_a_loss_that_is_not_finite_does_not_save_it(tmp_path, monkeypatch):
    run(tmp_path / "a")
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    update, calls = m3po.MetaPolicy.update, []

    def broken(self, *batch):
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *batch) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(m3po.MetaPolicy, "update", broken)
    with pytest.raises(FloatingPointError, match="q_loss is not finite at env step 84"):
        resume_run(tmp_path / "a", "--N", 3)
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


class OneArray(RunEnv):
    """Returns its own array each time, and counts on in it."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.here = np.zeros(2, np.float32)
        return self.here, {}

    def step(self, action):
        obs, *rest = super().step(action)
        self.here[:] = obs
        return self.here, *rest


def test_an_env_that_changes_the_arrays_it_returned_is_recorded_right(tmp_path, monkeypatch):
    monkeypatch.setattr(RunEnv, "terminate_at", 6)
    if "OneArray-v0" not in gym.registry:
        gym.register("OneArray-v0", entry_point=OneArray, max_episode_steps=50)
    run(tmp_path / "a", "--env", "OneArray-v0")
    resume_run(tmp_path / "a", "--N", 3)
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    t = torch.arange(120) % 6
    assert torch.equal(D_env["tokens"][:, 0], t.float()) and (
        torch.equal(D_env["next_obs"][:, 0], t + 1.0))


@pytest.mark.parametrize("error, says", [
    (RuntimeError("CUDA out of memory. Tried\nto allocate"), "CUDA out of memory. Tried"),
    (MemoryError("Unable to allocate 3 TiB"), "Unable to allocate 3 TiB"),
    (MemoryError(), "out of memory"),
    (RuntimeError("a bug\nin memory.py"), None), (RuntimeError(), None)])
def test_too_little_memory_is_one_line_and_a_bug_is_not(error, says, monkeypatch):
    def main(*_):
        raise error

    monkeypatch.setattr(m3po, "main", main)
    env = Namespace(close=lambda: None)
    monkeypatch.setattr(m3po, "parse_args", lambda: (None, env, None))
    with pytest.raises(SystemExit if says else RuntimeError) as raised:
        m3po.command_line()
    assert not says or raised.value.code == (
        f"m3po.py: error: {says}; see --M, --retain, --env-capacity")


# --- variants and diagnostics ---------------------------------------------------------------------


def test_beta_falls_from_one_to_zero_between_a_and_b():
    args, _, _ = parse("--env", "walker2d-randomparams", "--hybrid")
    assert args.hybrid == [50, 100]
    assert [m3po.model_fraction(args, e) for e in (1, 50, 75, 100, 200)] == [1, 1, 0.5, 0, 0]
    args, _, _ = parse("--beta", "0.25")
    assert m3po.model_fraction(args, 5) == 0.25


@pytest.mark.parametrize("beta, imagined", [(1.0, 8), (0.5, 4), (0.25, 2), (0.0, 0)])
def test_a_batch_holds_a_fraction_beta_of_imagined_rows(beta, imagined):
    class Rows:
        act_dim, device = 1, "cpu"

        def __init__(self, value):
            self.value = value

        def sample(self, n):
            return Batch(torch.full((3, n, 4), self.value), torch.ones(3, n, dtype=torch.bool),
                         torch.full((n, 2), self.value), torch.full((n,), self.value))

    batches = list(m3po.sample_batches(Rows(1.0), Rows(0.0), beta, 5, 8))
    assert len(batches) == 5
    for batch, noise in batches:
        assert noise.shape == (2, 8, 1)
        assert batch.tokens.shape == (3, 8, 4) and batch.mask.shape == (3, 8)
        assert batch.terminated.sum() == imagined and batch.next_obs[:, 0].sum() == imagined


def test_recurrent_sac_never_asks_the_model(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the model was used")

    for name in ("fit", "sample", "predict"):
        monkeypatch.setattr(m3po.MetaModel, name, refuse)
    rows = read_rows(run(tmp_path / "a", "--beta", 0))
    assert rows[-1]["imagined"] == "0" and math.isfinite(float(rows[-1]["q_loss"]))
    policy, model, _, _ = m3po.load(tmp_path / "a")
    assert (model.token_std == 1).all() and (policy.token_std != 1).any()  # nor what it scales by


def test_blind_agents_and_hidden_rewards_see_nothing_of_them():
    # A token is (o' - o, o, a, r), one number each.
    for flags, width in ((["--L", 0], 0), (["--no-token-reward"], 3), ([], 4),
                         (["--no-token-changes"], 3)):
        args, env, _ = parse(*TINY, *flags)
        policy, model = m3po.build(args, env, "cpu")
        assert {net.token_dim
                for net in (policy.actor, policy.qf, policy.qf_target, model.net)} == {width}
