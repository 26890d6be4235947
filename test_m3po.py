"""The last chapter: what this code claims, test by test. Run with: python -m pytest -q test_m3po.py

Exact tests against independent slow versions first, then fakes a reader can compute in the head, then
whole runs. In order: envs.py; rollouts.py, model.py, policy.py; runs, faults and resume; bounds.py;
play.py, figures.py and ablations.py; evaluation.py and bench.py.
"""

import contextlib
import copy
import csv
import dataclasses
import fcntl
import gc
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from PIL import Image
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.utils.env_checker import check_env
from torch.utils.flop_counter import FlopCounterMode
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import ablations
import bench
import bounds
import checkpoint
import diagnostics
import envs
import evaluation
import figures
import m3po
import play
from model import HistoryNet, MetaModel, gaussian_nll
from policy import LOGGED, GraphedUpdate, MetaPolicy
from rollouts import Batch, EnvBuffer, LiveHistory, ModelBuffer, branch


# ==================================================================================================
# envs.py: the hidden tasks
# ==================================================================================================

NAMES = list(envs.ENVS)
MUJOCO = [name for name in NAMES if name != "point-fwd-bwd"]
DIRECTION = ["point-fwd-bwd", "halfcheetah-fwd-bwd", "ant-fwd-bwd", "humanoid-direc"]
SWITCHING = [name for name in NAMES if name != "halfcheetah-pier"]
FAR = 10**6  # a switch period that no test reaches
README_PLACES = [Path(__file__).parent / "README.md"]

# Two tasks that are as different as the env allows.
TASKS = {
    "point-fwd-bwd": ([-1], [1]),
    "halfcheetah-fwd-bwd": ([-1], [1]),
    "halfcheetah-pier": ([0] * 16, [1] * 16),
    "ant-fwd-bwd": ([-1], [1]),
    "ant-crippled-leg": ([1, 0, 0, 0], [0, 0, 1, 0]),
    "walker2d-randomparams": ([-1, -1], [1, 1]),
    "humanoid-direc": ([-1], [1]),
}


def make_fixed(name, task=None, seed=0):
    """The env after reset, with a task that stays; -> (env, obs)."""
    env = envs.make(name, switch_every=None if name == "halfcheetah-pier" else FAR)
    obs, _ = env.reset(seed=seed)
    if task is not None:
        env.unwrapped.set_task(task)
    return env, obs


def random_actions(env, count, seed=0):
    shape = (count, *env.action_space.shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def envs_run(env, actions):
    """Steps until the actions or the episode end. -> obs [T, O], rewards [T], infos"""
    obs, rewards, infos = [], [], []
    for action in actions:
        o, r, terminated, truncated, info = env.step(action)
        obs.append(o), rewards.append(r), infos.append(info)
        if terminated or truncated:
            break
    return np.array(obs), np.array(rewards), infos


# ------------------------------------------------------------------------- Gymnasium's contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_each_env_passes_gymnasiums_own_checker(name):
    check_env(gym.make(envs.ENVS[name]).unwrapped, skip_render_check=True)  # no display


def test_making_and_running_every_env_prints_nothing(tmp_path):
    program = (
        "import envs\n"
        "for name in envs.ENVS:\n"
        "    env = envs.make(name); env.reset(seed=0); env.step(env.action_space.sample())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], cwd=tmp_path, text=True,
        capture_output=True, env={"PYTHONPATH": str(Path(envs.__file__).parent), "PATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # MuJoCo writes its warnings to a log file too


@pytest.mark.parametrize("name", NAMES)
def test_made_envs_are_float32_with_unit_actions_and_the_dims_of_the_table(name):
    obs_dim = dict(zip(NAMES, (1, 17, 17, 27, 27, 17, 45)))[name]
    action_dim = dict(zip(NAMES, (1, 6, 6, 8, 8, 6, 17)))[name]
    env = envs.make(name)
    assert env.action_space == Box(-1, 1, (action_dim,), np.float32)
    assert env.observation_space.shape == (obs_dim,)
    assert env.observation_space.dtype == np.float32
    first, _ = env.reset(seed=0)
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert first.dtype == obs.dtype == np.float32 and obs.shape == (obs_dim,)
    assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]
    assert env.spec.max_episode_steps == (100 if name == "point-fwd-bwd" else 1_000)
    assert env.unwrapped.reward_text and env.unwrapped.termination_text


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_trajectory_and_another_seed_another(name):
    def trajectory(seed):
        env = envs.make(name, switch_every=None if name == "halfcheetah-pier" else 3)
        first, info = env.reset(seed=seed)
        obs, rewards, infos = envs_run(env, random_actions(env, 40))
        return first, obs, rewards, np.array([info["task"]] + [i["next_task"] for i in infos])

    a, b, other = trajectory(5), trajectory(5), trajectory(6)
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
    assert any(not np.array_equal(x, y) for x, y in zip(a, other))


def test_one_env_does_not_disturb_another():
    env, _ = make_fixed("walker2d-randomparams", [0, 0])
    alone, _, _ = envs_run(env, random_actions(env, 10))
    env, _ = make_fixed("walker2d-randomparams", [0, 0])
    make_fixed("walker2d-randomparams", [1, 1])  # a shared model would now be heavy
    beside, _, _ = envs_run(env, random_actions(env, 10))
    assert np.array_equal(alone, beside)


def test_a_pickled_env_keeps_its_switch_period():
    env = envs.make("ant-fwd-bwd", switch_every=7).unwrapped
    assert pickle.loads(pickle.dumps(env)).switch_every == 7


@pytest.mark.parametrize("name", ["halfcheetah-pier", "humanoid-direc"])
def test_fifty_envs_leave_nothing_behind(name):
    fifty = [envs.make(name) for _ in range(50)]
    data = [weakref.ref(env.unwrapped) for env in fifty]
    del fifty
    gc.collect()
    assert all(reference() is None for reference in data)


def test_render_mode_passes_through_and_nothing_renders_unasked():
    env = envs.make("ant-fwd-bwd", render_mode="rgb_array")
    assert env.render_mode == "rgb_array"
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.unwrapped.mujoco_renderer._viewers == {}  # no GL context yet


# ---------------------------------------------------------------------------------- hidden task


@pytest.mark.parametrize("name", NAMES)
def test_the_task_is_not_in_the_observation(name):
    env, first = make_fixed(name)
    for task in TASKS[name]:
        env.reset(seed=0)
        env.unwrapped.set_task(task)
        if name in MUJOCO:  # the same state, now under this task
            mujoco.mj_forward(env.unwrapped.model, env.unwrapped.data)
            assert np.array_equal(env.unwrapped._get_obs(), first)


@pytest.mark.parametrize("name", DIRECTION)
def test_the_direction_shows_in_the_reward_alone(name):
    (a, rewards_a), (b, rewards_b) = [
        envs_run(env, random_actions(env, 20))[:2]
        for task in TASKS[name]
        for env in [make_fixed(name, task)[0]]
    ]
    assert np.array_equal(a, b) and not np.array_equal(rewards_a, rewards_b)


@pytest.mark.parametrize("name", SWITCHING)
def test_the_task_is_redrawn_every_period_with_a_random_phase(name):
    period, firsts = 4, set()
    for seed in range(12):
        env = envs.make(name, switch_every=period)
        env.reset(seed=seed)
        changes = [
            t for t, info in enumerate(envs_run(env, random_actions(env, 14))[2]) if info["switched"]
        ]
        assert all((t - changes[0]) % period == 0 for t in changes)  # a redraw may repeat
        firsts.update(t % period for t in changes[:1])
    assert len(firsts) > 1
    assert envs.make(name).unwrapped.switch_every == (25 if name == "point-fwd-bwd" else 300)


def test_the_period_is_exact_where_no_redraw_can_repeat():
    env = envs.make("walker2d-randomparams", switch_every=5)  # its tasks are real numbers
    env.reset(seed=0)
    infos = envs_run(env, np.zeros((23, 6), np.float32))[2]
    changes = [t for t, info in enumerate(infos) if info["switched"]]
    assert set(np.diff(changes)) == {5} and 1 <= changes[0] <= 5 and len(changes) >= 4


@pytest.mark.parametrize("name", DIRECTION)
def test_info_names_the_task_that_made_the_reward(name):
    env = envs.make(name, switch_every=3)
    _, info = env.reset(seed=1)
    promised, task, age = info["next_task"], None, None
    assert np.array_equal(info["task"], promised) and not info["switched"]
    directions = set()
    for action in random_actions(env, 18):
        _, reward, _, _, info = env.step(action)
        assert np.array_equal(info["task"], promised)  # next_task kept its word
        switched = task is not None and not np.array_equal(info["task"], task)
        age = 0 if switched or age is None else age + 1
        assert (info["switched"], info["steps_since_switch"]) == (switched, age)
        dir_ = float(info["task"][0])
        directions.add(dir_)
        u = env.unwrapped
        if name == "point-fwd-bwd":
            speed, rest = float(action[0]), 0.0
        else:
            a = np.asarray(action, np.float64) * (0.4 if name == "humanoid-direc" else 1.0)
            speed, rest = info["x_velocity"], u.alive_bonus - u.action_weight * (a**2).sum()
            rest /= u.speed_weight
            reward /= u.speed_weight
        assert reward == pytest.approx(dir_ * speed + rest, abs=1e-6)
        assert info["right_way"] == (dir_ * speed > 0)
        promised, task = info["next_task"], info["task"]
    assert directions == {-1.0, 1.0}


def test_a_switch_resets_nothing():
    still, _ = make_fixed("halfcheetah-fwd-bwd", seed=3)
    switching = envs.make("halfcheetah-fwd-bwd", switch_every=2)
    switching.reset(seed=3)
    a, _, _ = envs_run(still, random_actions(still, 50))
    b, _, infos = envs_run(switching, random_actions(still, 50))
    assert np.array_equal(a, b) and sum(info["switched"] for info in infos) > 5


def test_both_directions_and_all_legs_are_drawn_equally_often():
    rng = np.random.default_rng(0)
    directions = np.mean([envs.draw_direction(rng) for _ in range(2_000)])
    legs = np.mean([envs.AntCrippledLeg.draw_task(rng) for _ in range(2_000)], axis=0)
    assert abs(directions) < 0.08 and np.all(abs(legs - 0.25) < 0.04)


def test_the_pier_is_drawn_per_episode_and_never_within_one():
    env = envs.make("halfcheetah-pier")
    tasks = []
    for seed in (0, None, None):
        _, first = env.reset(seed=seed)
        _, _, infos = envs_run(env, random_actions(env, 20))
        assert all(np.array_equal(info["task"], first["task"]) for info in infos)
        tasks.append(first["task"])
    assert len(np.unique(tasks, axis=0)) == 3
    assert np.min(tasks) >= 0 and np.max(tasks) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_sees_the_task_of_its_next_action(name):
    env = envs.make(name, switch_every=None if name == "halfcheetah-pier" else 2, oracle=True)
    obs_dim = env.unwrapped.observation_space.shape[0]
    obs, info = env.reset(seed=0)
    assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    for action in random_actions(env, 8):
        shown = obs[obs_dim:]
        obs, _, _, _, info = env.step(action)
        assert np.array_equal(shown, info["task"])


def test_the_toys_oracle_gets_its_closed_form_and_a_blind_agent_nothing():
    returns = {"oracle": [], "always right": []}
    for who, rewards in returns.items():
        for seed in range(40):
            env = envs.make("point-fwd-bwd", oracle=True)
            obs, _ = env.reset(seed=seed)
            total, done = 0.0, False
            while not done:
                action = obs[1:] if who == "oracle" else np.ones(1, np.float32)
                obs, reward, _, done, _ = env.step(action)
                total += reward
            rewards.append(total)
    assert set(returns["oracle"]) == {envs.PointFwdBwd.ORACLE_RETURN}
    assert abs(np.mean(returns["always right"])) < 25  # sd of the mean of 40 is about 8


# -------------------------------------------------------------------------------------- physics

STOCK = {
    "halfcheetah-fwd-bwd": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "ant-fwd-bwd": ("Ant-v5", {"contact_cost_weight": 0}),
    "walker2d-randomparams": ("Walker2d-v5", {}),
    "humanoid-direc": ("Humanoid-v5", {"contact_cost_weight": 0}),
}


@pytest.mark.parametrize("name", list(STOCK))
@pytest.mark.filterwarnings("ignore:.*settotalmass")
def test_under_the_standard_task_an_env_is_gymnasiums_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs the stock cheetah's warning there
    stock_id, kwargs = STOCK[name]
    stock = gym.make(stock_id, disable_env_checker=True, **kwargs)
    env, _ = make_fixed(name, [0, 0] if name.startswith("walker") else [1])
    stock.reset(seed=0)
    mine, theirs = env.unwrapped, stock.unwrapped
    theirs.set_state(mine.data.qpos.copy(), mine.data.qvel.copy())
    obs_dim = env.observation_space.shape[0]
    for action in random_actions(env, 40):
        obs, reward, terminated, _, info = env.step(action)
        command = action * stock.action_space.high
        their_obs, their_reward, their_terminated, _, their_info = stock.step(command)
        np.testing.assert_allclose(obs, their_obs[:obs_dim], rtol=1e-4, atol=1e-4)
        assert info["x_velocity"] == pytest.approx(their_info["x_velocity"], abs=1e-4)
        assert terminated == their_terminated
        if terminated:  # v5 pays no bonus for the last step, the table here does
            break
        assert reward == pytest.approx(their_reward, abs=2e-4)


def test_the_cheetah_weighs_its_standard_14_kg():
    for name in ("halfcheetah-fwd-bwd", "halfcheetah-pier"):
        mass = envs.make(name).unwrapped.model.body_mass[1:8]
        assert mass.sum() == pytest.approx(14.0, abs=1e-9)


@pytest.mark.parametrize("name", DIRECTION)
def test_the_reward_for_speed_flips_with_the_direction(name):
    rewards, speeds = {}, {}
    for direction in (-1, 1):
        env, _ = make_fixed(name, [direction])
        if name in MUJOCO:
            env.unwrapped.data.qvel[0] = 0.5  # m/s; in the air the humanoid cannot speed up
        _, rewards[direction], infos = envs_run(env, random_actions(env, 10))
        speeds[direction] = np.array([i.get("x_velocity", 0.0) for i in infos])
    assert np.array_equal(speeds[-1], speeds[1])
    half = (rewards[1] - rewards[-1]) / 2
    if name == "point-fwd-bwd":
        assert np.array_equal(half, random_actions(env, 10)[:, 0].astype(np.float64))
    else:
        assert np.allclose(half, env.unwrapped.speed_weight * speeds[1], atol=1e-9)
        assert np.abs(half).max() > 0.1


@pytest.mark.parametrize("leg", range(4))
def test_a_crippled_leg_gets_no_force_and_the_others_all(leg):
    env, _ = make_fixed("ant-crippled-leg", np.eye(4)[leg])
    model, data = env.unwrapped.model, env.unwrapped.data
    geoms = model.geom_pos.copy()
    _, rewards, infos = envs_run(env, np.ones((1, 8), np.float32))
    force = {model.joint(model.dof_jntid[d]).name: data.qfrc_actuator[d] for d in range(6, 14)}
    for joint, torque in force.items():
        assert torque == (0.0 if joint.endswith(str(leg + 1)) else 150.0)
    # The commanded action is paid for, also the part that the dead leg ignored.
    assert rewards[0] == pytest.approx(infos[0]["x_velocity"] - 0.5 * 8 + 1)
    assert np.array_equal(model.geom_pos, geoms)


def test_another_crippled_leg_is_another_motion():
    ends = []
    for leg in range(4):
        env, _ = make_fixed("ant-crippled-leg", np.eye(4)[leg])
        ends.append(envs_run(env, random_actions(env, 5))[0][-1])
    assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 0.1


def pier_run(damping, friction, steps=200):
    env, _ = make_fixed("halfcheetah-pier", [damping] * 8 + [friction] * 8)
    obs, _, _ = envs_run(env, random_actions(env, steps))
    return obs


def test_another_damping_or_friction_of_the_blocks_changes_the_cheetahs_motion():
    base = pier_run(0.5, 0.3)
    for other in (pier_run(0.1, 0.3), pier_run(0.5, 0.9)):
        assert np.abs(other[20] - base[20]).max() > 0.01  # within a second
        assert np.abs(other[:, 8] - base[:, 8]).max() > 0.1  # forward speed, m/s


def test_a_block_swings_longer_the_less_it_is_damped():
    swings = []
    for damping in (0.05, 0.3, 1.0):
        env, _ = make_fixed("halfcheetah-pier", [damping] * 8 + [0.5] * 8)
        data = env.unwrapped.data
        heights = []
        for _ in range(60):  # 3 s
            env.step(np.zeros(6, np.float32))
            heights.append(data.qpos[10])  # block 1, on which the cheetah stands
        swings.append(np.ptp(heights[20:]))
    assert swings[0] > 2 * swings[1] > 4 * swings[2]


def test_block_friction_is_the_friction_of_the_contact():
    for share, friction in ((0.0, 0.2), (1.0, 0.8)):  # also below the cheetah's own 0.4
        env, _ = make_fixed("halfcheetah-pier", [0.5] * 8 + [share] * 8)
        envs_run(env, np.zeros((20, 6), np.float32))
        data = env.unwrapped.data
        assert data.ncon > 0
        assert np.allclose([data.contact[i].friction[0] for i in range(data.ncon)], friction)


def test_blocks_float_and_carry_the_cheetah_without_reaching_their_stop():
    env, _ = make_fixed("halfcheetah-pier", [0.5] * 16)
    data = env.unwrapped.data
    envs_run(env, np.zeros((300, 6), np.float32))
    blocks = data.qpos[9:]
    assert np.allclose(np.delete(blocks, 1), 0.0, atol=1e-3)  # own weight: afloat
    model = env.unwrapped.model
    sunk = 14.0 * 9.81 / model.jnt_stiffness[10]
    assert blocks[1] == pytest.approx(-sunk, abs=2e-3) and sunk < 0.5 * envs.PIER_STOP
    assert abs(data.qvel[10]) < 1e-3


@pytest.mark.parametrize("speed", (20.0, -20.0))
def test_1000_steps_at_full_speed_do_not_run_off_the_pier(speed):
    env, _ = make_fixed("halfcheetah-pier", [0.5] * 16)
    data, heights = env.unwrapped.data, []
    for _ in range(1_000):
        data.qvel[0] = speed
        env.step(np.zeros(6, np.float32))
        heights.append(data.qpos[1])
    assert abs(data.qpos[0]) > 600
    data.qpos[0] = np.sign(speed) * 1_000  # as far as 20 m/s can get, and stand there
    data.qvel[:] = 0
    for _ in range(60):
        env.step(np.zeros(6, np.float32))
        heights.append(data.qpos[1])
    assert min(heights) > -0.8


def test_the_pier_shows_the_cheetah_only():
    env, obs = make_fixed("halfcheetah-pier")
    data = env.unwrapped.data
    assert np.allclose(obs, np.concatenate((data.qpos[1:9], data.qvel[:9])))
    assert np.array_equal(data.qpos[9:], np.zeros(8))


def walker_landing(mass, friction, speed=0.0):
    """An upright walker falls 4 cm onto its feet; -> (env, contact forces up, along [T])."""
    env, _ = make_fixed("walker2d-randomparams", [mass, friction])
    model, data = env.unwrapped.model, env.unwrapped.data
    env.unwrapped.set_state(env.unwrapped.init_qpos, np.zeros(9))
    data.qvel[0] = speed
    up, along = [], []
    for _ in range(60):  # 0.12 s; the feet touch after 0.09 s
        mujoco.mj_step(model, data)
        force = np.zeros((data.ncon, 6))
        for i in range(data.ncon):
            mujoco.mj_contactForce(model, data, i, force[i])
        up.append(force[:, 0].sum())
        along.append(np.hypot(force[:, 1], force[:, 2]).sum())
    assert data.ncon > 0
    return env, np.array(up), np.array(along)


def test_torso_mass_changes_weight_contact_force_and_inertia():
    light, up_light, _ = walker_landing(-1, 0)
    heavy, up_heavy, _ = walker_landing(1, 0)
    for env, scale in ((light, 1.5**-3), (heavy, 1.5**3)):
        u = env.unwrapped
        assert u.model.body_mass[u.torso] == pytest.approx(scale * u.standard_mass)
        assert np.allclose(u.model.body_inertia[u.torso], scale * u.standard_inertia)
        assert u.model.body_subtreemass[0] == pytest.approx(u.model.body_mass.sum())  # derived
    assert up_heavy.sum() > 1.2 * up_light.sum()
    ends = [envs_run(env, random_actions(env, 3))[0][-1] for env in (light, heavy)]
    assert np.abs(ends[0] - ends[1]).max() > 0.1


def test_ground_friction_changes_what_the_foot_can_hold():
    slippery, up, along = walker_landing(0, -1, speed=2.0)
    _, up_rough, along_rough = walker_landing(0, 1, speed=2.0)
    friction = 1.9 * 1.5**-3  # the foot's, the larger of the two, and scaled
    data = slippery.unwrapped.data
    assert all(data.contact[i].friction[0] == pytest.approx(friction) for i in range(data.ncon))
    assert np.all(along <= 1.001 * friction * up + 1e-6)
    assert np.max(along_rough / np.maximum(up_rough, 1.0)) > 1.2 * friction


def test_walker_tasks_do_not_compound_and_leave_the_simulation_alone():
    env, _ = make_fixed("walker2d-randomparams", [0, 0])
    u = env.unwrapped
    envs_run(env, random_actions(env, 3))

    def constants():
        m = u.model
        parts = (m.body_mass, m.body_inertia, m.geom_friction, m.dof_invweight0, m.body_invweight0)
        return np.concatenate([np.ravel(p) for p in parts])

    def state():
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        out = np.empty(mujoco.mj_stateSize(u.model, kind))
        mujoco.mj_getState(u.model, u.data, out, kind)
        return out

    before, running = constants(), state()
    for _ in range(20):
        u.set_task([1, -1])
        u.set_task([-1, 1])
    assert not np.allclose(constants(), before)
    u.set_task([0, 0])
    assert np.allclose(constants(), before, rtol=1e-12)
    assert np.array_equal(state(), running)
    assert u.data.time > 0


# zero action / uniform random: return of METHOD.md (8 episodes), and how far 3 episodes may be off
REFERENCE = {
    "halfcheetah-fwd-bwd": ((-0.3, 5), (-103, 150)),
    "ant-fwd-bwd": ((1_000, 20), (-36, 110)),
    "walker2d-randomparams": ((97, 30), (1, 30)),
    "humanoid-direc": ((201, 30), (105, 45)),
}


@pytest.mark.parametrize("name", list(REFERENCE))
def test_zero_and_random_actions_give_the_reference_returns(name):
    for share, (expected, tolerance) in zip((0.0, 1.0), REFERENCE[name]):
        returns = []
        for seed in range(3):
            env = envs.make(name)
            env.reset(seed=seed)
            _, rewards, _ = envs_run(env, share * random_actions(env, 1_000, seed))
            returns.append(rewards.sum())
        assert abs(np.mean(returns) - expected) < tolerance


# ---------------------------------------------------------------------------------- termination


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_for_model_rollouts_equals_the_envs_flag(name):
    env = envs.make(name)
    rule = envs.termination_fn(env)
    assert envs.termination_known(env)
    seen, flags = [], []
    for seed in range(3 if name in ("halfcheetah-fwd-bwd", "halfcheetah-pier") else 12):
        env.reset(seed=seed)
        if name.startswith("ant"):  # thrown up, so that it leaves the healthy range soon
            env.unwrapped.data.qvel[2] = 4.0
        for action in random_actions(env, 60, seed):
            obs, _, terminated, truncated, _ = env.step(action)
            seen.append(obs), flags.append(terminated)
            if terminated or truncated:
                break
    never = env.unwrapped.termination_text == "never"
    assert any(flags) != never and not all(flags)
    seen = np.array(seen)
    for batch in (seen, seen.astype(np.float64), seen[:, None], torch.as_tensor(seen)):
        answer = rule(batch)
        assert str(answer.dtype).endswith("bool") and answer.shape == batch.shape[:-1]
        assert np.array_equal(np.asarray(answer).ravel(), flags)
    oracle = envs.make(name, oracle=True)
    task = np.full((len(seen), oracle.unwrapped.task_dim), -9.0, np.float32)
    told = envs.termination_fn(oracle)(np.concatenate((seen, task), axis=1))
    assert np.array_equal(told, flags)


@pytest.mark.parametrize(
    "name, dim, limit, dead_at_limit",
    [
        ("ant-fwd-bwd", 0, 0.2, False),
        ("ant-crippled-leg", 0, 1.0, False),
        ("walker2d-randomparams", 0, 0.8, True),
        ("walker2d-randomparams", 0, 2.0, True),
        ("walker2d-randomparams", 1, 1.0, True),
        ("walker2d-randomparams", 1, -1.0, True),
        ("humanoid-direc", 0, 1.0, True),
        ("humanoid-direc", 0, 2.0, True),
    ],
)
def test_the_limits_hold_to_the_last_float32_in_numpy_and_torch(name, dim, limit, dead_at_limit):
    env, obs = make_fixed(name)
    rule = envs.termination_fn(env)
    healthy = np.tile(obs, (3, 1))
    healthy[:, :2] = (1.3 if dim or name.startswith(("walker", "humanoid")) else 0.5, 0.0)
    limit = np.float32(limit)
    inwards = np.float32(0.0 if dim else healthy[0, 0])
    inside = np.nextafter(limit, inwards)
    outside = np.nextafter(limit, np.float32(2 * limit - inwards))
    healthy[:, dim] = (inside, limit, outside)
    for batch in (healthy, healthy.astype(np.float64), torch.as_tensor(healthy)):
        assert rule(batch).tolist() == [False, dead_at_limit, True]
        assert bool(rule(batch[1])) == dead_at_limit  # one row alone


# --------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", MUJOCO)
def test_a_simulation_that_blows_up_ends_the_episode_with_finite_numbers(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    env, first = make_fixed(name)
    last, _, _, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert "fault" not in info
    env.unwrapped.data.qvel[0] = np.nan
    obs, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape))
    assert "fault" in info and (reward, terminated, truncated) == (0.0, False, True)
    assert np.array_equal(obs, last) and obs.dtype == np.float32
    obs, info = env.reset(seed=0)  # as new
    assert np.array_equal(obs, first)
    *_, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert not truncated and "fault" not in info


def test_mujoco_resetting_itself_counts_as_a_fault_though_all_numbers_are_finite(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    env, _ = make_fixed("ant-fwd-bwd")
    env.step(np.zeros(8, np.float32))
    env.unwrapped.data.qvel[7] = 1e12  # MuJoCo's limit is 1e10
    obs, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
    assert info["fault"] == "MuJoCo reset itself after instability"
    assert (reward, terminated, truncated) == (0.0, False, True) and np.isfinite(obs).all()


def test_a_non_finite_reward_or_observation_is_a_fault_in_any_env():
    for where, reason in ((0, "non-finite observation"), (1, "non-finite reward")):
        env = envs.FaultGuard(Own(bad=where))
        first, _ = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert (reward, terminated, truncated, info["fault"]) == (0.0, False, True, reason)
        assert np.array_equal(obs, first)


# --------------------------------------------------------------------------------- your own env


class Own(gym.Env):
    """A user's env whose every oddity is an argument."""

    def __init__(self, obs=None, action=None, old_step=False, old_reset=False, bad=None, **_):
        self.observation_space = obs or Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action or Box(-1, 1, (2,), np.float32)
        self.old_step, self.old_reset, self.bad = old_step, old_reset, bad

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return np.full(3, 0.1) if self.old_reset else (np.full(3, 0.1), {})

    def step(self, action):
        self.actions.append(action)
        obs = np.full(3, np.nan if self.bad == 0 else 0.1)
        reward = np.inf if self.bad == 1 else 1.0
        return (obs, reward, True, {}) if self.old_step else (obs, reward, True, False, {})


gym.register("Own-v0", entry_point=Own, max_episode_steps=5)


def make_own(monkeypatch, **kwargs):
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "_", None)  # restores kwargs afterwards
    for key, value in kwargs.items():
        monkeypatch.setitem(gym.registry["Own-v0"].kwargs, key, value)
    return envs.make("Own-v0")


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"action": Discrete(3)}, "Discrete action"),
        ({"action": Dict({"a": Box(-1, 1)})}, "Dict action"),
        ({"action": Tuple((Discrete(2), Discrete(2)))}, "Tuple action"),
        ({"action": Box(-np.inf, np.inf, (2,))}, "unbounded action"),
        ({"action": Box(0, np.inf, (2,))}, "unbounded action"),
        ({"action": Box(-1, 1, (2, 2))}, "action shape"),
        ({"action": Box(0, 5, (2,), np.int64)}, "int64 action"),
        ({"obs": Box(0, 255, (64, 64, 3), np.uint8)}, "image"),
        ({"obs": Box(-1, 1, ())}, "observation shape"),
        ({"obs": Dict({"a": Box(-1, 1)})}, "Dict observation"),
        ({"obs": Discrete(5)}, "Discrete observation"),
        ({"old_step": True}, "old API: step"),
        ({"old_reset": True}, "old API: reset"),
    ],
)
def test_what_m3po_cannot_use_is_refused_by_name_in_one_line(monkeypatch, kwargs, word):
    with pytest.raises(envs.EnvError, match=re.escape(word)) as error:
        make_own(monkeypatch, **kwargs)
    message = str(error.value)
    assert message.startswith("Own-v0: ") and "\n" not in message


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_asymmetric_action_bounds_are_rescaled_from_the_unit_box(monkeypatch, dtype):
    bounds = np.array([-3, 0.2], dtype), np.array([0.1, 0.7], dtype)
    env = make_own(monkeypatch, action=Box(*bounds, dtype=dtype))
    assert env.action_space == Box(-1, 1, (2,), np.float32)
    env.reset(seed=0)
    for unit in (-1, 0, 1):
        env.step(np.full(2, unit, np.float32))
    low, middle, high = env.unwrapped.actions
    assert np.array_equal(low, bounds[0]) and np.array_equal(high, bounds[1])  # never beyond
    assert np.allclose(middle, (bounds[0] + bounds[1]) / 2) and middle.dtype == dtype


