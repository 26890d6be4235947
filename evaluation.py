"""Evaluation: fresh episodes under the mean action, and how fast the agent adapts in them.

Adapting is nothing but tokens entering the window: no gradient, no task id. The episodes run side by
side, so that the policy sees one batch per time step; in training they are dealt to several processes.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import time
import traceback
from contextlib import contextmanager
from multiprocessing.util import Finalize

import numpy as np
import torch

from rollouts import LiveHistory

SEEN = ("steps_since_switch", "switched", "right_way")  # of info, where the env has them
FOUND = ("reward", *SEEN, "fault")  # of a step; fault is 1 where the simulator failed


class Group:
    """n envs, each for one episode at a time."""

    def __init__(self, envs):
        self.envs = envs

    def reset(self, env_seeds):
        """The first observations [n, O]."""
        self.obs = np.stack([env.reset(seed=s)[0] for env, s in zip(self.envs, env_seeds)])
        self.running = np.ones(len(self.envs), bool)
        return self.obs

    def step(self, actions):
        """One step of every env that still runs: obs [n, O], FOUND [5, n] (NaN where an env does
        not run or does not say), running [n]."""
        found = [(math.nan,) * len(FOUND)] * len(self.envs)
        for i in self.running.nonzero()[0]:
            self.obs[i], reward, terminated, truncated, info = self.envs[i].step(actions[i])
            found[i] = reward, *(info.get(name, math.nan) for name in SEEN), "fault" in info
            self.running[i] = not (terminated or truncated)
        return self.obs, np.array(found, float).T, self.running

    def close(self):
        for env in self.envs:
            env.close()


@torch.inference_mode()
def evaluate(policy, group, env_seeds, L):
    """One fresh episode per env of the group with the mean action of a policy on the CPU, all as one
    batch.

    Returns FOUND as arrays [T, n], NaN past an episode's end.
    """
    obs = group.reset(env_seeds)
    history = LiveHistory(len(obs), L, obs.shape[1] + policy.act_dim + 1)
    running, log = np.ones(len(obs), bool), []
    while running.any():
        obs_t = torch.tensor(obs)  # a copy: the group writes to its own
        action_t = policy.act(history.tokens, history.mask, obs_t, deterministic=True)
        obs, found, running = group.step(action_t.numpy())
        log.append(found)
        history.append(obs_t, action_t, torch.tensor(np.nan_to_num(found[0]), dtype=torch.float32))
    return dict(zip(FOUND, np.array(log).swapaxes(0, 1)))


class Player:
    """Some of an evaluation's envs, and a copy of the policy to play them with."""

    def __init__(self, make_env, make_policy, n, L):
        self.group, self.policy, self.L = Group([make_env() for _ in range(n)]), make_policy(), L

    def play(self, weights, env_seeds):
        self.policy.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()},
                                    strict=False)  # Q does not act
        return evaluate(self.policy, self.group, env_seeds, self.L)


