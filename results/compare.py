"""Variants beside a control: what they return, late and on the way, and how sure that is.

    python -m results.compare results/halfcheetah-fwd-bwd/{recurrent-sac,m3po}
    python -m results.compare CONTROL VARIANT ... --until 10000   # as if all had ended there

A variant is a folder ENV/METHOD that holds its seeds. Prints a markdown row each: its flags as far
as they differ from the control's; the mean of the last five evaluations by seed, and the mean of
all, which says how soon a run learned; of both the mean over seeds, and what is left when the
control's is taken away seed by seed, over the seeds that both have, each with Student's 95 %
interval if there are two or more. Seeds are paired because runs of one seed begin with the same
weights and the same random steps, which can matter more than the variant does. Who evaluated fewer
than five times is taken as it is. All are compared after the same env steps, without --until as
many as every variant has come to; shorter runs are counted and left out.
"""

from pathlib import Path

import numpy as np

from figures import FigureError, known_mean, read_run, with_interval
from flags import CHANGES_NO_LEARNING, OneLineParser, defaults, in_range, unused
from tables import commits, read_config, text

HEADER = ("| variant | flags | seeds | last five evaluations, by seed | mean | minus the control's "
          "| mean of all | minus the control's | right way | commits |\n" + "|---" * 10 + "|")


def typed(name, value):
    """A flag with its value on a command line. One that its control alone was given: without it."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return f"(no {flag})"
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-")
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *(f"{x:g}" if isinstance(x, float) else str(x) for x in values)])


def read_seeds(folder):
    """The runs in a folder of seeds."""
    runs = sorted(map(read_run, folder.glob("seed*/")), key=lambda run: run.flags["seed"])
    if not runs:
        raise FigureError(f"{folder} holds no seed")
    return runs


def length(run):
    """Env steps."""
    return run.progress["global_step"][-1]


class Variant:
    """Those of a folder's runs that got as far as `until` env steps."""

    def __init__(self, folder, runs, until):
        self.folder = folder
        self.runs = [run for run in runs if length(run) >= until]
        self.shorter = len(runs) - len(self.runs)
        if not self.runs:
            raise FigureError(f"no run in {folder} got to {until:,.0f} env steps")
        self.seeds = [run.flags["seed"] for run in self.runs]
        self.until = until
        self.last_five = self.means("eval_return_mean", 5)
        self.all = self.means("eval_return_mean")
        self.right_way = known_mean(self.means("eval_right_way", 5))

    def means(self, column, newest=0):
        """[seeds], of the newest evaluations; 0: of all."""
        curves = [run.curve(column) for run in self.runs]
        return np.array([known_mean(values[x <= self.until / 1_000][-newest:])
                         for x, values in curves])

    def flags_beside(self, control):
        """Those that change what is learned, as they are typed; of another program none."""
        mine, other = self.runs[0].flags, control.runs[0].flags
        if mine["method"] != other["method"]:
            return "-"
        default = defaults(mine["env"], mine["method"])
        other = other | {name: default[name] for name in unused(other)}  # what it has no use for
        differ = [typed(name, value) for name, value in mine.items()
                  if name not in CHANGES_NO_LEARNING | unused(mine) and value != other.get(name)]
        return f"`{' '.join(differ)}`" if differ else "-"


def difference(values, control, digits):
    """The mean of values - control [seeds], with its interval, as text."""
    left = values - control
    if not left.size:
        return "-"  # no seed in common
    return ("" if left.mean() < 0 else "+") + with_interval(left, digits)


def row(variant, control):
    """Cells of one variant."""
    digits = 0 if abs(control.last_five).max() > 200 else 1
    seeds = " ".join(map(str, variant.seeds))
    shorter = f" ({variant.shorter} shorter)" if variant.shorter else ""
    cells = [variant.folder.name, variant.flags_beside(control), seeds + shorter,
             ", ".join(f"{value:.{digits}f}" for value in variant.last_five)]
    _, mine, its = np.intersect1d(variant.seeds, control.seeds, return_indices=True)
    for values, other in ((variant.last_five, control.last_five), (variant.all, control.all)):
        cells.append(with_interval(values, digits))
        cells.append("-" if variant is control else difference(values[mine], other[its], digits))
    return *cells, text(variant.right_way), commits(read_config(run.folder) for run in variant.runs)


def print_rows(control, *variants):
    for variant in (control, *variants):
        print("| " + " | ".join(row(variant, control)) + " |")


def main(argv=None):
    parser = OneLineParser("python -m results.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("control", type=Path, metavar="CONTROL", help="a folder ENV/METHOD")
    parser.add_argument("variants", nargs="+", type=Path, metavar="VARIANT")
    parser.add_argument("--until", type=in_range(int, 1), metavar="STEPS", help="env steps")
    args = parser.parse_args(argv)
    try:
        found = {folder: read_seeds(folder) for folder in (args.control, *args.variants)}
        until = args.until or min(max(map(length, runs)) for runs in found.values())
        control, *variants = [Variant(folder, runs, until) for folder, runs in found.items()]
    except FigureError as error:
        parser.error(str(error))
    print(f"After {until:,.0f} env steps:\n\n{HEADER}")
    print_rows(control, *variants)


if __name__ == "__main__":
    main()
