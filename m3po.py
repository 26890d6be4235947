"""M3PO: Meta-Model-Based Meta-Policy Optimization (Hiraoka et al., ACML 2021), Algorithm 2.

    python m3po.py --env point-fwd-bwd                  # two minutes on two CPU cores
    python m3po.py --env ant-fwd-bwd --k 1              # the paper's run: 200 epochs

A meta-model is fitted to real data; short rollouts in it, branched from real histories, feed a
SAC meta-policy that adapts to a hidden, changing task from the last L steps it saw.

    paper          here                          shape / unit                file
    h_{L:t}        tokens, mask, obs             [L, B, D], [L, B], [B, O]   rollouts.py (contract)
    z_t            HistoryNet.encode             [members, B, 5]             model.py
    p_theta        MetaModel (fit, sample)       an ensemble of --B members  model.py
    pi_phi, Q      MetaPolicy (act, update)      [B, A] in [-1, 1], [2, B]   policy.py
    D_env          EnvBuffer                     ring of real steps          rollouts.py
    D_model        ModelBuffer                   ring of imagined steps      rollouts.py
    tau (task)     info["task"], never in obs                                envs.py
    C_Th1, C_Th2   full_rollout_gap, ...                                     bounds.py

The clocks of one run (Table 2, halfcheetah-fwd-bwd):

    run        N = 200 epochs
    epoch      E = 1000 env steps, then one evaluation of 50 episodes
    env step   M = 1000 model rollouts of k = 1 model step, then G = 40 policy updates
    fit        every `--fit-every` env steps (the paper: once per epoch)
"""

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import diagnostics
import envs
from evaluation import Players, early_steps, summarise
from model import MetaModel
from policy import LOGGED, GraphedUpdate, MetaPolicy
from rollouts import Batch, EnvBuffer, ModelBuffer

# Table 2 and METHOD's reading of it; what is not named here is the same for every env. Any other
# env, your own included, starts from "default".
DEFAULTS = {
    "default": dict(N=200, E=1_000, M=1_000, G=40, L=10, width=400, warmup=3_000, fit_every=250,
                    model_decay=1e-3, retain=100, lr=3e-4, gamma=0.99, target_entropy=None,
                    layer_norm=True),
    "point-fwd-bwd": dict(N=15, E=200, M=200, G=4, L=3, width=64, warmup=200, fit_every=100,
                          model_decay=0.0, lr=5e-4, gamma=0.9, target_entropy=-2.0,
                          layer_norm=False),
    "halfcheetah-pier": dict(M=500),
    "walker2d-randomparams": dict(M=500),
    "humanoid-direc": dict(M=500, G=20),
}
# M3PO-h, Table 3: the share of D_model falls from 1 to 0 between these epochs.
HYBRID = {"halfcheetah-pier": (80, 130), "walker2d-randomparams": (50, 100),
          "humanoid-direc": (150, 250)}


RUNNING = set("env seed N out device compile resume eval_episodes eval_every diagnose_every "
              "checkpoint_every env_capacity".split())  # flags that change no learning


def env_defaults(name):
    """{flag: value} of DEFAULTS for this env."""
    return DEFAULTS["default"] | DEFAULTS.get(name, {})


def differences(flags):
    """{flag: value} of what is trained otherwise than by the defaults for flags["env"]."""
    default = vars(build_parser().parse_args([])) | env_defaults(flags["env"])
    if flags.get("warmup") == default_warmup(flags):
        default["warmup"] = flags["warmup"]
    return {name: flags[name] for name, value in default.items()
            if name not in RUNNING and name in flags and flags[name] != value}


