"""The seven environments. Each hides a task from the agent, who must find it by acting.

    short name               obs  reward, per step                    terminated            task
    point-fwd-bwd              1  dir a                               never                 dir
    halfcheetah-fwd-bwd       17  dir vx - 0.05 |a|^2                 never                 dir
    halfcheetah-pier          17  vx - 0.05 |a|^2                     never                 blocks
    ant-fwd-bwd               27  dir vx - 0.5 |a|^2 + 1              z out of [0.2, 1]     dir
    ant-crippled-leg          27  vx - 0.5 |a|^2 + 1                  z out of [0.2, 1]     leg
    walker2d-randomparams     17  vx - 0.001 |a|^2 + 1                z out of (0.8, 2)     params
                                                                      or |angle| >= 1
    humanoid-direc            45  1.25 dir vx - 0.1 |ctrl|^2 + 5      z out of (1, 2)       dir

    dir     direction of travel, -1 or +1
    blocks  damping and friction of each of the pier's eight blocks, drawn once per episode
    leg     which of the four legs gets no force
    params  mass of the torso and friction of the ground, each times 1.5^U(-3, 3)

Sources: M3PO, App. A.5 (the tasks); Gymnasium's MuJoCo v5 envs (bodies, speeds, healthy ranges,
reset noise); learning_to_adapt (the pier). vx is the displacement over one env step, divided by
its duration: of the centre of mass for the humanoid, of the torso for the others. The bonus of
1 or 5 is paid on every step, the terminated one included (Gymnasium's v5 leaves it out there).

Time index. Step t is: o_t, then a_t, then the simulator gives r_t and o_{t+1}. The task *in force
for step t* is the one that made r_t and o_{t+1}. Every `switch_every` steps, with a random phase,
it is drawn anew, between two steps; the draw is uniform and may repeat. A switch resets nothing.
The task is never in the observation. `info`, which the agent never reads, says (for evaluation,
plots and tests):

    info["task"]                float32 vector; the task in force for the step just taken.
                                After reset: the one that will hold for the first step
    info["next_task"]           the task that will hold for the next step
    info["switched"]            the task differs from that of the step before. False at reset, at
                                the first step, and when a redraw repeats the task
    info["steps_since_switch"]  0 at the first step under a new task and at the first step of an
                                episode, then 1, 2, ...; 0 at reset
    info["x_velocity"]          vx (not in the toy)
    info["right_way"]           dir * vx > 0, in the toy dir * a > 0 (only where dir is the task)
    info["fault"]               only if the simulator failed in this step: the reason. What an own
                                env says here is taken for that

`make(name)` gives the env as the rest of M3PO wants it: flat float32 observations, actions in
[-1, 1]. Your own env: `make("my_module:MyEnv-v0")`, see README.
"""

import copy
import functools
import math
import multiprocessing
import os
import sys

import gymnasium as gym
import numpy as np

# `import mujoco` fails where MUJOCO_GL names a backend that is not there; training draws nothing.
asked_gl = os.environ.pop("MUJOCO_GL", None)
import mujoco

if asked_gl is not None:
    os.environ["MUJOCO_GL"] = asked_gl
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit, TransformAction, TransformObservation
from tqdm import tqdm

from env_checks import EnvError, check_env, own_code, why_not

# ------------------------------------------------------------------------------ the hidden task