@pytest.mark.parametrize("space", (np.float32, np.float64))
def test_observations_are_float32_whatever_the_space_says(monkeypatch, space):
    env = make_own(monkeypatch, obs=Box(-1, 1, (3,), space))
    assert env.observation_space.dtype == np.float32 == env.reset(seed=0)[0].dtype
    assert env.step(np.zeros(2, np.float32))[0].dtype == np.float32


def own_old_reset(self):
    return np.zeros(3)


def own_broken(self, *_, **__):
    raise LookupError("the motor\ndoes not answer")


@pytest.mark.parametrize("method, function, says", [
    ("reset", own_old_reset, "old API: reset"), ("reset", own_broken, "LookupError"),
    ("step", own_broken, "LookupError"), ("__init__", own_broken, "LookupError")])
def test_what_an_own_env_raises_is_one_line_with_its_place(monkeypatch, method, function, says):
    monkeypatch.setattr(Own, method, function)
    with pytest.raises(envs.EnvError, match=says) as error:
        envs.make("Own-v0")
    message = str(error.value)
    assert message.startswith("Own-v0: ") and "\n" not in message
    if function is own_broken:
        assert f"test_m3po.py:{own_broken.__code__.co_firstlineno + 1}: the motor does" in message


def test_an_env_whose_observations_have_another_shape_than_its_space_is_refused(monkeypatch):
    with pytest.raises(envs.EnvError, match=r"reset returned an observation of shape \(3,\)"):
        make_own(monkeypatch, obs=Box(-1, 1, (4,), np.float32))


def test_an_env_without_a_time_limit_gets_one(monkeypatch):
    monkeypatch.setattr(gym.registry["Own-v0"], "max_episode_steps", None)
    assert envs.time_limit(envs.make("Own-v0")) == 1_000
    monkeypatch.setattr(gym.registry["Own-v0"], "max_episode_steps", 5)
    assert envs.time_limit(envs.make("Own-v0")) == 5 and envs.time_limit(envs.make("ant-fwd-bwd")) == 1_000


def test_a_reward_too_large_for_float32_and_a_reset_without_numbers_are_faults(monkeypatch):
    env = make_own(monkeypatch)
    env.reset(seed=0)
    step = Own.step
    monkeypatch.setattr(Own, "step", lambda self, a: (step(self, a)[0], 1e300, False, False, {}))
    assert env.step(np.zeros(2, np.float32))[1:4] == (0.0, False, True)
    monkeypatch.setattr(Own, "reset", lambda self, seed=None, options=None: (np.full(3, np.nan), {}))
    with pytest.raises(envs.EnvError, match="non-finite"):
        env.reset(seed=0)


@pytest.mark.filterwarnings("error")
def test_float64_observations_are_cast_without_a_warning(monkeypatch):
    env = make_own(monkeypatch, obs=Box(-0.1, np.full(3, 0.3), dtype=np.float64))
    assert env.observation_space.dtype == np.float32
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32
    assert env.step(np.zeros(2, np.float32))[0].dtype == np.float32


def test_without_a_termination_rule_no_imagined_state_is_terminal(monkeypatch):
    env = make_own(monkeypatch)
    assert not envs.termination_known(env)
    for batch in (np.full((4, 2, 3), np.nan), torch.zeros(4, 2, 3)):
        answer = envs.termination_fn(env)(batch)
        assert answer.shape == (4, 2) and not answer.any()


@pytest.mark.parametrize("name", ["nope", "no_such_module:X-v0", "Foo-v9", "a:b:c", "", 3])
def test_an_unknown_env_is_answered_with_the_valid_names(name):
    with pytest.raises(envs.EnvError) as error:
        envs.make(name)
    assert "\n" not in str(error.value) and all(valid in str(error.value) for valid in NAMES)