def default_warmup(flags):
    """At most half the run, so that a short one learns something too."""
    return min(env_defaults(flags["env"])["warmup"], max(1, flags["N"] * flags["E"] // 2))


# ---- flags --------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, low_open=False, high_open=False):
    """An argparse type: an int or float inside a range, which the error message names."""
    left, right = "(" if low_open else "[", ")" if high_open or math.isinf(high) else "]"

    def parse(text):
        try:
            value = kind(text)
            ok = (value > low if low_open else value >= low) and (
                value < high if high_open else value <= high) and math.isfinite(value)
        except (ValueError, OverflowError):
            ok = False
        if not ok:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} in {left}{low}, {high}{right}")
        return value

    return parse


count, natural = number(int, 1), number(int, 0)
positive, share = number(float, 0, low_open=True), number(float, 0, 1)


def build_parser():
    p = OneLineParser("m3po.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                      formatter_class=lambda prog: argparse.HelpFormatter(prog, width=98))
    g = p.add_argument_group("task")
    g.add_argument("--env", default="point-fwd-bwd", metavar="NAME",
                   help=f"{', '.join(envs.ENVS)}, or your own as module:Id-v0 (default: %(default)s)")
    g.add_argument("--switch-every", type=count, metavar="STEPS",
                   help="env steps between redraws of the hidden task (default: the env's; 300, toy 25)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                   help="of everything random (default: 0)")

    g = p.add_argument_group("Table 2 (defaults differ by env; the paper's values are shown)")
    add = lambda *names, **kw: g.add_argument(*names, metavar=names[0].lstrip("-"), **kw)
    add("--N", "--epochs", type=count, help="epochs (200; toy 15)")
    add("--E", "--steps-per-epoch", type=count, help="env steps per epoch (1000; toy 200)")
    add("--M", "--model-rollouts", type=count,
        help="model rollouts per env step (1000; pier, walker2d, humanoid 500; toy 200)")
    add("--B", "--ensemble-size", type=count, default=3, help="members of the meta-model (3)")
    add("--G", "--updates-per-step", type=natural,
        help="policy updates (gradient steps) per env step (40; humanoid 20; toy 4)")
    add("--k", "--rollout-length", type=count, default=1, help="model steps per rollout (1)")
    add("--L", "--history-length", type=natural,
        help="tokens of history; 0 blinds policy and model to it (10; toy 3)")
    g.add_argument("--width", type=count, help="units of the two hidden layers (400; toy 64)")
    g.add_argument("--z-dim", type=count, default=5, help="units of the GRU (5)")

    g = p.add_argument_group("meta-model (not in the paper unless said)")
    g.add_argument("--fit-every", type=count, metavar="STEPS",
                   help="env steps between model fits (250; toy 100; the paper: E)")
    g.add_argument("--model-lr", type=positive, default=1e-3, help="Adam step size (0.001)")
    g.add_argument("--model-decay", type=number(float, 0), metavar="RATE",
                   help="L2 weight decay of the meta-model (0.001; toy 0)")
    g.add_argument("--model-batch", type=count, default=256, help="rows per gradient step (256)")
    g.add_argument("--max-passes", type=count, default=200,
                   help="most passes over D_env per fit, where the hold-out error has not stopped it (200)")
    g.add_argument("--beta-nll", type=share, default=0.5,
                   help="each term of the likelihood is weighed by its own variance to this power; 0 is the"
                        " paper's likelihood, which hardly learns the reward (0.5)")
    g.add_argument("--reward-weight", type=positive,
                   help="weight of the reward beside 1 per observation (default: obs dims)")
    g.add_argument("--retain", type=count, metavar="STEPS",
                   help="env steps whose rollouts D_model keeps (100; the lineage MBPO: E)")
    g.add_argument("--env-capacity", type=count, default=1_000_000,
                   help="most env steps kept in D_env (1000000)")

    g = p.add_argument_group("meta-policy (SAC; not in the paper unless said)")
    g.add_argument("--warmup", type=count,
                   help="uniform random env steps at the start (3000, toy 200; at most half the run)")
    g.add_argument("--batch-size", type=count, default=256, help="rows per update (256)")
    g.add_argument("--lr", type=positive, help="Adam step size of policy and Q (0.0003; toy 0.0005)")
    g.add_argument("--gamma", type=number(float, 0, 1, high_open=True),
                   help="discount (0.99; toy 0.9)")
    g.add_argument("--tau", type=number(float, 0, 1, low_open=True), default=0.005,
                   help="share of Q that enters its target per update (0.005)")
    g.add_argument("--alpha", type=positive,
                   help="fixed temperature; 1.0 is the paper's literal objective (default: tuned)")
    g.add_argument("--target-entropy", type=number(float, -math.inf),
                   help="nats, that the tuned temperature aims at (minus half the action dims; toy -2)")

    g.add_argument("--layer-norm", action=argparse.BooleanOptionalAction,
                   help="normalise Q's hidden layers (yes; toy no)")

    g = p.add_argument_group("the paper's variants")
    g.add_argument("--rollout", choices=("branched", "full"), default="branched",
                   help="full: M model episodes from initial histories to the horizon, one model step"
                        " each per env step, never branching from D_env (Fig. 9)")
    g.add_argument("--model", choices=("gru", "mlp"), default="gru",
                   help="mlp: M2PO, MBPO's 7 feed-forward nets of 4 x 200 that see no history (Fig. 16)")
    g.add_argument("--hybrid", nargs="*", type=number(float, 0), metavar="EPOCH",
                   help="M3PO-h: the share of D_model in a batch falls from 1 to 0 between epochs A and"
                        " B; alone, Table 3's: " + ", ".join(f"{e} {a} {b}" for e, (a, b) in HYBRID.items()))
    g.add_argument("--beta", type=share, default=1.0,
                   help="constant share of D_model in a batch; 0 is recurrent SAC, no model (1)")

    g = p.add_argument_group("one idea removed")
    g.add_argument("--no-token-reward", action="store_true",
                   help="tokens are (o, a) as the paper prints them, not (o, a, r)")
    g.add_argument("--oracle", action="store_true",
                   help="show the hidden task to the agent: an upper bound")

    g = p.add_argument_group("running")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                   help="auto takes a GPU if there is one (auto)")
    g.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                   help="torch.compile the policy's losses and actions and the model's answers to rollouts: a"
                        " minute or two first, then about a third faster; on a GPU also record an update as one CUDA graph; auto does so"
                        " from 10,000 updates per epoch on (auto)")
    g.add_argument("--eval-episodes", type=natural, default=50, help="episodes per evaluation (50)")
    g.add_argument("--eval-every", type=count, default=1, help="epochs between evaluations (1)")
    g.add_argument("--diagnose-every", type=natural, default=10,
                   help="epochs between measurements of model error by depth and eps_pi; 0 never (10)")
    g.add_argument("--checkpoint-every", type=count, default=1, help="epochs between checkpoints (1)")
    g.add_argument("--out", metavar="DIR", help="run folder (runs/ENV__m3po__SEED__TIME)")
    g.add_argument("--resume", metavar="DIR",
                   help="go on with the run in DIR; --N, --out, --device and --compile may change, nothing"
                        " else")
    return p


UNSET = object()
MAY_CHANGE = {"N", "out", "device", "compile", "resume"}  # between a checkpoint and the run that resumes it


def parse_args(argv=None):
    """Flags as a namespace, a made env, and the checkpoint to resume or None. Whatever is wrong is
    said in one line, before anything is created."""
    parser = build_parser()
    flags = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(flags, UNSET))))
    given = {name: value for name, value in given.items() if value is not UNSET}
    state, folder = None, given.get("resume")
    if folder is not None:
        try:
            state = checkpoint.read(Path(folder) / "checkpoint.pt", "run")
        except checkpoint.CheckpointError as error:
            parser.error(f"argument --resume: {error}")
        for name, value in given.items():
            if name not in MAY_CHANGE and value != state["flags"].get(name):
                parser.error(f"argument --{name.replace('_', '-')}: {value} contradicts the checkpoint, "
                             f"which has {state['flags'].get(name)}")
        flags |= state["flags"] | {"out": folder, "resume": folder}
    args = argparse.Namespace(**flags | given)
    args.env = next((name for name, env_id in envs.ENVS.items() if env_id == args.env), args.env)
    for name, value in env_defaults(args.env).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "warmup" not in given and not state:
        args.warmup = default_warmup(vars(args))
    if args.device == "cuda" and not torch.cuda.is_available():
        if "device" in given:
            parser.error("argument --device: cuda asked for, but torch sees no CUDA device")
        args.device = "auto"  # written on a GPU, resumed where there is none
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.hybrid is not None and not state:
        args.hybrid = list(args.hybrid or HYBRID.get(args.env, ()))
        if len(args.hybrid) != 2 or not args.hybrid[0] < args.hybrid[1]:
            parser.error("argument --hybrid: needs two epochs A < B; Table 3 has values only for "
                         + ", ".join(HYBRID))
        if "beta" in given:
            parser.error("argument --beta: a constant share contradicts --hybrid's schedule")
    if state and args.N * args.E < state["step"]:
        parser.error(f"argument --N: {args.N} epochs lie before the checkpoint's step {state['step']}")
    if args.rollout == "full" and args.k != 1:
        parser.error("argument --k: full rollouts have no length but the episode's")
    if args.warmup > args.N * args.E:
        parser.error(f"argument --warmup: {args.warmup} is more than the run's {args.N * args.E} env steps")
    if args.out is None:
        name = args.env.replace("/", "-").replace(":", "-")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        args.out = f"runs/{name}__m3po__{args.seed}__{stamp}"
    if Path(args.out).exists() and args.out != folder:
        parser.error(f"argument --out: {args.out} exists; a run goes on only with --resume")
    try:
        env = make_env(args)
    except envs.EnvError as error:
        parser.error(f"argument --env: {error}")
    return args, env, state