class TaskClock:
    """Holds the hidden task and draws it anew every `every` steps (None: only at reset).

    draw(rng) returns a float32 vector. All randomness comes from the env's own generator, so one
    seed gives one trajectory.
    """

    switch_at = None  # if given, the task changes at these steps of an episode instead (play.py)

    def __init__(self, draw, every):
        self.draw = draw
        self.every = every

    def reset(self, rng):
        """Draws the task of a new episode."""
        self.task = self.draw(rng)
        self.t = 0  # index of the coming step in the episode
        self.age = 0  # index of the coming step among those under the present task
        self.changed = False  # the coming step's task differs from the last step's
        # Random phase: the first redraw comes after 1..every steps, all later ones `every` apart.
        self.steps_left = int(rng.integers(1, self.every + 1)) if self.every else math.inf

    def step(self, rng):
        """Ends one env step. Returns that step's info; from then on `task` is the next step's."""
        info = {
            "task": self.task.copy(),
            "switched": self.changed,
            "steps_since_switch": self.age,
        }
        self.t += 1
        self.age += 1
        self.changed = False
        self.steps_left -= 1
        if self.steps_left == 0 and self.switch_at is None:
            self.steps_left = self.every
            self.change_to(self.draw(rng))
        elif self.switch_at is not None and self.t in self.switch_at:
            self.change_to(self.draw_another(rng))
        info["next_task"] = self.task.copy()
        return info

    def change_to(self, task):
        if not np.array_equal(task, self.task):
            self.task, self.age, self.changed = task, 0, True

    def draw_another(self, rng):
        """A task other than the present one, unless a hundred draws give none."""
        draws = (self.draw(rng) for _ in range(100))
        return next((task for task in draws if not np.array_equal(task, self.task)), self.task)

    def reset_info(self):
        """The info of reset: nothing has switched yet, and the first step's task is known."""
        return {
            "task": self.task.copy(),
            "next_task": self.task.copy(),
            "switched": False,
            "steps_since_switch": 0,
        }


def switching_clock(env):
    """The TaskClock of an env, ours or yours, whose task switches within an episode; else None."""
    return next((value for value in vars(env.unwrapped).values()
                 if isinstance(value, TaskClock) and value.every), None)


def checked_period(env_class, switch_every):
    """The switch period in env steps: the class's own if None is asked for."""
    if switch_every is None:
        return env_class.switch_every
    if env_class.switch_every is None:
        raise EnvError(f"{env_class.__name__} does not switch tasks: give no switch_every")
    if not isinstance(switch_every, (int, np.integer)) or switch_every < 1:
        raise EnvError(f"switch_every must be a whole number of env steps >= 1: {switch_every}")
    return int(switch_every)


def draw_direction(rng):
    """[dir], -1 or +1 with equal chance."""
    return np.array([rng.choice((-1.0, 1.0))], np.float32)


def never(next_obs):
    """terminated_fn of an env that never terminates: all False, [..., O] -> [...]."""
    return next_obs[..., 0] < -math.inf


# Limits rounded to float32, so that float32 and float64 observations give the same answer.
FLOAT32_02, FLOAT32_08 = float(np.float32(0.2)), float(np.float32(0.8))
FLOAT32_MAX = float(np.finfo(np.float32).max)


# -------------------------------------------------------------------------------------- the toy


