"""The flags of m3po.py: one table of defaults, the parser, and what may not go together.

`parse` reads what was given once; whatever was not comes from the checkpoint to resume, then from
the env's row of BY_ENV, then from DEFAULTS. It makes no env and creates nothing. What is wrong ends
the program with one line and exit status 2.

A baseline (baselines/NAME.py) has the flags EVERY method has, those of DEFAULTS that it names in
SAME, and its own: DEFAULTS and BY_ENV of its file, which win over the ones here, and
add_flags(add), which describes them. `method` is "m3po" or NAME.
"""

import argparse
import importlib
import math
from datetime import datetime
from pathlib import Path

import torch

import checkpoint
import envs

# Every flag. Table 2 of the paper where it says; docs/DEVIATIONS.md has the reasons for the rest.
DEFAULTS = dict(
    # task
    env="point-fwd-bwd", oracle=False, switch_every=None, reset_every=None, seed=0,
    # Table 2
    N=200, E=1_000, M=1_000, G=40, B=3, k=2, L=10, width=400, z_dim=5,
    # both
    angles=[], newest_token=True, token_changes=True,
    # meta-model
    fit_every=250, model_lr=1e-3, model_decay=1e-3, model_batch=256, model_updates=4.0,
    beta_nll=0.5, reward_weight=None, model_layer_norm=True, retain=100,
    env_capacity=1_000_000,
    # meta-policy
    warmup=3_000, batch_size=256, lr=3e-4, gamma=0.99, tau=0.005, alpha=None, target_entropy=None,
    layer_norm=True, reward_scale=1.0,
    # the paper's variants
    rollout="branched", model="gru", hybrid=None, beta=0.5, no_token_reward=False,
    # running
    device="auto", threads=None, compile="auto", eval_episodes=50, eval_every=1, diagnose_every=10,
    checkpoint_every=1, track=False, out=None, resume=None)
# What is different for an env; your own env has no row.
BY_ENV = {
    "point-fwd-bwd": dict(N=15, E=200, M=200, G=4, k=1, L=3, width=64, warmup=200, fit_every=100,
                          model_decay=0.0, model_updates=1.0, lr=5e-4, gamma=0.9,
                          target_entropy=-2.0, layer_norm=False),
    # On their backs these neither end nor get up. Angle 1 is the pitch.
    "halfcheetah-fwd-bwd": dict(reset_every=250, angles=[1]),
    "halfcheetah-pier": dict(M=500, reset_every=250, angles=[1]),
    "ant-fwd-bwd": dict(reset_every=250),
    "ant-crippled-leg": dict(reset_every=250),
    "walker2d-randomparams": dict(M=500),
    "humanoid-direc": dict(M=500, G=20),
}
# M3PO-h, Table 3: the fraction of D_model in a batch falls from 1 to 0 between these epochs.
HYBRID = {"halfcheetah-pier": (80, 130), "walker2d-randomparams": (50, 100),
          "humanoid-direc": (150, 250)}
SHORT = {"point-fwd-bwd": "toy", "halfcheetah-pier": "pier", "walker2d-randomparams": "walker2d",
         "humanoid-direc": "humanoid"}  # in --help

# What every method has; the rest is M3PO's.
EVERY = """env oracle switch_every reset_every seed N E L width angles env_capacity warmup gamma
device threads eval_episodes eval_every checkpoint_every track out resume""".split()

MAY_CHANGE = {"N", "out", "device", "threads", "compile", "track", "resume"}  # in a resume
CHANGES_NO_LEARNING = MAY_CHANGE | {"env", "seed", "eval_episodes", "eval_every", "diagnose_every",
                                    "checkpoint_every"}
OF_THE_MODEL = set("M B k model_updates model_lr model_decay model_batch beta_nll reward_weight "
                   "model_layer_norm retain rollout model".split())  # nothing to recurrent SAC
ONE_THREAD = 128  # units of width up to which a second thread of torch costs more than it brings


