"""The paper's figures, drawn from runs. Needs matplotlib and SciPy; training needs neither.

    python figures.py curves runs/ant* --out curves.png           learning curves (Figures 7, 9, 16)
    python figures.py adaptation runs/ant* --out adaptation.png   reward around a switch of the task
    python figures.py theory runs/ant* --out theory.png           Figures 11, 12, 17, the two gaps
    python figures.py envs --out envs.png                         the environments (Figure 6)

A run is a folder with config.json and progress.csv: a run folder, or what experiments.py keeps of
one in results/; `adaptation` needs switches.csv too, and like `theory` takes one env at a time.
Runs are grouped by env and variant, which is what in config.json differs from m3po.py's defaults
for that env. Lines are means over seeds, each seed faint; bands are Student's 95 % intervals,
because a bootstrap over two to five seeds covers too little. A table prints beside each plot.
Figure 4 comes from bounds.py.
"""

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import drawing
import envs
import play
from flags import OneLineParser, completed, defaults, differences, unused
from logs import method_name

# Okabe and Ito's colours and four of Tol's, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442",
           "#882255", "#44AA99", "#999933", "#777777")
DPI = 150
STRUCTURE = set("k L B rollout model hybrid beta no_token_reward oracle beta_nll reward_weight "
                "alpha".split())  # flags that make a variant, also where all runs share them
NAMED = {  # flag: value, or None for all, and how the paper and the README call it ({0}: value)
    "hybrid": (None, "M3PO-h {0[0]:g} to {0[1]:g}"), "model": ("mlp", "M2PO"),
    "rollout": ("full", "Full"),
    "beta": (0, "recurrent SAC"), "L": (0, "blind (L = 0)"), "oracle": (True, "oracle"),
    "no_token_reward": (True, "no reward token"), "angles": ([], "raw angles")}
TOGETHER = {  # flags that make a variant if they differ like this
    "literal likelihood": {"beta_nll": 0, "reward_weight": 1}, "imagined alone": {"beta": 1},
    "raw angles, no early resets": {"angles": [], "reset_every": None},
    "z alone": {"newest_token": False, "token_changes": False, "model_layer_norm": False}}
THEORY = (  # columns of progress.csv, drawn solid and dashed; axis; title
    (("model_nll",), "NLL on held-out rows (nats)", "Figure 11: the meta-model"),
    (("kl_pi",), r"KL($\pi$ || $\pi_D$) (nats)", "Figure 12: the policy against the data's"),
    (("td_error",), "mean |TD error| (reward units)", "Figure 17: Q"),
    (("gap_full", "gap_branched"), "gap (reward units)", "Theorems 1 (solid) and 2 (dashed)"))

DRAWN = {"global_step", "eval_return_mean", *(c for columns, *_ in THEORY for c in columns)}


class FigureError(Exception):
    """A picture that cannot be drawn. The message is one line."""


# ---- statistics ---------------------------------------------------------------------------------