class PointFwdBwd(gym.Env):
    """A point on a line, told by the reward alone which way to go.

    x' = x + 0.1 a between walls at -1 and 1, reward = dir * a, the push, also against a wall. 100
    steps, dir drawn anew every 25. Whoever ignores the history gets about 0; whoever knows dir gets
    1 per step. The walls keep every x often visited.
    """

    ORACLE_RETURN = 100.0
    metadata = {"render_modes": []}
    switch_every = 25
    task_dim = 1
    reward_text = "dir * a"
    termination_text = "never"
    terminated_fn = staticmethod(never)

    def __init__(self, switch_every=None, render_mode=None):
        self.switch_every = checked_period(type(self), switch_every)
        self.render_mode = render_mode
        self.clock = TaskClock(draw_direction, self.switch_every)
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def set_task(self, task):
        """Sets the task of the coming step by hand (tests)."""
        self.clock.task = np.array(task, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock.reset(self.np_random)
        self.x = 0.0
        return np.array([self.x], np.float32), self.clock.reset_info()

    def step(self, action):
        a = min(max(float(action[0]), -1.0), 1.0)
        self.x = min(max(self.x + 0.1 * a, -1.0), 1.0)
        reward = float(self.clock.task[0]) * a
        info = self.clock.step(self.np_random)
        info["right_way"] = reward > 0
        return np.array([self.x], np.float32), reward, False, False, info


# --------------------------------------------------------------------------- the six of the paper


class HiddenTaskMujoco:
    """What the six MuJoCo envs share; mixed into one of Gymnasium's own v5 classes.

    Gymnasium's class gives the body, reset noise, observation and rendering. This one gives the
    step, with reward = speed_weight * direction * vx - action_weight * |a|^2 + alive_bonus.
    `a` is always the commanded action in the env's own units, also where a leg ignores it.
    """

    switch_every = 300  # 15 s of the paper at 0.05 s per step; the others keep the same count
    task_dim = 1
    has_direction = True
    direction = 1.0  # of travel that is paid; apply_task changes it
    working = 1.0  # share of its command that an actuator obeys; a crippled leg's is 0
    speed_weight = 1.0
    alive_bonus = 0.0
    gymnasium_kwargs = {}  # for Gymnasium's class
    edit_spec = None  # function that changes the mujoco.MjSpec before it is compiled
    draw_task = staticmethod(draw_direction)

    def __init__(self, switch_every=None, **kwargs):
        self.switch_every = checked_period(type(self), switch_every)
        super().__init__(**self.gymnasium_kwargs, **kwargs)
        self._ezpickle_args, self._ezpickle_kwargs = (switch_every,), kwargs  # for pickle
        self.clock = TaskClock(self.draw_task, self.switch_every)
        self.seconds_per_step = self.dt
        obs_dim = self._get_obs().shape[0]
        self.observation_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)

    def _initialize_simulation(self):
        # A copy for each env, because rendering and some tasks write to the model.
        model = copy.copy(compiled_model(self.fullpath, type(self).edit_spec))
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def apply_task(self, task):
        """Makes `task` hold from the next step on. It starts from the original model each time."""
        self.direction = float(task[0])

    def set_task(self, task):
        """Sets the task of the coming step by hand (tests)."""
        self.clock.task = np.array(task, np.float32)
        self.apply_task(self.clock.task)

    def x_position(self):
        return self.data.qpos[0]

    def reset_model(self):
        self.clock.reset(self.np_random)
        self.apply_task(self.clock.task)
        return super().reset_model()

    def _get_reset_info(self):
        return self.clock.reset_info()

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        if np.shape(action) != self.action_space.shape:
            raise ValueError(f"action shape {np.shape(action)}, not {self.action_space.shape}")
        action = np.asarray(action, np.float64)
        x_before = self.x_position()
        self.data.ctrl[:] = self.working * action
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        vx = float(self.x_position() - x_before) / self.seconds_per_step

        next_obs = self._get_obs()
        paid_vx = self.speed_weight * self.direction * vx
        reward = float(paid_vx - self.action_weight * action.dot(action) + self.alive_bonus)
        # The rule that model rollouts use, on the float32 numbers that the agent gets.
        terminated = bool(self.terminated_fn(next_obs))

        info = self.clock.step(self.np_random)  # from here on the clock holds the next task
        info["x_velocity"] = vx
        if self.has_direction:
            info["right_way"] = self.direction * vx > 0
        if self.clock.changed:
            self.apply_task(self.clock.task)
        if self.render_mode == "human":
            self.render()
        return next_obs, reward, terminated, False, info


@functools.cache
def compiled_model(xml_path, edit_spec):
    """The compiled model, built once per process: evaluation makes many envs of one kind."""
    spec = mujoco.MjSpec.from_file(xml_path)
    if edit_spec is not None:
        edit_spec(spec)
    return spec.compile()


CHEETAH_MASS = 14.0  # kg


def cheetah_mass_by_density(spec):
    """Gives the cheetah its 14 kg through density; returns its mass before, 21.18 kg.

    Gymnasium's file uses the compiler's `settotalmass`, which prints a deprecation warning in
    MuJoCo 4. The result is the same model.
    """
    spec.compiler.settotalmass = -1  # off
    mass_before = float(spec.compile().body_mass.sum())
    for geom in spec.geoms:
        geom.density *= CHEETAH_MASS / mass_before
    return mass_before


class HalfCheetahFwdBwd(HiddenTaskMujoco, HalfCheetahEnv):
    action_weight = 0.05
    reward_text = "dir * vx - 0.05 sum a^2"
    termination_text = "never"
    terminated_fn = staticmethod(never)
    edit_spec = staticmethod(cheetah_mass_by_density)