def make_env(args):
    return envs.make(args.env, args.switch_every, args.oracle)


def seeds(run_seed, stream, index, n=1):
    """n env seeds; streams (0 training, 1 evaluation) and indices never meet."""
    return [int(s) for s in np.random.SeedSequence([run_seed, stream, index]).generate_state(n)]


# ---- logging ------------------------------------------------------------------------------------

FIELDS = [*"""epoch global_step eval_return_mean eval_return_std eval_length_mean
eval_discounted_return eval_reward_after_switch eval_reward_otherwise eval_right_way eval_faults
train_return_mean q_loss actor_loss q_mean td_error entropy alpha beta model_nll model_nll_train
model_explained_reward model_explained_obs model_passes imagined terminated_share nonfinite_share
dropped_transitions""".split(), *diagnostics.FIELDS,
          *(f"seconds_{part}" for part in ("env", "fit", "rollouts", "updates", "eval", "diagnose"))]


@contextmanager
def clock(seconds, part):
    """Adds the wall time of its block to seconds[part]."""
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def append_csv(path, fields, rows):
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def cpu_name():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


def versions():
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "gymnasium": gym.__version__, "mujoco": envs.mujoco.__version__, "numpy": np.__version__,
            "commit": commit or "unknown"}


def describe(args, env, p):
    """What is trained, printed before training starts."""
    inner, v = env.unwrapped, versions()
    per_epoch = (f"{args.E:,} env steps, {args.E * args.M:,} model rollouts of k={args.k}, "
                 f"{args.E * args.G:,} policy updates")
    own = "the env's own"
    period = getattr(inner, "switch_every", own)
    differs = differences(vars(args))
    task = f"redrawn every {period} env steps" if isinstance(period, int) else period or "one per episode"
    note = "" if envs.termination_known(env) else " (unknown to the model: branches never end)"
    return "\n".join([
        f"env          {args.env}{' + oracle' if args.oracle else ''}: "
        f"obs {env.observation_space.shape[0]}, actions {env.action_space.shape[0]} in [-1, 1]",
        f"reward       {getattr(inner, 'reward_text', own)}",
        f"terminated   {getattr(inner, 'termination_text', own)}{note}; "
        f"episodes of {envs.time_limit(env):,} env steps at most",
        f"hidden task  {task}",
        "method       M3PO" + ("" if not differs else ", but " + ", ".join(
            f"{name.replace('_', ' ')} = {value}" for name, value in differs.items())),
        f"one epoch    {per_epoch}; {args.N} epochs",
        f"device       {args.device}, {torch.get_num_threads()} threads, seed {args.seed}",
        "versions     " + ", ".join(f"{name} {version[:12]}" for name, version in v.items()),
        f"run folder   {args.out}",
    ] + ([f"resumed      {args.resume} from env step {p['step']:,}"] if args.resume else []))


