"""How near the hot loop is to what this machine can do: each part beside its own floor.

    python bench.py                    # halfcheetah-fwd-bwd at Table 2's sizes, about five minutes
    python bench.py --env ant-fwd-bwd --threads 1

The floor of a policy update, a model rollout or a model fit is the matrix products it needs,
forward and backward, into memory that is already there, and nothing else. The floor of an env step
and of an evaluation is `mj_step` alone. All jobs of a table run in turns, so that whatever else the
machine does meets them alike; times are medians.
"""

import argparse
import copy
import resource
import statistics
import time
from contextlib import closing

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from tqdm import tqdm

import envs
import m3po
from evaluation import Group, evaluate
from rollouts import EnvBuffer, ModelBuffer

ROWS = 10_000  # real steps in D_env


def medians(jobs, repeats, device):
    """Median seconds of each of jobs {name: function}, which run in turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # compiles, allocates, fills caches
        for job in jobs.values():
            job()
    times = {name: [] for name in jobs}
    for _ in tqdm(range(repeats), leave=False, disable=None):
        for name, job in jobs.items():
            wait()
            start = time.perf_counter()
            job()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def show(title, times, floor, unit, count):
    """One row per job: time per unit, units per second, and how many floors it takes."""
    print(f"\n{title:44} {'ms / ' + unit:>16} {unit + 's / s':>16} {'x floor':>8}")
    for name, seconds in times.items():
        print(f"  {name:42} {seconds / count * 1e3:16.4f} {count / seconds:16,.0f} "
              f"{seconds / times[floor]:8.2f}", flush=True)


# ---- matrix products ----------------------------------------------------------------------------


def products(net, B, L, backward=None):
    """The matrix products (a, b, out) of one pass of B rows through a HistoryNet.

    backward: None, "inputs" (what reaches x and z; the weights are frozen) or "all".
    """
    device = net.w[0].device
    new = lambda *shape: torch.randn(shape, device=device)
    pairs = []
    for w in net.w:
        E, i, o = w.shape
        x, y, w = new(E, B, i), new(E, B, o), new(E, i, o)
        pairs += [(x, w)] + [(y, w.mT)] * (backward is not None) + [(x.mT, y)] * (backward == "all")
    if net.token_dim:
        E, D, H3 = net.w_x.shape
        H = net.z_dim
        tokens, gates, w_x = new(E, L * B, D), new(E, L * B, H3), new(E, D, H3)
        h, step, w_h = new(E, B, H), new(E, B, H3), new(E, H, H3)
        pairs += [(tokens, w_x)] + [(h, w_h)] * L
        if backward == "all":  # the products with h for the gradient of w_h: all steps at once
            pairs += [(step, w_h.mT)] * L + [(tokens.mT, gates), (new(E, L * B, H).mT, gates)]
    return [(a, b, new(len(a), a.shape[1], b.shape[2])) for a, b in pairs]


def multiply(jobs):
    for a, b, out in jobs:
        torch.bmm(a, b, out=out)


def update_products(policy, B, L):
    """Those of `MetaPolicy.update`: critic_loss, then actor_loss."""
    critic = [*products(policy.actor, B, L), *products(policy.qf_target, B, L),
              *products(policy.qf, B, L, "all")]
    actor = [*products(policy.actor, B, L, "all"), *products(policy.qf, B, 0, "inputs"),
             *products(policy.qf, B, L)[len(policy.qf.w):]]  # Q's own encoding of h
    return critic + actor


def bench_nets(args, env, device):
    """Policy updates, model rollouts and model fits on made-up data of the env's sizes."""
    flags, _, _ = m3po.parse_args(["--env", args.env, "--out", "runs/bench"])
    policy, model = m3po.build(flags, env, device)
    O, A, L, B, G, M = (policy.obs_dim, policy.act_dim, flags.L, flags.batch_size, flags.G, flags.M)
    D_env = EnvBuffer(ROWS, O, A, L, device)
    data = torch.randn(ROWS, 2 * O + A + 1)
    for t, row in enumerate(data):
        D_env.add(row[:O], row[O:O + A].clamp(-1, 1), row[-1], row[O + A:-1], False, t % 1000 == 999)
    model.update_statistics(D_env)
    policy.use_statistics(model)
    D_model = ModelBuffer(D_env, M, flags.k, flags.retain, envs.termination_fn(env))
    D_model.rollout(policy, model)

    def updates(policy):
        noise = torch.randn(G, 2, B, A, device=device)
        for batch, n in zip(m3po.sample_batches(D_model, D_env, 1.0, G, B), noise):
            policy.update(batch, n)

    def rollouts(policy, model):
        for _ in range(10):
            D_model.rollout(policy, model)

    modes = {"eager": (policy, model)}
    if m3po.compiler_works():
        modes["compiled"] = copy.deepcopy(policy), copy.deepcopy(model)
        m3po.compile_all(*modes["compiled"])
    floor = update_products(policy, B, L)
    jobs = {"floor: its matrix products": lambda: [multiply(floor) for _ in range(G)]}
    jobs |= {f"{name}, sampling included": lambda p=p: updates(p) for name, (p, _) in modes.items()}
    show(f"policy update, batch {B}, width {flags.width}, L {L}",
         medians(jobs, args.repeats, device), "floor: its matrix products", "update", G)

    members = -(-M // model.elites)
    step = products(policy.actor, M, L) + products(model.net, members, L)
    jobs = {"floor: its matrix products": lambda: [multiply(step) for _ in range(10 * flags.k)]}
    jobs |= {name: lambda both=both: rollouts(*both) for name, both in modes.items()}
    show(f"model rollouts, M {M}, k {flags.k}", medians(jobs, args.repeats, device),
         "floor: its matrix products", "imagined step", 10 * M * flags.k)

    train, held = len(D_env.rows(holdout=False)), len(D_env.rows(holdout=True))
    passes, batches = 5, -(-train // flags.model_batch)
    one_step = products(model.net, flags.model_batch, L, "all")
    look = products(model.net, held, L)  # validation, before and after each pass
    jobs = {"floor: its matrix products":
            lambda: [multiply(one_step) for _ in range(passes * batches)] + [
                multiply(look) for _ in range(passes + 1)]}

    def fit(model):
        model.max_passes, model.patience = passes, passes + 1
        model.fit(D_env)

    jobs |= {name: lambda m=m: fit(m) for name, (_, m) in modes.items()}
    show(f"model fit, {len(model.min_logvar)} members, validation included",
         medians(jobs, max(3, args.repeats // 4), device), "floor: its matrix products", "row",
         passes * train * len(model.min_logvar))


# ---- the simulator ------------------------------------------------------------------------------


def plain_env(name):
    """Gymnasium's own env with its usual wrappers, on the same compiled model as ours."""
    ours = envs.CLASSES[name]
    theirs = next(c for c in ours.__mro__ if c.__module__.startswith("gymnasium"))
    same_model = {"edit_spec": ours.edit_spec,
                  "_initialize_simulation": envs.HiddenTaskMujoco._initialize_simulation}
    env = type(theirs.__name__, (theirs,), same_model)(**ours.gymnasium_kwargs)
    return TimeLimit(OrderEnforcing(env), 1_000)


def bench_env(args, name):
    """Env steps under random actions; episodes that end are begun again."""
    ours, plain = envs.make(name), plain_env(name)
    actions = np.random.default_rng(0).uniform(-1, 1, (500, *ours.action_space.shape))

    def steps(env):
        env.reset(seed=0)
        ends = []
        for action in actions.astype(env.action_space.dtype):
            _, _, terminated, truncated, _ = env.step(action)
            ends.append(terminated or truncated)
            if ends[-1]:
                env.reset()
        return ends

    ends = steps(ours)

    def raw():
        inner = ours.unwrapped
        ours.reset(seed=0)
        for action, ended in zip(actions, ends):
            inner.data.ctrl[:] = action
            mujoco.mj_step(inner.model, inner.data, nstep=inner.frame_skip)
            if ended:
                ours.reset()

    jobs = {"floor: mj_step": raw, "Gymnasium's own env": lambda: steps(plain),
            "ours": lambda: steps(ours)}
    show(f"env step, {name}", medians(jobs, args.repeats, torch.device("cpu")), "floor: mj_step",
         "env step", len(actions))


class Recorder(Group):
    """A group that notes which env took which action."""

    def __init__(self, envs):
        super().__init__(envs)
        self.taken = []

    def step(self, actions):
        self.taken.append([(i, actions[i].copy()) for i in self.running.nonzero()[0]])
        return super().step(actions)


def bench_evaluation(args, env, device):
    """One evaluation against the mj_steps of the same envs under the same actions."""
    flags, _, _ = m3po.parse_args(["--env", args.env, "--out", "runs/bench"])
    policy, model = m3po.build(flags, env, device)
    n = flags.eval_episodes
    recorder = Recorder([envs.make(args.env) for _ in range(n)])
    evaluate(policy, recorder, list(range(n)), flags.L, device)
    if m3po.compiler_works():
        m3po.compile_all(policy, model)

    def raw():
        recorder.reset(list(range(n)))
        sims = [env.unwrapped for env in recorder.envs]
        for taken in recorder.taken:
            for i, action in taken:
                sims[i].data.ctrl[:] = action
                mujoco.mj_step(sims[i].model, sims[i].data, nstep=sims[i].frame_skip)

    with closing(m3po.make_eval_group(flags)) as group:
        jobs = {"floor: mj_step, one after the other": raw,
                f"ours, workers: {group.workers}":
                lambda: evaluate(policy, group, list(range(n)), flags.L, device)}
        show(f"evaluation of {n} episodes, {args.env}", medians(jobs, 3, device),
             "floor: mj_step, one after the other", "episode", n)


# ---- memory -------------------------------------------------------------------------------------


def bench_memory(device):
    """D_model of humanoid-direc at M = 1000 with an epoch of E = 1000 env steps kept, filled."""
    env = envs.make("humanoid-direc")
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    D_env = EnvBuffer(200_000, O, A, 10, device)
    D_model = ModelBuffer(D_env, 1_000, 1, 1_000, envs.termination_fn(env))
    D_env.total, D_model.written = D_env.capacity, D_model.blocks
    D_model.count.fill_(D_model.M)
    tensors = [getattr(D_model, name) for name in ModelBuffer.STATE]
    for tensor in (*tensors, *(getattr(D_env, name) for name in EnvBuffer.STATE)):
        tensor.copy_(tensor.clone() if tensor is D_model.count else torch.zeros_like(tensor))
    D_model.count.fill_(D_model.M)
    D_model.sample(40 * 256)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    windows = D_model.blocks * D_model.M * 11 * (O + A + 1) * 4
    print(f"\nD_model of humanoid-direc, M 1000, E 1000: "
          f"{sum(t.nbytes for t in tensors) / 1e6:,.0f} MB; with D_env of 200,000 steps and one batch "
          f"of 40 updates the process grew by {grown / 1e3:,.0f} MB (windows stored whole: "
          f"{windows / 1e6:,.0f} MB)")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--env", default="halfcheetah-fwd-bwd", choices=list(envs.ENVS)[1:], metavar="NAME",
                   help="whose sizes and defaults (%(default)s)")
    p.add_argument("--threads", type=m3po.count, help="of torch (its default)")
    p.add_argument("--device", choices=("cpu", "cuda"),
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--repeats", type=m3po.count, default=20, help="turns per table (20)")
    args = p.parse_args()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, env = torch.device(args.device), envs.make(args.env)
    name = torch.cuda.get_device_name() if args.device == "cuda" else m3po.cpu_name()
    print(f"{name}; {torch.get_num_threads()} threads; "
          + ", ".join(f"{k} {v[:12]}" for k, v in m3po.versions().items()))
    bench_memory(device)
    for each in list(envs.ENVS)[1:]:
        bench_env(args, each)
    bench_evaluation(args, env, device)
    bench_nets(args, env, device)


if __name__ == "__main__":
    main()