@pytest.mark.parametrize(
    "name, period",
    [("halfcheetah-pier", 5), ("Pendulum-v1", 5), ("ant-fwd-bwd", 0), ("ant-fwd-bwd", 2.5)],
)
def test_a_switch_period_is_refused_where_it_makes_no_sense(name, period):
    with pytest.raises(envs.EnvError, match="switch"):
        envs.make(name, switch_every=period)


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")
def test_the_readmes_own_env_works(tmp_path, monkeypatch):
    text = next(p for p in README_PLACES if p.exists()).read_text()
    code = re.search(r"```python\n# my_env\.py\n(.*?)```", text, re.S).group(1)
    (tmp_path / "my_env.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    env = envs.make("my_env:MyEnv-v0")
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == 200 and envs.termination_known(env)
    rule = envs.termination_fn(env)
    assert rule(torch.tensor([[0.0], [6.0]])).tolist() == [False, True]
    env.reset(seed=0)
    obs, _, infos = envs_run(env, np.full((200, 1), -1, np.float32))
    assert len(obs) < 200 and rule(obs).tolist() == [False] * (len(obs) - 1) + [True]
    flags = re.search(r"python m3po.py (--env my_env:MyEnv-v0.*)", text).group(1).split()
    run_parse(*flags)  # the command is valid as it stands; here with tiny sizes
    row = run_rows(run(tmp_path / "a", *flags[:2]))[-1]
    assert math.isfinite(float(row["q_loss"])) and row["eval_right_way"] == "nan"


# ==================================================================================================
# rollouts.py, model.py, policy.py
# ==================================================================================================

@pytest.fixture(autouse=True)
def core_same_draws_whatever_ran_before():
    torch.manual_seed(0)


def core_never(next_obs):
    return torch.zeros(len(next_obs), dtype=torch.bool)


def core_random_batch(O, A, L, B, dtype=torch.float32):
    """Random transitions with windows of 0 .. L tokens, right-aligned; every third terminates."""
    length = torch.arange(B) % (L + 1)
    mask = torch.arange(L, -1, -1)[:, None] <= length  # slot L is the own token
    tokens = torch.randn(L + 1, B, O + A + 1, dtype=dtype)
    tokens[..., O:-1] = tokens[..., O:-1].tanh()
    terminated = (torch.arange(B) % 3 == 0).to(dtype)
    return Batch(tokens, mask, torch.randn(B, O, dtype=dtype), terminated)


# --- D_env: real steps and their windows ---------------------------------------------------------


def core_fill(D_env, n, lengths=(1, 1, 2, 3, 5, 9, 14), seed=0):
    """n steps with obs = [row, episode, task], action = [row + 0.5], reward = -row, and the task
    changing within episodes. Returns the log, (episode, token, terminated) per row."""
    rng, log = random.Random(seed), []
    episode, left, task = -1, 0, 0
    for row in range(n):
        if left == 0:
            episode, left, by_time_limit = episode + 1, rng.choice(lengths), rng.random() < 0.5
        task = rng.choice([task, task, 1 - task])
        left -= 1
        obs, next_obs = [row, episode, task], [row + 1, episode, 0.25]
        terminated, truncated = left == 0 and not by_time_limit, left == 0 and by_time_limit
        D_env.add(obs, [row + 0.5], -row, next_obs, terminated, truncated)
        log.append((episode, [*obs, row + 0.5, -row], float(terminated)))
    return log


def core_slow_window(log, row, L, oldest):
    """The tokens of h at `row`, oldest first: walk back through the list until something stops."""
    found = []
    for earlier in range(row - 1, -1, -1):
        if len(found) == L or earlier < oldest or log[earlier][0] != log[row][0]:
            break
        found.insert(0, log[earlier][1])
    return found


@pytest.mark.parametrize("capacity, L", [(1_000, 4), (37, 4), (37, 1), (37, 0), (16, 15), (5, 9)])
def test_every_window_equals_a_walk_back_through_the_episode(capacity, L):
    checked = 0
    for until in range(0, 400, 23):  # look in at many positions of the write head
        D_env = EnvBuffer(capacity, 3, 1, L)
        log = core_fill(D_env, until + 1)
        rows = torch.arange(max(0, until + 1 - capacity), until + 1)  # all that should be kept
        assert len(D_env) == len(rows) and D_env.oldest == rows[0]
        batch = D_env.batch(rows)
        assert batch.tokens.shape == (L + 1, len(rows), 5)
        assert batch.mask.shape == (L + 1, len(rows))
        for b, row in enumerate(rows.tolist()):
            slow = core_slow_window(log, row, L, D_env.oldest)
            mask = batch.mask[:, b].tolist()
            assert mask == [False] * (L - len(slow)) + [True] * len(slow) + [True]  # right-aligned
            assert batch.tokens[batch.mask[:, b], b].tolist() == slow + [log[row][1]]
            assert batch.next_obs[b].tolist() == [row + 1, log[row][0], 0.25]
            assert batch.terminated[b] == log[row][2]
            checked += 1
    assert checked > 80


def test_a_window_is_contiguous_of_one_episode_and_never_past_the_write_head():
    D_env = EnvBuffer(capacity=50, obs_dim=3, act_dim=1, L=4)
    log = core_fill(D_env, 333)
    batch = D_env.sample(3_000)
    step, episode, task = batch.tokens[..., :3].unbind(-1)
    mask, ages = batch.mask, batch.mask.sum(0) - 1
    assert (step[1:] - step[:-1])[mask[:-1]].eq(1).all()  # each token one step after the one before
    assert (episode == episode[-1])[mask].all()
    assert (step >= 333 - 50)[mask].all()
    assert set(ages.tolist()) == {0, 1, 2, 3, 4}
    assert (task.amax(0) > task.amin(0))[ages == 4].any()  # a task switch does not cut a window
    first = {episode: row for row, (episode, _, _) in reversed(list(enumerate(log)))}
    for row, age in zip(step[-1].tolist(), ages.tolist()):  # and it is never shorter than it can be
        assert age == min(4, row - first[log[int(row)][0]], row - 283)


def test_the_live_window_is_the_window_its_step_gets_once_it_is_stored():
    D_env, rng, seen = EnvBuffer(20, 1, 1, L=3), random.Random(1), Counter()
    for row in range(200):
        tokens, mask = D_env.live_window()
        assert tokens.shape == (3, 1, 3) and mask.shape == (3, 1)
        seen[int(mask.sum())] += 1
        D_env.add([row], [0.5], -row, [row + 1], rng.random() < 0.2, rng.random() < 0.1)
        stored = D_env.batch(torch.tensor([row]))
        assert torch.equal(mask, stored.mask[:-1])
        assert torch.equal(tokens[mask], stored.tokens[:-1][mask])
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("L", [0, 3])
def test_the_history_an_evaluation_carries_is_the_one_d_env_gives(L):
    D_env, live, seen = EnvBuffer(50, 2, 1, L), LiveHistory(1, L, 4), Counter()
    for row in range(30):
        tokens, mask = D_env.live_window()
        seen[int(mask.sum())] += 1
        assert torch.equal(mask, live.mask) and torch.equal(tokens[mask], live.tokens[live.mask])
        obs, action, reward = torch.randn(1, 2), torch.rand(1, 1), torch.randn(1)
        D_env.add(obs[0], action[0], reward[0], [0, 0], row % 6 == 5, False)
        live.append(obs, action, reward)
        if row % 6 == 5:
            live = LiveHistory(1, L, 4)
    assert set(seen) == set(range(L + 1))


def test_with_L_0_a_history_is_the_observation_alone():
    D_env = EnvBuffer(10, 3, 1, L=0)
    core_fill(D_env, 25)
    batch = D_env.sample(7)
    assert batch.tokens.shape == (1, 7, 5) and batch.mask.all()
    tokens, mask = D_env.live_window()
    assert tokens.shape == (0, 1, 5) and mask.shape == (0, 1)


@pytest.mark.parametrize("terminated, truncated", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_only_termination_cuts_the_bootstrap_and_both_flags_end_the_history(terminated, truncated):
    D_env = EnvBuffer(10, 1, 1, L=2)
    D_env.add([0], [0], 0, [1], terminated, truncated)
    assert D_env.batch(torch.tensor([0])).terminated.item() == terminated
    _, mask = D_env.live_window()
    assert mask.any().item() == (not (terminated or truncated))


def test_after_a_dropped_transition_a_new_history_begins():
    D_env = EnvBuffer(10, 1, 1, L=3)
    for row in range(2):
        D_env.add([row], [0], 0, [row + 1], False, False)
    D_env.end_episode()  # the simulator failed at the third step: no row, but an end
    assert not D_env.live_window()[1].any()
    D_env.add([7], [0], 0, [8], False, False)
    assert D_env.batch(torch.tensor([2])).mask[:, 0].tolist() == [False, False, False, True]
    assert D_env.start_rows().tolist() == [0, 2]
    assert D_env.batch(torch.tensor([0, 1])).terminated.tolist() == [0, 0]


def test_rows_are_drawn_uniformly_from_those_kept():
    D_env = EnvBuffer(37, 3, 1, L=2)
    core_fill(D_env, 100)
    count = Counter(D_env.sample_rows(37_000).tolist())
    assert set(count) == set(range(63, 100))
    assert all(abs(n - 1_000) < 5 * 1_000**0.5 for n in count.values())  # 5 standard deviations


def test_a_row_stays_on_its_side_of_the_holdout_split_as_long_as_it_is_kept():
    D_env, side = EnvBuffer(500, 1, 1, L=2, holdout=0.2), {}
    for row in range(1_500):
        D_env.add([row], [0], 0, [0], False, row % 7 == 0)
        if row % 100 == 99:
            held, trained = D_env.rows(holdout=True).tolist(), D_env.rows(holdout=False).tolist()
            assert sorted(held + trained) == list(range(max(0, row - 499), row + 1))
            for kept, is_held in ((held, True), (trained, False)):
                assert all(side.setdefault(r, is_held) == is_held for r in kept)
    assert 0.15 < sum(side.values()) / len(side) < 0.25


def test_the_holdout_comes_in_runs_of_steps_and_none_reaches_over_an_episodes_end():
    D_env = EnvBuffer(2_000, 3, 1, L=2, holdout=0.3, block=4)
    log, runs = core_fill(D_env, 2_000), {}
    held = set(D_env.rows(holdout=True).tolist())
    for row in range(2_000):
        age = row - min(r for r in range(max(0, row - 14), row + 1) if log[r][0] == log[row][0])
        runs.setdefault((log[row][0], age // 4), set()).add(row in held)
    assert all(len(sides) == 1 for sides in runs.values())  # a run is held out as a whole or not
    share = sum(sides.pop() for sides in runs.values()) / len(runs)
    assert abs(share - 0.3) < 5 * (0.21 / len(runs)) ** 0.5  # each drawn for itself


def test_start_rows_are_the_first_steps_of_the_episodes_kept():
    D_env = EnvBuffer(30, 3, 1, L=2)
    log = core_fill(D_env, 111)
    begins = [r for r in range(81, 111) if log[r - 1][0] != log[r][0]]
    assert len(begins) > 3 and D_env.start_rows().tolist() == begins
    D_env = EnvBuffer(10, 3, 1, L=2)
    core_fill(D_env, 25, lengths=(25,))  # an episode longer than the ring
    with pytest.raises(ValueError, match="first step"):
        D_env.start_rows()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n", [20, 75])  # D_env not full, and wrapped; both in mid-episode
def test_buffers_go_on_after_saving_and_loading_as_if_nothing_had_been(n, full):
    D_env, policy = core_real_steps(n, 3, capacity=40, holdout=1.0), CorePolicy()
    D_model = ModelBuffer(D_env, 6, 2, 3, core_never, full=full, horizon=7)
    for _ in range(5):
        D_model.rollout(policy, CoreModel())
    env_twin = EnvBuffer(40, 1, 2, 3, holdout=1.0)
    twin = ModelBuffer(env_twin, 6, 2, 3, core_never, full=full, horizon=7)
    env_twin.load_state_dict(copy.deepcopy(D_env.state_dict()))
    twin.load_state_dict(copy.deepcopy(D_model.state_dict()))
    samples = []
    for env, buffer, acting in ((D_env, D_model, policy), (env_twin, twin, copy.deepcopy(policy))):
        torch.manual_seed(1)
        samples.append([*buffer.sample(200), *env.sample(200)])
        for row in (n, n + 1):
            env.add([row], [0.5, -1], -row, [row + 1], False, row % 7 == 6)
            buffer.rollout(acting, CoreModel())
        samples[-1] += [*buffer.sample(200), env.rows(holdout=True), env.start_rows(), buffer.stats]
    assert all(torch.equal(a, b) for a, b in zip(*samples))


def test_a_batch_splits_into_its_own_step_and_into_minibatches_without_overlap():
    D_env = EnvBuffer(50, 3, 1, L=2)
    core_fill(D_env, 50)
    batch = D_env.batch(torch.arange(12))
    obs, actions, rewards = batch.split(3)
    assert obs[:, 0].tolist() == list(range(12))
    assert obs.shape == (12, 3) and actions.shape == (12, 1) and rewards.shape == (12,)
    assert actions[:, 0].tolist() == [row + 0.5 for row in range(12)]
    assert rewards.tolist() == [-row for row in range(12)]
    parts = list(batch.minibatches(4))
    assert [len(p.next_obs) for p in parts] == [3, 3, 3, 3]
    for name in ("tokens", "mask"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], 1), getattr(batch, name))
    for name in ("next_obs", "terminated"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))


# --- D_model: branches ---------------------------------------------------------------------------


class CorePolicy:
    """a = [a fingerprint of the whole window and o, the number of the call]."""

    def __init__(self):
        self.calls = 0

    @staticmethod
    def fingerprint(tokens, mask, obs):
        slot = torch.arange(1, len(tokens) + 1)[:, None]
        seen = torch.where(mask, slot * tokens[..., 0] + 3 * tokens[..., -1], 0)  # whole numbers
        return seen.sum(0) + 100 * mask.sum(0) + obs[:, 0]

    def act(self, tokens, mask, obs):
        self.calls += 1
        call = torch.full((len(obs),), self.calls - 1.0)
        return torch.stack([self.fingerprint(tokens, mask, obs), call], -1)


class CoreModel:
    """o' = o + 1000, r = the number of the branch; NaN for the (branch, depth) asked for. From
    imagined obs one reads where they come from: depth = obs // 1000, real step = obs % 1000."""

    def __init__(self, nan_reward=(), nan_obs=()):
        self.nan_reward, self.nan_obs = set(nan_reward), set(nan_obs)

    def sample(self, tokens, mask, obs, actions):
        # What the model sees is what the policy saw.
        assert torch.equal(actions[:, 0], CorePolicy.fingerprint(tokens, mask, obs))
        reward, next_obs = torch.arange(float(len(obs))), obs + 1_000
        for b, o in enumerate(obs[:, 0].tolist()):
            if not math.isnan(o) and (b, o // 1_000) in self.nan_reward:
                reward[b] = math.nan
            if not math.isnan(o) and (b, o // 1_000) in self.nan_obs:
                next_obs[b] = math.inf
        return reward, next_obs


def core_real_steps(n, L, capacity=1_000, length=7, holdout=0.1):
    """obs = [step], action = [0.5, -1], reward = -step; episodes of `length` steps."""
    D_env = EnvBuffer(capacity, 1, 2, L, holdout=holdout)
    for row in range(n):
        D_env.add([row], [0.5, -1], -row, [row + 1], False, row % length == length - 1)
    return D_env


def core_stored(D_model, n=6_000):
    """What D_model hands out, by (call, branch): (origin, depth, window, mask, own, next, done)."""
    found, batch = {}, D_model.sample(n)
    for b in range(n):
        o, mark, call, member = batch.tokens[-1, b].tolist()
        window, mask = batch.tokens[:-1, b : b + 1], batch.mask[:-1, b : b + 1]
        # The action was chosen from exactly this window.
        assert mark == CorePolicy.fingerprint(window, mask, batch.tokens[-1, b : b + 1, :1]).item()
        found[int(call), int(member)] = (int(o % 1_000), int(o // 1_000), window[:, 0], mask[:, 0],
                                         batch.next_obs[b].item(), batch.terminated[b].item())
    return found


@pytest.mark.parametrize("L", [0, 1, 3, 7])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_after_k_imagined_steps_a_window_is_real_tokens_then_the_branchs_own(k, L):
    D_env, policy = core_real_steps(60, L), CorePolicy()
    D_model = ModelBuffer(D_env, M=8, k=k, steps=3, terminated_fn=core_never)
    for _ in range(7):  # the ring of 3 rollouts wraps twice
        D_model.rollout(policy, CoreModel())
    stored = core_stored(D_model)
    assert len(D_model) == len(stored) == 3 * k * 8
    # Oldest first out: the last 3 of 7 rollouts are left, with every branch and depth of them.
    assert set(stored) == {(call, b) for call in range(4 * k, 7 * k) for b in range(8)}
    for (call, b), (origin, depth, window, mask, next_obs, done) in stored.items():
        assert depth == call % k and next_obs == origin + 1_000 * (depth + 1) and done == 0
        real = [[step, 0.5, -1, -step] for step in range(origin - origin % 7, origin)]
        own = [(origin + 1_000 * d, call - depth + d, b) for d in range(depth)]
        n_own, n_real = min(L, depth), max(0, min(len(real), L - depth))
        assert mask.tolist() == [False] * (L - n_own - n_real) + [True] * (n_own + n_real)
        assert window[L - n_own - n_real : L - n_own].tolist() == real[len(real) - n_real :]
        imagined = window[L - n_own :, [0, 2, 3]].tolist()  # obs, call and branch
        assert imagined == [list(token) for token in own[depth - n_own :]]


def test_a_branch_at_t_sees_only_history_up_to_t():
    D_env = core_real_steps(60, L=3)
    origin = torch.tensor([0, 1, 5, 6, 7, 24, 33])
    clean = branch(D_env, origin)
    for i, t in enumerate(origin.tolist()):
        spoilt = copy.deepcopy(D_env)
        spoilt.tokens[t + 1 :] = spoilt.next_obs[t:] = math.nan
        spoilt.tokens[t, 1:] = math.nan  # also step t's own action and reward
        b = branch(spoilt, origin[i : i + 1])
        assert b.obs.item() == t and torch.equal(b.mask[:, 0], clean.mask[:, i])
        assert b.tokens[b.mask][:, 0].tolist() == list(range(t - t % 7, t))[-3:]
        assert torch.equal(b.tokens[b.mask], clean.tokens[:, i][clean.mask[:, i]])


@pytest.mark.parametrize("L", [0, 2, 6])
def test_the_dead_and_the_non_finite_store_nothing_and_are_counted(L):
    """A branch from step s terminates with its imagined step number s % 3; branch 0 gets a NaN
    reward at depth 1 and branch 1 an infinite observation at depth 0."""
    dies = lambda next_obs: next_obs[:, 0] // 1_000 > next_obs[:, 0] % 1_000 % 3
    D_model = ModelBuffer(core_real_steps(60, L), M=9, k=4, steps=5, terminated_fn=dies)
    expected, stats = set(), [0, 0, 0]
    for rollout in range(5):
        state = torch.get_rng_state()
        origins = D_model.env.sample_rows(9).tolist()
        torch.set_rng_state(state)
        D_model.rollout(CorePolicy(), CoreModel(nan_reward=[(0, 1)], nan_obs=[(1, 0)]))
        for b, s in enumerate(origins):
            for depth in range(s % 3 + 1):
                stats[0] += 1
                if (b, depth) in ((0, 1), (1, 0)):
                    stats[2] += 1
                    break
                expected.add((rollout, b, s, depth))
        stats[1] += sum(
            (s % 3) < {0: 1, 1: 0}.get(b, 9) for b, s in enumerate(origins))  # lived to its end
    assert D_model.stats.tolist() == stats and min(stats) > 0
    assert len(D_model) == len(expected)
    batch = D_model.sample(5_000)
    assert batch.tokens[batch.mask].isfinite().all() and batch.next_obs.isfinite().all()
    o, _, _, b = batch.tokens[-1].T
    origin, depth = o % 1_000, o // 1_000
    assert torch.equal(batch.terminated, (depth == origin % 3).float())
    assert set(zip(b.tolist(), origin.tolist(), depth.tolist())) == {e[1:] for e in expected}


def test_when_all_branches_end_at_their_first_step_only_that_step_is_stored():
    D_model = ModelBuffer(core_real_steps(60, 3), M=5, k=3, steps=2,
                          terminated_fn=lambda next_obs: ~core_never(next_obs))
    for rollout in range(5):
        D_model.rollout(CorePolicy(), CoreModel())
        assert len(D_model) == 5 * min(rollout + 1, 2)
    batch = D_model.sample(100)
    assert (batch.tokens[-1, :, 0] < 60).all() and (batch.terminated == 1).all()
    assert D_model.stats.tolist() == [25, 25, 0]


def test_a_model_that_predicts_nan_leaves_d_model_empty_and_usable():
    D_model = ModelBuffer(core_real_steps(60, 3), M=5, k=2, steps=3, terminated_fn=core_never)
    D_model.rollout(CorePolicy(), CoreModel(nan_reward=[(b, 0) for b in range(5)]))
    assert len(D_model) == 0 and D_model.stats.tolist() == [5, 0, 5]
    D_model.rollout(CorePolicy(), CoreModel())
    assert len(D_model) == len(core_stored(D_model)) == 10


def test_stored_rows_are_drawn_uniformly_however_many_each_step_stored():
    dies = lambda next_obs: next_obs[:, 0] // 1_000 > next_obs[:, 0] % 1_000 % 3
    D_model = ModelBuffer(core_real_steps(60, 2), M=10, k=3, steps=4, terminated_fn=dies)
    policy = CorePolicy()
    for _ in range(6):
        D_model.rollout(policy, CoreModel())
    n = len(D_model)
    own = D_model.sample(500 * n).tokens[-1]
    count = Counter(zip(own[:, 2].tolist(), own[:, 3].tolist()))  # by call and branch
    assert n < 4 * 3 * 10 and len(count) == n
    chi_square = sum((c - 500) ** 2 / 500 for c in count.values())
    assert abs(chi_square - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_a_branch_whose_origin_is_overwritten_keeps_its_own_tokens_and_takes_no_strangers():
    D_env, policy = core_real_steps(30, L=4, capacity=30), CorePolicy()
    D_model = ModelBuffer(D_env, M=30, k=3, steps=1, terminated_fn=core_never)
    D_model.rollout(policy, CoreModel())
    for row in range(30, 45):  # 15 of the 30 real steps are overwritten
        D_env.add([row], [0.5, -1], -row, [row + 1], False, row % 7 == 6)
    batch = D_model.sample(2_000)
    for b in range(2_000):
        o = int(batch.tokens[-1, b, 0])
        origin, depth = o % 1_000, o // 1_000
        real = [s for s in range(origin - origin % 7, origin) if s >= 15]
        steps = (real + [origin + 1_000 * d for d in range(depth)])[-4:]
        if depth < 4:  # a window of 4 reaches 4 - depth real steps back
            steps = real[max(0, len(real) - (4 - depth)) :] + steps[len(steps) - depth :]
        assert batch.tokens[:-1, b][batch.mask[:-1, b]][:, 0].tolist() == steps


# --- D_model: full rollouts (Sec. 5.1) -----------------------------------------------------------


@pytest.mark.parametrize("L", [0, 2, 5])
def test_full_rollouts_run_from_first_observations_to_the_horizon_in_the_model_alone(L):
    """Horizon 6; branches that left real step 14 terminate with their third step, and branch 3 gets
    a NaN at depth 4. Every real step but the first ones of episodes is poisoned."""
    D_env, policy, steps = core_real_steps(35, L), CorePolicy(), 9
    D_env.next_obs[:] = math.nan
    for row in range(35):
        if row % 7:
            D_env.tokens[row] = math.nan
        else:
            D_env.tokens[row, 1:] = math.nan  # of a first step only the observation is used
    dies = lambda next_obs: next_obs[:, 0] == 3_014
    D_model = ModelBuffer(D_env, 5, 1, steps, dies, full=True, horizon=6)
    D_env.tokens[0, 1:] = 0  # padding is read from slot 0 and masked
    model, seen = CoreModel(nan_obs=[(3, 4)]), {}
    for call in range(60):
        D_model.rollout(policy, model)
        if len(D_model) and call % 4 == 3 or call == 59:
            stored = core_stored(D_model, 600)
            assert all(c > call - steps for c, _ in stored)  # the last `steps` env steps are kept
            seen |= stored
    assert set(stored) == {(c, b) for c in range(60 - steps, 60) for b in range(5)} - {
        (c, 3) for c in range(60) if (c, 3) not in seen}
    depths, begun = Counter(), set()
    for (call, b), (origin, depth, window, mask, next_obs, done) in seen.items():
        depths[depth] += 1
        assert origin % 7 == 0 and next_obs == origin + 1_000 * (depth + 1)
        n = min(depth, L)  # its whole imagined episode so far, or the last L steps of it
        assert mask.tolist() == [False] * (L - n) + [True] * n
        tokens = [[origin + 1_000 * d, call - depth + d, b] for d in range(depth - n, depth)]
        assert window[L - n :][:, [0, 2, 3]].tolist() == tokens
        assert done == (origin == 14 and depth == 2)
        if depth == 0:
            begun.add(origin)
        later = seen.get((call + 1, b))
        if later is not None:
            # All begin at once; branch b is cut one time, after (b + 1) 6 / 5 steps.
            restarts = done or depth == 5 or (b, depth) == (3, 4) or call + 1 == (b + 1) * 6 // 5
            assert later[1] == 0 if restarts else later[:2] == (origin, depth + 1)
    assert begun == {0, 7, 14, 21, 28} and set(depths) == set(range(6))
    assert not any(b == 3 and row[1] >= 4 for (_, b), row in seen.items())


def test_full_rollouts_that_never_end_are_soon_of_every_age():
    D_model = ModelBuffer(core_real_steps(20, 2), 7, 1, 4, core_never, full=True, horizon=7)
    for call in range(30):
        D_model.rollout(CorePolicy(), CoreModel())
        ages = D_model.depth.view(-1, 7)[call % D_model.blocks]  # of the step just imagined
        if call >= 7:
            assert sorted(ages.tolist()) == list(range(7))


def test_len_of_a_full_d_model_counts_what_sample_can_give():
    """L = 2 blocks are kept as history only: two good steps, then two without a number in them."""
    D_model = ModelBuffer(core_real_steps(20, 2), 5, 1, 2, core_never, full=True)
    bad = CoreModel(nan_reward=itertools.product(range(5), range(4)))
    for model, n in ((CoreModel(), 5), (CoreModel(), 10), (bad, 5), (bad, 0)):
        D_model.rollout(CorePolicy(), model)
        assert len(D_model) == n
        if n:
            assert D_model.sample(8).next_obs.isfinite().all()


# --- the network: GRU + MLP, all members at once -------------------------------------------------


def core_member(net, e):
    """Member e as a network of its own, by copying its weights."""
    one = copy.deepcopy(net)
    for p, q in zip(one.parameters(), net.parameters()):
        p.data = q.data[e : e + 1].clone()
    return one


def core_torch_forward(net, e, tokens, x):
    """Member e's output for one row by torch.nn: tokens [n, D] real ones only, x [I]."""
    D, H = net.token_dim, net.z_dim
    gru = torch.nn.GRU(D, H).to(x.dtype)
    for name, p in (("weight_ih_l0", net.w_x[e].T), ("weight_hh_l0", net.w_h[e].T),
                    ("bias_ih_l0", net.b_x[e, 0]), ("bias_hh_l0", net.b_h[e, 0])):
        getattr(gru, name).data = p.data.contiguous()
    z = gru(tokens[:, None, :D])[1][0, 0] if len(tokens) else torch.zeros(H, dtype=x.dtype)
    layers = []
    for w, b in zip(net.w, net.b):
        layers += [torch.nn.Linear(*w.shape[1:]).to(x.dtype), torch.nn.SiLU()]
        layers[-2].weight.data, layers[-2].bias.data = w[e].T, b[e, 0]
    return z, torch.nn.Sequential(*layers[:-1])(torch.cat([z, x]))


@torch.no_grad()
@pytest.mark.parametrize("token_dim", [6, 4])
def test_the_batched_network_equals_torch_gru_and_linear_on_only_the_real_tokens(token_dim):
    net = HistoryNet(3, token_dim, 4, 2, widths=(7, 8), z_dim=5).double()
    batch = core_random_batch(O=3, A=2, L=4, B=10, dtype=torch.float64)  # 0 .. 4 tokens, each twice
    tokens, mask, x = batch.tokens[:-1], batch.mask[:-1], torch.randn(10, 4, dtype=torch.float64)
    z, out = net.encode(tokens, mask), net(tokens, mask, x)
    assert z.shape == (3, 10, 5) and out.shape == (3, 10, 2)
    assert sorted(mask.sum(0).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for e, b in itertools.product(range(3), range(10)):
        z_slow, out_slow = core_torch_forward(net, e, tokens[mask[:, b], b], x[b])
        assert torch.allclose(z[e, b], z_slow, atol=1e-12)
        assert torch.allclose(out[e, b], out_slow, atol=1e-12)
    assert torch.equal(z[:, mask.sum(0) == 0], torch.zeros(3, 2, 5, dtype=torch.float64))  # z_0 = 0


@torch.no_grad()
@pytest.mark.parametrize("member", [None, [2, 0]])
def test_members_share_nothing(member):
    """E members at once equal one after the other, on shared and on separate inputs."""
    net = HistoryNet(3, 4, 3, 2, widths=(8,))
    chosen = member or [0, 1, 2]
    pick = None if member is None else torch.tensor(member)
    tokens, mask, x = torch.randn(3, 6, 4), torch.rand(3, 6) < 0.7, torch.randn(6, 3)
    shared = net(tokens, mask, x, pick)
    for i, e in enumerate(chosen):
        assert torch.allclose(shared[i : i + 1], core_member(net, e)(tokens, mask, x), atol=1e-6)
    n = len(chosen)
    tokens, mask, x = torch.randn(n, 3, 6, 4), torch.rand(n, 3, 6) < 0.7, torch.randn(n, 6, 3)
    separate = net(tokens, mask, x, pick)
    for i, e in enumerate(chosen):
        alone = core_member(net, e)(tokens[i], mask[i], x[i])
        assert torch.allclose(separate[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e30, math.inf, math.nan])
def test_padding_has_exactly_no_effect_on_output_or_gradient(size):
    net = HistoryNet(2, 5, 3, 2, widths=(8,))
    batch, x = core_random_batch(2, 2, L=4, B=15), torch.randn(15, 3)
    tokens, mask = batch.tokens[:-1], batch.mask[:-1]
    results = []
    for padding in (torch.zeros_like(tokens), torch.randn_like(tokens) * size):
        leaf = torch.where(mask[..., None], tokens, padding).requires_grad_()
        out = net(leaf, mask, x)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()])
        assert not grads[0][~mask].any() and grads[0][mask].any(-1).all()
        results.append([out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@torch.no_grad()
def test_token_dim_hides_the_end_of_a_token_and_0_the_whole_history():
    tokens, mask, x = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), torch.randn(4, 2)
    other_reward, other_action = tokens.clone(), tokens.clone()
    other_reward[..., -1] += 1
    other_action[..., -2] += 1
    sees_all, sees_oa, blind = (HistoryNet(2, d, 2, 1, widths=(8,)) for d in (6, 5, 0))
    assert not torch.isclose(sees_all(tokens, mask, x), sees_all(other_reward, mask, x)).any()
    assert torch.equal(sees_oa(tokens, mask, x), sees_oa(other_reward, mask, x))
    assert not torch.isclose(sees_oa(tokens, mask, x), sees_oa(other_action, mask, x)).any()
    assert torch.equal(blind(tokens, mask, x), blind(torch.randn_like(tokens), ~mask, x))
    assert blind(tokens[:0], mask[:0], x).shape == (2, 4, 1)
    assert not hasattr(blind, "w_x") and blind.w[0].shape == (2, 2, 8)
    assert not sees_all.encode(tokens[:0], mask[:0]).any()  # L = 0: z = 0


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    net = HistoryNet(2, 5, 3, 2, widths=(8,)).double()
    batch = core_random_batch(2, 2, L=4, B=15, dtype=torch.float64)
    tokens, mask, x = batch.tokens[:-1], batch.mask[:-1], torch.randn(15, 3, dtype=torch.float64)
    order = torch.randperm(15)
    permuted = net(tokens[:, order], mask[:, order], x[order])
    assert torch.allclose(permuted, net(tokens, mask, x)[:, order], atol=1e-12)


# --- the meta-model ------------------------------------------------------------------------------


def core_constant_heads(model, mean, logvar=-60.0):
    """All weights 0: member e predicts mean[e] with variance exp(logvar), whatever it is shown."""
    with torch.no_grad():
        for p in model.net.parameters():
            p.zero_()
        model.min_logvar.fill_(logvar - 20)  # far from where the soft bounds bend
        model.max_logvar.fill_(logvar + 20)
        model.net.b[-1][..., : model.obs_dim + 1] = torch.tensor(mean)[:, None, None]
        model.net.b[-1][..., model.obs_dim + 1 :] = logvar
    return model


def core_noisy_world(n, holdout=0.1):
    """r = 2 o - a + 0.5 noise, o' - o = a + 0.1 + s noise with s = 0.2 for a < 0 and 0.5 above."""
    D_env = EnvBuffer(n, 1, 1, L=2, holdout=holdout)
    obs, action, noise = torch.randn(n), torch.rand(n) * 2 - 1, torch.randn(n, 2)
    reward = 2 * obs - action + 0.5 * noise[:, 0]
    change = action + 0.1 + torch.where(action < 0, 0.2, 0.5) * noise[:, 1]
    for row in range(n):
        D_env.add(obs[row, None], action[row, None], reward[row], obs[row, None] + change[row],
                  False, row % 10 == 9)
    return D_env


@pytest.mark.parametrize("literal", [True, False])
def test_a_fitted_model_samples_with_the_mean_and_the_variance_of_the_data(literal):
    """The three queries come with histories of the data: none of them tells anything here."""
    D_env = core_noisy_world(3_000)
    objective = dict(beta_nll=0.0, reward_weight=1.0) if literal else {}
    model = MetaModel(1, 1, widths=(32,), lr=1e-2, **objective)
    found = model.fit(D_env)
    assert found["explained_reward"] > 0.9  # 1 - 0.25 / 4.58 is all there is to explain
    n, history = 6_000, D_env.sample(6_000)
    for o, a in ((0.5, -0.6), (-1.0, 0.6), (0.0, 0.3)):
        reward, next_obs = model.sample(history.tokens[:-1], history.mask[:-1],
                                        torch.full((n, 1), o), torch.full((n, 1), a))
        assert abs(reward.mean() - (2 * o - a)) < 0.15
        assert abs(next_obs.mean() - (o + a + 0.1)) < 0.1
        # The squared error alone decides when to stop, so the spread is known less well.
        assert 0.7 < reward.std() / 0.5 < 1.6
        assert 0.7 < next_obs.std() / (0.2 if a < 0 else 0.5) < 1.6


def test_a_hidden_sign_is_found_through_the_rewards_of_the_history_and_not_without():
    """r = sign * a, the sign drawn per episode and shown nowhere but in earlier rewards."""
    D_env = EnvBuffer(2_000, 1, 1, L=3)
    for row in range(2_000):
        if row % 20 == 0:
            sign = 1 if torch.rand(()) < 0.5 else -1
        action = (0.5 + torch.rand(1)) * (1 if torch.rand(()) < 0.5 else -1)
        D_env.add(torch.randn(1), action, sign * action.item(), [0.0], False, row % 20 == 19)
    explained = {}
    for name, token_dim in (("o, a, r", 3), ("o, a", 2), ("blind", 0)):
        model = MetaModel(1, 1, widths=(32,), token_dim=token_dim, lr=1e-2, max_passes=100)
        explained[name] = float(model.fit(D_env)["explained_reward"])
    # An episode's first step, 1 in 20, cannot be known.
    assert 0.85 < explained["o, a, r"] < 1.0, explained
    assert explained["o, a"] < 0.1 and explained["blind"] < 0.1, explained


@pytest.mark.parametrize("B", [1, 2, 3, 7])
def test_each_row_is_drawn_from_one_member_and_from_each_equally_often(B):
    """Member e predicts (e, e, e): a mixture of members within a row would show."""
    model = core_constant_heads(MetaModel(2, 1, members=3, widths=(4,)), [0.0, 1.0, 2.0])
    tokens, mask = torch.randn(4, B, 4), torch.ones(4, B, dtype=torch.bool)
    obs, actions, count = torch.randn(B, 2), torch.zeros(B, 1), torch.zeros(B, 3)
    for _ in range(900):
        reward, next_obs = model.sample(tokens, mask, obs, actions)
        member = reward.round().long()
        assert torch.allclose(reward, member.float(), atol=1e-5)
        assert torch.allclose(next_obs - obs, member[:, None].float(), atol=1e-5)
        count[torch.arange(B), member] += 1
    assert (count - 300).abs().max() < 5 * 200**0.5  # 5 standard deviations, for every row


@torch.no_grad()
def test_a_sampled_row_is_a_members_prediction_for_that_rows_own_history():
    model = MetaModel(2, 1, members=3, widths=(16,))
    model.min_logvar.fill_(-70.0)
    model.max_logvar.fill_(-60.0)  # no noise
    for name in ("token", "target"):  # neither mean 0 nor std 1
        getattr(model, f"{name}_mean").normal_()
        getattr(model, f"{name}_std").uniform_(0.5, 2)
    batch = core_random_batch(2, 1, L=3, B=20)
    tokens, mask, (obs, actions, _) = batch.tokens[:-1], batch.mask[:-1], batch.split(2)
    reward, next_obs = model.sample(tokens, mask, obs, actions)
    all_means, _ = model.predict_mean(tokens, mask, obs, actions)
    mean, std = model.token_mean, model.token_std
    x = torch.cat([(obs - mean[:2]) / std[:2], (actions - mean[2:3]) / std[2:3]], -1)
    members = set()
    for b in range(20):
        matches = []
        for e in range(3):
            window = ((tokens[:, b] - mean) / std)[mask[:, b]]
            _, out = core_torch_forward(model.net, e, window, x[b])
            assert torch.allclose(all_means[e, b], out[:3], atol=1e-4)
            r, *change = out[:3] * model.target_std + model.target_mean
            matches.append(torch.allclose(reward[b], r, atol=1e-4)
                           and torch.allclose(next_obs[b], obs[b] + torch.stack(change), atol=1e-4))
        assert sum(matches) == 1
        members.add(matches.index(True))
    assert members == {0, 1, 2}


def test_samples_have_the_predicted_mean_and_standard_deviation_in_real_units():
    model = core_constant_heads(MetaModel(1, 1, widths=(4,)), [0.5] * 3, logvar=2 * math.log(0.2))
    model.target_mean.copy_(torch.tensor([10.0, -1.0]))
    model.target_std.copy_(torch.tensor([5.0, 2.0]))
    n = 40_000
    reward, next_obs = model.sample(torch.zeros(0, n, 3), torch.zeros(0, n, dtype=torch.bool),
                                    torch.full((n, 1), 7.0), torch.zeros(n, 1))
    assert abs(reward.mean() - (10 + 5 * 0.5)) < 0.03 and abs(reward.std() - 5 * 0.2) < 0.03
    assert abs(next_obs.mean() - (7 - 1 + 2 * 0.5)) < 0.02 and abs(next_obs.std() - 2 * 0.2) < 0.02
    assert abs(torch.corrcoef(torch.stack([reward, next_obs[:, 0]]))[0, 1]) < 0.03  # diagonal


@pytest.mark.parametrize("beta, reward_weight", [(0.0, 1.0), (0.5, None), (1.0, 3.0)])
def test_the_loss_is_the_weighted_beta_nll_of_torch_distributions(beta, reward_weight):
    model = MetaModel(2, 1, widths=(8,), beta_nll=beta, reward_weight=reward_weight).double()
    with torch.no_grad():
        model.max_logvar.fill_(1.5), model.min_logvar.fill_(-3.0)
    batch = core_random_batch(2, 1, L=3, B=6, dtype=torch.float64)
    inputs = batch.tokens[:-1], batch.mask[:-1], torch.randn(6, 3).double()
    y = torch.randn(3, 6, 3).double()
    raw = model.net(*inputs)
    weight = [model.obs_dim if reward_weight is None else reward_weight, 1, 1]  # r, then o' - o
    slow = 0.01 * (1.5 + 3.0) * 9 / 3  # PETS' pull on the bounds, per output
    for e, b, j in itertools.product(range(3), range(6), range(3)):
        high, low = model.max_logvar[e, 0, j], model.min_logvar[e, 0, j]
        logvar = high - (1 + (high - raw[e, b, 3 + j]).exp()).log()
        logvar = low + (1 + (logvar - low).exp()).log()
        assert low < logvar < high + 0.1
        term = -Normal(raw[e, b, j], (logvar / 2).exp()).log_prob(y[e, b, j])
        slow = slow + term * logvar.exp().detach() ** beta * weight[j] / sum(weight) / 6
    loss = model.loss(*inputs, y)
    assert math.isclose(loss.item(), slow.item(), rel_tol=1e-6)
    net = list(model.net.parameters())  # the same gradient: the factor variance^beta is detached
    for ours, theirs in zip(torch.autograd.grad(loss, net), torch.autograd.grad(slow, net)):
        assert torch.allclose(ours, theirs, atol=1e-6)


@torch.no_grad()
def test_validation_is_the_mixtures_nll_and_the_explained_share_of_the_variance():
    D_env = core_noisy_world(300)
    model = MetaModel(1, 1, members=4, widths=(8,), elites=2)
    model.update_statistics(D_env)
    model.elite.copy_(torch.tensor([3, 1]))
    found = model.validate(D_env)
    rows = D_env.rows(holdout=True)
    tokens, mask, x, y = model.standardised(D_env.batch(rows))
    mean, logvar = model.predict(tokens, mask, x)
    chosen = Normal(mean[[1, 3]].transpose(0, 1), (logvar / 2).exp()[[1, 3]].transpose(0, 1))
    mixture = MixtureSameFamily(Categorical(torch.ones(len(rows), 2)), Independent(chosen, 1))
    assert torch.isclose(found["nll"], -mixture.log_prob(y).mean(), rtol=1e-4)
    ensemble = (mean[1] + mean[3]) / 2
    share = 1 - ((y - ensemble) ** 2).mean(0) / ((y - y.mean(0)) ** 2).mean(0)
    assert torch.isclose(found["explained_reward"], share[0], atol=1e-4)
    assert torch.isclose(found["explained_obs"], share[1], atol=1e-4)


def test_statistics_are_those_of_the_rows_kept_and_inputs_are_standardised_with_them():
    for n in (20, 130):  # of a ring that is not full, and of one that has wrapped
        D_env = EnvBuffer(50, 3, 1, L=2)
        core_fill(D_env, n)
        model = MetaModel(3, 1, widths=(4,))
        model.update_statistics(D_env)
        batch = D_env.batch(torch.arange(max(0, n - 50), n))
        tokens, mask, x, y = model.standardised(batch)
        own = (batch.tokens[-1] - batch.tokens[-1].mean(0)) / batch.tokens[-1].std(0, correction=0)
        assert torch.allclose(x, own[:, :-1], atol=1e-4)  # reward apart: it is predicted, not shown
        change = batch.next_obs - batch.tokens[-1, :, :3]
        target = torch.cat([batch.tokens[-1, :, -1:], change], -1)
        spread = target.std(0, correction=0)
        spread[spread == 0] = 1  # o' - o is constantly 1 in the first dimension
        assert torch.allclose(y, (target - target.mean(0)) / spread, atol=1e-4)
        assert tokens.shape[0] == mask.shape[0] == 2 and torch.equal(mask, batch.mask[:-1])


def core_spy(monkeypatch, model, name, record):
    """Calls of model.<name> go on as before and are recorded."""
    original = getattr(model, name)

    def spied(*args, **kwargs):
        result = original(*args, **kwargs)
        record.append((args, kwargs, result, copy.deepcopy(model.state_dict())))
        return result

    monkeypatch.setattr(model, name, spied)


def test_each_member_keeps_one_resample_for_the_whole_fit_and_no_holdout_row(monkeypatch):
    D_env = EnvBuffer(400, 1, 1, L=2, holdout=0.25)
    for row in range(400):
        D_env.add(torch.randn(1), torch.randn(1), row, [0.0], False, row % 9 == 8)  # r says the row
    model = MetaModel(1, 1, widths=(4,), batch_size=64, least_steps=1, max_passes=3)
    record = []
    core_spy(monkeypatch, model, "loss", record)
    model.fit(D_env)
    train = D_env.rows(holdout=False)
    n = len(train)
    per_pass = math.ceil(n / 64)
    assert len(record) == 3 * per_pass
    resamples = []
    for p in range(3):
        y = torch.cat([args[3] for args, *_ in record[p * per_pass : (p + 1) * per_pass]], 1)
        rows = (y[..., 0] * model.target_std[0] + model.target_mean[0]).round().long()  # [E, n]
        assert rows.shape == (3, n)
        resamples.append([Counter(member) for member in rows.tolist()])
        orders = rows if p == 0 else torch.cat([orders, rows])
    assert resamples[0] == resamples[1] == resamples[2]
    assert len(torch.unique(orders, dim=0)) == 9  # each pass is shuffled anew
    first, second, third = resamples[0]
    assert first != second and second != third
    for member in resamples[0]:
        assert set(member) <= set(train.tolist())
        assert 0.55 < len(member) / n < 0.71  # a resample with replacement holds 1 - 1/e of them


@pytest.mark.parametrize("n, batch, steps", [(5, 64, 20), (50, 10, 20), (70, 10, 21), (90, 3, 30)])
def test_a_pass_over_few_rows_is_repeated_until_it_is_20_steps(monkeypatch, n, batch, steps):
    D_env, record = core_real_steps(n, L=2), []
    D_env.holdout[:] = False
    model = MetaModel(1, 2, widths=(4,), batch_size=batch, max_passes=1)
    core_spy(monkeypatch, model, "loss", record)
    model.fit(D_env)
    assert len(record) == steps


def test_a_fit_stops_by_its_rule_and_returns_every_member_to_its_own_best(monkeypatch):
    D_env = core_noisy_world(400)
    model = MetaModel(1, 1, 6, widths=(16,), lr=0.05, patience=4)  # a rate at which errors jump
    record = []
    core_spy(monkeypatch, model, "validate", record)
    found = model.fit(D_env)
    record = [call for call in record if call[1].get("holdout", True)]  # not on training rows
    before, *errors, after = [result["member_error"] for *_, result, _ in record]
    states = [state for *_, state in record]
    best, best_pass, waited, passes = before.clone(), [0] * 6, 0, 0
    for error in errors:  # the rule, member by member
        passes += 1
        improved = False
        for e in range(6):
            if error[e] < 0.99 * best[e]:
                best[e], best_pass[e], improved = error[e], passes, True
        waited = 0 if improved else waited + 1
        if waited == 4:
            break
    assert found["passes"] == passes == len(errors)
    assert found["nll"] == model.validate(D_env)["nll"]
    assert found["nll_train"] == model.validate(D_env, holdout=False)["nll"] != found["nll"]
    assert torch.allclose(after, best, rtol=1e-5)
    for name, p in model.named_parameters():  # every weight of a member is that of its best pass
        for e in range(6):
            assert torch.equal(p[e], states[best_pass[e]][name][e]), (name, e)
    assert len(set(best_pass)) > 1 and max(best_pass) < passes


def test_a_fit_that_only_makes_things_worse_changes_no_weight():
    D_env = core_noisy_world(400)
    model = MetaModel(1, 1, widths=(16,), max_passes=30)
    model.fit(D_env)
    statistics = MetaModel(1, 1)
    statistics.update_statistics(D_env)
    assert torch.equal(model.token_mean, statistics.token_mean)  # a fit begins with them
    assert torch.equal(model.target_std, statistics.target_std)
    before = copy.deepcopy(model.state_dict())
    for group in model.optimizer.param_groups:
        group["lr"] = 1.0
    assert model.fit(D_env)["passes"] == model.patience
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_elites_are_the_members_with_the_least_holdout_error():
    D_env = core_noisy_world(200)
    model = MetaModel(1, 1, members=4, widths=(4,), elites=2, token_dim=0, max_passes=0)
    core_constant_heads(model, [3.0, 0.25, -2.0, 1.0])  # standardised targets are 0 in the mean
    model.fit(D_env)
    assert model.elite.tolist() == [1, 3]
    model.target_mean.zero_(), model.target_std.fill_(1)
    n = 1_000
    reward, _ = model.sample(torch.zeros(0, n, 3), torch.zeros(0, n, dtype=torch.bool),
                             torch.zeros(n, 1), torch.zeros(n, 1))
    assert sorted(Counter(reward.tolist()).items()) == [(0.25, n // 2), (1.0, n // 2)]


@pytest.mark.parametrize("case", ["no holdout", "all holdout", "one row", "constant", "few rows"])
def test_odd_data_never_divides_by_zero(case):
    holdout = {"no holdout": 0.0, "all holdout": 1.0}.get(case, 0.1)
    n = {"one row": 1, "few rows": 5}.get(case, 300)
    D_env = EnvBuffer(1_000, 2, 1, L=3, holdout=holdout)
    for row in range(n):
        first = 4.0 if case == "constant" else torch.randn(()).item()
        D_env.add([first, row % 5], torch.rand(1), row % 3, [first, (row + 1) % 5], False,
                  row % 8 == 7)
    model = MetaModel(2, 1, widths=(8,), max_passes=4)
    found = model.fit(D_env)
    assert math.isfinite(found["nll"]) and math.isfinite(found["explained_reward"])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if case == "constant":
        assert model.token_std[0] == model.target_std[1] == 1
    batch = D_env.sample(64)
    obs, actions, _ = batch.split(2)
    reward, next_obs = model.sample(batch.tokens[:-1], batch.mask[:-1], obs, actions)
    assert reward.isfinite().all() and next_obs.isfinite().all()


def test_a_fit_to_an_empty_d_env_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        MetaModel(1, 1, widths=(4,)).fit(EnvBuffer(10, 1, 1, L=2))


def test_a_fit_stops_at_an_error_that_is_not_finite():
    D_env, model = core_noisy_world(50), MetaModel(1, 1, widths=(4,))
    with torch.no_grad():
        model.net.b[-1][1] = math.nan
    with pytest.raises(FloatingPointError, match="meta-model"):
        model.fit(D_env)


def test_what_is_seldom_seen_is_standardised_to_at_most_10():
    model = MetaModel(1, 1, widths=(4,))
    model.token_mean.fill_(1.0), model.token_std.fill_(0.5)
    assert model.standardise(torch.tensor([[3.0, -9.0, 99.0]])).tolist() == [[4.0, -10.0, 10.0]]
    x = model.standardise_step(torch.tensor([[3.0]]), torch.tensor([[-9.0]]))
    assert x.tolist() == [[4.0, -10.0]]


def test_gaussian_nll_is_that_of_torch_distributions():
    mean, logvar, y = torch.randn(3, 50).double()
    slow = -Normal(mean, (0.5 * logvar).exp()).log_prob(y)
    assert torch.allclose(gaussian_nll(mean, logvar, y), slow)


# --- the meta-policy -----------------------------------------------------------------------------


def core_policy(O=2, A=2, **kwargs):
    """Tiny, in float64, with Q targets that differ from Q and statistics that are not 0 and 1."""
    policy = MetaPolicy(O, A, widths=(8,), z_dim=3, **kwargs).double()
    with torch.no_grad():
        for p in policy.qf_target.parameters():
            p.add_(0.3 * torch.randn_like(p))
        policy.token_mean.normal_(), policy.token_std.uniform_(0.2, 2.0)
    return policy


def core_standardised(policy, tokens, obs):
    """Number by number what the nets are shown: (x - mean) / std, at most 10 away from 0."""
    mean, std = policy.token_mean, policy.token_std
    shown = lambda x: torch.stack([((x[..., i] - mean[i]) / std[i]).clamp(-10, 10)
                                   for i in range(x.shape[-1])], -1)
    return shown(tokens), shown(obs)


def core_torch_policy(policy, tokens, mask, obs):
    """pi(. | h) by torch.distributions, for one row: tokens [L, D], mask [L], obs [O]."""
    _, out = core_torch_forward(policy.actor, 0, tokens[mask], obs)
    mean, log_std = out.split(policy.act_dim)
    gaussian = Normal(mean, log_std.clamp(-10, 2).exp())
    squashed = TransformedDistribution(gaussian, [TanhTransform(cache_size=1)])
    return Independent(squashed, 1), gaussian


@torch.no_grad()
def test_log_probabilities_are_those_of_torch_distributions():
    policy, batch = core_policy(), core_random_batch(2, 2, L=3, B=30, dtype=torch.float64)
    tokens, mask, (obs, _, _) = batch.tokens[:-1], batch.mask[:-1], batch.split(2)
    noise = torch.randn(30, 2).double()
    actions, logp = policy.sample(tokens, mask, obs, noise)
    assert actions.shape == (30, 2) and logp.shape == (30,)
    for b in range(30):
        seen = core_standardised(policy, tokens[:, b], obs[b])
        squashed, gaussian = core_torch_policy(policy, seen[0], mask[:, b], seen[1])
        action = TanhTransform()(gaussian.mean + gaussian.stddev * noise[b])
        assert torch.allclose(actions[b], action)
        assert torch.isclose(logp[b], squashed.log_prob(action), atol=1e-6)


@torch.no_grad()
def test_log_probabilities_of_a_batchs_own_actions_are_those_of_torch_distributions():
    policy, batch = core_policy(), core_random_batch(2, 2, L=3, B=30, dtype=torch.float64)
    logp = policy.log_prob(batch)
    for b in range(30):
        tokens, obs = core_standardised(policy, batch.tokens[:, b], batch.tokens[-1, b, :2])
        squashed, _ = core_torch_policy(policy, tokens[:-1], batch.mask[:-1, b], obs)
        assert torch.isclose(logp[b], squashed.log_prob(batch.tokens[-1, b, 2:4]), atol=1e-6)
    batch.tokens[-1, :, 2:4] = torch.tensor([1.0, -1.0])  # at the bounds, where the density ends
    assert policy.log_prob(batch).isfinite().all()


@torch.no_grad()
def test_far_into_saturation_log_probabilities_stay_finite_and_right():
    """Mean 12, deviation 1, noise 0: log N = -log(2 pi) / 2, log(1 - tanh(12)^2) = log 4 - 24."""
    policy = MetaPolicy(1, 1, widths=(4,))
    for p in policy.actor.parameters():
        p.zero_()
    policy.actor.b[-1][0, 0, 0] = 12.0
    none = torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool), torch.zeros(1, 1)
    action, logp = policy.sample(*none, torch.zeros(1, 1))
    assert action.item() == 1.0  # float32 cannot tell
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 24)
    assert math.isclose(logp.item(), expected, rel_tol=1e-5)
    policy.actor.b[-1][0, 0, 1] = 50.0  # log-std is clamped to 2
    _, log_std = policy.distribution(*none)
    assert log_std.item() == 2.0
    policy.actor.b[-1][0, 0, 1] = -50.0
    _, log_std = policy.distribution(*none)
    assert log_std.item() == -10.0


@torch.no_grad()
def test_acting_draws_from_the_same_distribution_and_the_mean_action_is_tanh_of_the_mean():
    policy, batch = MetaPolicy(2, 2, widths=(8,)), core_random_batch(2, 2, L=3, B=30)
    policy.token_mean.normal_(), policy.token_std.uniform_(0.2, 2.0)
    history = batch.tokens[:-1], batch.mask[:-1], 5 * batch.split(2)[0]
    torch.manual_seed(1)
    acted = policy.act(*history)
    torch.manual_seed(1)
    sampled, _ = policy.sample(*history, torch.randn(30, 2))
    assert torch.allclose(acted, sampled, atol=1e-6) and acted.abs().max() <= 1
    mean, _ = policy.distribution(*history)
    chosen = policy.act(*history, deterministic=True)
    assert torch.allclose(chosen, torch.tanh(mean), atol=1e-6)


def test_the_policys_nets_see_what_the_models_statistics_make_of_the_data():
    D_env, model, policy = EnvBuffer(50, 3, 1, L=2), MetaModel(3, 1, widths=(4,)), MetaPolicy(3, 1)
    core_fill(D_env, 40)
    model.update_statistics(D_env)
    policy.use_statistics(model)
    batch = D_env.batch(torch.arange(40))
    tokens, obs = policy.standardise(batch.tokens, batch.split(3)[0])
    assert torch.allclose(tokens[-1].mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(tokens[-1].std(0, correction=0), torch.ones(5), atol=1e-5)
    assert torch.equal(tokens[-1, :, :3], obs)
    assert policy.standardise(1e6 * batch.tokens, obs)[0].abs().max() == 10
    assert {"token_mean", "token_std"} <= set(policy.state_dict())


def core_slow_losses(policy, batch, noise):
    """Critic, actor and temperature loss row by row, with torch.nn and torch.distributions.
    noise [2, B, A]: of the next action and of the action."""
    B, alpha = len(batch.next_obs), policy.log_alpha.exp().item()
    critic = td_error = actor = temperature = 0.0
    logps = []
    for b in range(B):
        mask, own = batch.mask[:, b], batch.tokens[-1, b]
        action, reward = own[2:4], own[4].item()  # these are not standardised
        tokens, next_obs = core_standardised(policy, batch.tokens[:, b], batch.next_obs[b])
        obs = tokens[-1, :2]

        def q(net, tokens, mask, obs, action):
            return [core_torch_forward(net, e, tokens[mask], torch.cat([obs, action]))[1].item()
                    for e in range(2)]

        now = tokens[:-1], mask[:-1], obs  # h_t
        after = tokens[1:], mask[1:], next_obs  # h_{t+1} has seen step t's token
        squashed, gaussian = core_torch_policy(policy, *after)
        next_action = torch.tanh(gaussian.mean + gaussian.stddev * noise[0, b])
        v = min(q(policy.qf_target, *after, next_action))
        v -= alpha * squashed.log_prob(next_action).item()
        y = reward + (0.0 if batch.terminated[b] else policy.gamma * v)
        critic += sum((q_i - y) ** 2 for q_i in q(policy.qf, *now, action)) / B
        td_error += sum(abs(q_i - y) for q_i in q(policy.qf, *now, action)) / (2 * B)

        squashed, gaussian = core_torch_policy(policy, *now)
        new_action = torch.tanh(gaussian.mean + gaussian.stddev * noise[1, b])
        logp = squashed.log_prob(new_action).item()
        actor += (alpha * logp - min(q(policy.qf, *now, new_action))) / B
        temperature += -alpha * (logp + policy.target_entropy) / B
        logps.append(logp)
    return critic, td_error, actor, temperature, torch.tensor(logps).double()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_the_three_losses_equal_their_equations_row_by_row(alpha):
    policy = core_policy(alpha=alpha, gamma=0.9)
    batch = core_random_batch(2, 2, L=3, B=24, dtype=torch.float64)
    noise = torch.randn(2, 24, 2).double()
    critic, td_error, actor, temperature, logp = core_slow_losses(policy, batch, noise)
    loss, _, our_td_error = policy.critic_loss(batch, noise[0])
    assert math.isclose(loss.item(), critic, rel_tol=1e-6)
    assert math.isclose(our_td_error.item(), td_error, rel_tol=1e-6)
    loss, our_logp = policy.actor_loss(batch, noise[1])
    assert math.isclose(loss.item(), actor, rel_tol=1e-6)
    assert torch.allclose(our_logp, logp, atol=1e-6)
    assert math.isclose(policy.temperature_loss(logp).item(), temperature, rel_tol=1e-6)
    assert policy.target_entropy == -1.0  # -A / 2, as in MBPO


@pytest.mark.parametrize("which", ["critic", "actor", "temperature"])
def test_gradients_equal_finite_differences_and_reach_nothing_else(which):
    policy = core_policy()
    batch = core_random_batch(2, 2, L=3, B=12, dtype=torch.float64)
    noise, logp = torch.randn(12, 2).double(), torch.randn(12).double()
    part, loss = {
        "critic": (policy.qf, lambda: policy.critic_loss(batch, noise)[0]),
        "actor": (policy.actor, lambda: policy.actor_loss(batch, noise)[0]),
        "temperature": (None, lambda: policy.temperature_loss(logp)),
    }[which]
    params = [policy.log_alpha] if part is None else list(part.parameters())
    if which == "actor":
        policy.qf.requires_grad_(False)  # as update() does
    loss().backward()
    for p in params:
        direction = torch.randn_like(p)
        along = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(step * direction)
                along.append(loss().item())
                p.sub_(step * direction)
        slope = (along[0] - along[1]) / 2e-6
        assert math.isclose((p.grad * direction).sum().item(), slope, rel_tol=1e-5, abs_tol=1e-7)
        assert abs(slope) > 1e-7
    others = {id(p) for p in policy.parameters()} - {id(p) for p in params}
    assert all(p.grad is None for p in policy.parameters() if id(p) in others)


def core_update_case(**kwargs):
    policy = MetaPolicy(2, 2, widths=(8,), **kwargs)
    with torch.no_grad():
        for p in policy.qf_target.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return policy, core_random_batch(2, 2, L=3, B=32), torch.randn(2, 32, 2)


def test_one_update_moves_every_weight_of_the_actor_and_of_both_qs_at_its_rate():
    policy, batch, noise = core_update_case(lr=1e-3)
    before = copy.deepcopy(policy)
    policy.update(batch, noise)
    for part in ("actor", "qf"):
        for (name, new), old in zip(getattr(policy, part).named_parameters(),
                                    getattr(before, part).parameters()):
            moved = (new - old).abs()
            assert (moved > 0).all(), (part, name)
            assert torch.isclose(moved.median(), torch.tensor(1e-3), rtol=0.05)  # Adam's first step
    assert policy.log_alpha != before.log_alpha


def test_the_targets_move_towards_q_by_exactly_tau_and_have_no_gradient():
    policy, batch, noise = core_update_case(tau=0.25)
    before = copy.deepcopy(policy.qf_target)
    policy.update(batch, noise)
    for old, target, q in zip(before.parameters(), policy.qf_target.parameters(),
                              policy.qf.parameters()):
        assert torch.allclose(target, 0.75 * old + 0.25 * q, atol=1e-6)
        assert target.grad is None and not target.requires_grad


def test_the_actors_step_changes_no_q_and_the_critics_step_no_actor():
    policy, batch, noise = core_update_case()
    critic_only = copy.deepcopy(policy)
    critic_only.critic_loss(batch, noise[0])[0].backward()
    critic_only.q_optimizer.step()
    actor_only = copy.deepcopy(critic_only)  # the actor's step comes after the critic's
    actor_only.actor_loss(batch, noise[1])[0].backward()
    actor_only.actor_optimizer.step()
    log_alphas = set()
    for left_over in (None, 100.0, -100.0):  # gradients from before
        fresh = copy.deepcopy(policy)
        for p in fresh.parameters():
            if left_over and p.requires_grad:
                p.grad = torch.full_like(p, left_over)
        fresh.update(batch, noise)
        log_alphas.add(fresh.log_alpha.item())
        for a, b in zip(fresh.qf.parameters(), critic_only.qf.parameters()):
            assert torch.equal(a, b) and a.requires_grad
        for a, b in zip(fresh.actor.parameters(), actor_only.actor.parameters()):
            assert torch.equal(a, b)
        for a, b in zip(fresh.qf.parameters(), critic_only.qf.parameters()):
            assert torch.equal(a.grad, b.grad)  # the actor's loss has added nothing
    assert len(log_alphas) == 1


def test_a_given_alpha_stays_and_a_tuned_one_follows_the_entropy():
    policy, batch, noise = core_update_case(alpha=0.5)
    for _ in range(3):
        policy.update(batch, noise)
    assert math.isclose(policy.log_alpha.exp().item(), 0.5, rel_tol=1e-6)
    for target_entropy, rises in ((50.0, True), (-50.0, False)):
        policy, batch, noise = core_update_case(target_entropy=target_entropy)
        assert math.isclose(policy.log_alpha.exp().item(), 0.1, rel_tol=1e-6)
        policy.update(batch, noise)
        assert (policy.log_alpha.exp() > 0.1).item() == rises


def test_an_update_returns_what_it_says():
    policy, batch, noise = core_update_case(alpha=0.5)
    with torch.no_grad():
        q_loss, q_mean, td_error = policy.critic_loss(batch, noise[0])
        own = torch.cat(batch.split(2)[:2], -1)  # statistics 0 and 1: nothing is standardised
        assert torch.isclose(q_mean, policy.qf(batch.tokens[:-1], batch.mask[:-1], own).mean())
    twin = copy.deepcopy(policy)
    returned = policy.update(batch, noise)
    assert not returned.requires_grad and len(returned) == len(LOGGED)
    found = dict(zip(LOGGED, returned))
    assert found["q_loss"] == q_loss and found["q_mean"] == q_mean and found["td_error"] == td_error
    twin.critic_loss(batch, noise[0])[0].backward()
    twin.q_optimizer.step()
    actor_loss, logp = twin.actor_loss(batch, noise[1])
    assert found["actor_loss"] == actor_loss and found["entropy"] == -logp.mean()


def test_the_same_update_twice_gives_the_same_numbers():
    policy, batch, noise = core_update_case()
    twin = copy.deepcopy(policy)
    for _ in range(3):
        assert torch.equal(policy.update(batch, noise), twin.update(batch, noise))
    for a, b in zip(policy.parameters(), twin.parameters()):
        assert torch.equal(a, b)


def test_updates_find_the_best_action_which_only_the_history_tells():
    """A bandit: r = -(a - g)^2, and g = +-0.5 is the reward of the one earlier token."""
    policy = MetaPolicy(1, 1, widths=(32,), lr=3e-3, alpha=1e-3)
    B = 128
    mask = torch.ones(2, B, dtype=torch.bool)
    for _ in range(400):
        goal = torch.where(torch.rand(B) < 0.5, 0.5, -0.5)
        action = torch.rand(B) * 2 - 1
        tokens = torch.zeros(2, B, 3)
        tokens[0, :, 2], tokens[1, :, 1], tokens[1, :, 2] = goal, action, -((action - goal) ** 2)
        batch = Batch(tokens, mask, torch.zeros(B, 1), torch.ones(B))
        policy.update(batch, torch.randn(2, B, 1))
    for goal in (0.5, -0.5):
        token = torch.tensor([[[0.0, 0.0, goal]]])
        best = policy.act(token, mask[:1, :1], torch.zeros(1, 1), deterministic=True)
        assert abs(best.item() - goal) < 0.25


def test_layer_norm_scales_each_hidden_row_and_only_in_q():
    torch.manual_seed(0)
    net = HistoryNet(2, 4, 3, 1, (8, 8), layer_norm=True)
    tokens, mask, x = torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.bool), torch.randn(2, 6, 3)
    z, out = net.encode(tokens, mask), net(tokens, mask, x)
    for e in range(2):
        for i in range(6):
            v = torch.cat([z[e, i], x[e, i]])
            for w, b in zip(net.w[:-1], net.b[:-1]):
                v = v @ w[e] + b[e, 0]
                v = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()
                v = v * torch.sigmoid(v)
            assert torch.allclose(out[e, i], v @ net.w[-1][e] + net.b[-1][e, 0], atol=1e-5)
    policy = MetaPolicy(3, 2, widths=(8,), layer_norm=True)
    assert (policy.qf.layer_norm, policy.qf_target.layer_norm, policy.actor.layer_norm) == (True, True, False)


def test_the_toy_alone_has_no_layer_norm():
    on = {env: m3po.parse_args(["--env", env])[0].layer_norm for env in ("point-fwd-bwd", "ant-fwd-bwd")}
    assert on == {"point-fwd-bwd": False, "ant-fwd-bwd": True}
    assert not m3po.parse_args(["--env", "ant-fwd-bwd", "--no-layer-norm"])[0].layer_norm


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_what_is_compiled_equals_the_eager_original():
    policy, _, noise = core_update_case()
    batch = core_random_batch(2, 2, L=1, B=32)  # the GRU's steps are unrolled: few compile sooner
    compiled = copy.deepcopy(policy)
    compiled.compile_methods()
    history = batch.tokens[:-1], batch.mask[:-1], batch.next_obs
    assert torch.allclose(policy.act(*history, True), compiled.act(*history, True), atol=1e-6)
    model = MetaModel(2, 2, widths=(8, 8))
    imagines = copy.deepcopy(model)
    imagines.compile_methods()
    steps = []
    for m in (model, imagines):
        torch.manual_seed(3)  # the draws are outside of what is compiled
        steps.append(torch.cat([x.flatten() for x in m.sample(*history, policy.act(*history, True))]))
    assert torch.allclose(*steps, atol=1e-5)
    for _ in range(2):
        assert torch.allclose(policy.update(batch, noise), compiled.update(batch, noise), rtol=1e-4)
    for a, b in zip(policy.parameters(), compiled.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


# --- an update as a CUDA graph --------------------------------------------------------------------


def core_updates(update, policy, n=6):
    """n updates on batches that are views, as in training: all losses, then all parameters."""
    torch.manual_seed(1)
    batches = core_random_batch(5, 2, L=4, B=n * 16).minibatches(n)
    device = policy.token_mean.device
    losses = [update(Batch(*(x.to(device) for x in batch)), torch.randn(2, 16, 2).to(device))
              for batch in batches]
    return [x.cpu() for x in (*losses, *policy.parameters())]


@pytest.fixture
def core_no_gpu_graphs(monkeypatch):
    """Stand-ins for torch.cuda's streams and graphs: recording changes no parameter, and a replay
    does what was recorded with what then lies in the same tensors."""
    class Graph:
        recording = False

        def replay(self):
            self.update.losses.copy_(self.update.run())

    class Record:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            update, Graph.recording = Graph.latest, True
            self.graph.update = update
            self.before = copy.deepcopy(update.policy.state_dict())
            self.optimizers = update.policy.q_optimizer, update.policy.actor_optimizer
            self.steps = [copy.deepcopy(o.state_dict()) for o in self.optimizers]

        def __exit__(self, *error):
            Graph.recording = False
            self.graph.update.policy.load_state_dict(self.before)
            for optimizer, step in zip(self.optimizers, self.steps):
                optimizer.load_state_dict(step)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return Graph


def test_a_graphed_update_feeds_every_batch_once_and_keeps_the_losses(core_no_gpu_graphs):
    policy = MetaPolicy(5, 2, widths=(8, 8))
    other = copy.deepcopy(policy)
    graphed = core_no_gpu_graphs.latest = GraphedUpdate(other)
    expected, found = core_updates(policy.update, policy), core_updates(graphed, other)
    assert graphed.graph and all(map(torch.equal, expected, found))


@pytest.mark.parametrize("late", [False, True])
def test_an_update_that_cannot_be_recorded_goes_on_with_one_line(
        late, core_no_gpu_graphs, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operation not permitted\nwhen capturing")

    policy = MetaPolicy(5, 2, widths=(8, 8))
    other = copy.deepcopy(policy)
    graphed = core_no_gpu_graphs.latest = GraphedUpdate(other)
    if late:  # in the middle of an update
        actor_loss = other.actor_loss
        monkeypatch.setattr(other, "actor_loss", lambda *batch: (
            fail if core_no_gpu_graphs.recording else actor_loss)(*batch))
    else:
        monkeypatch.setattr(torch.cuda, "graph", fail)
    found = core_updates(graphed, other)
    assert all(map(torch.equal, core_updates(policy.update, policy), found))
    assert capsys.readouterr().out == "CUDA graph   off: operation not permitted when capturing\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graphed_update_on_a_gpu_is_the_eager_update(compiled):
    policy = MetaPolicy(5, 2, widths=(8, 8)).to("cuda")
    other = copy.deepcopy(policy)
    if compiled:
        other.compile_methods()
    graphed = GraphedUpdate(other)
    expected, found = core_updates(policy.update, policy), core_updates(graphed, other)
    assert graphed.graph
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ==================================================================================================
# m3po.py, checkpoint.py, diagnostics.py: runs, faults, resume, variants
# ==================================================================================================


TINY = ["--N", "2", "--E", "40", "--M", "20", "--G", "2", "--warmup", "40", "--fit-every", "40", "--retain",
        "40", "--width", "8", "--batch-size", "16", "--max-passes", "2", "--eval-episodes", "2",
        "--diagnose-every", "0"]


def run_parse(*flags):
    return m3po.parse_args([str(flag) for flag in flags])


def run(out, *flags):
    """A tiny run in this process; returns its folder."""
    assert m3po.main(*run_parse(*TINY, *flags, "--out", out)) is None
    return out


def run_resume(folder, *flags):
    assert m3po.main(*run_parse("--resume", folder, *flags)) is None
    return folder


def run_rows(folder, name="progress.csv"):
    with open(folder / name, newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(f)]


def run_differences(a, b, path=""):
    """Paths at which two checkpoints differ, NaN equal to NaN."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for k in a for d in run_differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in run_differences(x, y, f"{path}/{i}")]
    if torch.is_tensor(a):
        same = a.shape == b.shape and torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
        return [] if same else [path]
    return [] if a == b or a != a and b != b else [path]


def run_same(a, b):
    """Two run folders agree bit for bit: every log but its times, every weight, dataset, stream."""
    states = [checkpoint.read(folder / "checkpoint.pt", "run") for folder in (a, b)]
    for state in states:
        state["progress"].pop("seconds")
        for name in ("out", "resume", "N"):
            state["flags"].pop(name)
    assert run_differences(*states) == []
    assert run_rows(a) == run_rows(b) and run_rows(a, "eval.csv") == run_rows(b, "eval.csv")


class RunEnv(gym.Env):
    """o = (t, a constant); r = 1; what happens at t is set by the test."""

    observation_space = gym.spaces.Box(-1e3, 1e3, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    terminate_at, truncate_at, fail_at = 6, None, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        reward = math.nan if self.t == self.fail_at else 1.0
        obs = np.array([self.t, 0], np.float32)
        return obs, reward, self.t == self.terminate_at, self.t == self.truncate_at, {}


@pytest.fixture
def run_env(monkeypatch):
    """Register RunEnv with the given behaviour; returns the flag that names it."""
    def register(**behaviour):
        for name, value in behaviour.items():
            monkeypatch.setattr(RunEnv, name, value)
        if "RunEnv-v0" not in gym.registry:
            gym.register("RunEnv-v0", entry_point=RunEnv)
        return ["--env", "RunEnv-v0"]
    return register


# ---- flags ----


def run_refused(command, flags, says, tmp_path, monkeypatch, capsys):
    """The command's parser ends it with one line that contains `says`, and creates nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and says in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, says", [
    (["--bogus"], "--bogus"), (["--epoch", "3"], "--epoch"), (["--k", "0"], "[1, inf)"),
    (["--k", "1.5"], "whole"), (["--gamma", "1"], "[0, 1)"), (["--gamma", "nan"], "[0, 1)"),
    (["--lr", "-1"], "(0, inf)"), (["--lr", "inf"], "(0, inf)"), (["--B", "0"], "[1, inf)"),
    (["--tau", "0"], "(0, 1]"), (["--alpha", "0"], "(0, inf)"), (["--warmup", "0"], "[1, inf)"),
    (["--warmup", "9999"], "--warmup"), (["--beta", "1.1"], "[0, 1]"), (["--hybrid", "3"], "A < B"),
    (["--hybrid"], "Table 3"), (["--hybrid", "1", "2", "--beta", "0.5"], "--beta"),
    (["--env", "nope"], "humanoid-direc"), (["--env", "nope:Nope-v0"], "humanoid-direc"),
    (["--resume", "nowhere"], "nowhere"), (["--eval-episodes", "-1"], "[0, inf)"),
    (["--env", "halfcheetah-pier", "--switch-every", "9"], "switch"), (["--device", "tpu"], "cuda"),
    (["--resume", ""], "--resume"), (["--seed", "9" * 400], "[0, 4294967295]"), (["--N", "1__0"], "whole"),
    (["--rollout", "full", "--k", "2"], "--k"),
])
def test_an_impossible_flag_is_one_line_that_names_it_and_nothing_is_created(
        flags, says, tmp_path, monkeypatch, capsys):
    run_refused(m3po.parse_args, flags, says, tmp_path, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_refused_and_only_auto_falls_back(capsys):
    with pytest.raises(SystemExit) as stop:
        run_parse("--device", "cuda")
    assert stop.value.code == 2 and "CUDA" in capsys.readouterr().err
    args, env, _ = run_parse()
    assert args.device == "cpu"


@pytest.mark.parametrize("env, M, G", [("halfcheetah-fwd-bwd", 1000, 40), ("halfcheetah-pier", 500, 40),
                                       ("ant-fwd-bwd", 1000, 40), ("ant-crippled-leg", 1000, 40),
                                       ("walker2d-randomparams", 500, 40), ("humanoid-direc", 500, 20)])
def test_the_defaults_are_table_2(env, M, G):
    args, _, _ = run_parse("--env", env)
    assert (args.N, args.E, args.B, args.k, args.L) == (200, 1000, 3, 1, 10)
    assert (args.M, args.G, args.width, args.z_dim, args.rollout, args.model) == (M, G, 400, 5, "branched", "gru")


def test_a_registered_id_is_the_short_name():
    args, _, _ = run_parse("--env", "M3PO/HumanoidDirec-v0")
    assert (args.env, args.M, args.G) == ("humanoid-direc", 500, 20)


def test_the_default_warmup_is_at_most_half_the_run_and_no_difference():
    args, _, _ = run_parse("--env", "halfcheetah-fwd-bwd", "--N", 3, "--k", 2)
    assert args.warmup == 1_500 and m3po.differences(vars(args)) == {"k": 2}
    assert run_parse("--N", 1, "--E", 1)[0].warmup == 1


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert m3po.versions()["commit"] == "unknown"


def test_the_same_folder_twice_is_refused(tmp_path, capsys):
    run(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        run_parse(*TINY, "--out", tmp_path / "a")
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err


# ---- a whole run ----


def test_a_run_moves_every_parameter_and_writes_what_it_promises(tmp_path, capsys):
    args, env, _ = run_parse(*TINY, "--diagnose-every", 1, "--out", tmp_path / "a")
    torch.manual_seed(args.seed)
    policy, model = m3po.build(args, env, "cpu")
    m3po.main(args, env)
    trained, trained_model, _, _ = m3po.load(tmp_path / "a")
    for before, after in ((policy, trained), (model, trained_model)):
        for (name, p), q in zip(before.named_parameters(), after.parameters()):
            assert not torch.equal(p, q), name
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["flags"]["G"] == 2 and config["versions"]["torch"] == torch.__version__
    rows = run_rows(tmp_path / "a")
    assert [row["global_step"] for row in rows] == ["40", "80"]
    for name in ("eval_return_mean", "q_loss", "alpha", "model_nll", "model_explained_reward", "td_error",
                 "kl_pi", "eps_m", "gap_full", "gap_branched", "nll_depth_5", "rmse_reward_depth_1"):
        assert math.isfinite(float(rows[1][name])), name
    assert int(rows[1]["imagined"]) == 40 * 20  # E x M x k
    assert len(run_rows(tmp_path / "a", "eval.csv")) == 4
    said = capsys.readouterr().out
    for word in ("dir * a", "redrawn every 25", "800 model rollouts", "80 policy updates", "best"):
        assert word in said


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    run_same(run(tmp_path / "a"), run(tmp_path / "b"))
    assert run_rows(run(tmp_path / "c", "--seed", 1)) != run_rows(tmp_path / "a")


@pytest.mark.parametrize("env", ["point-fwd-bwd", "ant-fwd-bwd"])
def test_evaluation_and_diagnostics_do_not_disturb_training(env, tmp_path):
    a = run(tmp_path / "a", "--env", env, "--diagnose-every", 1, "--eval-episodes", 4)
    b = run(tmp_path / "b", "--env", env, "--eval-episodes", 0)
    weights = [checkpoint.read(folder / "agent.pt", "agent") for folder in (a, b)]
    assert run_differences(weights[0]["policy"], weights[1]["policy"]) == []
    assert run_differences(weights[0]["model"], weights[1]["model"]) == []


def test_training_never_touches_rendering_nor_optional_packages(tmp_path):
    code = ("import sys\n"
            "for name in ('matplotlib', 'tensorboard'): sys.modules[name] = None\n"
            "import m3po\n"
            "from gymnasium.envs.mujoco import mujoco_rendering\n"
            "mujoco_rendering.MujocoRenderer.render = mujoco_rendering.MujocoRenderer._get_viewer = None\n"
            f"m3po.main(*m3po.parse_args({TINY + ['--env', 'ant-fwd-bwd', '--out', str(tmp_path / 'a')]!r}))\n")
    environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(m3po.__file__).parent, env=environ,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr and (tmp_path / "a/agent.pt").exists()


def test_tensorboard_gets_every_number_where_it_is_installed(monkeypatch, tmp_path):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 1  # nothing was written before

        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    run(tmp_path / "a")
    assert ("losses/q_loss", 80) in written and ("charts/eval_return_mean", 40) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert m3po.tensorboard(tmp_path, 0) is None


@pytest.mark.parametrize("name", [name for name in envs.ENVS if name != "point-fwd-bwd"])
def test_every_environment_trains_end_to_end(name, tmp_path):
    rows = run_rows(run(tmp_path / "a", "--env", name, "--E", 100, "--warmup", 100, "--fit-every", 100,
                        "--G", 1, "--eval-episodes", 1))
    assert math.isfinite(float(rows[-1]["q_loss"])) and int(rows[-1]["imagined"]) > 0


class RunCountingEnv:
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

    evaluation.evaluate(Policy(), evaluation.Group([RunCountingEnv()]), [0], 2)
    assert seen[0] == (0.0, []) and seen[1] == (1.0, [[0.0, 10.0]])
    assert seen[2] == (2.0, [[0.0, 10.0], [1.0, 20.0]])
    assert seen[3] == (3.0, [[1.0, 20.0], [2.0, 30.0]])


def test_an_agent_learns_to_adapt_on_the_toy_and_a_blind_one_cannot(tmp_path):
    """Knowing the direction is worth 100, guessing it 0. A quarter of the default run."""
    flags = ["--N", "5", "--seed", "1", "--diagnose-every", "0"]
    for name, extra in (("sees", []), ("blind", ["--L", "0", "--G", "2", "--N", "3"])):
        m3po.main(*run_parse(*flags, *extra, "--out", tmp_path / name))
    sees, blind = (max(float(row["eval_return_mean"]) for row in run_rows(tmp_path / name)[-2:])
                   for name in ("sees", "blind"))
    assert sees > 40 and abs(blind) < 15


# ---- faults in the env and in the numbers ----


def test_a_failed_simulator_step_is_dropped_counted_and_ends_the_episode(run_env, tmp_path):
    flags = run_env(terminate_at=None, truncate_at=9, fail_at=4)
    rows = run_rows(run(tmp_path / "a", *flags))
    assert rows[-1]["dropped_transitions"] == "20"  # every 4th of 80 steps
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    assert D_env["total"] == 60 and D_env["age"].max() == 2 and bool(torch.isfinite(D_env["tokens"]).all())


@pytest.mark.parametrize("terminate_at, truncate_at, cut", [(3, None, 1.0), (None, 3, 0.0), (3, 3, 1.0), (None, None, 0.0)])
def test_only_termination_cuts_the_bootstrap(terminate_at, truncate_at, cut, run_env, tmp_path):
    flags = run_env(terminate_at=terminate_at, truncate_at=truncate_at)
    run(tmp_path / "a", *flags, "--eval-episodes", 0)
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    assert D_env["terminated"][2] == cut and D_env["terminated"].sum() == cut * (80 // 3)


def test_episodes_of_one_step_and_a_constant_observation_train(run_env, tmp_path):
    rows = run_rows(run(tmp_path / "a", *run_env(terminate_at=1), "--rollout", "full"))
    assert math.isfinite(float(rows[-1]["q_loss"])) and float(rows[-1]["eval_length_mean"]) == 1


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    run(tmp_path / "a")
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    update = m3po.MetaPolicy.update
    calls = []

    def broken(self, *batch):
        calls.append(1)
        return update(self, *batch) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(m3po.MetaPolicy, "update", broken)
    with pytest.raises(FloatingPointError, match="q_loss is not finite at env step 83"):
        run_resume(tmp_path / "a", "--N", 3)
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
    with pytest.raises(FloatingPointError, match="q_loss is not finite at env step 83"):
        run_resume(tmp_path / "a", "--N", 3)
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
    run_resume(tmp_path / "a", "--N", 3)
    D_env = checkpoint.read(tmp_path / "a/checkpoint.pt", "run")["D_env"]
    t = torch.arange(120) % 6
    assert torch.equal(D_env["tokens"][:, 0], t.float()) and torch.equal(D_env["next_obs"][:, 0], t + 1.0)


@pytest.mark.parametrize("error, says", [
    (RuntimeError("CUDA out of memory. Tried\nto allocate"), "CUDA out of memory. Tried"),
    (MemoryError("Unable to allocate 3 TiB"), "Unable to allocate 3 TiB"), (MemoryError(), "out of memory"),
    (RuntimeError("a bug\nin memory.py"), None), (RuntimeError(), None)])
def test_too_little_memory_is_one_line_and_a_bug_is_not(error, says, monkeypatch):
    def main(*_):
        raise error

    monkeypatch.setattr(m3po, "main", main)
    monkeypatch.setattr(m3po, "parse_args", lambda: (None,) * 3)
    with pytest.raises(SystemExit if says else RuntimeError) as raised:
        m3po.command_line()
    assert not says or raised.value.code == f"m3po.py: error: {says}; see --M, --retain, --env-capacity"


def test_faults_in_evaluation_are_counted(run_env, tmp_path):
    rows = run_rows(run(tmp_path / "a", *run_env(terminate_at=None, truncate_at=9, fail_at=4)))
    assert [row["eval_faults"] for row in rows] == ["2", "2"]  # one in each of two episodes


# ---- checkpoints ----


@pytest.mark.parametrize("flags", [[], ["--env", "halfcheetah-fwd-bwd"], ["--env", "ant-crippled-leg", "--k", 3],
                                   ["--rollout", "full"], ["--env", "walker2d-randomparams", "--model", "mlp"],
                                   ["--hybrid", 1, 3]])
def test_stopping_and_resuming_equals_never_stopping(flags, tmp_path):
    flags += ["--eval-every", 2, "--eval-episodes", 1]
    a = run(tmp_path / "a", *flags, "--N", 4)
    b = run_resume(run(tmp_path / "b", *flags, "--N", 2), "--N", 4)
    run_same(a, b)


def test_resuming_into_another_folder_leaves_the_first_alone(tmp_path):
    a = run(tmp_path / "a")
    before = (a / "progress.csv").read_bytes()
    m3po.main(*run_parse("--resume", a, "--N", 3, "--out", tmp_path / "b"))
    assert (a / "progress.csv").read_bytes() == before
    assert [row["epoch"] for row in run_rows(tmp_path / "b")] == ["1", "2", "3"]


def test_rows_past_the_checkpoint_and_half_lines_are_cut(tmp_path):
    a = run(tmp_path / "a", "--N", 3)
    b = run(tmp_path / "b")
    with open(b / "progress.csv", "a") as f:
        f.write((a / "progress.csv").read_text().splitlines()[-1] + "\n3,12")
    with open(b / "eval.csv", "a") as f:
        f.write("120,0,1.5,100\r\n120,")
    run_same(a, run_resume(b, "--N", 3))


@pytest.mark.parametrize("flags, says", [(["--gamma", "0.5"], "--gamma"), (["--env", "ant-fwd-bwd"], "--env"),
                                         (["--N", "1"], "--N"), (["--seed", "7"], "--seed")])
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(flags, says, tmp_path, capsys):
    run(tmp_path / "a")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_parse("--resume", tmp_path / "a", *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and says in message and message.count("\n") == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "code", "version", "agent"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_and_runs_no_code(damage, tmp_path, capsys):
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
        torch.save({"foreign": {"a": 1}, "code": Bomb(), "version": {"kind": "run", "version": 99}}[damage], path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_parse("--resume", tmp_path / "a")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "checkpoint.pt" in message
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_that_does_not_fit_is_refused_naming_the_field(tmp_path):
    run(tmp_path / "a")
    args, env, state = run_parse("--resume", tmp_path / "a", "--N", 3)
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


def test_a_checkpoint_has_the_same_names_compiled_and_eager(tmp_path):
    args, env, _ = run_parse(*TINY)
    for part in m3po.build(args, env, "cpu"):
        names = list(part.state_dict())
        part.compile_methods()
        assert list(part.state_dict()) == names


def test_a_loaded_agent_evaluates_exactly_as_the_live_one(tmp_path):
    run(tmp_path / "a", "--env", "halfcheetah-pier")
    policy, model, env, args = m3po.load(tmp_path / "a")
    env_seeds = m3po.seeds(args.seed, 1, args.N, 2)
    group = evaluation.Group([env, m3po.make_env(args)])
    episodes = evaluation.evaluate(policy, group, env_seeds, args.L)
    live = [float(row["return"]) for row in run_rows(tmp_path / "a", "eval.csv")[-2:]]
    assert evaluation.summarise(episodes, args.gamma, early=50)[0].tolist() == live


RUN_KILLED = """
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
    m3po.main(*run_parse(*flags, "--out", tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", RUN_KILLED, tmp_path / "b", "20", *flags], text=True,
                          cwd=Path(m3po.__file__).parent, capture_output=True, check=True)
    ends = done.stdout.split()
    assert ends == 20 * ["9"] + ["done"]
    run_same(tmp_path / "a", tmp_path / "b")


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
    m3po.main(*run_parse(*flags, "--N", end, "--out", tmp_path / "a"))
    args, env, state = run_parse("--resume", tmp_path / "b", "--N", end)
    m3po.main(args, env, state)
    run_same(tmp_path / "a", tmp_path / "b")


def test_a_log_without_even_its_first_line_does_not_stop_a_resume(tmp_path):
    run(tmp_path / "a")
    (tmp_path / "a/eval.csv").write_text("")
    run_resume(tmp_path / "a", "--N", 3)
    assert [row["global_step"] for row in run_rows(tmp_path / "a", "eval.csv")] == ["120", "120"]


def test_after_the_first_signal_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with checkpoint.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)  # caught: the loop will see it and save
        assert stop.received == signal.SIGINT
        assert {signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) is before


# ---- variants and diagnostics ----


def test_a_model_that_was_never_fitted_has_no_errors_in_the_log(tmp_path):
    row = run_rows(run(tmp_path / "a", "--beta", 0, "--diagnose-every", 1))[-1]
    assert row["kl_pi"] and not any(row[name] for name in row if "depth" in name or "model_" in name)


def test_beta_falls_from_one_to_zero_between_a_and_b():
    args, _, _ = run_parse("--env", "walker2d-randomparams", "--hybrid")
    assert args.hybrid == [50, 100]
    assert [m3po.share_of_model(args, e) for e in (1, 50, 75, 100, 200)] == [1, 1, 0.5, 0, 0]
    args, _, _ = run_parse("--beta", "0.25")
    assert m3po.share_of_model(args, 5) == 0.25


@pytest.mark.parametrize("beta, imagined", [(1.0, 8), (0.5, 4), (0.25, 2), (0.0, 0)])
def test_a_batch_holds_a_share_beta_of_imagined_rows(beta, imagined):
    class Rows:
        def __init__(self, value):
            self.value = value

        def sample(self, n):
            return Batch(torch.full((3, n, 4), self.value), torch.ones(3, n, dtype=torch.bool),
                         torch.full((n, 2), self.value), torch.full((n,), self.value))

    batches = list(m3po.sample_batches(Rows(1.0), Rows(0.0), beta, 5, 8))
    assert len(batches) == 5
    for batch in batches:
        assert batch.tokens.shape == (3, 8, 4) and batch.mask.shape == (3, 8)
        assert batch.terminated.sum() == imagined and batch.next_obs[:, 0].sum() == imagined


def test_recurrent_sac_never_asks_the_model(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the model was used")

    for name in ("fit", "sample", "predict"):
        monkeypatch.setattr(m3po.MetaModel, name, refuse)
    rows = run_rows(run(tmp_path / "a", "--beta", 0))
    assert rows[-1]["imagined"] == "0" and math.isfinite(float(rows[-1]["q_loss"]))


@pytest.mark.parametrize("model, moves", [("gru", True), ("mlp", False)])
def test_only_the_meta_model_s_prediction_moves_with_the_history(model, moves):
    args, env, _ = run_parse(*TINY, "--model", model)
    policy, net = m3po.build(args, env, "cpu")
    obs, actions = torch.randn(6, 1), torch.rand(6, 1)
    mask = torch.ones(args.L, 6, dtype=torch.bool)
    one, other = (net.predict_mean(torch.randn(args.L, 6, 3), mask, obs, actions)[0] for _ in range(2))
    assert torch.equal(one, other) != moves
    one, other = (policy.act(torch.randn(args.L, 6, 3), mask, obs, True) for _ in range(2))
    assert not torch.equal(one, other)  # M2PO's policy keeps the history
    assert one.shape == (6, 1) and len(net.min_logvar) == (3 if moves else 7)


def test_blind_agents_and_hidden_rewards_see_nothing_of_them():
    for flags, width in ((["--L", 0], 0), (["--no-token-reward"], 2), ([], 3)):
        args, env, _ = run_parse(*TINY, *flags)
        policy, model = m3po.build(args, env, "cpu")
        assert {net.token_dim for net in (policy.actor, policy.qf, policy.qf_target, model.net)} == {width}


def test_a_policy_has_no_divergence_from_a_copy_of_itself_and_much_from_noise():
    D_env = EnvBuffer(600, 1, 1, 2)
    torch.manual_seed(0)
    args, env, _ = run_parse(*TINY, "--L", 2)
    policy, _ = m3po.build(args, env, "cpu")
    for row in range(600):
        obs = torch.rand(1)
        action = policy.act(*D_env.live_window(), obs[None])[0]
        D_env.add(obs, action, 0.0, torch.rand(1), False, row % 20 == 19)
    near = diagnostics.policy_divergence(policy, D_env, (8, 8), seed=1)
    with torch.no_grad():
        policy.actor.b[-1][..., 0] += 3.0  # the mean moves by 3
    assert 0 <= near < 0.1 < 1 < diagnostics.policy_divergence(policy, D_env, (8, 8), seed=1)


def test_the_error_by_depth_grows_as_a_wrong_model_adds_its_error_up():
    """o' = o + 1 for real; the model says o' = o + 1.5: depth d is off by d / 2."""
    D_env = EnvBuffer(200, 1, 1, 2, holdout=1.0)
    for row in range(200):
        D_env.add([row % 10], [0.0], 2.0, [row % 10 + 1], False, row % 10 == 9)

    class Model:
        target_mean, target_std, token_std = torch.tensor([2.5, 1.5]), torch.ones(2), torch.ones(3)

        def predict_mean(self, tokens, mask, obs, actions):
            return torch.zeros(3, len(obs), 2), torch.zeros(3, len(obs), 2)

    found = diagnostics.error_by_depth(Model(), D_env)
    assert [found[f"rmse_obs_depth_{d}"] for d in range(1, 6)] == pytest.approx([0.5, 1, 1.5, 2, 2.5])
    assert found["rmse_reward_depth_4"] == pytest.approx(0.5)
    nll = 2 * 0.5 * math.log(2 * math.pi) + 0.5 * 0.5**2  # reward off by 0.5, and the observation by:
    assert found["nll_depth_1"] == pytest.approx(nll + 0.5 * 0.5**2, rel=1e-4)
    assert found["nll_depth_3"] == pytest.approx(nll + 0.5 * 1.5**2, rel=1e-4)


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


def test_an_episode_that_ended_is_not_counted_on():
    episodes = {name: np.array([[1.0, 1.0], [1.0, math.nan]]) for name in
                evaluation.FOUND}
    returns, lengths, _ = evaluation.summarise(episodes, 0.9, early=50)
    assert returns.tolist() == [2, 1] and lengths.tolist() == [2, 1]


# ==================================================================================================
# bounds.py: the theory
# ==================================================================================================

BOUNDS_GRID = [  # eps_m, eps_pi, gamma, k, r_max
    (0.1, 0.2, 0.95, 1, 1.0),
    (0.3, 0.0, 0.9, 5, 2.0),
    (0.0, 0.7, 0.85, 50, 1.0),
    (1, 1, 0.5, 3, 0.1),
    (0.01, 0.02, 0.99, 10, 7.0),
    (0.4, 0.6, 0.0, 2, 1.0),
    (0.2, 0.1, 0.3, 1, 1.0),
    (1e-6, 1e-4, 0.9, 20, 1.0),
    (0.0, 0.0, 0.95, 4, 1.0),
]


def bounds_slow_series(eps_m, eps_pi, gamma, k, r_max):
    """Eqs. 13, 15 and 18 branch by branch, no formula for any inner sum; plain Python floats."""
    terms, t = [2 * eps_pi], 1
    while gamma**t > 1e-22:
        n_branches = t if t < k else k
        real = 2 * t * eps_pi  # from p_pi to p_piD
        branches = sum(2 * (n_branches - i) * (eps_pi + eps_m) for i in range(n_branches))
        terms.append(gamma**t * (real + branches / n_branches))
        t += 1
    return r_max * math.fsum(terms)


def bounds_table_1(eps_m, eps_pi, g, k, r_max):
    """C_Th2 letter by letter as the paper's Table 1 prints it."""
    return r_max * (
        (1 + g**2) / (1 - g) ** 2 * 2 * eps_pi
        + (g - k * g**k + (k - 1) * g ** (k + 1)) / (1 - g) ** 2 * (eps_pi + eps_m)
        + (g**k - g) / (g - 1) * (eps_pi + eps_m)
        + g**k / (1 - g) * (k + 1) * (eps_pi + eps_m)
    )


def bounds_random_errors(n=2_000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.random(n), rng.random(n) * 0.99, rng.integers(1, 60, n)


# --- the closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", BOUNDS_GRID)
def test_tight_closed_form_equals_the_series_summed_branch_by_branch(case):
    slow = bounds_slow_series(*case)
    assert bounds.branched_rollout_gap_series(*case) == pytest.approx(slow, rel=1e-12, abs=0)
    assert bounds.branched_rollout_gap(*case, tight=True) == pytest.approx(slow, rel=1e-12, abs=0)


@pytest.mark.parametrize("case", BOUNDS_GRID)
def test_default_closed_form_is_table_1_as_printed(case):
    assert bounds.branched_rollout_gap(*case) == pytest.approx(
        bounds_table_1(*case), rel=1e-12, abs=0
    )


@pytest.mark.parametrize("case", BOUNDS_GRID)
def test_table_1_exceeds_the_series_by_one_gamma_counted_twice(case):
    _, eps_pi, gamma, _, r_max = case
    extra = 2 * r_max * gamma * eps_pi / (1 - gamma) ** 2
    assert bounds.branched_rollout_gap(*case) == pytest.approx(
        bounds_slow_series(*case) + extra, rel=1e-12
    )
    assert extra >= 0


def test_full_rollout_gap_equals_its_sum_over_time():
    # Janner 4.1: sum of gamma^t {2 (t + 1) eps_pi + 2 (t + 1) eps_pi + 2 t eps_m}
    for eps_m, eps_pi, gamma, _, r_max in BOUNDS_GRID:
        terms = [gamma**t * (4 * (t + 1) * eps_pi + 2 * t * eps_m) for t in range(6_000)]
        expected = r_max * math.fsum(terms)
        assert bounds.full_rollout_gap(eps_m, eps_pi, gamma, r_max) == pytest.approx(
            expected, rel=1e-12
        )


def test_janner_branched_gap_by_hand():
    # gamma 1/2, k 1: 2 {(1/4) / (1/4) eps_pi + (5/2) / (1/2) eps_pi + 2 (eps_m + 2 eps_pi)}
    assert bounds.janner_branched_gap(0.1, 0.01, 0.5, 1) == pytest.approx(2 * (0.01 + 0.05 + 0.24))


def test_sharp_bounds_equal_their_sums_over_time():
    for eps_m, eps_pi, gamma, k, r_max in BOUNDS_GRID:
        ts = range(6_000)
        full = r_max * math.fsum(gamma**t * 2 * t * (eps_m + eps_pi) for t in ts)
        branched = r_max * (
            2 * eps_pi
            + math.fsum(gamma**t * (2 * t * eps_pi + (min(t, k) + 1) * eps_m) for t in ts[1:])
        )
        assert bounds.sharp_full_gap(eps_m, eps_pi, gamma, r_max) == pytest.approx(full, rel=1e-12)
        assert bounds.sharp_branched_gap(eps_m, eps_pi, gamma, k, r_max) == pytest.approx(
            branched, rel=1e-12
        )


def test_no_errors_no_gap():
    for gamma, k in itertools.product((0.0, 0.5, 0.99), (1, 7)):
        assert bounds.full_rollout_gap(0, 0, gamma) == 0 == bounds.sharp_full_gap(0, 0, gamma)
        for gap in (
            bounds.branched_rollout_gap,
            bounds.branched_rollout_gap_series,
            bounds.janner_branched_gap,
            bounds.sharp_branched_gap,
            bounds.tight_gap,
        ):
            assert gap(0, 0, gamma, k) == 0


def test_gap_is_proportional_to_r_max():
    for gap, case in (
        (bounds.full_rollout_gap, (0.1, 0.2, 0.9)),
        (bounds.branched_rollout_gap, (0.1, 0.2, 0.9, 3)),
        (bounds.branched_rollout_gap_series, (0.1, 0.2, 0.9, 3)),
        (bounds.janner_branched_gap, (0.1, 0.2, 0.9, 3)),
        (bounds.sharp_full_gap, (0.1, 0.2, 0.9)),
        (bounds.sharp_branched_gap, (0.1, 0.2, 0.9, 3)),
    ):
        assert gap(*case, r_max=5) == pytest.approx(5 * gap(*case))


def test_arrays_broadcast_and_agree_with_floats():
    eps_m, eps_pi, gamma = np.array([0.0, 0.3])[:, None, None], 0.1, np.array([0.5, 0.9])[:, None]
    ks = np.array([1, 2, 30])
    for gap in (
        bounds.branched_rollout_gap,
        bounds.branched_rollout_gap_series,
        bounds.janner_branched_gap,
        bounds.sharp_branched_gap,
    ):
        out = gap(eps_m, eps_pi, gamma, ks)
        assert out.shape == (2, 2, 3)
        assert out[1, 0, 2] == pytest.approx(gap(0.3, 0.1, 0.5, 30), rel=1e-13)
    assert bounds.full_rollout_gap([0.1, 0.2], [0.3, 0.4], 0.9).shape == (2,)
    assert bounds.best_k(np.full((3, 1), 0.2), np.full(2, 0.1), 0.9).shape == (3, 2)


# --- the claims of Sec. 5 ------------------------------------------------------------------------


def test_theorem_2_grows_with_k_by_a_known_step():
    eps_m, eps_pi, gamma, k = bounds_random_errors()
    step = bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k + 1) - bounds.branched_rollout_gap(
        eps_m, eps_pi, gamma, k
    )
    expected = gamma ** (k + 1) * (eps_m + eps_pi) / (1 - gamma)
    scale = bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k)
    assert np.all(expected >= 0)
    assert np.all(np.abs(step - expected) <= 1e-12 * scale)


def test_best_k_is_1_under_every_bound():
    eps_m, eps_pi, gamma, _ = bounds_random_errors(300)
    for gap in (
        bounds.branched_rollout_gap,
        bounds.tight_gap,
        bounds.janner_branched_gap,
        bounds.sharp_branched_gap,
    ):
        assert np.all(bounds.best_k(eps_m, eps_pi, gamma, gap=gap) == 1)


def test_best_k_finds_the_minimum_of_any_gap_and_the_smallest_k_of_a_tie():
    assert bounds.best_k(0.1, 0.1, 0.9, k_max=20, gap=lambda m, p, g, k: (k - 7.0) ** 2) == 7
    assert bounds.best_k(0.1, 0.1, 0.9, k_max=20, gap=lambda m, p, g, k: (k - 7.5) ** 2) == 7


def test_corollary_1_model_error_hurts_branches_of_one_step_less():
    eps_m, _, gamma, _ = bounds_random_errors()
    full, branched, difference = bounds.model_error_terms(eps_m, gamma, r_max=3.0)
    assert np.all(branched <= full)
    np.testing.assert_allclose(branched - full, difference, rtol=0, atol=1e-12 * full.max())
    # and they really are the eps_m terms of the two bounds
    np.testing.assert_allclose(full, bounds.full_rollout_gap(eps_m, 0, gamma, 3.0))
    np.testing.assert_allclose(branched, bounds.branched_rollout_gap(eps_m, 0, gamma, 1, 3.0))


def test_one_step_branches_beat_full_rollouts_on_the_whole_grid_of_figure_4():
    panels = list(bounds.figure_panels())
    assert [gamma for _, gamma, *_ in panels] == [0.85, 0.9, 0.95] * 2
    for name, gamma, eps_m, k, difference in panels:
        assert difference.shape == (len(k), len(eps_m)) == (50, 101)
        assert (k[0], k[-1], eps_m[0], eps_m[-1]) == (1, 50, 0, 1)
        eps_pi = 0 * eps_m if name.startswith("(a)") else 1 - eps_m
        exact = -2 * ((1 - gamma) * eps_pi + gamma**2 * eps_m) / (1 - gamma) ** 2
        np.testing.assert_allclose(difference[0], exact, atol=1e-9)
        no_errors = (eps_m == 0) & (eps_pi == 0)
        assert np.all(difference[0][~no_errors] < 0)
        assert np.all(difference[0][no_errors] == 0)  # the one exception to the paper's "always"


def test_long_branches_lose_in_panel_b_and_win_in_panel_a():
    for name, _, eps_m, _, difference in bounds.figure_panels():
        inside = difference[:, (eps_m > 0)]
        assert (inside < 0).all() if name.startswith("(a)") else (inside[-1] > 0).any()


def test_longest_k_agrees_with_trying_every_k():
    for eps_m, eps_pi, gamma in (
        (0.1, 0.2, 0.95),
        (0.0, 1.0, 0.85),
        (0.05, 0.5, 0.9),
        (0.0, 0.3, 0.75),
    ):
        full, k = bounds.full_rollout_gap(eps_m, eps_pi, gamma), 0
        while bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k + 1) < full:
            k += 1
        assert k >= 1 and bounds.longest_k(eps_m, eps_pi, gamma) == k
    assert bounds.longest_k(0.5, 0.0, 0.9) == math.inf
    assert bounds.longest_k(0.0, 0.0, 0.9) == 0  # a tie at 0 is no win


def test_sharp_below_tight_below_printed_and_below_janner():
    errors = bounds_random_errors()
    sharp, tight = bounds.sharp_branched_gap(*errors), bounds.tight_gap(*errors)
    slack = 1 + 1e-12
    assert np.all(sharp <= tight * slack)
    assert np.all(tight <= bounds.branched_rollout_gap(*errors) * slack)
    assert np.all(tight <= bounds.janner_branched_gap(*errors) * slack)
    assert np.all(
        bounds.sharp_full_gap(*errors[:3]) <= bounds.full_rollout_gap(*errors[:3]) * slack
    )


def test_sharp_against_sharp_only_the_first_real_action_speaks_for_full_rollouts():
    eps_m, eps_pi, gamma, k = bounds_random_errors()
    difference = bounds.sharp_branched_gap(eps_m, eps_pi, gamma, k) - bounds.sharp_full_gap(
        eps_m, eps_pi, gamma
    )
    expected = 2 * eps_pi - gamma * (gamma + gamma**k) * eps_m / (1 - gamma) ** 2
    np.testing.assert_allclose(difference, expected, rtol=1e-9, atol=1e-9)


# --- bad input -----------------------------------------------------------------------------------

BOUNDS_BAD = [
    ("eps_m", -0.1, "[0, 1]"),
    ("eps_m", 1.1, "[0, 1]"),
    ("eps_m", math.nan, "[0, 1]"),
    ("eps_pi", -1e-9, "[0, 1]"),
    ("eps_pi", math.inf, "[0, 1]"),
    ("eps_pi", "x", "[0, 1]"),
    ("gamma", 1.0, "[0, 1)"),
    ("gamma", -0.1, "[0, 1)"),
    ("gamma", math.nan, "[0, 1)"),
    ("gamma", None, "[0, 1)"),
    ("eps_m", [0.5, 2.0], "[0, 1]"),
    ("k", 0, "whole number >= 1"),
    ("k", 1.5, "whole number >= 1"),
    ("k", math.nan, "whole number >= 1"),
    ("k", math.inf, "whole number >= 1"),
    ("r_max", 0, "finite and > 0"),
    ("r_max", math.inf, "finite and > 0"),
    ("r_max", math.nan, "finite and > 0"),
]


@pytest.mark.parametrize("name, value, text", BOUNDS_BAD)
def test_bad_input_is_a_value_error_naming_argument_and_range(name, value, text):
    good = {"eps_m": 0.1, "eps_pi": 0.2, "gamma": 0.9, "k": 2, "r_max": 1.0}
    n_raised = 0
    for function, arguments in (
        (bounds.full_rollout_gap, ("eps_m", "eps_pi", "gamma", "r_max")),
        (bounds.sharp_full_gap, ("eps_m", "eps_pi", "gamma", "r_max")),
        (bounds.model_error_terms, ("eps_m", "gamma", "r_max")),
        (bounds.best_k, ("eps_m", "eps_pi", "gamma")),
        (bounds.branched_rollout_gap, tuple(good)),
        (bounds.janner_branched_gap, tuple(good)),
        (bounds.branched_rollout_gap_series, tuple(good)),
        (bounds.sharp_branched_gap, tuple(good)),
    ):
        if name in arguments:
            with pytest.raises(ValueError) as caught:
                function(**{**{a: good[a] for a in arguments}, name: value})
            assert name in str(caught.value) and text in str(caught.value)
            n_raised += 1
    assert n_raised >= 4


# --- Lemma 3 and Eqs. 4-8 on problems solved by brute force ---------------------------------------


def bounds_small_problem(seed, horizon=2):
    return bounds.random_problem(np.random.default_rng(seed), horizon=horizon)


def bounds_brute_force_pomdp_return(problem, gamma):
    """Sum over every path of tasks, actions and observations: no belief, no history MDP."""
    prior, switch, next_obs, task_reward, _ = problem.tasks

    def value(h, task, t):  # expected discounted reward from t on
        total = 0.0
        for a in range(2):
            now = task_reward[task, h, a]
            if t == problem.steps:  # frozen: the same reward for ever
                later = gamma / (1 - gamma) * now
            else:
                later = gamma * sum(
                    next_obs[task, h, a, o]
                    * switch[task, new]
                    * value(problem.child[h, a, o], new, t + 1)
                    for o in range(2)
                    for new in range(len(prior))
                )
            total += problem.policy[h, a] * (now + later)
        return total

    return sum(
        problem.start[h] * prior[task] * value(h, task, 0)
        for h in np.flatnonzero(problem.start)
        for task in range(len(prior))
    )


@pytest.mark.parametrize("seed", range(4))
def test_lemma_3_value_of_the_history_mdp_is_the_value_of_the_pomdp(seed):
    problem, gamma = bounds_small_problem(seed), 0.9
    brute = bounds_brute_force_pomdp_return(problem, gamma)
    assert bounds.solve(problem, gamma, [1])["true"] == pytest.approx(brute, abs=1e-12)
    assert bounds.pomdp_return(problem, gamma) == pytest.approx(brute, abs=1e-12)


def bounds_slow_law(problem, law, policy, dynamics, steps):
    """{history: probability} after `steps` steps from `law`, one transition at a time."""
    for _ in range(steps):
        new = {}
        for (h, p), a, o in itertools.product(law.items(), range(2), range(2)):
            child = int(problem.child[h, a, o])
            new[child] = new.get(child, 0.0) + p * policy[h, a] * dynamics[h, a, o]
        law = new
    return law


@pytest.mark.parametrize("seed", range(3))
def test_returns_and_errors_equal_equations_4_to_8_written_out(seed):
    problem, gamma, ks, n = bounds_small_problem(seed), 0.6, (1, 2, 4), 60  # 0.6^60 = 5e-14
    start = {h: problem.start[h] for h in np.flatnonzero(problem.start)}
    s = bounds.solve(problem, gamma, ks)
    frozen = problem.steps  # laws stand still after that, so later ones need no computing
    data = [
        bounds_slow_law(problem, start, problem.data_policy, problem.real, t)
        for t in range(frozen + 1)
    ]

    def paid(law, policy):
        return sum(
            p * policy[h, a] * problem.reward[h, a] for h, p in law.items() for a in range(2)
        )

    for key, dynamics in (("true", problem.real), ("full", problem.model)):
        laws = [
            bounds_slow_law(problem, start, problem.policy, dynamics, min(t, frozen))
            for t in range(n)
        ]
        slow = sum(gamma**t * paid(law, problem.policy) for t, law in enumerate(laws))
        assert s[key] == pytest.approx(slow, abs=1e-11)
    for i, k in enumerate(ks):
        for key, last in (
            ("branched", problem.policy),
            ("branched_data_action", problem.data_policy),
        ):
            slow = paid(data[0], problem.data_policy)  # Eq. 4, t = 0
            for t in range(1, n):
                points = (
                    range(t) if t < k else range(t - k, t)
                )  # Eqs. 7 and 8: where branches leave
                rewards = [
                    paid(
                        bounds_slow_law(
                            problem,
                            data[min(u, frozen)],
                            problem.policy,
                            problem.model,
                            min(t - u, frozen),
                        ),
                        last,
                    )
                    for u in points
                ]
                slow += gamma**t * sum(rewards) / len(rewards)  # Eqs. 5 and 6
            assert s[key][i] == pytest.approx(slow, abs=1e-11)
    eps_m = max(
        sum(
            p * problem.data_policy[h, a] * abs(problem.real[h, a] - problem.model[h, a]).sum() / 2
            for h, p in law.items()
            for a in range(2)
        )
        for law in data
    )
    eps_pi = max(
        abs(problem.policy[h] - problem.data_policy[h]).sum() / 2 for h in range(len(problem.start))
    )
    assert (s["eps_m"], s["eps_pi"]) == pytest.approx((eps_m, eps_pi), abs=1e-12)


def test_history_tree_lists_every_history_once():
    child, depth, rank = bounds.history_tree(3)
    assert [int((depth == t).sum()) for t in range(4)] == [2, 8, 32, 128]
    inner = depth < 3
    reached = child[inner].ravel()
    assert len(set(reached)) == len(reached) == (depth > 0).sum()
    assert np.all(
        rank[child[inner]] % 2 == np.arange(2)
    )  # the newest observation is the branch taken
    assert np.all(child[~inner] == np.flatnonzero(~inner)[:, None, None])


# --- the verification ----------------------------------------------------------------------------


def test_every_bound_holds_on_random_problems_and_lemma_3_too():
    rows, lemma3, lemma1 = bounds.verify(n_problems=250, seed=7, ks=(1, 2, 5))
    assert len(rows) == 2 + 3 * 5
    for key, row in rows.items():
        assert row.shape == (250, 2) and np.all(np.isfinite(row)), key
        assert row[:, 0].max() <= 1 + 1e-9, key
        assert row[:, 0].max() > 0.005, key  # the check has something to measure
    assert lemma3 < 1e-11
    assert lemma1[0] == 0 and lemma1[1] > 0  # Eq. 14 holds for h_t, not for (h_t, a_t)


def test_worst_case_attains_the_sharp_bounds_for_small_errors():
    for ratio in (0.0, 0.3, 1.0):  # all policy error, mixed, all model error
        eps_m, eps_pi = 1e-5 * ratio, 1e-5 * (1 - ratio)
        s, gaps = bounds.check_bounds(bounds.worst_case_problem(eps_m, eps_pi, 0.9), 0.9, (1, 4))
        assert (s["eps_m"], s["eps_pi"]) == pytest.approx((eps_m, eps_pi), rel=1e-9)
        for (name, k), (gap, bound) in gaps.items():
            assert gap <= bound * (1 + 1e-6) + 1e-10
            if "sharp" in name:
                assert gap > 0.999 * bound


def test_worst_case_breaks_no_bound_for_large_errors_either():
    for eps_m, eps_pi, gamma in itertools.product((0.0, 0.1, 1.0), (0.0, 0.3, 1.0), (0.3, 0.9)):
        _, gaps = bounds.check_bounds(
            bounds.worst_case_problem(eps_m, eps_pi, gamma), gamma, (1, 2, 9)
        )
        for key, (gap, bound) in gaps.items():
            assert abs(gap) <= bound + 1e-9, key


def test_lemma_1_counts_one_action_too_few():
    s = bounds.solve(bounds.worst_case_problem(0.0, 0.1, 0.9), 0.9, (1,))
    over_h, over_h_and_a = s["drift"]
    assert over_h[1] == pytest.approx(2 * 0.1)  # 2 t eps_pi: right for h_t
    assert over_h_and_a[1] == pytest.approx(2 * (1 - 0.9**2))  # 0.38 > 2 t eps_pi = 0.2
    assert over_h_and_a[0] == pytest.approx(2 * 0.1)  # and 0.2 > 0 at t = t_sw = 0


def test_with_the_last_action_from_the_data_policy_the_tight_bound_is_attained_at_k_1():
    _, gaps = bounds.check_bounds(bounds.worst_case_problem(1e-5, 1e-5, 0.9), 0.9, (1,))
    gap, bound = gaps["Theorem 2, tight, a_t ~ pi_D", 1]
    assert 0.999 * bound < gap < bound
    sharp = gaps["Theorem 2, sharp (ours)", 1][1]
    assert gap > 1.05 * sharp  # the sharp bound needs a_t from pi


def test_r_max_must_bound_the_absolute_reward():
    problem = bounds.worst_case_problem(0.01, 0.01, 0.9)
    problem = dataclasses.replace(problem, reward=problem.reward - 1)  # rewards in [-2, 0]
    s = bounds.solve(problem, 0.9, (1,))
    gap = s["branched"][0] - s["true"]
    assert problem.reward.max() == 0  # Sec. 5.1 would allow any r_max > 0
    assert gap > bounds.branched_rollout_gap(s["eps_m"], s["eps_pi"], 0.9, 1, r_max=0.01)
    assert gap <= bounds.branched_rollout_gap(s["eps_m"], s["eps_pi"], 0.9, 1, r_max=2.0)


# --- the command line ----------------------------------------------------------------------------


def bounds_run(*args, code=None):
    command = (
        [sys.executable, "bounds.py", *args]
        if code is None
        else [sys.executable, "-c", code, *args]
    )
    folder = os.path.dirname(os.path.abspath(bounds.__file__))
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def test_cli_prints_table_1_and_the_comparison():
    run = bounds_run()
    assert run.returncode == 0 and run.stderr == ""
    assert "C_Th1" in run.stdout and "C_Th2" in run.stdout and "tight" in run.stdout
    assert f"{bounds.full_rollout_gap(0.5, 0.5, 0.95):.2f}" in run.stdout
    assert f"{bounds.branched_rollout_gap(0.5, 0.5, 0.95, 1):.2f}" in run.stdout


def test_cli_answers_for_ones_own_numbers():
    run = bounds_run(
        "--eps-m", "0.1", "--eps-pi", "0.2", "--gamma", "0.95", "--k", "3", "--r-max", "2"
    )
    assert run.returncode == 0 and run.stderr == ""
    for gap in (
        bounds.full_rollout_gap(0.1, 0.2, 0.95, 2),
        bounds.branched_rollout_gap(0.1, 0.2, 0.95, 3, 2),
        bounds.tight_gap(0.1, 0.2, 0.95, 3, 2),
        bounds.janner_branched_gap(0.1, 0.2, 0.95, 3, 2),
    ):
        assert f"{gap:.4f}" in run.stdout
    assert "best k of 1 to 50: 1" in run.stdout
    assert f"up to k = {bounds.longest_k(0.1, 0.2, 0.95)}" in run.stdout


def test_cli_verifies_and_reports_no_broken_bound():
    run = bounds_run("--verify", "--problems", "20", "--seed", "3")
    assert run.returncode == 0 and run.stderr == ""
    assert "20 random meta-RL problems (seed 3)" in run.stdout
    assert "held in every problem" in run.stdout and "BROKE" not in run.stdout
    assert "Janner 4.2" in run.stdout and "Lemma 3" in run.stdout


def test_verification_reports_a_bound_that_is_too_small(monkeypatch, capsys):
    def too_small(*args):
        return 1e-9 * bounds.full_rollout_gap(*args)

    monkeypatch.setattr(bounds, "FULL_BOUNDS", (("Wrong", "full", too_small, "eps_pi"),))
    assert bounds.print_verification(5, 0) == 1
    assert "BROKE: Wrong, k = -: 5 times" in capsys.readouterr().out


def test_cli_draws_figure_4_as_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure4.png"
    run = bounds_run("--figure", str(path))
    assert run.returncode == 0 and run.stderr == ""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 700)


def test_cli_without_matplotlib_says_how_to_get_it_in_one_line(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; import bounds; "
        "sys.exit(bounds.main(sys.argv[1:]))"
    )
    run = bounds_run("--figure", str(tmp_path / "x.png"), code=code)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "pip install matplotlib" in run.stderr


BOUNDS_OWN = ["--eps-m", "0.1", "--eps-pi", "0.2", "--gamma", "0.9"]


@pytest.mark.parametrize(
    "args, words",
    [
        ([*BOUNDS_OWN, "--gamma", "1"], ["--gamma", "[0, 1)"]),
        ([*BOUNDS_OWN, "--eps-m", "nan"], ["--eps-m", "[0, 1]"]),
        ([*BOUNDS_OWN, "--eps-pi", "-0.1"], ["--eps-pi", "[0, 1]"]),
        ([*BOUNDS_OWN, "--k", "0"], ["--k", "whole number >= 1"]),
        ([*BOUNDS_OWN, "--k", "x"], ["--k", "whole number >= 1"]),
        ([*BOUNDS_OWN, "--r-max", "0"], ["--r-max", "> 0"]),
        (["--eps-m", "0.1"], ["--eps-pi", "--gamma"]),
        (["--verify", "--problems", "0"], ["--problems", ">= 1"]),
        (["--verify", "--seed", "-1"], ["--seed", ">= 0"]),
        (["--seed", "1"], ["--seed", "--verify"]),
        (["--verify", "--k", "2"], ["--verify", "--eps-m"]),
        (["--ver"], ["--ver"]),
        (["--figure", "/no/such/folder/f.png"], ["--figure", "No such file"]),
    ],
)
def test_cli_bad_values_are_one_line_and_exit_2(args, words, capsys):
    if args[0] == "--figure":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as caught:
        bounds.main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    for word in words:
        assert word in err


def test_cli_error_leaves_no_traceback_in_a_real_process():
    run = bounds_run("--eps-m", "2", "--eps-pi", "0", "--gamma", "0.9")
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "--eps-m" in run.stderr and "[0, 1]" in run.stderr


# ==================================================================================================
# play.py and figures.py: to see it
# ==================================================================================================

SEE_SIX = [name for name in envs.ENVS if name != "point-fwd-bwd"]


def see_train(folder, *flags):
    m3po.main(*m3po.parse_args(["--warmup", "30", "--M", "10", "--G", "1", "--width", "16",
                                "--device", "cpu", "--out", str(folder), *flags]))
    return str(folder)


@pytest.fixture(scope="module")
def see_runs(tmp_path_factory):
    """{"toy", "cheetah"}: run folders of a few dozen env steps."""
    root = tmp_path_factory.mktemp("see")
    return {"toy": see_train(root / "toy", "--N", "2", "--E", "60", "--fit-every", "60",
                             "--diagnose-every", "1", "--eval-episodes", "3"),
            "cheetah": see_train(root / "cheetah", "--env", "halfcheetah-fwd-bwd", "--N", "1",
                                 "--E", "40", "--eval-episodes", "1", "--diagnose-every", "0")}


@pytest.fixture(scope="module")
def see_gl():
    try:
        play.choose_gl()
    except play.PlayError as reason:
        pytest.skip(str(reason))


def see_error(capsys, module, *argv):
    """The one line on stderr with which a command stops, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        module.main([str(arg) for arg in argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{module.__name__}.py"), err
    return err


def see_image(path, size):
    """Pixels of a picture that has this size and is not blank."""
    image = Image.open(path)
    assert image.size == size
    pixels = np.asarray(image.convert("RGB"), int)
    assert pixels.std() > 5
    return pixels


def see_fake(folder, returns=(1.0, 3.0), seed=0, steps=None, **flags):
    """A run folder with a hand-written learning curve, 1,000 env steps between evaluations."""
    folder.mkdir()
    args = vars(m3po.parse_args(["--seed", str(seed), "--out", str(folder / "x")])[0])
    (folder / "config.json").write_text(json.dumps({"flags": args | flags}))
    with open(folder / "progress.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["epoch", "global_step", "eval_return_mean", "td_error", "seconds_fit"])
        for i, value in enumerate(returns):
            step = steps[i] if steps else 1_000 * (i + 1)
            writer.writerow([i + 1, step, value, "" if i else 0.5, 30.0])
    return folder


# ---- play.py ------------------------------------------------------------------------------------


def test_play_evaluates_as_training_does_and_says_how_the_agent_fared(see_runs, capsys):
    play.main([see_runs["toy"], "--episodes", "4", "--seed", "5"])
    printed = capsys.readouterr().out
    policy, _, _, args = m3po.load(see_runs["toy"])
    test = evaluation.Group([m3po.make_env(args) for _ in range(4)])
    found = evaluation.evaluate(policy, test, m3po.seeds(5, 2, 0, 4), args.L)
    returns = np.nansum(found["reward"], 0)
    for i, value in enumerate(returns):
        assert f"episode {i:3d}  return {value:9.1f}  length  100" in printed
    assert f"return       {returns.mean():.1f} +- {returns.std():.1f} over 4 episodes" in printed
    assert "right way" in printed and "after a switch" in printed


def test_the_toy_gets_a_strip_and_a_gif_with_a_frame_per_step(see_runs, tmp_path):
    strip, gif = tmp_path / "s.png", tmp_path / "v.gif"
    play.main([see_runs["toy"], "--episodes", "1", "--strip", str(strip)])
    see_image(strip, (1800, 360))
    play.main([see_runs["toy"], "--episodes", "1", "--video", str(gif), "--window", "20", "28"])
    see_image(gif, (480, 360))
    assert Image.open(gif).n_frames == 8 and Image.open(gif).info["duration"] == 100


def test_a_robot_gets_a_strip_and_a_gif(see_runs, see_gl, tmp_path):
    strip, gif = tmp_path / "s.png", tmp_path / "v.gif"
    play.main([see_runs["cheetah"], "--episodes", "1", "--strip", str(strip), "--video", str(gif),
               "--window", "100", "112", "--every", "3"])
    see_image(strip, (1800, 540))
    see_image(gif, (480, 360))
    assert Image.open(gif).n_frames == 4
    assert Image.open(gif).info["duration"] == 150  # ms: 3 steps of 0.05 s


def see_film(name, steps=3):
    film = play.Film(envs.make(name))
    film.reset(seed=0)
    for _ in range(steps):
        film.step(np.zeros(film.action_space.shape, np.float32))
    return film


@pytest.mark.parametrize("name", [n for n in SEE_SIX if n.endswith(("fwd-bwd", "direc"))])
def test_the_robot_is_blue_forwards_and_red_backwards(see_gl, name):
    film = see_film(name)
    for direction, channel in ((1, 2), (-1, 0)):
        film.tasks[-1] = np.array([direction], np.float32)
        stage = play.Stage(film)
        pixels = stage.frame(2).astype(int)
        stage.close()
        assert (pixels[..., channel] > pixels[..., 2 - channel] + 80).sum() > 500
        assert (pixels[..., 2 - channel] > pixels[..., channel] + 80).sum() == 0


def test_the_dead_leg_is_red_and_it_is_the_leg_without_force():
    film = see_film("ant-crippled-leg")
    model = film.unwrapped.model
    for leg in range(4):
        film.tasks[0] = np.eye(4, dtype=np.float32)[leg]
        play.paint(model, film, 0)
        red = model.geom_rgba[:, 0] > 2 * model.geom_rgba[:, 1]
        moved = {model.joint(j).name for j in range(1, model.njnt)
                 if red[model.geom_bodyid == model.jnt_bodyid[j]].all()}
        assert red.sum() == 3 and moved == {f"hip_{leg + 1}", f"ankle_{leg + 1}"}


@pytest.mark.parametrize("name", SEE_SIX)
def test_colouring_does_not_change_the_trajectory(name):
    film, plain = see_film(name, 1), envs.make(name)
    plain.reset(seed=0)
    plain.step(np.zeros(plain.action_space.shape, np.float32))
    rng = np.random.default_rng(0)
    for t in range(40):
        film.tasks[t] = film.unwrapped.draw_task(rng)
        play.paint(film.unwrapped.model, film, t)  # the live model, though play.py paints a copy
        action = rng.uniform(-0.5, 0.5, plain.action_space.shape).astype(np.float32)
        (obs_a, *rest_a, _), (obs_b, *rest_b, _) = film.step(action), plain.step(action)
        assert np.array_equal(obs_a, obs_b) and rest_a == rest_b


def test_a_film_knows_the_switches_and_where_the_point_was():
    film = play.Film(envs.make("point-fwd-bwd"))
    film.reset(seed=29)
    infos = [film.step(np.ones(1, np.float32))[4] for _ in range(100)]
    assert film.switches == [t for t, info in enumerate(infos) if info["switched"]] == [52, 77]
    assert np.allclose(np.ravel(film.states), np.minimum(0.1 * np.arange(101), 1.0))  # to the wall
    assert film.colour(51) == play.BLUE and film.colour(52) == play.RED
    assert film.caption(54) == "step 54   backwards (new 2 steps ago)   reward so far 49"


@pytest.mark.parametrize("argv, says", [
    (["{gone}"], "does not exist"),
    (["{toy}", "--vid", "x.gif"], "unrecognized"),
    (["{toy}", "--episodes", "0"], "--episodes"),
    (["{toy}", "--video", "x.avi"], ".gif or .mp4"),
    (["{toy}", "--strip", "no/such/x.png"], "no folder"),
    (["{toy}", "--view"], "no window"),
    (["{toy}", "--strip", "x.png", "--window", "9", "3"], "--window"),
    (["{toy}", "--strip", "x.png", "--window", "200", "300"], "--window"),
])
def test_play_refuses_in_one_line(see_runs, capsys, tmp_path, argv, says):
    argv = [a.format(gone=tmp_path / "gone", **see_runs) for a in argv]
    assert says in see_error(capsys, play, *argv)
    assert not Path("x.png").exists()


def test_a_missing_package_is_named_with_its_pip_command(see_runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    err = see_error(capsys, play, see_runs["toy"], "--video", tmp_path / "v.mp4")
    assert "python -m pip install imageio-ffmpeg" in err
    err = see_error(capsys, play, see_runs["toy"], "--strip", tmp_path / "s.png")
    assert "python -m pip install matplotlib" in err
    err = see_error(capsys, figures, "curves", see_runs["toy"], "--out", tmp_path / "c.png")
    assert "python -m pip install matplotlib" in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="displays are Linux's matter")
def test_without_a_display_view_says_so(see_runs, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "no display" in see_error(capsys, play, see_runs["cheetah"], "--view")


def test_without_opengl_one_line_says_what_to_install(see_runs, tmp_path):
    argv = [see_runs["cheetah"], "--strip", str(tmp_path / "s.png")]
    done = subprocess.run([sys.executable, play.__file__, *argv], text=True, capture_output=True,
                          env=os.environ | {"MUJOCO_GL": "broken"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "apt-get install libegl1" in done.stderr and "libosmesa6" in done.stderr


# ---- figures.py ---------------------------------------------------------------------------------


def test_every_figure_from_a_tiny_run_has_its_size(see_runs, tmp_path, capsys):
    sizes = {"curves": (780, 630), "adaptation": (1050, 630), "theory": (1560, 1170)}
    for name, size in sizes.items():
        path = tmp_path / f"{name}.png"
        figures.main([name, see_runs["toy"], "--out", str(path)])
        see_image(path, size)
        printed = capsys.readouterr().out
        assert "IQM of last" in printed and "wall time" in printed and "point-fwd-bwd" in printed
    both = tmp_path / "both.png"
    figures.main(["curves", see_runs["toy"], see_runs["cheetah"], "--out", str(both)])
    see_image(both, (1560, 630))


def test_the_gallery_shows_seven_environments(see_gl, tmp_path):
    figures.main(["envs", "--out", str(tmp_path / "e.png")])
    see_image(tmp_path / "e.png", (1800, 810))


def test_the_interquartile_mean_of_known_values():
    assert figures.interquartile_mean([100, 1, 2, -50]) == 1.5
    assert figures.interquartile_mean(range(9)) == 4  # two go at either end
    assert figures.interquartile_mean([7, 9, 100]) == pytest.approx(116 / 3)  # a quarter of 3 is 0
    assert figures.interquartile_mean([5]) == 5
    rows = np.array([[0, 1, 2, 90], [4, 4, 4, 4]])
    assert figures.interquartile_mean(rows, axis=1).tolist() == [1.5, 4]


def test_the_bootstrap_interval_of_known_values():
    assert figures.bootstrap_interval([3, 3, 3]) == (3, 3)
    assert figures.bootstrap_interval([0, 1]) == (0, 1)  # both ends are drawn a quarter of the time
    assert np.isnan(figures.bootstrap_interval([1])).all()
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = figures.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrow = figures.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    shifted = np.stack([values, values + 1], 1)
    low, high = figures.bootstrap_interval(shifted, figures.interquartile_mean)
    assert low.shape == (2,) and low[1] == pytest.approx(low[0] + 1) and (low < high).all()


@pytest.mark.parametrize("flags, name", [
    ({}, "M3PO"), ({"k": 5}, "k = 5"), ({"rollout": "full"}, "Full"), ({"model": "mlp"}, "M2PO"),
    ({"hybrid": [80, 130]}, "M3PO-h"), ({"beta": 0.0}, "recurrent SAC"),
    ({"L": 0}, "blind (L = 0)"), ({"no_token_reward": True}, "no reward token"),
    ({"oracle": True}, "oracle"),
    ({"beta_nll": 0.0, "reward_weight": 1.0}, "literal likelihood"),
    ({"seed": 9, "N": 1, "out": "elsewhere", "device": "cuda"}, "M3PO"),
    ({"k": 5, "G": 9}, "k = 5, G = 9"), ({"fit_every": 7}, "fit every = 7"),
    ({"beta": 0.5}, "beta = 0.5"), ({"G": 1}, "G = 1"),
])
def test_a_variant_is_named_by_what_differs_from_the_defaults(flags, name):
    args = vars(m3po.parse_args([])[0])
    assert sorted(figures.variant(m3po.differences(args | flags)).split(", ")) == sorted(
        name.split(", "))


def test_settings_that_all_runs_share_stand_in_the_title(tmp_path):
    runs = [see_fake(tmp_path / "a", G=9), see_fake(tmp_path / "b", seed=1, G=9),
            see_fake(tmp_path / "c", G=9, k=5)]
    groups, titles = figures.read_runs(runs)
    assert titles == {"point-fwd-bwd": "point-fwd-bwd\nG = 9"}
    assert {label: len(group) for label, group in groups["point-fwd-bwd"].items()} == {
        "M3PO": 2, "k = 5": 1}


def test_the_table_counts_right(tmp_path, capsys):
    see_fake(tmp_path / "a", (0, 2, 4))  # mean height of the curve: 2
    see_fake(tmp_path / "b", (2, 4, 4), seed=1)  # 3.5
    groups, _ = figures.read_runs([tmp_path / "a", tmp_path / "b"])
    figures.summary(groups)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == "point-fwd-bwd M3PO 2 3 4.0 2.8 4.0 [4.0, 4.0] 1.5 min".split()


def test_seeds_are_compared_at_the_steps_they_share(tmp_path):
    runs = [figures.read_run(see_fake(tmp_path / "a", (1, 2, 3))),
            figures.read_run(see_fake(tmp_path / "b", (5, "", 7, 8), seed=1))]  # longer; one gap
    x, values = figures.over_seeds(runs, "eval_return_mean")
    assert x.tolist() == [1, 3] and values.tolist() == [[1, 3], [5, 7]]


def test_a_half_written_last_row_is_left_out(tmp_path):
    folder = see_fake(tmp_path / "a", (1, 2))
    with open(folder / "progress.csv", "a") as f:
        f.write("3,30")
    assert figures.read_run(folder).progress["global_step"].tolist() == [1000, 2000]


def test_reward_is_aligned_at_the_switch_and_ends_at_the_next(see_runs, monkeypatch):
    reward = np.arange(100.0)[:, None]
    switched = np.isin(reward, (3, 30, 50)).astype(float)
    monkeypatch.setattr(figures, "evaluate", lambda *a: {"reward": reward, "switched": switched})
    x, rows = figures.around_switches(figures.read_run(see_runs["toy"]), 1)
    assert x.tolist() == list(range(-5, 26)) and len(rows) == 3
    nan = float("nan")
    assert np.array_equal(rows[0], [nan, nan, *range(0, 29)], equal_nan=True)
    assert np.array_equal(rows[1], [*range(25, 50), *[nan] * 6], equal_nan=True)
    assert np.array_equal(rows[2], range(45, 76))


def test_recovery_is_nine_tenths_of_the_way_back():
    x = np.arange(-2, 5)
    assert figures.steps_to_recover(x, np.array([1, 1, -1, -1, 0.7, 0.81, 1])) == 3
    assert figures.steps_to_recover(x, np.array([1, 1, -1, -1, 0, 0, 0])) is None
    assert figures.steps_to_recover(x, np.zeros(7)) is None


def see_break(folder, how):
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"flags": {"env"')
    elif how == "no progress":
        (folder / "progress.csv").unlink()
    elif how == "header only":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n")
    elif how == "empty":
        (folder / "progress.csv").write_text("")
    elif how == "text":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n1,1000,hello\n")
    elif how == "binary":
        (folder / "progress.csv").write_bytes(bytes(range(256)))
    elif how == "NaN only":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n1,1000,nan\n")
    elif how == "no steps":
        (folder / "progress.csv").write_text("epoch,eval_return_mean\n1,3\n")


@pytest.mark.parametrize("how, says", [
    ("no config", "config.json does not exist"), ("broken config", "config.json is broken"),
    ("no progress", "progress.csv does not exist"), ("header only", "has no rows"),
    ("empty", "has no rows"), ("text", "hello"), ("binary", "progress.csv"),
    ("NaN only", "no number in column eval_return_mean"), ("no steps", "global_step"),
])
def test_a_broken_run_folder_gets_one_line_that_names_it(tmp_path, capsys, how, says):
    see_break(see_fake(tmp_path / "bad"), how)
    good = see_fake(tmp_path / "good", seed=1)
    for command in ("curves", "theory"):
        argv = [command, good, tmp_path / "bad", "--out", tmp_path / "c.png"]
        err = see_error(capsys, figures, *argv)
        assert says in err and str(tmp_path / "bad") in err
    assert not (tmp_path / "c.png").exists()


def test_runs_that_do_not_belong_together_get_one_line(tmp_path, capsys):
    a, b = see_fake(tmp_path / "a"), see_fake(tmp_path / "b", env="ant-fwd-bwd")
    out = tmp_path / "x.png"
    for command in ("theory", "adaptation"):
        assert "one env at a time" in see_error(capsys, figures, command, a, b, "--out", out)
    assert "one variant (M3PO) with one seed (0)" in see_error(
        capsys, figures, "curves", a, see_fake(tmp_path / "c"), "--out", out)
    assert "agent.pt does not exist" in see_error(capsys, figures, "adaptation", a, "--out", out)
    assert "does not exist" in see_error(capsys, figures, "curves", tmp_path / "no", "--out", out)
    assert "no folder" in see_error(capsys, figures, "curves", a, "--out", tmp_path / "no/x.png")
    assert "does not end in" in see_error(capsys, figures, "curves", a, "--out", tmp_path / "x.bmp")
    assert not out.exists()


def test_theory_says_which_quantity_no_run_has_measured(tmp_path):
    figures.main(["theory", str(see_fake(tmp_path / "a")), "--out", str(tmp_path / "t.svg")])
    assert (tmp_path / "t.svg").stat().st_size > 10_000  # td_error alone is drawn


# ---- ablations.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ablations.ROWS)
def test_a_row_of_the_ablations_is_the_variant_that_figures_name(label):
    args = vars(m3po.parse_args(ablations.ROWS[label][0].split())[0])
    named = figures.variant(m3po.differences(args))
    assert named.replace(" ", "").startswith(label.replace(" ", ""))
    assert (named == "M3PO") == (label == "M3PO")


def test_students_interval_of_known_values():
    assert ablations.interval([7.0]) == "7.0"
    assert ablations.interval([1, 2, 3, 4, 5]) == "3.0 [1.0, 5.0]"  # 2.776 sqrt(2.5 / 5) = 1.963
    assert ablations.interval([0, 1]) == "0.5 [-5.9, 6.9]"  # 12.706 / 2 = 6.353
    for n, quantile in ablations.T95.items():  # 95 % of the density lies within
        x = np.linspace(-quantile, quantile, 20_001)
        student = torch.distributions.StudentT(torch.tensor(n - 1, dtype=torch.float64))
        density = student.log_prob(torch.as_tensor(x)).exp().numpy()
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=4e-5)


def test_who_repeats_the_way_that_paid_last_gets_the_closed_form():
    env, returns = envs.make("point-fwd-bwd"), []
    assert "100 if told the task" in ablations.closed_form(env) and "= 95.04" in ablations.closed_form(env)
    assert ablations.closed_form(envs.make("ant-fwd-bwd")) == ""
    for seed in range(400):
        way, paid, done = 1.0, [], False
        env.reset(seed=seed)
        while not done:
            _, reward, _, done, _ = env.step(np.array([way], np.float32))
            way = way if reward > 0 else -way
            paid.append(reward)
        returns.append(sum(paid))
    assert np.mean(returns) == pytest.approx(95.04, abs=4 * np.std(returns) / 20)


def test_ablations_skip_what_is_finished_go_on_with_what_is_not_and_outlive_a_failure(
        tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(out / "m3po/seed0")
    with monkeypatch.context() as patch:  # stopped between the first epoch and the second
        patch.setattr(m3po, "finish_epoch", lambda args, env, p, *rest, first=m3po.finish_epoch:
                      first(args, env, p, *rest) if p["step"] == 40 else sys.exit("stopped"))
        with pytest.raises(SystemExit):
            run(out / "blind/seed0", "--L", 0)
    (out / "k2").mkdir()
    (out / "k2/seed0").touch()  # where a folder should be
    before = (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns
    flags = ["--only", "m3po", "k2", "blind", "--seeds", "0", "--out", str(out), "--", *TINY]
    assert ablations.main(flags) == 1
    said = capsys.readouterr().out
    assert "3 runs, 1 of them finished before" in said
    assert said.splitlines()[-1].startswith("failed") and "k2/seed0.log" in said.splitlines()[-1]
    assert "exists" in (out / "k2/seed0.log").read_text()
    assert (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns == before
    run_same(out / "blind/seed0", run(tmp_path / "never_stopped", "--L", 0))
    table = (out / "table.md").read_text()
    assert table in said and "95.04" in table and "first 12 after a switch" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(":")[0] for row in rows] == ["| M3PO", "| k=2", "| blind"]
    returns = [float(row["eval_return_mean"]) for row in run_rows(out / "m3po/seed0")]
    way = float(run_rows(out / "m3po/seed0")[-1]["eval_right_way"])
    assert f"| {returns[-1]:.1f} | {np.mean(returns):.1f} | {way:.2f} |" in rows[0]
    assert rows[1].endswith("| `--k 2` | - | - | - | - / - | - | - |")

    with pytest.raises(ValueError, match="was trained with G 2, not 3; use another --out"):
        ablations.main([*flags, "--G", "3"])
    capsys.readouterr()
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "still go on" in see_error(capsys, ablations, *flags)


def test_stopping_the_ablations_sends_each_run_one_signal_and_waits_until_it_has_saved(tmp_path):
    code = ("import pathlib, signal, sys, time\n"
            "def save(*_): time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, save)\n"
            "pathlib.Path(sys.argv[1], 'running').touch(); time.sleep(60)\n")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    todo = {folder: [sys.executable, "-c", code, str(folder)] for folder in folders}

    def stop():
        while not all((folder / "running").exists() for folder in folders[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(tmp_path / "lock", "w") as lock, pytest.raises(KeyboardInterrupt):
            threading.Thread(target=stop, daemon=True).start()
            ablations.run_all(todo, 2, lock)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]


@pytest.mark.parametrize("flags, says", [
    (["--only", "nope"], "recurrent-sac"), (["--jobs", "0"], "[1, inf)"), (["--seeds", "-1"], "--seeds"),
    (["--N", "2"], "--N"), (["--", "--seed=3"], "--seed=3"), (["--env", "nope"], "humanoid-direc"),
    (["--", "--bogus"], "--bogus"), (["--", "--beta", "0.5"], "--beta"),
    (["--", "--eval-episodes", "0"], "last epoch"),
])
def test_bad_input_to_the_ablations_is_one_line_and_nothing_is_created(
        flags, says, tmp_path, monkeypatch, capsys):
    run_refused(ablations.main, flags, says, tmp_path, monkeypatch, capsys)


# ==================================================================================================
# evaluation.py and bench.py
# ==================================================================================================


class WorkerEnv:
    """r = a t for four steps, seeds 1 and 2 for one and two more; seed 13 breaks at its third."""

    def reset(self, seed=None):
        self.seed, self.t = seed, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
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
        assert found["reward"].shape == (6, 16) and np.isfinite(found["reward"]).sum(0).tolist() == (
            [4, 5, 6] + [4] * 13)
        assert np.nansum(found["right_way"]) == (weight > 0) * (4 + 5 + 6 + 13 * 4)
    pids = found["steps_since_switch"][0]
    assert set(pids[:6]) == {os.getpid()}
    assert [set(pids[6:11]), set(pids[11:])] == [{process.pid} for process in some.processes]
    some.close()
    assert not any(process.is_alive() for process in some.processes)


def test_an_evaluation_in_processes_is_the_same_and_restores_the_threads():
    policy, threads = MetaPolicy(17, 6, widths=(8, 8)), torch.get_num_threads()
    make = lambda: envs.make("halfcheetah-fwd-bwd")
    several = [players(16, workers, make, lambda: MetaPolicy(17, 6, widths=(8, 8))) for workers in (1, 2)]
    env_seeds = list(range(16))
    found = [evaluation.evaluate(policy, evaluation.Group([make() for _ in range(16)]), env_seeds, 3)]
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
    with pytest.raises(RuntimeError, match='raise KeyError."the simulator broke".'):
        some.evaluate(WorkerPolicy(), list(range(16)))
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
    some = players(2 * 8, 2, make_env=lambda: Refuses() if multiprocessing.parent_process() else WorkerEnv())
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
import evaluation, test_m3po
class Slow(test_m3po.WorkerEnv):
    def step(self, action):
        time.sleep(60 if WHEN == "playing" else 0.2)
        return super().step(action)
some = evaluation.Players(Slow, test_m3po.WorkerPolicy, 24, 3, 2)
print(*(process.pid for process in some.processes), flush=True)
if WHEN == "playing":
    some.evaluate(test_m3po.WorkerPolicy(), list(range(20, 44)))
time.sleep(0 if WHEN == "ended" else 60)
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
    code = ("import evaluation, test_m3po\n"
            "made = []\n"
            "def make():\n"
            "    made.append(0)\n"
            "    if len(made) == 2: raise SystemExit('only one robot here')\n"
            "    return test_m3po.WorkerEnv()\n"
            "evaluation.Players(make, test_m3po.WorkerPolicy, 16, 4, 2)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(m3po.__file__).parent, timeout=60,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "only one robot here\n")


def test_the_floor_is_the_matrix_products_of_an_update():
    """torch's own count of the eager update, which has no matrix product with h: L of them forward
    in each of 8 encodings (actor 1 + 1, Q 2 + 2, target 2) and twice as many back in 3."""
    O, A, L, B, H = 5, 2, 4, 16, 5
    policy = MetaPolicy(O, A, widths=(8, 8))
    batch = core_random_batch(O, A, L=L, B=B)
    with FlopCounterMode(display=False) as counted:
        policy.update(batch, torch.randn(2, B, A))
    with_h = 2 * B * H * 3 * H * L * (8 + 2 * 3)
    floor = bench.update_products(policy, B, L)
    with FlopCounterMode(display=False) as multiplied:
        bench.multiply(floor)
    assert multiplied.get_total_flops() == counted.get_total_flops() + with_h


def test_medians_are_of_the_runs_after_the_warm_up():
    calls = {"a": 0, "b": 0}

    def job(name, seconds):
        calls[name] += 1
        time.sleep(0.2 if calls[name] <= 2 else seconds)

    found = bench.medians({"a": lambda: job("a", 0.01), "b": lambda: job("b", 0.03)}, 5,
                          torch.device("cpu"))
    assert calls == {"a": 7, "b": 7} and found["a"] < found["b"] < 0.1


def test_the_simulators_floor_does_the_steps_that_the_evaluation_did():
    recorder = bench.Recorder([envs.make("ant-fwd-bwd") for _ in range(2)])
    policy = MetaPolicy(27, 8, widths=(8, 8))
    found = evaluation.evaluate(policy, recorder, [0, 1], 3)
    lengths = np.isfinite(found["reward"]).sum(0)
    assert [sum(i == env for taken in recorder.taken for i, _ in taken) for env in (0, 1)] == list(lengths)
    sim, after = recorder.envs[0].unwrapped, recorder.obs[0].copy()
    recorder.reset([0, 1])
    for taken in recorder.taken:
        for i, ctrl in taken:
            if i == 0:
                bench.drive(sim, ctrl)
    assert np.array_equal(sim._get_obs(), after)


def test_every_table_of_the_bench_can_be_made(monkeypatch, capsys):
    """With small nets and few rows, eager."""
    monkeypatch.setattr(bench, "ROWS", 300)
    monkeypatch.setattr(m3po, "compiler_works", lambda device: False)
    parse = m3po.parse_args
    small = ["--width", "8", "--M", "12", "--G", "2", "--L", "2", "--eval-episodes", "2"]
    monkeypatch.setattr(m3po, "parse_args", lambda argv: parse([*argv, *small]))
    bench.main(["--repeats", "1", "--env", "walker2d-randomparams"])
    printed = capsys.readouterr().out
    for title in ("D_model of humanoid-direc", "evaluation of 2 episodes", "policy update, batch 256",
                  "model rollouts, M 12", "model fit, 3 members", *(f"env step, {name}" for name in
                                                                 list(envs.ENVS)[1:])):
        assert title in printed
    ratios = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("  ")]
    assert len(ratios) == 6 * 3 + 2 + 3 * 2 and ratios.count(1.0) >= 10 and min(ratios) > 0


@pytest.mark.parametrize("name", ["halfcheetah-fwd-bwd", "ant-fwd-bwd", "humanoid-direc"])
def test_gymnasiums_own_env_of_the_bench_has_our_physics(name):
    ours, plain = envs.make(name), bench.plain_env(name)
    ours.reset(seed=0), plain.reset(seed=0)
    plain.unwrapped.set_state(ours.unwrapped.data.qpos, ours.unwrapped.data.qvel)
    low, high = plain.action_space.low, plain.action_space.high
    for action in np.random.default_rng(0).uniform(-1, 1, (20, *low.shape)).astype(np.float32):
        ours.step(action), plain.step(low + (action + 1) / 2 * (high - low))
    assert np.allclose(ours.unwrapped.data.qpos, plain.unwrapped.data.qpos, atol=1e-4)