def episode_rows(step, returns, lengths):
    return [{"global_step": step, "episode": i, "return": r, "length": n}
            for i, (r, n) in enumerate(zip(returns.tolist(), lengths.tolist()))]


def tensorboard(folder, step):
    """A writer if the package is there, else None. What it shows past env step `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def check_finite(p, args, policy):
    """Stops the run, so that the last good checkpoint stays the last."""
    losses, first = p["losses"].cpu(), (p["step"] - 1) // args.E * args.E  # of this epoch's env steps
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0, 0])
        which = LOGGED[int((~torch.isfinite(losses[bad])).nonzero()[0, 0])]
        raise FloatingPointError(f"{which} is not finite at env step {first + bad}")
    if not all(torch.isfinite(q).all() for q in policy.parameters()):
        raise FloatingPointError(f"a parameter of the policy or Q is not finite at step {p['step']}")


def log_epoch(out, board, args, row, p, policy, D_model, bar):
    """Close the epoch's row: losses, shares, seconds; to progress.csv, TensorBoard and the screen."""
    check_finite(p, args, policy)
    done = p["updated"]
    mean = p["losses"].sum(0).cpu() / done if done else torch.full((len(LOGGED),), math.nan)
    imagined, ended, nonfinite = D_model.stats.tolist()
    returns = p["train_returns"]
    row |= dict(zip(LOGGED, mean.tolist())) | {
        "train_return_mean": float(np.mean(returns)) if returns else math.nan,
        "alpha": policy.log_alpha.exp().item(), "imagined": int(imagined),
        "terminated_share": ended / max(imagined, 1),
        "nonfinite_share": nonfinite / max(imagined, 1), "dropped_transitions": p["dropped"]}
    row |= {f"model_{name}": value for name, value in p["fit"].items()}
    row |= {f"seconds_{part}": seconds for part, seconds in p["seconds"].items()}
    append_csv(out / "progress.csv", FIELDS, [row])
    for name, value in row.items() if board else ():
        group = "losses" if name in LOGGED else "charts"
        board.add_scalar(f"{group}/{name}", value, row["global_step"])
    split = " ".join(f"{part} {seconds:.1f}s" for part, seconds in p["seconds"].items())
    score = (f"return {row['eval_return_mean']:8.1f} +- {row['eval_return_std']:6.1f}  "
             if "eval_return_mean" in row else "")
    fit = p["fit"].get("explained_reward", math.nan)
    bar.write(f"epoch {row['epoch']:3d}  step {row['global_step']:7,d}  {score}Q {row['q_mean']:7.1f}  "
              f"alpha {row['alpha']:.3f}  explained r {fit:.2f}  | {split}", file=sys.stdout)