# The pier. Lineage: learning_to_adapt's half_cheetah_blocks. There eight blocks of 10 kg and the
# cheetah of 21.18 kg are together rescaled to 14 kg, so its cheetah has only 2.93 kg. Here the
# cheetah keeps 14 kg, and masses, springs and dampers of the blocks grow by the same factor 4.78:
# forces and masses in one proportion move alike. Four things differ on purpose:
# 1. In the lineage a block sinks 0.09 m under its own weight, and would sink another 0.19 m under
#    the standing cheetah's, but a stop ends it at 0.15 m: it lies on the stop, and its damping no
#    longer matters. Here the block floats (its own weight is balanced, about at the height where
#    the lineage's rests), and spring and damper are PIER_STIFFER times stronger, so that the
#    cheetah sinks 0.064 m, about what the lineage's stop left it, and stays clear of the stop.
# 2. Blocks are 0.5 m deep instead of 0.1 m, so that no foot gets under the edge of the next.
# 3. The two outer blocks are 1000 m long. Past the end of a block the cheetah would fall forever
#    (never terminated): at 20 m/s, 1000 steps of 0.05 s are 1000 m.
# 4. Friction varies too, as the paper says (the lineage varies damping only).
PIER_EDGES = [-1002.0, -2.0, 2.0, 6.0, 10.0, 14.0, 18.0, 22.0, 1022.0]  # 8 blocks between
PIER_STIFFER = 3.0
PIER_STOP = 0.15  # m from rest to the stop, up and down
PIER_FRICTION = (0.2, 0.8)  # the standard ground has 0.4


def build_pier(spec):
    """Adds the eight blocks after the cheetah, so its joints stay the first nine."""
    natural_mass = cheetah_mass_by_density(spec)
    in_lineage = CHEETAH_MASS / (natural_mass + 8 * 10.0)  # kg there per kg before rescaling
    scale = CHEETAH_MASS / (natural_mass * in_lineage)  # 4.78, ours over theirs
    standard = spec.compile()
    spec.stat.extent = standard.stat.extent  # else the long blocks push the camera away
    spec.stat.center = standard.stat.center
    water = spec.geom("floor")
    water.contype = water.conaffinity = 0
    water.pos = [0.0, 0.0, -0.2]
    water.rgba = [0.1, 0.5, 0.8, 1.0]
    for i, (left, right) in enumerate(zip(PIER_EDGES[:-1], PIER_EDGES[1:])):
        block = spec.worldbody.add_body(name=f"block_{i}", pos=[(left + right) / 2, 0.0, 0.0])
        block.gravcomp = 1.0  # floats: its own weight is balanced
        block.add_joint(
            name=f"block_{i}",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0.0, 0.0, 1.0],
            limited=True,
            range=[-PIER_STOP, PIER_STOP],
            stiffness=150.0 * scale * PIER_STIFFER,
            damping=10.0 * scale * PIER_STIFFER,  # the largest; apply_task takes a share of it
            armature=0.1 * scale,
        )
        block.add_geom(
            name=f"block_{i}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[0.0, 0.0, -0.25],  # top at 0, the height of the standard ground
            size=[(right - left) / 2 - 0.001, 0.99, 0.25],
            mass=10.0 * in_lineage * scale,
            contype=0,  # touches the cheetah, not the next block
            conaffinity=1,
            priority=1,  # the block's friction counts, not the larger of the two
            rgba=[0.64, 0.6 - 0.07 * i, 0.4 - 0.05 * i, 1.0],
        )


class HalfCheetahPier(HiddenTaskMujoco, HalfCheetahEnv):
    """The blocks' joints are the last eight of qpos and qvel; the agent does not see them."""

    switch_every = None
    task_dim = 16  # [8 dampings, 8 frictions], each from 0 (least) to 1 (most)
    has_direction = False
    action_weight = 0.05
    reward_text = "vx - 0.05 sum a^2"
    termination_text = "never"
    terminated_fn = staticmethod(never)
    edit_spec = staticmethod(build_pier)

    def __init__(self, switch_every=None, **kwargs):
        super().__init__(switch_every, **kwargs)
        self.max_damping = self.model.dof_damping[9:].copy()
        self.blocks = [self.model.geom(f"block_{i}").id for i in range(8)]

    @staticmethod
    def draw_task(rng):
        return rng.uniform(0.0, 1.0, 16).astype(np.float32)

    def apply_task(self, task):
        least, most = PIER_FRICTION
        self.model.dof_damping[9:] = task[:8] * self.max_damping
        self.model.geom_friction[self.blocks, 0] = least + task[8:] * (most - least)

    def reset_model(self):
        obs = super().reset_model()
        self.data.qpos[9:] = self.data.qvel[9:] = 0.0  # the reset noise is the cheetah's alone
        mujoco.mj_forward(self.model, self.data)
        return obs

    def _get_obs(self):
        qpos, qvel = self.data.qpos, self.data.qvel
        return np.concatenate((qpos[1:9], qvel[:9])).astype(np.float32)


