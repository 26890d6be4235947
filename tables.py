"""The tables that experiments.py writes of its grid: one per env, a row per method, in markdown.

METHODS are the rows there may be. What stands in them was read from progress.csv and config.json of
finished runs; the column of seeds says which have ended.
"""

import json
import math
from typing import NamedTuple

import numpy as np

import figures
from evaluation import early_steps


class Method(NamedTuple):
    label: str
    flags: str  # that make it
    shows: str
    program: str = "m3po"

    @property
    def slug(self):
        return self.label.lower().replace("=", "").replace(" ", "-")


METHODS = {method.slug: method for method in [
    Method("M3PO", "", "the default, k = 1"),
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


def steps(run):
    return run.wanted["N"] * run.wanted["E"]


def row(runs, kept, usual_steps):
    """A method's row: its runs of the grid in one env, and what is kept of those that ended."""
    def mean(column):
        value = figures.known_mean(np.array(
            [run.progress.get(column, [math.nan])[-1] for run in kept]))
        return f"{value:.2f}" if math.isfinite(value) else "-"

    method, returns = runs[0].method, [run.progress["eval_return_mean"] for run in kept]
    less = f", after {steps(runs[0]):,} env steps" if steps(runs[0]) != usual_steps else ""
    return "| " + " | ".join([
        f"{method.label}: {method.shows}{less}", f"`{method.flags}`" if method.flags else "-",
        figures.with_interval([values[-1] for values in returns]) if kept else "-",
        figures.with_interval([np.nanmean(values) for values in returns]) if kept else "-",
        mean("eval_right_way"),
        mean("eval_reward_after_switch") + " / " + mean("eval_reward_otherwise"),
        mean("model_explained_reward"),
        " ".join(str(run.flags["seed"]) for run in kept) or "-"]) + " |"


def table(runs, kept, env):
    """Markdown of the runs in one env; kept: {run folder: figures.Run}."""
    by_method = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    usual = runs[0]
    return "\n".join([
        f"`{usual.env}`, {usual.wanted['eval_episodes']} episodes after {steps(usual):,} env "
        "steps; means over seeds, those of returns with Student's 95 % interval."
        f"{closed_form(env)}", "",
        "| method | flags | final return | mean of all evaluations | right way | reward per step, "
        f"first {early_steps(env)} after a switch / else | explained reward, held out | seeds |",
        "|---|---|---|---|---|---|---|---|",
        *(row(twins, [kept[run.folder] for run in twins if run.folder in kept], steps(usual))
          for twins in by_method.values())]) + "\n"


def tables(runs, kept, made, line, left_out):
    """Markdown of a grid: the runs of experiments.py, those of them that ended, {name: env}, the
    command, and the flags left out for some methods as lines."""
    if not kept:
        return "No run of this grid has ended yet.\n"
    kept = {run.folder: figures.read_run(run.result) for run in kept}
    configs = [json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
               for run in kept.values()]
    used = {f"device {config['flags']['device']}, " + ", ".join(
        f"{name} {version[:12]}" for name, version in config.get("versions", {}).items())
            for config in configs}
    machines = {config.get("cpu", "a CPU") for config in configs}
    head = (f"`{line}`: {' and '.join(sorted(machines))}, median "
            f"{np.median([run.seconds() for run in kept.values()]):.0f} s per run; "
            f"{'; '.join(sorted(used))}.")
    return "\n".join([" ".join([head, *left_out]) + "\n", *(
        table([run for run in runs if run.env == name], kept, env) for name, env in made.items())])