# ---- Algorithm 2 --------------------------------------------------------------------------------


def build(args, env, device):
    """Policy, meta-model and the two datasets (line 1)."""
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    token_dim = 0 if args.L == 0 else O + A if args.no_token_reward else O + A + 1
    widths = (args.width,) * 2
    policy = MetaPolicy(O, A, token_dim, widths, args.z_dim, args.gamma, args.tau, args.lr, args.alpha,
                        target_entropy=args.target_entropy, layer_norm=args.layer_norm).to(device)
    shape = dict(members=args.B, widths=widths, z_dim=args.z_dim, token_dim=token_dim)
    if args.model == "mlp":  # M2PO: MBPO's ensemble
        shape = dict(members=7, elites=5, widths=(200,) * 4, token_dim=0)
    decay = args.model_decay or 0.0  # None in agents that are older than the flag
    model = MetaModel(O, A, **shape, lr=args.model_lr, weight_decay=decay,
                      batch_size=args.model_batch,
                      beta_nll=args.beta_nll, reward_weight=args.reward_weight,
                      max_passes=args.max_passes).to(device)
    return policy, model


def share_of_model(args, epoch):
    """beta, the share of D_model in a batch (App. A.8; the printed formula is identically 0)."""
    if args.hybrid is None:
        return args.beta
    a, b = args.hybrid
    return min(max(1 - (epoch - a) / (b - a), 0.0), 1.0)


def sample_batches(D_model, D_env, beta, n, batch_size):
    """n Batches in one gather, a share beta of each from D_model and the rest from D_env."""
    imagined = round(beta * batch_size)
    if imagined == batch_size:
        return D_model.sample(n * batch_size).minibatches(n)
    real = D_env.sample(n * (batch_size - imagined)).minibatches(n)
    if imagined == 0:
        return real
    return map(Batch.join, D_model.sample(n * imagined).minibatches(n), real)


def act(policy, D_env, obs, warm, device):
    """The action [A] for the real step: uniform before the warm-up is over, then a ~ pi(h_t)."""
    if not warm:
        return torch.rand(policy.act_dim).numpy() * 2 - 1
    obs = torch.as_tensor(obs, device=device)[None]
    return policy.act(*D_env.live_window(), obs)[0].cpu().numpy()