class AntFwdBwd(HiddenTaskMujoco, AntEnv):
    action_weight = 0.5
    alive_bonus = 1.0
    reward_text = "dir * vx - 0.5 sum a^2 + 1"
    termination_text = "torso height outside [0.2, 1.0] m"
    gymnasium_kwargs = {"include_cfrc_ext_in_observation": False}

    @staticmethod
    def terminated_fn(next_obs):
        z = next_obs[..., 0]
        return (z < FLOAT32_02) | (z > 1.0)

    def x_position(self):
        return self.data.xpos[1, 0]  # body 1 is the torso


class AntCrippledLeg(AntFwdBwd):
    """The two actuators of one leg give no force. The reward still counts what was commanded."""

    task_dim = 4  # one-hot: the dead leg
    has_direction = False
    reward_text = "vx - 0.5 sum a^2 + 1"

    def __init__(self, switch_every=None, **kwargs):
        super().__init__(switch_every, **kwargs)
        # Joints are named hip_1, ankle_1, ..., hip_4, ankle_4; actuators stand in another order.
        joints = [self.model.joint(j).name for j in self.model.actuator_trnid[:, 0]]
        self.leg_of_actuator = np.array([int(name[-1]) - 1 for name in joints])

    @staticmethod
    def draw_task(rng):
        return np.eye(4, dtype=np.float32)[rng.integers(4)]

    def apply_task(self, task):
        self.working = self.leg_of_actuator != np.argmax(task)


class Walker2dRandomParams(HiddenTaskMujoco, Walker2dEnv):
    task_dim = 2  # [log mass scale, log friction scale] / log 1.5^3, each in [-1, 1]
    has_direction = False
    action_weight = 0.001
    alive_bonus = 1.0
    reward_text = "vx - 0.001 sum a^2 + 1"
    termination_text = "torso height outside (0.8, 2) m or |pitch| >= 1 rad"

    @staticmethod
    def terminated_fn(next_obs):
        z, pitch = next_obs[..., 0], next_obs[..., 1]
        return (z <= FLOAT32_08) | (z >= 2.0) | (abs(pitch) >= 1.0)

    def __init__(self, switch_every=None, **kwargs):
        super().__init__(switch_every, **kwargs)
        self.torso = self.model.body("torso").id
        self.standard_mass = self.model.body_mass[self.torso]
        self.standard_inertia = self.model.body_inertia[self.torso].copy()
        self.standard_friction = self.model.geom_friction.copy()
        self.scratch = mujoco.MjData(self.model)

    @staticmethod
    def draw_task(rng):
        return rng.uniform(-1.0, 1.0, 2).astype(np.float32)

    def apply_task(self, task):
        mass_scale, friction_scale = 1.5 ** (3.0 * task.astype(np.float64))
        self.model.body_mass[self.torso] = mass_scale * self.standard_mass
        self.model.body_inertia[self.torso] = mass_scale * self.standard_inertia
        # A contact takes the larger friction of its two geoms, here the foot's: scale them all.
        self.model.geom_friction[:] = friction_scale * self.standard_friction
        # Derived constants follow the mass. mj_setConst overwrites the MjData it is given, so it
        # must not get the one that holds the running simulation.
        mujoco.mj_setConst(self.model, self.scratch)


class HumanoidDirec(HiddenTaskMujoco, HumanoidEnv):
    speed_weight = 1.25
    action_weight = 0.1
    alive_bonus = 5.0
    reward_text = "1.25 * dir * vx - 0.1 sum ctrl^2 + 5"
    termination_text = "torso height outside (1, 2) m"
    gymnasium_kwargs = {
        "include_cinert_in_observation": False,
        "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False,
        "include_cfrc_ext_in_observation": False,
    }

    @staticmethod
    def terminated_fn(next_obs):
        z = next_obs[..., 0]
        return (z <= 1.0) | (z >= 2.0)

    def x_position(self):
        mass = self.model.body_mass
        return mass.dot(self.data.xipos[:, 0]) / mass.sum()  # of the centre of mass


# ------------------------------------------------------------------------------------- wrappers


