"""How near the hot loop is to what this machine can do: each part beside its own floor.

    python bench.py                    # halfcheetah-fwd-bwd at its defaults, about five minutes
    python bench.py --env ant-fwd-bwd --threads 1

The floor of a policy update, a model rollout or a model fit is the matrix products it needs,
forward and backward, into memory that is already there, and nothing else. (The GRU's products with
h count as such; model.py does them as sums.) The floor of an env step and of an evaluation is
`mj_step` and resets, with the forces of the same episodes, one env after the other; sampling's is
to read as many rows anywhere in a table of D_model's size. All jobs of a table run in turns, so
that whatever else the machine does meets them alike; times are medians.
"""

import copy
import statistics
import time
from contextlib import closing

import mujoco
import numpy as np
import torch
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from tqdm import tqdm

import envs
import logs
import m3po
import speed
from evaluation import Group, evaluate
from flags import OneLineParser, count
from rollouts import EnvBuffer, ModelBuffer

ROWS = 20_000  # real steps in D_env


def medians(jobs, repeats, device):
    """Median seconds of each of jobs {name: function}, which run in turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # compiles, records, allocates, fills caches
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


def plural(unit):
    return unit + ("es" if unit.endswith("ch") else "s")


def show(title, times, unit, count):
    """One row per job: time per unit, units per second, and how many floors it takes; the floor is
    the first job."""
    floor = next(iter(times.values()))
    print(f"\n{title:44} {'ms / ' + unit:>16} {plural(unit) + ' / s':>16} {'x floor':>8}")
    for name, seconds in times.items():
        print(f"  {name:42} {seconds / count * 1e3:16.4g} {count / seconds:16,.0f} "
              f"{seconds / floor:8.2f}", flush=True)


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


def bench_nets(args, flags, env, device):
    """Policy updates, model rollouts and model fits on made-up data of the env's sizes."""
    policy, model = m3po.build(flags, env, device)
    O, A, L, B, G, M = (policy.obs_dim, policy.act_dim, flags.L, flags.batch_size, flags.G, flags.M)
    D_env = EnvBuffer(ROWS, O, A, L, device)
    data = torch.randn(ROWS, 2 * O + A + 1)
    for t, row in enumerate(data):
        obs, action, next_obs, reward = row.split([O, A, O, 1])
        D_env.add(obs, action.clamp(-1, 1), reward, next_obs, False, t % 1000 == 999)
    model.use_statistics(D_env.statistics())
    policy.use_statistics(D_env.statistics())
    D_model = ModelBuffer(D_env, M, flags.k, flags.retain, envs.terminated_fn(env))
    D_model.rollout(policy, model)

    def updates(update):
        for batch in m3po.sample_batches(D_model, D_env, 1.0, G, B):
            update(*batch)

    def rollouts(policy, model):
        for _ in range(10):
            D_model.rollout(policy, model)

    def policies():
        made = {"eager": copy.deepcopy(policy)}
        if speed.compiler_works(device):
            made["compiled"] = copy.deepcopy(policy)
            speed.compile_methods(made["compiled"])
        return made

    modes = policies()
    ways = {name: p.update for name, p in modes.items()}
    if device.type == "cuda":
        ways |= {f"{name}, CUDA graph": speed.Graphed(p) for name, p in policies().items()}
    floor = update_products(policy, B, L)
    jobs = {"floor: its matrix products": lambda: [multiply(floor) for _ in range(G)]}
    jobs |= {f"{name}, sampling included": lambda u=u: updates(u) for name, u in ways.items()}
    show(f"policy update, batch {B}, width {flags.width}, L {L}",
         medians(jobs, args.repeats, device), "update", G)

    members = -(-M // model.elites)
    step = products(policy.actor, M, L) + products(model.net, members, L)
    jobs = {"floor: its matrix products": lambda: [multiply(step) for _ in range(10 * flags.k)]}
    models = {name: copy.deepcopy(model) for name in modes}
    if "compiled" in models:
        speed.compile_methods(models["compiled"])
    jobs |= {name: lambda name=name: rollouts(modes[name], models[name]) for name in modes}
    show(f"model rollouts, M {M}, k {flags.k}", medians(jobs, args.repeats, device),
         "imagined step", 10 * M * flags.k)

    rows = G * B  # of one env step's batches; a row read anywhere costs more than its bytes
    tokens = torch.randn(len(D_model.tokens), 1 + O + A + O, device=device)
    anywhere = torch.randint(len(tokens), (rows,), device=device)
    jobs = {"floor: as many rows, read anywhere": lambda: tokens.index_select(0, anywhere),
            "D_model": lambda: D_model.sample(rows), "D_env": lambda: D_env.sample(rows)}
    show(f"sampling the {G} batches of an env step, L {L}", medians(jobs, args.repeats, device),
         "batch", G)

    *_, fastest = models.values()
    if device.type == "cuda":
        fastest.update = speed.Graphed(fastest)
    bench_fits(args, flags, model, fastest, D_env)


def bench_fits(args, flags, model, fastest, D_env):
    """A fit as they come in a run, every --fit-every env steps; and with ten times the rows."""
    O, A, new = model.obs_dim, model.act_dim, flags.fit_every
    larger = EnvBuffer(10 * len(D_env), O, A, flags.L, D_env.device)
    state = {name: value.repeat(10, *[1] * (value.dim() - 1)) if torch.is_tensor(value) else value
             for name, value in D_env.state_dict().items()}
    larger.load_state_dict(state | {"total": 10 * len(D_env)})
    steps = round(flags.model_updates * new)
    step = products(model.net, flags.model_batch, flags.L, "all")
    looks = [products(model.net, rows, flags.L) for rows in (
        new, len(D_env.rows(holdout=True)), model.max_rows)]  # fresh, held out, trained on

    def floor():
        for _ in range(steps):
            multiply(step)
        for look in looks:
            multiply(look)

    def fit(model, D_env):
        model.seen.fill_(D_env.total - new)
        model.fit(D_env)

    jobs = {"floor: its matrix products": floor,
            f"eager, of {len(D_env):,} rows in D_env": lambda: fit(model, D_env),
            f"as in long runs, of {len(D_env):,} rows": lambda: fit(fastest, D_env),
            f"as in long runs, of {len(larger):,} rows": lambda: fit(fastest, larger)}
    show(f"model fit, {model.members} members, measuring included",
         medians(jobs, max(3, args.repeats // 4), D_env.device), "gradient step", steps)


# ---- the simulator ------------------------------------------------------------------------------


def plain_env(name):
    """Gymnasium's own env with its usual wrappers, on the same compiled model as ours."""
    ours = envs.CLASSES[name]
    theirs = next(c for c in ours.__mro__ if c.__module__.startswith("gymnasium"))
    same_model = {"edit_spec": ours.edit_spec,
                  "_initialize_simulation": envs.HiddenTaskMujoco._initialize_simulation}
    env = type(theirs.__name__, (theirs,), same_model)(**ours.gymnasium_kwargs)
    return TimeLimit(OrderEnforcing(env), 1_000)


def drive(sim, ctrl):
    """The simulator's part of an env step, and nothing else."""
    sim.data.ctrl[:] = ctrl
    mujoco.mj_step(sim.model, sim.data, nstep=sim.frame_skip)


def bench_env(args, name):
    """Env steps under random actions; episodes that end are begun again."""
    ours, plain = envs.make(name), plain_env(name)
    actions = np.random.default_rng(0).uniform(-1, 1, (500, *ours.action_space.shape))
    low, high = plain.action_space.low, plain.action_space.high
    own_actions = low + (actions + 1) / 2 * (high - low)
    inner = ours.unwrapped

    def steps(env, actions, taken=None):
        env.reset(seed=0)
        for action in actions.astype(np.float32):
            _, _, terminated, truncated, _ = env.step(action)
            if taken is not None:
                taken.append((inner.data.ctrl.copy(), terminated or truncated))
            if terminated or truncated:
                env.reset()

    taken = []
    steps(ours, actions, taken)

    def raw():
        ours.reset(seed=0)
        for ctrl, ended in taken:
            drive(inner, ctrl)
            if ended:
                ours.reset()

    jobs = {"floor: mj_step": raw, "Gymnasium's own env": lambda: steps(plain, own_actions),
            "ours": lambda: steps(ours, actions)}
    show(f"env step, {name}", medians(jobs, args.repeats, torch.device("cpu")), "env step",
         len(actions))


class Recorder(Group):
    """A group that notes which env was driven by which forces."""

    def __init__(self, envs):
        super().__init__(envs)
        self.taken = []

    def step(self, actions):
        ran = self.running.nonzero()[0]
        result = super().step(actions)
        self.taken.append([(i, self.envs[i].unwrapped.data.ctrl.copy()) for i in ran])
        return result


def bench_evaluation(args, flags, env, device):
    """One evaluation, of an untrained agent, against the mj_steps of the same envs."""
    policy, _ = m3po.build(flags, env, device)
    n, seeds = flags.eval_episodes, list(range(flags.eval_episodes))
    with closing(m3po.make_players(flags, lambda: m3po.build(flags, env, "cpu")[0])) as players:
        recorder = Recorder([envs.make(args.env) for _ in range(n)])
        evaluate(copy.deepcopy(policy).cpu(), recorder, seeds, flags.L)

        def raw():
            recorder.reset(seeds)
            sims = [env.unwrapped for env in recorder.envs]
            for taken in recorder.taken:
                for i, ctrl in taken:
                    drive(sims[i], ctrl)

        jobs = {"floor: mj_step": raw, f"ours, in {players.workers} processes":
                lambda: players.evaluate(policy, seeds)}
        show(f"evaluation of {n} episodes, {args.env}",
             medians(jobs, max(3, args.repeats // 4), device), "episode", n)


# ---- memory -------------------------------------------------------------------------------------


def bench_memory():
    """Megabytes of D_model per env at its defaults, and what longer keeping and branches cost."""
    print(f"\n{'D_model, MB':44} {'--retain 100':>16} {'--retain 1000':>16} {'1000, --k 5':>16}")
    for name in envs.ENVS:
        flags, env, _ = m3po.parse_args(["--env", name])
        O, A = env.observation_space.shape[0], env.action_space.shape[0]
        D_env = EnvBuffer(1, O, A, flags.L, "meta")  # shapes without memory
        sizes = []
        for retain, k in ((100, flags.k), (1_000, flags.k), (1_000, 5)):
            D_model = ModelBuffer(D_env, flags.M, k, retain, envs.terminated_fn(env))
            sizes.append(sum(getattr(D_model, name).nbytes for name in D_model.STATE))
        print(f"  {name:42}" + "".join(f" {size / 1e6:16,.0f}" for size in sizes), flush=True)


def main(argv=None):
    p = OneLineParser("bench.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--env", default="halfcheetah-fwd-bwd", choices=list(envs.ENVS)[1:],
                   metavar="NAME", help="whose sizes and defaults (%(default)s)")
    p.add_argument("--threads", type=count, help="of torch (its default)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    p.add_argument("--repeats", type=count, default=20,
                   help="turns per table (20; of model fit and evaluation a quarter, at least 3)")
    args = p.parse_args(argv)
    flags, env, _ = m3po.parse_args(["--env", args.env, "--device", args.device])
    torch.manual_seed(0)
    flags.threads = args.threads
    speed.set_threads(flags)
    device = torch.device(flags.device)
    name = torch.cuda.get_device_name() if flags.device == "cuda" else logs.cpu_name()
    print(f"{name}; {torch.get_num_threads()} threads; "
          + ", ".join(f"{k} {v[:12]}" for k, v in logs.versions().items()))
    bench_memory()
    for each in list(envs.ENVS)[1:]:
        bench_env(args, each)
    bench_evaluation(args, flags, env, device)
    bench_nets(args, flags, env, device)


if __name__ == "__main__":
    main()