def real_step(env, D_env, p, args, obs, action):
    """Line 5: one step of the real env into D_env; returns the next observation to act on."""
    next_obs, reward, terminated, truncated, info = env.step(action)
    p["actions"].append(action.tolist())  # float32 to float loses nothing
    if "fault" in info:  # the simulator failed: this transition is no data
        p["dropped"] += 1
        D_env.end_episode()
    else:
        D_env.add(obs, action, reward, next_obs, terminated, truncated)
        p["train_return"] += float(reward)
    if not (terminated or truncated):
        return next_obs
    p["train_returns"].append(p["train_return"])
    p |= {"episode": p["episode"] + 1, "actions": [], "train_return": 0.0}
    return env.reset(seed=seeds(args.seed, 0, p["episode"])[0])[0]


def replay(env, p, args):
    """The observation at which the run stopped: the same seed, the same actions (checkpoint.py)."""
    obs, _ = env.reset(seed=seeds(args.seed, 0, p["episode"])[0])
    for action in p["actions"]:
        obs, *_ = env.step(np.array(action, np.float32))
    return obs


def open_run_folder(args, state):
    """A new folder with config.json, or the old one's logs up to the checkpoint."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=state is not None)
    for name in ("progress.csv", "eval.csv") if state else ():
        checkpoint.cut_log(Path(args.resume) / name, out / name, state["step"])
    config = {"flags": vars(args), "versions": versions()}
    checkpoint.write_atomically(out / "config.json",
                                lambda f: f.write(json.dumps(config, indent=1).encode()))


def finish_epoch(args, env, p, policy, model, D_env, D_model, players, board, bar):
    """What an epoch is judged by: evaluation, diagnostics, one row in the logs. No training stream
    is touched."""
    epoch, out = p["step"] // args.E, Path(args.out)
    row = {"epoch": epoch, "global_step": p["step"], "beta": share_of_model(args, epoch)}
    if args.eval_episodes and epoch % args.eval_every == 0:
        with clock(p["seconds"], "eval"):
            env_seeds = seeds(args.seed, 1, epoch, args.eval_episodes)
            episodes = players.evaluate(policy, env_seeds)
        returns, lengths, summary = summarise(episodes, args.gamma, early_steps(env))
        append_csv(out / "eval.csv", ["global_step", "episode", "return", "length"],
                   episode_rows(p["step"], returns, lengths))
        row |= summary
        p["last"] = [summary["eval_return_mean"], p["step"]]
        p["best"] = max(p["best"], p["last"])
    if args.diagnose_every and epoch % args.diagnose_every == 0 and len(D_env):
        with clock(p["seconds"], "diagnose"):
            row |= diagnostics.measure(policy, model, D_env, p["fit"], args, epoch)
    log_epoch(out, board, args, row, p, policy, D_model, bar)
    D_model.stats.zero_()
    p["losses"].zero_()
    p |= {"updated": 0, "train_returns": [], "seconds": {}}


def make_players(args, env):
    """Evaluation's envs, in as many processes as torch has threads. The toy's episodes are over in
    less time than that saves."""
    workers = 1 if args.env == "point-fwd-bwd" else torch.get_num_threads()
    return Players(lambda: make_env(args), lambda: build(args, env, "cpu")[0], args.eval_episodes,
                   workers, args.L)


def compiler_works(device):
    """Whether torch.compile can build anything for this device here."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception:  # whatever the missing compiler turns into, on any version
        return False
    return True


