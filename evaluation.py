"""Evaluation: fresh episodes under the mean action, and how fast the agent adapts in them.

Adapting is nothing but tokens entering the window: no gradient, no task id. The episodes run side
by side, so that the policy sees one batch per time step; in training they are dealt to several
processes.
"""

import ctypes
import functools
import math
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import Finalize

import numpy as np
import torch
from tqdm import tqdm

import envs
from env_checks import ADAPTING
from rollouts import LiveHistory

METRICS = ("reward", *ADAPTING, "fault")  # of a step; fault is 1 where the simulator failed
BAR_AFTER = 5  # seconds for which an evaluation runs without one on a terminal
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


class Group:
    """n envs, each for one episode at a time."""

    def __init__(self, members):
        self.envs = members

    def reset(self, env_seeds):
        """Starts one env per seed, at most as many as there are; the first observations [n, O]."""
        self.obs = np.stack([env.reset(seed=s)[0] for env, s in zip(self.envs, env_seeds)])
        self.running = np.ones(len(self.obs), bool)
        return self.obs

    def step(self, actions):
        """One step of every env that still runs: obs [n, O], METRICS [5, n] (NaN where an env does
        not run or does not say), running [n]."""
        metrics = [(math.nan,) * len(METRICS)] * len(self.obs)
        for i in self.running.nonzero()[0]:
            self.obs[i], reward, terminated, truncated, info = self.envs[i].step(actions[i])
            metrics[i] = reward, *(info.get(name, math.nan) for name in ADAPTING), "fault" in info
            self.running[i] = not (terminated or truncated)
        return self.obs, np.array(metrics, float).T, self.running

    def close(self):
        for env in self.envs:
            env.close()


@torch.inference_mode()
def evaluate(policy, group, env_seeds, L, show=False):
    """One fresh episode per seed with the mean action of a policy on the CPU, all as one batch.
    show: with a progress bar, on a terminal and where it takes long.

    Returns METRICS as arrays [T, n], NaN past an episode's end.
    """
    obs = group.reset(env_seeds)
    history = LiveHistory(len(obs), L, obs.shape[1] + policy.act_dim + 1)
    running, log = np.ones(len(obs), bool), []
    with tqdm(total=envs.time_limit(group.envs[0]) if show else None, desc="evaluation",
              unit="step", leave=False, delay=BAR_AFTER, dynamic_ncols=True,
              disable=None if show else True) as bar:
        while running.any():
            obs_t = torch.tensor(obs)  # a copy: the group writes to its own
            action_t = policy.act(history.tokens, history.mask, obs_t, deterministic=True)
            obs, metrics, running = group.step(action_t.numpy())
            log.append(metrics)
            reward_t = torch.tensor(np.nan_to_num(metrics[0]), dtype=torch.float32)
            history.append(obs_t, action_t, reward_t)
            bar.update()
    return dict(zip(METRICS, np.array(log).swapaxes(0, 1)))


class Player:
    """Some of an evaluation's envs, and a copy of the policy to play them with."""

    def __init__(self, make_env, make_policy, n, L):
        self.group, self.policy, self.L = Group([make_env() for _ in range(n)]), make_policy(), L

    def play(self, weights, env_seeds, show=False):
        self.policy.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()},
                                    strict=False)  # Q does not act
        return evaluate(self.policy, self.group, env_seeds, self.L, show)


