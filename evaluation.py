"""Evaluation: fresh episodes under the mean action, and how fast the agent adapts in them.

Adapting is nothing but tokens entering the window: no gradient, no task id. All episodes run side
by side, so that the policy sees one batch per time step; the envs step on several CPU cores at once.
"""

import math
import multiprocessing
import os
import signal
import traceback
from multiprocessing.util import Finalize

import numpy as np
import torch

from rollouts import LiveHistory

SEEN = ("steps_since_switch", "switched", "right_way")  # of info, where the env has them
FOUND = ("reward", *SEEN, "fault")  # of a step; fault is 1 where the simulator failed


class Group:
    """n envs in this process, each for one episode at a time."""

    workers = 1

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


class Workers:
    """A Group whose envs are dealt to `workers` processes, which step them at the same time; the
    first of them is this process, which would only wait otherwise."""

    def __init__(self, make_env, n, workers):
        context = multiprocessing.get_context("fork")  # at once, and nothing has to be pickled
        self.workers, self.parts = workers, np.array_split(np.arange(n), workers)
        self.pipes, self.processes = [], []
        for worker, part in enumerate(self.parts[1:], 1):
            ours, theirs = context.Pipe()
            job = (ours, theirs, make_env, len(part), worker)
            self.processes.append(context.Process(target=serve, args=job, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        self.own = Group([make_env() for _ in self.parts[0]])
        # At exit, before multiprocessing waits for its processes: they end when their pipe does.
        self.close = Finalize(self, close_workers, (self.own, self.pipes, self.processes),
                              exitpriority=10)

    def ask(self, verb, values):
        """Calls the verb in every process with its share of values; the answers in their order."""
        shares = [values[part[0]:part[-1] + 1] for part in self.parts]
        try:
            for pipe, share in zip(self.pipes, shares[1:]):
                pipe.send((verb, share))
            answers = [getattr(self.own, verb)(shares[0])] + [pipe.recv() for pipe in self.pipes]
        except (EOFError, ConnectionError):
            raise OSError("a process that steps evaluation's envs died") from None
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def reset(self, env_seeds):
        return np.concatenate(self.ask("reset", env_seeds))

    def step(self, actions):
        obs, found, running = zip(*self.ask("step", actions))
        return np.concatenate(obs), np.concatenate(found, 1), np.concatenate(running)


def close_workers(own, pipes, processes):
    own.close()
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join()


def serve(ours, theirs, make_env, n, worker):
    """A worker: does what its pipe asks until that closes, also by the death of who asks."""
    ours.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process gets them too, and closes us
        signal.signal(number, signal.SIG_IGN)
    # Else the kernel wakes a worker on the sender's core. Other runs begin at another core.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(os.getppid() + worker) % len(cores)]})
    group = None
    try:
        while True:
            verb, value = theirs.recv()
            try:
                group = group or Group([make_env() for _ in range(n)])
                answer = getattr(group, verb)(value)
            except Exception:
                answer = RuntimeError(f"in a process of evaluation:\n{traceback.format_exc()}")
            theirs.send(answer)
    except (EOFError, ConnectionError):
        if group:
            group.close()


def make_group(make_env, n, workers):
    """n envs; on Linux dealt to `workers` processes, if each gets eight or more: for fewer, messages
    cost more than is won."""
    workers = min(workers, n // 8)
    if workers < 2 or not hasattr(os, "sched_setaffinity") or multiprocessing.current_process().daemon:
        return Group([make_env() for _ in range(n)])
    return Workers(make_env, n, workers)


def evaluate(policy, group, env_seeds, L, device):
    """One fresh episode per env of the group with the mean action, all as one batch.

    Returns FOUND as arrays [T, n], NaN past an episode's end.
    """
    threads = torch.get_num_threads()
    if group.workers > 1:  # torch's own threads would spin on the cores that the workers need
        torch.set_num_threads(1)
    try:
        obs = group.reset(env_seeds)
        history = LiveHistory(len(obs), L, obs.shape[1] + policy.act_dim + 1, device)
        running, log = np.ones(len(obs), bool), []
        while running.any():
            obs_t = torch.tensor(obs, device=device)  # a copy: the group writes to its own
            action_t = policy.act(history.tokens, history.mask, obs_t, deterministic=True)
            obs, found, running = group.step(action_t.cpu().numpy())
            log.append(found)
            rewards = torch.tensor(np.nan_to_num(found[0]), dtype=torch.float32, device=device)
            history.append(obs_t, action_t, rewards)
    finally:
        torch.set_num_threads(threads)
    return dict(zip(FOUND, np.stack(log, 1)))


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