def main(args, env, state=None):
    """Algorithm 2. Returns the number of the signal that stopped it, or None."""
    eval_players = make_players(args, env)  # first: it forks, and draws weights that are not used
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    policy, model = build(args, env, device)  # line 1
    D_env = EnvBuffer(min(args.N * args.E, args.env_capacity), policy.obs_dim, policy.act_dim, args.L,
                      device)
    D_model = ModelBuffer(D_env, args.M, args.k, args.retain, envs.terminated_fn(env),
                          full=args.rollout == "full", horizon=envs.time_limit(env))
    # Everything that changes from step to step and lies in none of these four.
    p = {"step": 0, "episode": 0, "actions": [], "train_return": 0.0, "train_returns": [],
         "dropped": 0, "updated": 0, "stored": False, "fit": {}, "seconds": {}, "last": [math.nan, 0],
         "best": [-math.inf, 0], "losses": torch.zeros(args.E, len(LOGGED), device=device)}
    if state is not None:
        p = checkpoint.restore(state, policy, model, D_env, D_model)
        p["losses"] = p["losses"].to(device)
    update = policy.update
    if args.compile == "on" or args.compile == "auto" and args.E * args.G >= 10_000:
        if device.type == "cuda":
            update = GraphedUpdate(policy)
        if compiler_works(device):
            policy.compile_methods()
            model.compile_methods()
        else:
            print("compile      off: torch.compile found no working compiler (CPU: g++, GPU: Triton); "
                  "running eager")
    open_run_folder(args, state)
    print(describe(args, env, p), flush=True)
    obs = replay(env, p, args)
    save = lambda: checkpoint.save(Path(args.out), vars(args), p, policy, model, D_env, D_model)
    board = tensorboard(args.out, p["step"])

    with closing(eval_players) as players, checkpoint.StopSignals() as stop, tqdm(
            total=args.N * args.E, initial=p["step"], unit="step", dynamic_ncols=True,
            smoothing=0.05, disable=args.N * args.E == p["step"]) as bar:
        for epoch in range(p["step"] // args.E + 1, args.N + 1):  # line 2
            beta = share_of_model(args, epoch)
            while p["step"] < epoch * args.E:  # line 4
                t, warm = p["step"], p["step"] >= args.warmup
                if warm and (t - args.warmup) % args.fit_every == 0:
                    with clock(p["seconds"], "fit"):
                        if beta > 0:
                            p["fit"] = model.fit(D_env)  # line 3, more often: README, deviations
                        else:
                            model.update_statistics(D_env)
                            p["fit"] = {}  # what was fitted to other statistics predicts no more
                        policy.use_statistics(model)
                    p["stored"] = False
                with clock(p["seconds"], "env"):
                    action = act(policy, D_env, obs, warm, device)
                    obs = real_step(env, D_env, p, args, obs, action)  # line 5
                if warm and beta > 0:
                    with clock(p["seconds"], "rollouts"):
                        D_model.rollout(policy, model)  # lines 6-9
                        # Does it hold any row? Not asked at every step: asking waits for the GPU.
                        if not p["stored"] or t % args.retain == 0:
                            p["stored"] = len(D_model) > 0
                if warm and args.G and (beta == 0 or p["stored"]):
                    with clock(p["seconds"], "updates"):
                        noise = torch.randn(args.G, 2, args.batch_size, policy.act_dim, device=device)
                        batches = sample_batches(D_model, D_env, beta, args.G, args.batch_size)
                        p["losses"][t % args.E] = torch.stack(
                            [update(*both) for both in zip(batches, noise)]).mean(0)  # 10-12
                    p["updated"] += 1
                p["step"] += 1
                bar.update()
                if stop.received and p["step"] < epoch * args.E:
                    check_finite(p, args, policy)
                    save()
                    return stop.received
            finish_epoch(args, env, p, policy, model, D_env, D_model, players, board, bar)
            if epoch % args.checkpoint_every == 0 or epoch == args.N or stop.received:
                save()
            if stop.received:
                return stop.received
    if p["last"][1]:
        print("evaluation   last {:.1f} at step {:,}, best {:.1f} at step {:,}".format(
            *p["last"], *p["best"]))
    print(f"to see it    {args.out}/progress.csv, eval.csv; agent.pt and checkpoint.pt hold the agent")
    return None


def load(folder, device="cpu"):
    """The trained agent of a run folder: (policy, model, env, args). See README for its use."""
    agent = checkpoint.read(Path(folder) / "agent.pt", "agent")
    defaults = vars(build_parser().parse_args([]))  # of flags that are younger than the run
    args = argparse.Namespace(**defaults | agent["flags"])
    env = make_env(args)
    policy, model = build(args, env, device)
    policy.load_state_dict(agent["policy"])
    model.load_state_dict(agent["model"])
    return policy, model, env, args


def command_line():
    """Run main with faults turned into one line and an exit status."""
    args, env, state = parse_args()
    try:
        number = main(args, env, state)
    except (FloatingPointError, checkpoint.CheckpointError, OSError, ValueError) as error:
        sys.exit(f"m3po.py: error: {error}")
    except (RuntimeError, MemoryError) as error:  # torch's own class for it exists on GPUs alone
        first = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "memory" not in first:
            raise
        sys.exit(f"m3po.py: error: {first or 'out of memory'}; see --M, --retain, --env-capacity")
    if number:
        print(f"stopped and saved; go on with: python m3po.py --resume {args.out}")
        sys.exit(128 + number)


if __name__ == "__main__":
    command_line()
