"""The table that experiments.py writes of its grid: a row per method, env by env, in markdown; of
several envs one more, in which they share a scale.

METHODS are the rows there may be. What stands in them was read from progress.csv and config.json of
finished runs; the column of seeds says which have ended. Only the zero action and random ones are
played for them.
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


REFERENCE_EPISODES = 20  # of the zero action and of random ones
CURVE = 5  # evaluations, of which fewer say nothing of how fast a run learned


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
    Method("k=1", "--k 1", "branches of one step, as in the paper"),
    Method("k=2", "--k 2", "model errors over two steps"),
    Method("k=5", "--k 5", "model errors over five steps"),
    Method("Full", "--rollout full", "never branches from real histories"),
    Method("M2PO", "--model mlp", "its model sees no history, so not the task"),
    Method("M3PO-h", "--hybrid 5 10",
           "imagined data first, real data last (beta falls from epoch 5 to 10)"),
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


class NoPolicy:
    """Learns nothing: it acts at random, or not at all, in the middle of each action's bounds."""

    def __init__(self, env, at_random):
        self.act_dim, self.at_random = env.action_space.shape[0], at_random
        self.generator = torch.Generator().manual_seed(0)

    def act(self, tokens, mask, obs, deterministic):
        uniform = 2 * torch.rand(len(obs), self.act_dim, generator=self.generator) - 1
        return self.at_random * uniform


def play_references(flags):
    """What evaluations of the zero action and of random ones find with a run's flags, each as
    {column: number}."""
    args = Namespace(**flags)
    with closing(Group([m3po.make_env(args) for _ in range(REFERENCE_EPISODES)])) as group:
        env, env_seeds = group.envs[0], envs.seeds(0, 1, 0, REFERENCE_EPISODES)
        return [summarise(evaluate(NoPolicy(env, at_random), group, env_seeds, args.L), args.gamma,
                          early_steps(env))[2] for at_random in (False, True)]


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


def late_return(run):
    """Mean return of the evaluations in the last quarter of a run's env steps."""
    x, values = run.curve("eval_return_mean")
    return values[x > 0.75 * x[-1]].mean()


def row(runs, kept, usual, half):
    """A method's row: its runs of the grid in one env, and what is kept of those that ended. usual:
    a run of the first row, from which this one may differ in its length or evaluations; where
    these are fewer than CURVE, columns about the whole curve stay empty."""
    def mean(column):
        return text(figures.known_mean(np.array(
            [run.progress.get(column, [math.nan])[-1] for run in kept])))

    method, returns = runs[0].method, [run.curve("eval_return_mean")[1] for run in kept]
    less = f", after {steps(runs[0]):,} env steps" if steps(runs[0]) != steps(usual) else ""
    seldom = f", evaluated every {every:,}" if (every := between(runs[0])) != between(usual) else ""
    shown = lambda values: figures.with_interval(values) if values else "-"
    curves = kept if steps(runs[0]) >= CURVE * between(runs[0]) else []
    return "| " + " | ".join([
        f"{method.label}: {method.shows}{less}{seldom}",
        f"`{method.flags}`" if method.flags else "-",
        shown([values[-1] for values in returns]), shown([late_return(run) for run in kept]),
        shown([run.curve("eval_return_mean")[1].mean() for run in curves]), reached(curves, half),
        mean("eval_right_way"),
        mean("eval_reward_after_switch") + " / " + mean("eval_reward_otherwise"),
        mean("model_explained_reward"),
        " ".join(str(run.flags["seed"]) for run in kept) or "-"]) + " |"


def reference_row(name, found):
    """Of play_references."""
    return "| " + " | ".join([
        name, "-", f"{found['eval_return_mean']:.1f}", "-", "-", "-", text(found["eval_right_way"]),
        text(found["eval_reward_after_switch"]) + " / " + text(found["eval_reward_otherwise"]),
        "-", "-"]) + " |"


def read_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def versions(config):
    """Of commit and packages: those a run began with, and those it met when it was resumed."""
    return [config.get("versions", {}), *config.get("later", [])]


def commits(configs):
    """Those of runs, as text."""
    return ", ".join(sorted({of_run["commit"][:7] for config in configs
                             for of_run in versions(config) if of_run.get("commit")})) or "unknown"


def late_returns(twins, kept):
    """{seed: late_return} of a method's runs in one env that ended."""
    return {run.seed: late_return(kept[run.folder]) for run in twins if run.folder in kept}


def grouped(runs):
    """{method: its runs}."""
    by_method = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return by_method