SELF_RESETS = [getattr(mujoco.mjtWarning, f"mjWARN_BAD{kind}") for kind in ("QPOS", "QVEL", "QACC")]


class FaultGuard(gym.Wrapper):
    """Ends the episode when the simulator fails, so that no bad number reaches the agent.

    A fault is a non-finite observation or reward, MuJoCo resetting itself after instability, or
    what the env itself calls one: a true info["fault"]. Then step returns the previous observation,
    reward 0, terminated False, truncated True and info["fault"] = the reason. The caller drops that
    transition, counts it, and resets.
    """

    def __init__(self, env):
        super().__init__(env)
        self.name = env.spec.id if env.spec else str(env)
        self.foreseen = terminated_fn(env)
        self.no_rule = "its terminated_fn did not say so" if termination_known(env) else (
            "it has no terminated_fn")

    def reset(self, *, seed=None, options=None):
        self.last_obs, info = self.env.reset(seed=seed, options=options)
        if not np.isfinite(self.last_obs).all():
            raise EnvError(f"{self.name}: reset returned a non-finite observation")
        # Live views of MuJoCo's counters, of the simulation as it is now: an env may load it anew.
        data = getattr(self.env.unwrapped, "data", None)
        kinds = SELF_RESETS if isinstance(data, mujoco.MjData) else ()
        self.counters = [data.warning[kind] for kind in kinds]
        self.self_resets = self.count_self_resets()
        return self.last_obs, info

    def count_self_resets(self):
        return sum(counter.number for counter in self.counters)

    def step(self, action):
        # A copy: an env that changes the array it is given would change the data of the agent.
        obs, reward, terminated, truncated, info = self.env.step(np.array(action))
        fault = info.pop("fault", None)
        if fault:
            fault = str(fault)
        elif not abs(reward) <= FLOAT32_MAX:  # as which it is stored; NaN is not <= either
            fault = "non-finite reward"
        elif not np.isfinite(obs).all():
            fault = "non-finite observation"
        elif self.count_self_resets() > self.self_resets:
            fault = "MuJoCo reset itself after instability"
        else:
            foreseen = self.foreseen(obs[None])[0]
            if terminated and not foreseen:
                say_once(f"{self.name} terminated, but {self.no_rule}: imagined branches will not "
                         "end where episodes do")
            elif foreseen and not terminated:
                say_once(f"{self.name} did not terminate where its terminated_fn says that it "
                         "does: imagined branches end where episodes go on")
            self.last_obs = obs
            return obs, reward, terminated, truncated, info
        info["fault"] = fault
        return self.last_obs, 0.0, False, True, info


@functools.cache
def say_once(message):
    """A line on the screen, also beside a progress bar, and not again from evaluation's workers."""
    if multiprocessing.parent_process() is None:
        tqdm.write(f"note         {message}")


class TaskObservation(gym.Wrapper):
    """Appends the task of the next step to the observation: an upper bound, not a contestant.

    Where info has no "next_task", its "task" must be the one that holds for the next step.
    """

    def __init__(self, env, task_dim, limit):
        super().__init__(env)
        self.task_dim = task_dim
        if termination_known(env):
            rule, O = terminated_fn(env), env.observation_space.shape[0]
            self.terminated_fn = lambda next_obs: rule(next_obs[..., :O])  # the task stands behind
        space, ends = env.observation_space, np.full(task_dim, limit, np.float32)
        self.observation_space = Box(
            np.concatenate((space.low, -ends)), np.concatenate((space.high, ends)), dtype=np.float32
        )

    def shown(self, obs, info):
        task = np.atleast_1d(np.asarray(info.get("next_task", info.get("task")), np.float32))
        if len(task) != self.task_dim:
            raise EnvError(f"{self.env.name}: info says a task of {len(task)} numbers, where the "
                           f"first had {self.task_dim}")
        return np.concatenate((obs, task))

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.shown(obs, info), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.shown(obs, info), reward, terminated, truncated, info


# ------------------------------------------------------------------------- making and inspecting


def seeds(run_seed, stream, index, n=1):
    """n env seeds. Streams (0 training, 1 evaluation, 2 play.py, 3 to 5 diagnostics) and indices
    never meet."""
    return [int(s) for s in np.random.SeedSequence([run_seed, stream, index]).generate_state(n)]


