"""Whether an agent that earns little has fallen or goes the wrong way: a half-cheetah's evaluation
episodes, its steps on the back apart from the others.

    python -m results.upright RUN [RUN ...]        # run folders, or agents/halfcheetah-fwd-bwd

Twenty fresh episodes each, whose seeds no evaluation in training has.
"""

import math
import sys

import gymnasium as gym
import numpy as np

import m3po
import play
from evaluation import Group, evaluate

EPISODES, PITCH = 20, 1  # PITCH: a dim of the observation


class Fallen(gym.Wrapper):
    """Notes for each step whether it ended on the back."""

    def reset(self, **options):
        self.fallen = []
        return self.env.reset(**options)

    def step(self, action):
        result = self.env.step(action)
        self.fallen.append(math.cos(result[0][PITCH]) < 0)  # more than 90 degrees off
        return result


def measure(folder):
    """Mean return, its standard deviation, share of steps on the back, and of the other steps the
    reward and the share that goes the right way."""
    policy, _, _, args = play.load(folder)
    envs = [Fallen(m3po.make_env(args)) for _ in range(EPISODES)]
    episodes = evaluate(policy, Group(envs), range(900, 900 + EPISODES), args.L)
    fallen = np.array([env.fallen for env in envs]).T
    reward, right = episodes["reward"], episodes["right_way"]
    returns = reward.sum(0)
    return (returns.mean(), returns.std(), fallen.mean(), reward[~fallen].mean(),
            np.nanmean(right[~fallen]))


if __name__ == "__main__":
    print("| agent | return | standard deviation | on the back | else: reward per step "
          "| right way |\n|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        print("| {} | {:.0f} | {:.0f} | {:.2f} | {:.2f} | {:.2f} |".format(name, *measure(name)))