def known_mean(values, axis=0):
    """Mean over axis of what is not NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    n = known.sum(axis)
    return np.where(n, np.where(known, values, 0.0).sum(axis) / np.maximum(n, 1), np.nan)


def students_interval(values, level=0.95):
    """Of the mean over axis 0 of values [n, ...]: (low, high), each [...]. What is NaN is left out;
    fewer than two values have no interval: NaN."""
    from scipy import stats
    values = np.asarray(values, float)
    mean, n = known_mean(values), np.isfinite(values).sum(0)
    variance = known_mean((values - mean) ** 2) * n / np.where(n > 1, n - 1, np.nan)  # NaN if n < 2
    half = stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * np.sqrt(variance / n)
    return mean - half, mean + half


# ---- reading runs -------------------------------------------------------------------------------


@dataclass
class Run:
    folder: Path
    flags: dict
    progress: dict  # column: array, one entry per epoch, NaN where nothing was measured

    def curve(self, column):
        """(env steps in thousands, values) where the column holds a number."""
        steps = self.progress["global_step"] / 1_000
        values = self.progress.get(column, np.full(len(steps), np.nan))
        there = np.isfinite(values)
        return steps[there], values[there]

    def seconds(self):
        """Wall time that it took."""
        return float(sum(np.nansum(column) for name, column in self.progress.items()
                         if name.startswith("seconds_")))


def read_flags(folder):
    """Those in a run's config.json; FigureError says what of it is broken."""
    config = Path(folder) / "config.json"
    for path in (config.parent, config):
        if not path.exists():
            raise FigureError(f"{path} does not exist")
    try:
        flags = json.loads(config.read_text(encoding="utf-8"))["flags"]
        flags["env"], flags["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise FigureError(f"{config} is broken: no flags with env and seed") from error
    return completed(flags)


def read_run(folder):
    """A run's config.json and progress.csv; FigureError says what of them is broken. Columns may be
    missing, and what no figure draws may hold words."""
    flags, progress = read_flags(folder), Path(folder) / "progress.csv"
    if not progress.exists():
        raise FigureError(f"{progress} does not exist; did the first epoch end?")
    try:
        with open(progress, newline="", encoding="utf-8") as f:
            header, *rows = list(csv.reader(f)) or [[]]
        rows = [row for row in rows if len(row) == len(header)]  # the last may be half written
        columns = {}
        for name, cells in zip(header, zip(*rows)):
            try:
                columns[name] = np.array([float(cell or "nan") for cell in cells])
            except ValueError:
                if name in DRAWN:
                    raise
    except ValueError as error:
        raise FigureError(f"{progress} is broken: {error}") from error
    if not rows or "global_step" not in header:
        raise FigureError(f"{progress} has no " + ("rows" if not rows else "column global_step"))
    return Run(Path(folder), flags, columns)


def variant(differs, method="m3po"):
    """The name of a run with these differences; "M3PO" if there are none. A baseline's begins with
    its method."""
    differs, names = dict(differs), [] if method == "m3po" else [method_name(method)]
    for words, flags in TOGETHER.items():
        if flags.items() <= differs.items():
            names.append(words)
            differs = {name: value for name, value in differs.items() if name not in flags}
    for name, value in differs.items():
        named, words = NAMED.get(name, (value, ""))
        plain = f"{name.replace('_', ' ')} = {value}"
        names.append(words.format(value) if words and named in (None, value) else plain)
    return ", ".join(names) or "M3PO"


def read_runs(folders, one_env=False):
    """{env: {variant: [Run, ...]}}, and {env: title} with the settings that all its runs share."""
    by_env, groups, titles = {}, {}, {}
    for run in map(read_run, folders):
        by_env.setdefault(run.flags["env"], []).append(run)
    if one_env and len(by_env) > 1:
        raise FigureError(f"{' and '.join(by_env)} have no common scale here: one env at a time")
    for env, runs in by_env.items():
        differs = [differences(run.flags) for run in runs]
        has = [defaults(env, run.flags["method"]).keys() - unused(run.flags)  # a baseline less
               for run in runs]
        shared = {name: value for d in differs for name, value in d.items()
                  if name not in STRUCTURE and all(
                      name not in flags or name in other and other[name] == value
                      for other, flags in zip(differs, has))}
        titles[env] = f"{env}\n{variant(shared)}" if shared else env
        groups[env] = {}
        for run, d in zip(runs, differs):
            label = variant({name: value for name, value in d.items() if name not in shared},
                            run.flags["method"])
            groups[env].setdefault(label, []).append(run)
        named = [item for group in groups[env].items() for item in apart(*group).items()]
        groups[env] = dict(sorted(named, key=lambda item: item[0] != "M3PO"))
    return groups, titles


def apart(label, runs):
    """{label: runs} of runs with the same flags: by folder where a seed comes twice, as in
    ENV/METHOD/seedS of other commits."""
    by_folder = {}
    for run in runs:
        of_seed = by_folder.setdefault(run.folder.resolve().parent, {})
        twin = of_seed.setdefault(run.flags["seed"], run)
        if twin is not run:
            raise FigureError(f"{twin.folder} and {run.folder} are one variant ({label}) with one "
                              f"seed ({run.flags['seed']})")
    if len({run.flags["seed"] for run in runs}) == len(runs):
        return {label: runs}
    root = os.path.commonpath(by_folder)
    return {f"{label}, {folder.relative_to(root)}": list(of_seed.values())
            for folder, of_seed in by_folder.items()}


def over_seeds(runs, column):
    """(thousand steps [T], values [seeds, T]) at the steps at which every run has measured."""
    measured = [run.curve(column) for run in runs]
    for run, (x, _) in zip(runs, measured):
        if not len(x):
            raise FigureError(f"{run.folder}/progress.csv has no number in column {column}")
    x = measured[0][0]
    for other, _ in measured[1:]:
        x = np.intersect1d(x, other)
    if not len(x):
        raise FigureError(f"{column} was measured at no common step in "
                          + ", ".join(str(run.folder) for run in runs))
    return x, np.stack([values[np.isin(steps, x)] for steps, values in measured])


# ---- tables -------------------------------------------------------------------------------------


def print_table(*rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def with_interval(values, digits=1):
    """The mean of values [n] and its interval as text; the mean alone if n is 1."""
    show = lambda number: f"{number:.{digits}f}"
    span = f" [{', '.join(map(show, students_interval(values)))}]" if len(values) > 1 else ""
    return show(np.mean(values)) + span


def summary(groups):
    """Prints one row per env and variant. A seed's last return is the mean of one evaluation, its
    last five of five; the area under its curve is divided by the steps, so that it is a return
    too."""
    rows = []
    for env, variants in groups.items():
        for label, runs in variants.items():
            x, values = over_seeds(runs, "eval_return_mean")
            last = values[:, -1]
            trapezia = (values[:, 1:] + values[:, :-1]) / 2 * np.diff(x)
            area = trapezia.sum(1) / (x[-1] - x[0]) if len(x) > 1 else last
            seconds = sum(run.seconds() for run in runs)
            rows.append((env, label, str(len(runs)), f"{x[-1]:g}",
                         with_interval(values[:, -5:].mean(1)), with_interval(last),
                         f"{area.mean():.1f}",
                         f"{seconds / len(runs) / 60:.1f} min" if seconds else "-"))
    print_table(("env", "variant", "seeds", "1000 steps", "last five [95 %]",
                 "last return [95 %]", "area under curve", "wall time"), *rows)


# ---- drawing ------------------------------------------------------------------------------------


def panels(n, columns=3, width=5.2, height=3.6):
    """A figure of n panels with room for the legend below; its size is all that n decides."""
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    figure, _ = drawing.canvas(width * columns, height * rows + 0.6, DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, axes[:n]


def palette(groups):
    """{variant: colour}, the same in every panel."""
    labels = dict.fromkeys(label for variants in groups.values() for label in variants)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def with_seeds(groups):
    """{variant: its name in a legend, with the number of seeds}: one seed has no band, which would
    look as if it were sure."""
    found = {}
    for variants in groups.values():
        for label, runs in variants.items():
            found.setdefault(label, []).append(len(runs))
    spans = {label: sorted({min(n), max(n)}) for label, n in found.items()}
    return {label: f"{label} ({' to '.join(map(str, n))} seed{'s' * (n[-1] > 1)})"
            for label, n in spans.items()}


def draw_group(ax, x, values, interval, colour, label=None, ls="-"):
    """The mean of values [seeds, T], its interval as a band, and each seed faint."""
    ax.fill_between(x, *interval, color=colour, alpha=0.2, lw=0)
    for row in values if len(values) > 1 else ():
        ax.plot(x, row, color=colour, lw=0.7, alpha=0.4, ls=ls)
    marker = {"-": "o", "--": "s"}[ls] if len(x) < 3 else None
    ax.plot(x, known_mean(values), color=colour, lw=1.8, label=label, marker=marker, ms=4, ls=ls)


def keep_curves_in_sight(ax):
    """The wide bands of few seeds may be cut: outside the seeds' range they get half as much room
    again."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    bottom, top = ax.get_ylim()
    room = (high - low) / 4 or top - bottom
    ax.set_ylim(max(bottom, low - room), min(top, high + room))


def finish(figure, axes, path):
    """Grid, one legend for all panels below them, and the file."""
    entries = {}
    for ax in axes:
        ax.grid(alpha=0.25)
        handles, labels = ax.get_legend_handles_labels()
        entries = dict(zip(labels, handles)) | entries
    inches = max(2.5, 0.6 + 0.075 * max(map(len, entries), default=0))  # for a name
    columns = max(1, int(figure.get_figwidth() // inches))
    more = math.ceil(len(entries) / columns) - 2  # rows that panels() left no room for
    figure.set_figheight(figure.get_figheight() + 0.2 * max(more, 0))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", frameon=False,
                  ncols=columns, fontsize=9)
    figure.savefig(path)


def curves(args):
    """One panel per env: return against env steps."""
    groups, titles = read_runs(args.runs)
    summary(groups)
    figure, axes = panels(len(groups))
    colours, names = palette(groups), with_seeds(groups)
    for ax, (env, variants) in zip(axes, groups.items()):
        for label, runs in variants.items():
            x, values = over_seeds(runs, "eval_return_mean")
            draw_group(ax, x, values, students_interval(values), colours[label],
                       names[label])
        ax.set_title(titles[env], fontsize=9)
        ax.set(xlabel="1,000 env steps", ylabel="return per episode")
        ax.set_xlim(left=0)
        keep_curves_in_sight(ax)
    finish(figure, axes, args.out)


def theory(args):
    """One panel per quantity of THEORY; a quantity that no run measured says so."""
    groups, titles = read_runs(args.runs, one_env=True)
    (env, variants), colours = next(iter(groups.items())), palette(groups)
    every = [run for runs in variants.values() for run in runs]
    if not any(len(run.curve(c)[0]) for run in every for columns, *_ in THEORY for c in columns):
        raise FigureError("no run has a number in model_nll, kl_pi, td_error or the gaps")
    summary(groups)
    figure, axes = panels(len(THEORY), columns=2)
    for ax, (columns, ylabel, name) in zip(axes, THEORY):
        for label, runs in variants.items():
            for column, ls in zip(columns, ("-", "--")):
                measured = [run for run in runs if len(run.curve(column)[0])]
                if measured:
                    x, values = over_seeds(measured, column)
                    draw_group(ax, x, values, students_interval(values), colours[label],
                               label if ls == "-" else None, ls)
        if not ax.lines:
            ax.text(0.5, 0.5, f"{' and '.join(columns)}: not measured", ha="center",
                    transform=ax.transAxes)
        ax.set_title(name, fontsize=10)
        ax.set(xlabel="1,000 env steps", ylabel=ylabel,
               xlim=(0, max(run.progress["global_step"].max() for run in every) / 950))
    figure.suptitle(titles[env], fontsize=10)
    finish(figure, axes, args.out)


def around_switches(run):
    """Steps from a switch [T], the run's mean reward there in its last evaluation [T], and of how
    many switches."""
    path = run.folder / "switches.csv"
    if not path.exists():
        raise FigureError(f"{path} does not exist: no task switched in its evaluations, or the run "
                          "is older than that file")
    try:
        x, reward, switches = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True, ndmin=2)
    except ValueError as error:
        raise FigureError(f"{path} is broken: {error}") from error
    return x.astype(int), reward, int(switches.max())


def steps_to_recover(x, reward):
    """First step after the worst one after a switch with nine tenths of the way back to the reward
    before the switch; None if there is none."""
    before, worst = known_mean(reward[x < 0]), np.nanmin(reward[x >= 0])
    fallen = x[(x >= 0) & (reward == worst)][0]
    back = (x > fallen) & (reward >= worst + 0.9 * (before - worst))
    return int(x[back][0]) if back.any() and before > worst else None


def adaptation(args):
    """Reward around switches."""
    groups, titles = read_runs(args.runs, one_env=True)
    (env, variants), colours = next(iter(groups.items())), palette(groups)
    names = with_seeds(groups)
    figure, axes = panels(1, width=7)
    table = []
    for label, runs in variants.items():
        xs, rows, switches = zip(*map(around_switches, runs))
        x = xs[0]
        if any(not np.array_equal(x, other) for other in xs):
            raise FigureError(f"the runs of {label} look at other steps around a switch")
        values = np.stack(rows)
        draw_group(axes[0], x, values, students_interval(values), colours[label], names[label])
        mean = known_mean(values)
        before, after = known_mean(mean[x < 0]), known_mean(mean[(x >= 0) & (x < 5)])
        steps = [steps_to_recover(x, row) if after < before else None for row in values]
        table.append((env, label, str(sum(switches)), f"{before:.2f}", f"{after:.2f}",
                      ", ".join(str(step or "-") for step in steps)))
    summary(groups)
    print_table(("env", "variant", "switches", "reward before", "in the 5 steps after",
                 "steps to 90 % of the way back, by seed"), *table)
    axes[0].axvline(0, color="black", lw=1, ls="--")
    axes[0].set_title(titles[env], fontsize=9)
    axes[0].set(xlabel="env steps since the hidden task switched", ylabel="reward per env step")
    finish(figure, axes, args.out)


def gallery(args):
    """Figure 6: the robots shortly after a reset, four in a row, and the toy, played well."""
    drawing.choose_gl()
    robots = [name for name in envs.ENVS if name != "point-fwd-bwd"]
    n_rows = math.ceil((len(robots) + 2) / 4)
    figure, _ = drawing.canvas(12, 2.7 * n_rows, DPI)
    rows = [(row, row.add_gridspec(1, 4)) for row in figure.subfigures(n_rows, squeeze=False)[:, 0]]
    places = [(*rows[i // 4], i % 4) for i in range(len(robots))] + [(*rows[-1], slice(2, 4))]
    for (row, grid, place), name in zip(places, [*robots, "point-fwd-bwd"], strict=True):
        ax, film = row.add_subplot(grid[place]), drawing.Film(envs.make(name))
        film.reset(seed=29)
        for _ in range(100 if drawing.is_toy(film) else 8):
            size = film.unwrapped.clock.task[0] if drawing.is_toy(film) else 0.0
            film.step(np.full(film.action_space.shape, size, np.float32))
        if drawing.is_toy(film):
            drawing.draw_timeline(ax, film, 0, len(film))
        else:
            stage = drawing.Stage(film)
            ax.imshow(stage.frame(len(film) - 1))
            stage.close()
            ax.set(xticks=[], yticks=[], xlabel=film.words(len(film) - 1))
        ax.set_title(name, fontsize=10, pad=18 if drawing.is_toy(film) else None)
    figure.savefig(args.out)


# ---- the command --------------------------------------------------------------------------------


def build_parser():
    p = OneLineParser("figures.py", description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(dest="command", required=True, metavar="FIGURE")
    for draw, text in ((curves, "learning curves, one panel per env"),
                       (adaptation, "reward around switches of the task, in the last evaluation"),
                       (theory, "model NLL, KL of the policies, TD error, the theorems' gaps"),
                       (gallery, "the environments")):
        name = "envs" if draw is gallery else draw.__name__
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(draw=draw)
        if draw is not gallery:
            c.add_argument("runs", nargs="+", metavar="RUN_DIR",
                           help="run folders, or what is kept of them in results/")
        c.add_argument("--out", required=True, type=play.output_path(".png", ".pdf", ".svg"),
                       metavar="PATH", help="where to draw: .png, .pdf or .svg")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        play.need("figures.py", "matplotlib")
        play.need("figures.py", "scipy")
        args.draw(args)
    except (FigureError, play.PlayError, OSError) as error:
        parser.error(str(error))
    print(f"written      {args.out}")


if __name__ == "__main__":
    main()