def best_return(by_method, kept):
    """The highest mean of late returns in one env, NaN where no run ended. Not in the running are
    the oracle, a bound, and who has fewer than three seeds, or fewer than anybody has."""
    found = [list(late_returns(twins, kept).values()) for method, twins in by_method.items()
             if method.slug != "oracle"]
    enough = min(3, max(map(len, found), default=1)) or 1
    return max((np.mean(values) for values in found if len(values) >= enough), default=math.nan)


HEADER = """\
Means over seeds, those of returns with Student's 95 % interval. Late: mean of the evaluations in \
the last quarter of the steps. Half: half the way from random actions to the best method's late \
return, the median over seeds. Early: as many steps after a switch as the row of the env says. \
"-": has not ended, does not exist or, of whole curves, has fewer than five evaluations.

| method | flags | final return | late | mean of all evaluations | 1,000 steps to half | right way \
| reward per step, early after a switch / else | explained reward, held out | seeds |
|---|---|---|---|---|---|---|---|---|---|"""


def rows_of_env(runs, kept, env, zero, at_random):
    """Rows of the runs in one env, under one that names it; kept: {run folder: figures.Run}; the
    last two are of play_references."""
    by_method, usual = grouped(runs), runs[0]
    half = (at_random["eval_return_mean"] + best_return(by_method, kept)) / 2
    return [
        f"| **`{usual.env}`**, {usual.wanted['eval_episodes']} episodes after {steps(usual):,} env "
        f"steps; early: {early_steps(env)}.{closed_form(env)} |" + " |" * 9,
        *(row(twins, [kept[run.folder] for run in twins if run.folder in kept], usual, half)
          for twins in by_method.values()),
        reference_row("zero action", zero), reference_row("random actions", at_random)]


def overview(runs, kept, played):
    """Markdown of what the methods reach in all envs together; played: {env: returns of the zero
    action and of random ones}. A late return is put on a scale on which random actions are 0 and
    the env's best method 1, which no env's bonus for staying upright can make small."""
    from scipy import stats
    scaled, zeros, without = {}, [], []  # scaled: {method: {env: {seed: value}}}
    for env, (zero, low) in played.items():
        by_method = grouped([run for run in runs if run.env == env])
        high = best_return(by_method, kept)
        if not high > low:  # also where no run has ended
            without.append(env)
            continue
        zeros.append((zero - low) / (high - low))
        for method, twins in by_method.items():
            scaled.setdefault(method, {})[env] = {
                seed: (value - low) / (high - low)
                for seed, value in late_returns(twins, kept).items()}
    known = [env for env in played if env not in without]
    if not known:
        return "In no env is a run above random actions.\n"
    cut, rows = len(known) // 4, []  # at each end
    over = lambda values: [np.mean(values), stats.trim_mean(values, 0.25)][:1 + (cut > 0)]
    for method, by_env in scaled.items():
        columns = [by_env.get(env, {}) for env in known]
        whole = [[column[seed] for column in columns] for seed in columns[0]
                 if all(seed in column for column in columns)]  # [seeds][envs]
        per_seed = zip(*map(over, whole)) if whole else [()] * len(over(zeros))
        rows.append([method.label, *(text(np.mean(list(column.values()))) if column else "-"
                                     for column in columns),
                     *(figures.with_interval(list(values), 2) if values else "-"
                       for values in per_seed), str(len(whole))])
    rows.append(["zero action", *map(text, zeros), *map(text, over(zeros)), "-"])
    middle = ["interquartile mean"] * (cut > 0)
    but = f" Interquartile: without the {cut} lowest and highest of its envs." * (cut > 0)
    if without:
        but += f" Without {', '.join(without)}, where no run is above random actions."
    head = ["method", *known, "mean", *middle, "seeds"]
    return "\n".join([
        "All envs together: late returns on a scale from 0, random actions, to 1, the best "
        "method's mean (an estimate itself), as means over seeds. Over the envs: of each seed that "
        "ended in all of them, then the mean over those seeds, and Student's 95 % interval."
        f"{but}", "",
        *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))]) + "\n"


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
    rows, played = [], {}
    for name, env in made.items():
        of_env = [run for run in runs if run.env == name]
        references = play_references(of_env[0].wanted)
        rows += rows_of_env(of_env, kept, env, *references)
        played[name] = [found["eval_return_mean"] for found in references]
    parts = [" ".join([head, *left_out]) + "\n", "\n".join([HEADER, *rows]) + "\n"]
    return "\n".join([*parts, *([overview(runs, kept, played)] if len(made) > 1 else [])])
