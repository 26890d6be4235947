"""Variants beside a control: the mean of the last five evaluations, and how sure the difference is.

    python -m results.compare results/halfcheetah-fwd-bwd/{recurrent-sac,m3po}
    python -m results.compare CONTROL VARIANT ... --until 10000   # as if all had ended there

A variant is a folder ENV/METHOD that holds its seeds. Prints a markdown row each: its flags as far
as they differ from the control's, its returns by seed, their mean with Student's 95 % interval, and
what is left when the control's mean is taken away, with Welch's, which lets variances differ. One
seed of either has no interval. Who evaluated fewer than five times is taken as it is; runs shorter
than asked are counted and left out.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from figures import FigureError, known_mean, read_run, with_interval
from flags import CHANGES_NO_LEARNING, OneLineParser, in_range
from tables import commits, read_config, text


def typed(name, value):
    """A flag with its value on a command line. One that its control alone was given: without it."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return f"(no {flag})"
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-")
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *(f"{x:g}" if isinstance(x, float) else str(x) for x in values)])


class Variant:
    """The runs in a folder of seeds that got as far as `until` env steps, or all that did."""

    def __init__(self, folder, until):
        self.folder = folder
        runs = sorted(map(read_run, folder.glob("seed*")), key=lambda run: run.flags["seed"])
        if not runs:
            raise FigureError(f"{folder} holds no seed")
        until = until or max(run.progress["global_step"][-1] for run in runs)
        self.runs = [run for run in runs if run.progress["global_step"][-1] >= until]
        self.shorter = len(runs) - len(self.runs)
        if not self.runs:
            raise FigureError(f"no run in {folder} got to {until:,.0f} env steps")
        self.seeds = [run.flags["seed"] for run in self.runs]
        self.returns = np.array([self.last_five(run, "eval_return_mean", until)
                                 for run in self.runs])
        self.right_way = known_mean([self.last_five(run, "eval_right_way", until)
                                     for run in self.runs])

    @staticmethod
    def last_five(run, column, until):
        x, values = run.curve(column)
        return known_mean(values[x <= until / 1_000][-5:])

    def flags_beside(self, control):
        """Those that change what is learned, as they are typed; of another program none."""
        mine, other = self.runs[0].flags, control.runs[0].flags
        if mine["method"] != other["method"]:
            return "-"
        differ = [typed(name, value) for name, value in mine.items()
                  if name not in CHANGES_NO_LEARNING and value != other.get(name)]
        return f"`{' '.join(differ)}`" if differ else "-"


def row(variant, control):
    """Cells of one variant."""
    digits = 0 if abs(control.returns).max() > 200 else 1
    show, difference = lambda number: f"{number:.{digits}f}", "-"
    if variant is not control:
        difference = f"{variant.returns.mean() - control.returns.mean():+.{digits}f}"
        if min(len(variant.returns), len(control.returns)) > 1:
            test = stats.ttest_ind(variant.returns, control.returns, equal_var=False)
            low, high = test.confidence_interval(0.95)
            difference += f" [{show(low)}, {show(high)}]"
    seeds = " ".join(map(str, variant.seeds))
    shorter = f" ({variant.shorter} shorter)" if variant.shorter else ""
    return (variant.folder.name, variant.flags_beside(control), seeds + shorter,
            ", ".join(map(show, variant.returns)), with_interval(variant.returns, digits),
            difference, text(variant.right_way),
            commits(map(read_config, variant.runs)))


def main(argv=None):
    parser = OneLineParser("python -m results.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("control", type=Path, metavar="CONTROL", help="a folder ENV/METHOD")
    parser.add_argument("variants", nargs="+", type=Path, metavar="VARIANT")
    parser.add_argument("--until", type=in_range(int, 1), metavar="STEPS", help="env steps")
    args = parser.parse_args(argv)
    try:
        control, *variants = [Variant(folder, args.until)
                              for folder in (args.control, *args.variants)]
    except FigureError as error:
        parser.error(str(error))
    print("| variant | flags | seeds | last five evaluations, by seed | mean | minus the control's "
          "| right way | commits |\n|---|---|---|---|---|---|---|---|")
    for variant in (control, *variants):
        print("| " + " | ".join(row(variant, control)) + " |")


if __name__ == "__main__":
    main()
