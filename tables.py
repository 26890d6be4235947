"""The tables that experiments.py writes of its grid: one per env, a row per method, in markdown; of
several envs one more, in which they share a scale.

METHODS are the rows there may be. What stands in them was read from progress.csv and config.json of
finished runs; the column of seeds says which have ended. Only the zero action is played for them.
"""

import json
import math
from argparse import Namespace
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

import envs
import figures
import m3po
from evaluation import Group, early_steps, evaluate, summarise


class Method(NamedTuple):
    label: str
    flags: str  # that make it
    shows: str
    program: str = "m3po"

    @property
    def slug(self):
        return self.label.lower().replace("=", "").replace(" ", "-")


METHODS = {method.slug: method for method in [
    Method("M3PO", "", "the default"),
    Method("k=1", "--k 1", "mostly the paper's: branches of one step"),
    Method("k=2", "--k 2", "model errors over two steps"),
    Method("k=5", "--k 5", "model errors over five steps"),
    Method("Full", "--rollout full", "never branches from real histories"),
    Method("M2PO", "--model mlp", "its model sees no history, so not the task"),
    Method("M3PO-h", "--hybrid 5 10", "imagined data first, real data last (epochs for the toy)"),
    Method("recurrent SAC", "--beta 0", "no model at all"),
    Method("imagined alone", "--beta 1", "no real rows in a batch, as in the paper"),
    Method("z alone", "--no-newest-token --no-token-changes --no-model-layer-norm",
           "the paper's network: only z tells the task"),
    Method("literal likelihood", "--beta-nll 0 --reward-weight 1",
           "the loss as the paper prints it"),
    Method("blind", "--L 0", "neither policy nor model sees history"),
    Method("no reward token", "--no-token-reward", "a history without what tells the task"),
    Method("oracle", "--oracle", "the task is shown: an upper bound"),
    Method("PEARL", "", "the task guessed from the last steps, no model", "pearl"),
    Method("L2A", "", "a model that adapts by one gradient step, planned in", "l2a"),
    Method("GHP-MDP", "", "a model with a latent task, inferred and planned in", "ghp_mdp"),
]}


def closed_form(env):
    """What is known exactly about returns in env. Who is not told the task gets 0 on average in the
    first step and in each step at which the task is redrawn: it may be either way."""
    if not hasattr(env.unwrapped, "ORACLE_RETURN"):
        return ""
    T, every = env.spec.max_episode_steps, env.unwrapped.switch_every
    return (f" The best possible: {env.unwrapped.ORACLE_RETURN:g} if told the task, ({T} - 1) "
            f"(1 - 1/{every}) = {(T - 1) * (1 - 1 / every):.2f} if not, 0 if blind to history.")


class ZeroAction:
    """The policy that does nothing: in the middle of each action's bounds."""

    def __init__(self, env):
        self.act_dim = env.action_space.shape[0]

    def act(self, tokens, mask, obs, deterministic):
        return torch.zeros(len(obs), self.act_dim)


def play_nothing(flags):
    """What an evaluation of the zero action finds with a run's flags, as {column: number}."""
    args = Namespace(**flags)
    with closing(Group([m3po.make_env(args) for _ in range(args.eval_episodes)])) as group:
        env, env_seeds = group.envs[0], envs.seeds(0, 1, 0, args.eval_episodes)
        episodes = evaluate(ZeroAction(env), group, env_seeds, args.L)
        return summarise(episodes, args.gamma, early_steps(env))[2]


def steps(run):
    return run.wanted["N"] * run.wanted["E"]


def between(run):
    """Env steps from one evaluation to the next."""
    return run.wanted["eval_every"] * run.wanted["E"]


def text(number):
    return f"{number:.2f}" if math.isfinite(number) else "-"


def reached(kept, half):
    """The env steps, in 1,000, after which a run's return was first above `half`: median over the
    runs, one that never got there counting as later than all; and how many did where it was not
    all. "never" where that is the median; "-" without a half or a run."""
    first = []
    for run in kept:
        x, values = run.curve("eval_return_mean")
        first += [*x[values >= half], math.inf][:1]
    if not kept or math.isnan(half):
        return "-"
    got, median = np.isfinite(first).sum(), np.median(first)
    of = f" ({got} of {len(first)})" if got < len(first) else ""
    return (f"{median:.1f}" if math.isfinite(median) else "never") + of


def row(runs, kept, usual, half):
    """A method's row: its runs of the grid in one env, and what is kept of those that ended. usual:
    a run of the first row, from which this one may differ in its length or evaluations."""
    def mean(column):
        return text(figures.known_mean(np.array(
            [run.progress.get(column, [math.nan])[-1] for run in kept])))

    method, returns = runs[0].method, [run.curve("eval_return_mean")[1] for run in kept]
    less = f", after {steps(runs[0]):,} env steps" if steps(runs[0]) != steps(usual) else ""
    seldom = f", evaluated every {every:,}" if (every := between(runs[0])) != between(usual) else ""
    return "| " + " | ".join([
        f"{method.label}: {method.shows}{less}{seldom}",
        f"`{method.flags}`" if method.flags else "-",
        figures.with_interval([values[-1] for values in returns]) if kept else "-",
        figures.with_interval([values.mean() for values in returns]) if kept else "-",
        reached(kept, half), mean("eval_right_way"),
        mean("eval_reward_after_switch") + " / " + mean("eval_reward_otherwise"),
        mean("model_explained_reward"),
        " ".join(str(run.flags["seed"]) for run in kept) or "-"]) + " |"