CLASSES = {
    "point-fwd-bwd": PointFwdBwd,
    "halfcheetah-fwd-bwd": HalfCheetahFwdBwd,
    "halfcheetah-pier": HalfCheetahPier,
    "ant-fwd-bwd": AntFwdBwd,
    "ant-crippled-leg": AntCrippledLeg,
    "walker2d-randomparams": Walker2dRandomParams,
    "humanoid-direc": HumanoidDirec,
}
ENVS = {name: f"M3PO/{env_class.__name__}-v0" for name, env_class in CLASSES.items()}

for name, env_class in CLASSES.items():
    if ENVS[name] not in gym.registry:
        gym.register(
            ENVS[name],
            entry_point=env_class,
            max_episode_steps=100 if env_class is PointFwdBwd else 1_000,
            order_enforce=False,
            disable_env_checker=True,
        )


def make(name, switch_every=None, oracle=False, render_mode=None):
    """The env `name`, with actions in Box(-1, 1, (A,), float32) and obs in Box((O,), float32).

    name          a key of ENVS, a registered Gymnasium id, or "module:Id-v0" for your own env
    switch_every  env steps between two draws of the task; None is the env's default
    oracle        show the task to the agent, as TaskObservation does
    Raises EnvError, with one line, for what does not exist or cannot be used, and whatever the own
    code of an env raises.
    """
    kwargs = {} if render_mode is None else {"render_mode": render_mode}
    ours = name in ENVS or name in ENVS.values()
    if not ours and switch_every is not None:
        raise EnvError(f"{name}: switch_every is only for {', '.join(ENVS)}")
    if switch_every is not None:
        kwargs["switch_every"] = switch_every
    with own_code(name, "making it"):
        loaded = set(sys.modules)
        try:
            if not isinstance(name, str) or name.count(":") > 1:
                raise gym.error.Error("no such name")
            env = gym.make(ENVS.get(name, name), disable_env_checker=True, **kwargs)
        except (gym.error.Error, ModuleNotFoundError) as error:
            valid = ", ".join(ENVS) + ", or module:Id-v0"
            reason = why_not(name, error, loaded)
            raise EnvError(f"cannot make env {name!r}; valid: {valid} ({reason})") from error
    if ours:
        task_dim, limit = env.unwrapped.task_dim, 1.0
    else:
        task_dim, limit = check_env(name, env, oracle), math.inf
        # Some envs return float64 whatever their space says, or an array that they change later.
        flat = Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        env = TransformObservation(env, lambda obs: np.array(obs, np.float32), flat)
        if not is_limited(env):  # else evaluation might never end
            env = TimeLimit(env, time_limit(env) or 1_000)
    bounds = env.action_space
    env = FaultGuard(with_unit_actions(env))
    env.action_bounds = bounds  # what -1 and 1 stand for, after an own env's wrappers
    return TaskObservation(env, task_dim, limit) if oracle else env


def is_limited(env):
    """Whether a wrapper ends its episodes; an env that only has a limit may not keep to it."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            return True
        env = env.env
    return False


def time_limit(env):
    """Env steps after which an episode is truncated; None if nothing says."""
    has = env.has_wrapper_attr("_max_episode_steps")
    return env.get_wrapper_attr("_max_episode_steps") if has else None


def with_unit_actions(env):
    """Takes actions in [-1, 1], where the env does not yet.

    By hand, because Gymnasium's RescaleAction rounds past the bounds and keeps a float64 space.
    """
    space = env.action_space
    unit = Box(-1.0, 1.0, space.shape, np.float32)
    if space == unit:
        return env

    def rescale(action):
        fraction = (action + 1.0) / 2.0  # exact at both ends; clipped, for rounding in between
        action = (1.0 - fraction) * space.low + fraction * space.high
        return np.clip(action, space.low, space.high, dtype=space.dtype)

    return TransformAction(env, rescale, unit)


def termination_known(env):
    """Whether the env says for any next observation if the episode ends there."""
    return env.has_wrapper_attr("terminated_fn")


def terminated_fn(env):
    """The env's rule as a function for model rollouts: next_obs [..., O] -> bool [...].

    Takes torch tensors and NumPy arrays. Without a rule of the env's, no state is terminal.
    """
    return env.get_wrapper_attr("terminated_fn") if termination_known(env) else never