class Players:
    """The envs of an evaluation dealt to `workers` processes on as many cores; the first is this
    process, which would only wait otherwise.

    Each plays its episodes from beginning to end with a copy of the policy on the CPU: processes
    that met at every step to share one batch would spend more time on waiting for each other than a
    smaller batch costs. The last bits of a batched matmul depend on its size, and so on `workers`.
    """

    def __init__(self, make_env, make_policy, n, workers, L):
        if not hasattr(os, "sched_setaffinity") or multiprocessing.current_process().daemon:
            workers = 1  # not Linux; a process of somebody's pool may have none of its own
        self.workers = max(1, min(workers, n // 2))
        self.parts = np.array_split(np.arange(n), self.workers)
        self.own = Player(make_env, make_policy, len(self.parts[0]), L)
        self.pipes, self.processes = [], []
        # At exit, before multiprocessing waits for its processes: they end when their pipe does.
        self.close = Finalize(self, close_players, (self.own, self.pipes, self.processes),
                              exitpriority=10)
        context = multiprocessing.get_context("fork")  # at once, and nothing has to be pickled
        for worker, part in enumerate(self.parts[1:], 1):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            job = (ours, theirs, worker, make_env, make_policy, len(part), L)
            self.processes.append(context.Process(target=serve, args=job, daemon=True))
            self.processes[-1].start()
            theirs.close()

    def evaluate(self, policy, env_seeds):
        """`evaluate` of a policy on any device, in all processes at the same time."""
        weights = {name: w.numpy(force=True) for name, w in policy.state_dict().items()
                   if not name.startswith("qf")}
        shares = [env_seeds[part[0]:part[-1] + 1] for part in self.parts]
        threads = torch.get_num_threads()
        if self.workers > 1:  # torch's own threads would spin on the cores that the others need
            torch.set_num_threads(1)
        try:
            with reaching_workers():
                for pipe, share in zip(self.pipes, shares[1:]):
                    pipe.send((weights, share))
            found = [self.own.play(weights, shares[0])]
            with reaching_workers():
                found += [pipe.recv() for pipe in self.pipes]
        except BaseException:
            self.close()  # answers that nobody waits for any more would pass for those of the next
            raise
        finally:
            torch.set_num_threads(threads)
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        T = max(len(part["reward"]) for part in found)
        longer = lambda x: np.pad(x, ((0, T - len(x)), (0, 0)), constant_values=math.nan)
        return {name: np.concatenate([longer(part[name]) for part in found], 1) for name in FOUND}


@contextmanager
def reaching_workers():
    try:
        yield
    except (EOFError, ConnectionError):
        raise OSError("a process that plays evaluation's episodes died") from None


def close_players(own, pipes, processes):
    own.group.close()
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + 1  # for all together to close their envs; who still plays is killed
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()


def serve(ours, theirs, worker, *own):
    """A worker: plays what its pipe asks for until that closes, or the process that asks is killed."""
    ours.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process gets them too, and closes us
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: what comes when our parent dies
    # Else the kernel wakes a worker on the sender's core. Other runs begin at another core.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(os.getppid() + worker) % len(cores)]})
    torch.set_num_threads(1)
    player = None
    try:
        while True:
            asked = theirs.recv()
            try:
                player = player or Player(*own)
                answer = player.play(*asked)
            except (OSError, ValueError, MemoryError) as error:  # the env's own: one line says it
                answer = error
            except Exception as error:
                answer = RuntimeError(f"{error!r} in a process of evaluation:\n{traceback.format_exc()}")
            theirs.send(answer)
    except (EOFError, ConnectionError):
        if player:
            player.group.close()


def early_steps(env):
    """How many steps after a switch count as adapting: 50, or half a period where that is shorter."""
    return min(50, (getattr(env.unwrapped, "switch_every", None) or 100) // 2)


def summarise(episodes, gamma, early):
    """Returns and lengths per episode, and how fast the agent adapts, from evaluate's arrays: the
    reward per step in the first `early` steps after a switch against the rest."""
    reward = episodes["reward"]
    discount = gamma ** np.arange(len(reward))[:, None]
    returns = np.nansum(reward, 0)
    lengths = np.isfinite(reward).sum(0)
    # Time since a real switch; the start of an episode is not one.
    after = np.cumsum(np.nan_to_num(episodes["switched"]), 0) > 0
    just_after = after & (episodes["steps_since_switch"] < early)
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return returns, lengths, {
        "eval_return_mean": float(returns.mean()), "eval_return_std": float(returns.std()),
        "eval_length_mean": float(lengths.mean()),
        "eval_discounted_return": float(np.nansum(discount * reward, 0).mean()),
        "eval_reward_after_switch": mean(np.where(just_after, reward, np.nan)),
        "eval_reward_otherwise": mean(np.where(just_after, np.nan, reward)),
        "eval_right_way": mean(episodes["right_way"]),
        "eval_faults": int(np.nansum(episodes["fault"])),
    }