def read_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def versions(config):
    """Of commit and packages: those a run began with, and those it met when it was resumed."""
    return [config.get("versions", {}), *config.get("later", [])]


def commits(configs):
    """Those of runs, as text."""
    return ", ".join(sorted({of_run["commit"][:7] for config in configs
                             for of_run in versions(config) if of_run.get("commit")})) or "unknown"


def final_returns(twins, kept):
    """{seed: last return} of a method's runs in one env that ended."""
    return {run.seed: kept[run.folder].curve("eval_return_mean")[1][-1]
            for run in twins if run.folder in kept}


def grouped(runs):
    """{method: its runs}."""
    by_method = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return by_method


def means(by_method, kept):
    """{method: mean of its last returns in one env}, of those with a run that ended."""
    finals = {method: final_returns(twins, kept) for method, twins in by_method.items()}
    return {method: np.mean(list(final.values())) for method, final in finals.items() if final}


def best_return(by_method, kept):
    """The highest mean of last returns; the oracle, a bound, is not in the running."""
    return max((value for method, value in means(by_method, kept).items()
                if method.slug != "oracle"), default=math.nan)


def table(runs, kept, env, zero):
    """Markdown of the runs in one env; kept: {run folder: figures.Run}; zero: of play_nothing.
    Half the way is that from the zero action's return to the best method's last one."""
    by_method, usual, low = grouped(runs), runs[0], zero["eval_return_mean"]
    best = best_return(by_method, kept)
    half = (low + best) / 2 if best > low else math.nan
    nothing = " | ".join([
        "zero action", "-", f"{low:.1f}", "-", "-",
        text(zero["eval_right_way"]), text(zero["eval_reward_after_switch"]) + " / "
        + text(zero["eval_reward_otherwise"]), "-", "-"])
    return "\n".join([
        f"`{usual.env}`, {usual.wanted['eval_episodes']} episodes after {steps(usual):,} env "
        "steps; means over seeds, those of returns with Student's 95 % interval. Half: half the "
        "way from the zero action to the best method, the median over seeds."
        f"{closed_form(env)}", "",
        "| method | flags | final return | mean of all evaluations | 1,000 steps to half | right "
        f"way | reward per step, first {early_steps(env)} after a switch / else | explained reward,"
        " held out | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(twins, [kept[run.folder] for run in twins if run.folder in kept], usual, half)
          for twins in by_method.values()), f"| {nothing} |"]) + "\n"


def overview(runs, kept, zeros):
    """Markdown of what the methods reach in all envs together; zeros: {env: return}. A return is
    put on a scale on which the zero action is 0 and the env's best method 1; where no method is
    better than the zero action, that is 1 and the lowest mean of a method 0. Of a seed's envs
    stands the interquartile mean, of the seeds the mean, with its interval."""
    from scipy import stats
    scaled, below = {}, []  # {method: {seed: [value per env]}}
    for env, zero in zeros.items():
        by_method = grouped([run for run in runs if run.env == env])
        low, high = zero, best_return(by_method, kept)
        if high <= zero:
            below.append(env)
            low, high = min(means(by_method, kept).values()), zero
        for method, twins in by_method.items():
            values = scaled.setdefault(method, {})
            for seed, value in final_returns(twins, kept).items():
                values.setdefault(seed, []).append((value - low) / (high - low))
    rows = []
    for method, by_seed in scaled.items():
        whole = [stats.trim_mean(values, 0.25) for values in by_seed.values()
                 if len(values) == len(zeros)]
        shown = figures.with_interval(whole, 2) if whole else "-"
        rows.append(f"| {method.label} | {shown} | {len(whole)} |")
    middle = "interquartile mean" if len(zeros) > 3 else "mean"  # of three nothing can be cut off
    but = f" In {' and '.join(below)} no method is better than the zero action: there that is 1, " \
          "and 0 the lowest mean of a method." if below else ""
    return "\n".join([
        f"All {len(zeros)} envs: final return on a scale from 0, the zero action, to 1, the best "
        f"method's mean (an estimate itself); the {middle} over envs of each seed, then mean over "
        f"the seeds that ended in all of them, and Student's 95 % interval.{but}", "",
        f"| method | {middle} | seeds |", "|---|---|---|", *rows]) + "\n"


def tables(runs, kept, made, line, left_out):
    """Markdown of a grid: the runs of experiments.py, those of them that ended, {name: env}, the
    command, and the flags left out for some methods as lines."""
    if not kept:
        return "No run of this grid has ended yet.\n"
    kept = {run.folder: figures.read_run(run.result) for run in kept}
    configs = [read_config(run.folder) for run in kept.values()]
    used = {f"device {config['flags']['device']}, " + ", ".join(
        f"{name} {number[:12]}" for name, number in of_run.items() if name != "commit")
            for config in configs for of_run in versions(config)}
    machines = {config.get("cpu", "a CPU") for config in configs}
    head = (f"`{line}`: {' and '.join(sorted(machines))}, median "
            f"{np.median([run.seconds() for run in kept.values()]):.0f} s per run; "
            f"{'; '.join(sorted(used))}; commits {commits(configs)}.")
    parts, zeros = [], {}
    for name, env in made.items():
        of_env = [run for run in runs if run.env == name]
        zero = play_nothing(of_env[0].wanted)
        parts.append(table(of_env, kept, env, zero))
        zeros[name] = zero["eval_return_mean"]
    if len(made) > 1:
        parts.append(overview(runs, kept, zeros))
    return "\n".join([" ".join([head, *left_out]) + "\n", *parts])