def program(method):
    """What is typed after "python" to run it, "-m" apart."""
    return "m3po.py" if method == "m3po" else f"baselines.{method}"


def tables(method):
    """The method's DEFAULTS and BY_ENV."""
    if method == "m3po":
        return DEFAULTS, BY_ENV
    own = importlib.import_module(f"baselines.{method}")
    default = {name: DEFAULTS[name] for name in [*EVERY, *own.SAME]} | own.DEFAULTS
    rows = {env: {name: value for name, value in row.items() if name in default}
            | own.BY_ENV.get(env, {}) for env, row in BY_ENV.items()}
    return default, own.BY_ENV | rows


def defaults(env, method="m3po"):
    """{flag: value} for this env, and the method."""
    default, by_env = tables(method)
    return default | by_env.get(env, {}) | {"env": env, "method": method}


def default_warmup(flags):
    """At most half the run, so that a short one learns something too."""
    default = defaults(flags["env"], flags["method"])
    return min(default["warmup"], max(1, flags["N"] * flags["E"] // 2))


def completed(flags):
    """Those of a run in a config.json, also of an older program: a flag that did not exist then was
    off, which is false, none, empty, or a factor of 1."""
    off = {"method": "m3po", "reward_scale": 1.0, "std": 1.0, "angles": []}
    return {name: off.get(name, False if isinstance(value, bool) else None) for name, value
            in defaults(flags["env"], flags.get("method", "m3po")).items()} | flags


def unused(flags):
    """Names of the flags that do nothing beside the others."""
    return OF_THE_MODEL if flags.get("beta") == 0 else (
        {"k"} if flags.get("rollout") == "full" else set())


def differences(flags):
    """{flag: value} of what is trained otherwise than by the method's defaults for flags["env"]."""
    default = defaults(flags["env"], flags["method"])
    if flags["warmup"] == default_warmup(flags):
        default["warmup"] = flags["warmup"]
    if flags["env_capacity"] >= flags["N"] * flags["E"]:  # nothing is ever overwritten
        default["env_capacity"] = flags["env_capacity"]
    return {name: flags[name] for name, value in default.items()
            if name not in CHANGES_NO_LEARNING | unused(flags) and flags[name] != value}


# ---- the parser ---------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line; no flag may be abbreviated."""

    def __init__(self, *args, **kwargs):
        layout = lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=98)
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": layout} | kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def refuse(self, name, reason):
        """End the program with one line that names the flag."""
        self.error(f"argument --{name.replace('_', '-')}: {reason}")


def in_range(kind, low, high=math.inf, low_open=False, high_open=False):
    """An argparse type: an int or float inside a range, which the error message names."""
    left, right = "(" if low_open else "[", ")" if high_open or math.isinf(high) else "]"

    def parse_number(text):
        try:
            value = kind(text)
            ok = (value > low if low_open else value >= low) and (
                value < high if high_open else value <= high) and math.isfinite(value)
        except (ValueError, OverflowError):
            ok = False
        if not ok:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {whole} in {left}{low}, {high}{right}")
        return value

    return parse_number


count, natural = in_range(int, 1), in_range(int, 0)
positive, fraction = in_range(float, 0, low_open=True), in_range(float, 0, 1)


def shown(name, method="m3po"):
    """The defaults of a flag as --help shows them: "1000; toy 200"."""
    default, by_env = tables(method)
    say = lambda value: ("no", "yes")[value] if isinstance(value, bool) else str(value)
    return "; ".join([say(default[name])] + [
        f"{SHORT.get(env, env)} {say(row[name])}" for env, row in by_env.items() if name in row])


def build_parser(method="m3po"):
    default, own = tables(method)[0], None
    description = """\
M3PO: meta-model-based meta-policy optimization (Hiraoka et al., ACML 2021), Algorithm 2.

    python m3po.py                                                     the toy: about 2 minutes
    python m3po.py --env halfcheetah-fwd-bwd --N 20 --G 10 --width 128 a robot: under an hour"""
    if method != "m3po":
        own = importlib.import_module(f"baselines.{method}")
        description = own.__doc__.partition("\n")[0]
    parser = OneLineParser(program(method), argument_default=argparse.SUPPRESS,
                           usage=f"{program(method)} [flags]", description=description)

    def group(title):
        arguments = parser.add_argument_group(title)

        def add(*names, help, shows=None, **kwargs):
            name = names[0].strip("-").replace("-", "_")
            if name in default:  # which the method has
                arguments.add_argument(*names, help=f"{help} ({shows or shown(name, method)})",
                                       **kwargs)
        return add

    add = group("the ten to know first")
    add("--env", metavar="NAME", help=f"{', '.join(envs.ENVS)}, or your own as module:Id-v0")
    add("--seed", type=in_range(int, 0, 2**32 - 1), metavar="SEED", help="of everything random")
    add("--N", "--epochs", type=count, metavar="EPOCHS", help="length of the run")
    add("--G", "--updates-per-step", type=natural, metavar="UPDATES",
        help="policy updates (gradient steps) per env step: what takes the time")
    add("--width", type=count, metavar="UNITS", help="of each of the two hidden layers")
    add("--L", "--history-length", type=natural, metavar="TOKENS",
        help="how many steps back the agent sees; 0 blinds it")
    add("--threads", type=count, metavar="CORES", help="cores to use, for torch and for evaluation",
        shows=f"torch's choice, but 1 for torch up to a width of {ONE_THREAD}")
    add("--device", choices=("auto", "cpu", "cuda"), help="auto takes a GPU if there is one")
    add("--out", metavar="DIR", help="run folder", shows=f"runs/ENV__{method}__SEED__TIME")
    add("--resume", metavar="DIR", help="go on with the run in DIR; may then be changed",
        shows=", ".join(f"--{name}" for name in sorted(MAY_CHANGE & default.keys() - {"resume"})))

    add = group("Table 2 of the paper")
    add("--E", "--steps-per-epoch", type=count, metavar="STEPS", help="env steps per epoch")
    add("--M", "--model-rollouts", type=count, metavar="ROLLOUTS",
        help="model rollouts per env step")
    add("--k", "--rollout-length", type=count, metavar="STEPS",
        help="model steps per rollout; the paper: 1")
    add("--B", "--ensemble-size", type=in_range(int, 1, 1_000), metavar="MEMBERS",
        help="of the meta-model")
    add("--z-dim", type=count, metavar="UNITS", help="of z")

    add = group("all nets (not in the paper)")
    add("--angles", nargs="*", type=natural, metavar="DIM",
        help="observations that are angles without bounds, in radians, counted from 0: nets read"
        " their sine and cosine", shows="none; half-cheetahs 1, the pitch")
    add("--newest-token", action=argparse.BooleanOptionalAction,
        help="the MLP sees the newest token itself, beside z")
    add("--token-changes", action=argparse.BooleanOptionalAction,
        help="each token also holds what it brought about, o_{i+1} - o_i")

    add = group("meta-model (not in the paper unless said)")
    add("--fit-every", type=count, metavar="STEPS", help="env steps between fits; the paper: E")
    add("--model-lr", type=positive, metavar="RATE", help="Adam step size")
    add("--model-decay", type=in_range(float, 0), metavar="RATE", help="L2 weight decay")
    add("--model-batch", type=count, metavar="ROWS", help="per gradient step")
    add("--model-updates", type=positive, metavar="UPDATES",
        help="gradient steps on the meta-model per env step since the last fit")
    add("--beta-nll", type=fraction, metavar="POWER",
        help="each term of the likelihood is weighed by its own variance to this power; 0 is the"
        " paper's, which learns last what is not explained yet")
    add("--reward-weight", type=positive, metavar="WEIGHT",
        help="of the reward, beside 1 per observation", shows="observation dims")
    add("--model-layer-norm", action=argparse.BooleanOptionalAction,
        help="normalise the model's hidden layers")
    add("--retain", type=count, metavar="STEPS",
        help="env steps whose rollouts D_model keeps; the lineage MBPO: E")
    add("--env-capacity", type=count, metavar="STEPS", help="most env steps kept in D_env")

    add = group("meta-policy (SAC; not in the paper unless said)")
    add("--warmup", type=count, metavar="STEPS", help="uniform random env steps at the start",
        shows=f"{shown('warmup')}; at most half the run")
    add("--batch-size", type=count, metavar="ROWS", help="per update")
    add("--lr", type=positive, metavar="RATE", help="Adam step size of policy and Q")
    add("--gamma", type=in_range(float, 0, 1, high_open=True), metavar="FACTOR", help="discount")
    add("--tau", type=in_range(float, 0, 1, low_open=True), metavar="FRACTION",
        help="of Q that enters its target per update")
    add("--alpha", type=positive, metavar="TEMPERATURE",
        help="fixed; 1.0 is the paper's literal objective", shows="tuned")
    add("--target-entropy", type=in_range(float, -math.inf), metavar="NATS",
        help="that the tuned temperature aims at", shows="minus half the action dims; toy -2")
    add("--layer-norm", action=argparse.BooleanOptionalAction, help="normalise Q's hidden layers")
    add("--reward-scale", type=positive, metavar="FACTOR",
        help="on the rewards that Q learns from; below 1 where they are large")

    add = group("the paper's variants, and one idea removed")
    add("--rollout", choices=("branched", "full"),
        help="full: M model episodes from initial histories to the horizon, one model step each per"
        " env step, never branching from D_env (Fig. 9)")
    add("--model", choices=("gru", "mlp"),
        help="mlp: M2PO, MBPO's 7 feed-forward nets of 4 x 200 that see no history (Fig. 16)")
    add("--hybrid", nargs="*", type=in_range(float, 0), metavar="EPOCH",
        help="M3PO-h: the fraction of D_model in a batch falls from 1 to 0 between epochs A and B;"
        " alone, Table 3's",
        shows="; ".join(f"{SHORT[env]} {a} {b}" for env, (a, b) in HYBRID.items()))
    add("--beta", type=fraction, metavar="FRACTION",
        help="of D_model in a batch, constant; 0 is recurrent SAC, no model")
    add("--no-token-reward", action="store_true",
        help="tokens are (o, a) as the paper prints them, not (o, a, r)")
    add("--oracle", action="store_true", help="show the hidden task to the agent: an upper bound")

    add = group("running")
    add("--switch-every", type=count, metavar="STEPS",
        help="env steps between redraws of the hidden task", shows="the env's; 300, toy 25")
    add("--reset-every", type=lambda text: natural(text) or None, metavar="STEPS",
        help="longest episode in training, 0: the env's, by which those of evaluation end",
        shows="the env's; cheetahs and ants 250")
    add("--eval-episodes", type=natural, metavar="EPISODES", help="per evaluation")
    add("--eval-every", type=count, metavar="EPOCHS", help="between evaluations; the last has one")
    add("--diagnose-every", type=natural, metavar="EPOCHS",
        help="between measurements of model error by depth and eps_pi; 0 never")
    add("--checkpoint-every", type=count, metavar="EPOCHS", help="between checkpoints")
    add("--track", action=argparse.BooleanOptionalAction,
        help="log to Weights & Biases too; needs pip install wandb")
    add("--compile", choices=("auto", "on", "off"),
        help="torch.compile, and M3PO's CUDA graphs on a GPU (see speed.py): a minute or two first,"
        " then a third faster; auto: if updates (GHP-MDP: planned steps) per epoch times width are"
        " 500,000 or more")
    if own:
        own.add_flags(group(f"{method}'s own"))
    return parser


# ---- what may not go together -------------------------------------------------------------------


def parse(argv=None, method="m3po"):
    """(flags as a namespace, the checkpoint to resume or None)."""
    parser = build_parser(method)
    given = vars(parser.parse_args(argv))
    state, saved, folder = None, {}, given.get("resume")
    if folder is not None:
        state = checkpoint_to_resume(parser, folder, given, method)
        saved = completed(state["flags"] | {"method": method}) | {"out": folder}
    short = {env_id: name for name, env_id in envs.ENVS.items()}  # M3PO/AntFwdBwd-v0
    env = (given | saved).get("env", DEFAULTS["env"])
    flags = argparse.Namespace(**defaults(short.get(env, env), method) | saved | given)
    flags.env = short.get(flags.env, flags.env)
    if "warmup" not in given | saved:
        flags.warmup = default_warmup(vars(flags))
    choose_device(parser, flags, given)
    if flags.track:
        check_tracker(parser)
    if method == "m3po":
        check_variants(parser, flags, given, state)
    if state and flags.N * flags.E < state["step"]:
        parser.refuse("N", f"{flags.N} epochs lie before the checkpoint's step {state['step']}")
    if flags.warmup > flags.N * flags.E:
        parser.refuse("warmup",
                      f"{flags.warmup} is more than the run's {flags.N * flags.E} env steps")
    if flags.out is None:
        name = flags.env.replace("/", "-").replace(":", "-")
        flags.out = f"runs/{name}__{method}__{flags.seed}__{datetime.now():%Y%m%d-%H%M%S}"
    if Path(flags.out).exists() and flags.out != folder:
        parser.refuse("out", f"{flags.out} exists; a run goes on only with --resume")
    return flags, state


def check_variants(parser, flags, given, state):
    """What M3PO's variants need and exclude."""
    if flags.hybrid is not None and not state:
        flags.hybrid = list(flags.hybrid or HYBRID.get(flags.env, ()))
        if len(flags.hybrid) != 2 or not flags.hybrid[0] < flags.hybrid[1]:
            parser.refuse("hybrid", f"needs two epochs A < B; Table 3 has values only for "
                                    f"{', '.join(HYBRID)}")
        if "beta" in given:
            parser.refuse("beta", "a constant fraction contradicts --hybrid's schedule")
    for name in ("B", "model_layer_norm") if flags.model == "mlp" else ():
        if name in given:
            parser.refuse(name, "M2PO's ensemble is MBPO's: 7 members, without layer norm")
    if flags.rollout == "full":
        if given.get("k", 1) != 1:
            parser.refuse("k", "full rollouts have no length but the episode's")
        flags.k = 1


def check_angles(parser, flags, env):
    """That the env has these dims, which the parser cannot know."""
    largest, last = max(flags.angles, default=0), env.observation_space.shape[0] - 1
    if largest > last:
        parser.refuse("angles", f"{largest} is not in 0 to {last}, the dims that are seen")


def checkpoint_to_resume(parser, folder, given, method):
    """The checkpoint in a run folder, if the flags given beside it do not contradict it."""
    try:
        state = checkpoint.read(Path(folder) / "checkpoint.pt", "run", method)
    except checkpoint.CheckpointError as error:
        parser.refuse("resume", error)
    saved = completed(state["flags"] | {"method": method})
    for name in given.keys() - MAY_CHANGE:
        if given[name] != saved.get(name):
            parser.refuse(name, f"{given[name]} contradicts the checkpoint, which has "
                                f"{saved.get(name)}")
    return state


def check_tracker(parser):
    try:
        from wandb import init as _  # not the package alone: a folder wandb/ counts as one
    except ImportError:
        parser.refuse("track", "needs Weights & Biases: python -m pip install wandb")


def choose_device(parser, flags, given):
    """Replace "auto" by what is there."""
    there = torch.cuda.is_available()
    if flags.device == "cuda" and not there and "device" in given:
        parser.refuse("device", "cuda asked for, but torch sees no CUDA device")
    if flags.device == "auto" or not there:  # also a run from a GPU, resumed where there is none
        flags.device = "cuda" if there else "cpu"
