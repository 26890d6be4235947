"""envs.py: the hidden tasks and their physics."""

import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.utils.env_checker import check_env

import envs

NAMES = list(envs.ENVS)
MUJOCO = [name for name in NAMES if name != "point-fwd-bwd"]
DIRECTION = ["point-fwd-bwd", "halfcheetah-fwd-bwd", "ant-fwd-bwd", "humanoid-direc"]
SWITCHING = [name for name in NAMES if name != "halfcheetah-pier"]
FAR = 10**6  # a switch period that no test reaches


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


DIMS = {  # of observation and action
    "point-fwd-bwd": (1, 1), "halfcheetah-fwd-bwd": (17, 6), "halfcheetah-pier": (17, 6),
    "ant-fwd-bwd": (27, 8), "ant-crippled-leg": (27, 8), "walker2d-randomparams": (17, 6),
    "humanoid-direc": (45, 17),
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


# --- Gymnasium's contract -------------------------------------------------------------------------


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
    obs_dim, action_dim = DIMS[name]
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


# --- hidden task ----------------------------------------------------------------------------------


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
            t for t, info in enumerate(envs_run(env, random_actions(env, 14))[2])
            if info["switched"]
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


@pytest.mark.parametrize("name", [*SWITCHING, "examples.pendulum:PendulumSign-v0"])
def test_moments_that_are_given_replace_the_drawn_ones_and_the_task_is_another_one(name):
    env = envs.make(name)
    envs.switching_clock(env).switch_at = (1, 2, 9)
    for seed in range(3):
        _, info = env.reset(seed=seed)
        tasks = [info["task"]]  # of each step
        _, _, infos = envs_run(env, random_actions(env, 12))
        assert [t for t, info in enumerate(infos) if info["switched"]] == [1, 2, 9]
        tasks += [info["next_task"] for info in infos]
        assert [t for t in range(1, 13) if not np.array_equal(tasks[t - 1], tasks[t])] == [1, 2, 9]


def test_an_env_whose_task_never_switches_has_no_switching_clock():
    assert envs.switching_clock(envs.make("halfcheetah-pier")) is None
    assert envs.switching_clock(envs.make("Pendulum-v1")) is None


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


# --- physics --------------------------------------------------------------------------------------


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


# --- termination ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_for_model_rollouts_equals_the_envs_flag(name):
    env = envs.make(name)
    rule = envs.terminated_fn(env)
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
    told = envs.terminated_fn(oracle)(np.concatenate((seen, task), axis=1))
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
    rule = envs.terminated_fn(env)
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


# --- faults ---------------------------------------------------------------------------------------


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


def test_a_model_that_is_loaded_anew_at_a_reset_is_watched_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env, _ = make_fixed("ant-fwd-bwd")
    env.unwrapped.data = mujoco.MjData(env.unwrapped.model)
    env.reset(seed=0)
    env.unwrapped.data.qvel[7] = 1e12
    assert env.step(np.zeros(8, np.float32))[4]["fault"] == "MuJoCo reset itself after instability"