class Players:
    """The envs of an evaluation dealt to `workers` processes on as many cores; the first is this
    process, which would only wait otherwise.

    Each plays its episodes from beginning to end with a copy of the policy on the CPU: processes
    that met at every step to share one batch would spend more time on waiting for each other than a
    smaller batch costs. The last bits of a batched matmul depend on its size, and so on `workers`;
    and a planner of baselines/ draws the same noise in each process, for its share of the episodes.
    """

    def __init__(self, make_env, make_policy, n, workers, L):
        if not can_fork() or multiprocessing.current_process().daemon:
            workers = 1  # a process of somebody's pool may have none of its own
        self.workers = max(1, min(workers, n // 2))
        self.parts = np.array_split(np.arange(n), self.workers)
        how = make_env, make_policy, len(self.parts[0]), L  # no part is larger than the first
        self.own, self.pool, self.processes = Player(*how), None, []
        if self.workers > 1:
            context = multiprocessing.get_context("fork")  # at once, and nothing has to be pickled
            # A core each, or the kernel wakes a worker on the sender's. Other runs begin elsewhere.
            cores, queue = sorted(os.sched_getaffinity(0)), context.SimpleQueue()
            for worker in range(1, self.workers):
                queue.put(cores[(os.getpid() + worker) % len(cores)])
            self.pool = ProcessPoolExecutor(self.workers - 1, context, start_worker,
                                            (os.getpid(), queue, how))
            before = multiprocessing.active_children()
            self.pool.submit(os.getpid)  # forks all workers, now
            self.processes = [p for p in multiprocessing.active_children() if p not in before]
        self.close = weakref.finalize(self, close, self.own.group, self.pool, self.processes)

    def evaluate(self, policy, env_seeds):
        """`evaluate` of a policy on any device, in all processes at the same time."""
        weights = {name: w.numpy(force=True) for name, w in policy.state_dict().items()
                   if "qf" not in name}
        own, *others = [env_seeds[part[0]:part[-1] + 1] for part in self.parts]
        threads = torch.get_num_threads()
        if self.workers > 1:  # torch's own threads would spin on the cores that the others need
            torch.set_num_threads(1)
        try:
            futures = [self.pool.submit(play, weights, share) for share in others]
            parts = [self.own.play(weights, own, show=True),
                     *(future.result() for future in futures)]
        except BrokenProcessPool:
            self.close()
            raise OSError("a process that plays evaluation's episodes died") from None
        except BaseException:
            self.close()  # nobody waits for the others any more
            raise
        finally:
            torch.set_num_threads(threads)
        T = max(len(part["reward"]) for part in parts)
        longer = lambda x: np.pad(x, ((0, T - len(x)), (0, 0)), constant_values=math.nan)
        return {name: np.concatenate([longer(part[name]) for part in parts], 1) for name in METRICS}


def can_fork():
    """Whether workers can be forked, kept to a core and made to end with this process: on Linux."""
    return (hasattr(os, "fork") and hasattr(os, "sched_setaffinity")
            and hasattr(ctypes.CDLL(None), "prctl"))


def start_worker(parent, cores, how):
    """Begins a worker's life, which ends when the pool is shut down or its parent dies."""
    global player
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process gets them too, and ends us
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was already dead
        os.kill(os.getpid(), signal.SIGKILL)
    os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)

    @functools.cache  # made in the first evaluation, where an error of the env is that of a future
    def player():
        made = Player(*how)
        Finalize(made, made.group.close, exitpriority=0)  # at this process's end
        return made


def play(weights, env_seeds):
    """A worker's part of an evaluation."""
    try:
        return player().play(weights, env_seeds)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # what cannot be sent says in words what it was
            raise RuntimeError(repr(error)) from error
        raise


def close(group, pool, processes):
    """Closes the envs, also in the workers, who have a second for it; who still plays is killed."""
    group.close()
    if pool:
        pool.shutdown(wait=False)
    deadline = time.monotonic() + 1
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        while process.is_alive():  # join may return too early: the pool joins it too
            time.sleep(0.001)


def period(env):
    """Env steps between switches; 100 where the env does not say."""
    return getattr(env.unwrapped, "switch_every", None) or 100


def early_steps(env):
    """How many steps after a switch count as adapting: 50, or half a shorter period."""
    return min(50, period(env) // 2)


def summarise(episodes, gamma, early):
    """Returns and lengths per episode, and how fast the agent adapts, from evaluate's arrays: the
    reward per step in the first `early` steps after a switch against the rest, in which the
    beginnings of episodes are, too."""
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


def span(env):
    """The steps from a switch at which reward is looked at: an array with 0 at the switch."""
    T = period(env)
    return np.arange(-20, 61) if T >= 100 else np.arange(-math.ceil(T / 5), T + 1)


def around_switches(episodes, x):
    """Reward [switches, X] at steps x [X] from each switch of evaluate's arrays, NaN where neither
    the task before it nor the one after it holds; and [(episode, step)] of the switches."""
    T, rows, places = len(episodes["reward"]), [], []
    for i, (reward, switched) in enumerate(zip(episodes["reward"].T, episodes["switched"].T)):
        edges = [0, *np.flatnonzero(switched == 1), T]
        for last, s, following in zip(edges[:-2], edges[1:-1], edges[2:]):
            same_pair = (s + x >= last) & (s + x < following)
            rows.append(np.where(same_pair, reward[(s + x).clip(0, T - 1)], np.nan))
            places.append((i, int(s)))
    return np.array(rows), places
