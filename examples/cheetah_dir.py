"""The setting in which PEARL was published, for checks against public numbers: episodes of 200 env
steps, and a half-cheetah whose hidden direction is drawn once for each.

    python -m baselines.pearl --env examples.cheetah_dir:CheetahDir-v0 --N 20 --G 10 --width 128

As an own env it has no --angles of its own: nets read its pitch as it is, if not told --angles 1.
"""

import gymnasium as gym

from envs import HalfCheetahFwdBwd


class CheetahDir(HalfCheetahFwdBwd):
    switch_every = None  # no switch within an episode


gym.register("CheetahDir-v0", entry_point=CheetahDir, max_episode_steps=200)
