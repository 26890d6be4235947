r"""A pendulum whose torque has a hidden sign: what must be told apart is in the dynamics.

    python m3po.py --env examples.pendulum:PendulumSign-v0 --N 16 --E 500 --M 200 --G 10 --L 5 \
        --width 64 --warmup 1000 --k 1 --model-updates 4

Gymnasium's Pendulum, but every 50 env steps the motor's wires are swapped or not, with equal
chances. The rewards are those of a pendulum, whatever the sign; only how the speed answers to the
last torques tells it. A reward is a tenth of Gymnasium's, so that Q stays small. --oracle shows the
sign.
"""

import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from envs import TaskClock, draw_direction


class PendulumSign(PendulumEnv):
    switch_every = 50  # env steps; evaluation reads it

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.clock = TaskClock(draw_direction, self.switch_every)

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        self.clock.reset(self.np_random)
        return obs, self.clock.reset_info()

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(self.clock.task * action)
        return obs, 0.1 * float(reward), terminated, truncated, self.clock.step(self.np_random)


gym.register("PendulumSign-v0", entry_point=PendulumSign, max_episode_steps=200)
