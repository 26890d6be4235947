"""Every setting that was tried one at a time on half-cheetah, beside its control: one table.

    python -m results.search.table

All after 10,000 env steps, from the CSVs in results/. Runs of three programs cannot be compared
with each other, so each has its own control: docs/RESULTS.md says what lies between them. What
the columns mean: results/compare.py. Under the table: what runs of one seed have in common.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from results.compare import HEADER, Variant, print_rows, read_seeds

UNTIL = 10_000
OLD, NEW = Path("results/halfcheetah-fwd-bwd"), Path("results/search/halfcheetah-fwd-bwd")
BOUNDS = Path("results/search/learned-bounds")
K2 = "m3po-k2-model-updates-4"
PROGRAMS = {
    "learned bounds, raw pitch": [OLD / "m3po-learned-bounds", *(
        BOUNDS / f"m3po-{name}" for name in (
            "entropy-minus-1", "entropy-0", "k2", "model-updates-4", "k2-model-updates-4"))],
    "living variances, raw pitch": [NEW / f"{K2}-to-10k", *(NEW / f"{K2}-{name}" for name in (
        "noise-1.5", "stretched", "one-variance", "angles"))],
    "today's": [OLD / "m3po", *(NEW / f"m3po-{name}" for name in (
        "reset", "reset-model-updates-4", "reset-k2", "beta-05", "beta-95", "retain-300",
        "retain-1000", "G-40")),
        NEW / "imagined-alone-screen", OLD / "k5", OLD / "m3po-h", OLD / "recurrent-sac",
        NEW / "recurrent-sac-G-40", OLD / "oracle", NEW / "oracle-no-model"],
}


def shared_by_seeds(variants):
    """A line: does a seed do well or badly whatever the setting? The last fives are fitted by a
    mean per variant, then also by a number per seed, and the F test says whether that is more than
    chance would give it."""
    y = np.concatenate([v.last_five for v in variants])
    seeds = np.concatenate([v.seeds for v in variants])
    rows = np.repeat(np.arange(len(variants)), [len(v.seeds) for v in variants])
    one_hot = lambda labels: (labels[:, None] == np.unique(labels)).astype(float)
    squares = {}
    for name, x in (("rows", one_hot(rows)), ("both", np.hstack([one_hot(rows), one_hot(seeds)]))):
        fit, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
        squares[name] = ((y - x @ fit) ** 2).sum(), len(y) - rank
    (rows_sum, rows_df), (sum_, df) = squares["rows"], squares["both"]
    F = (rows_sum - sum_) / (rows_df - df) / (sum_ / df)
    spread, rest = (rows_sum / rows_df) ** 0.5, (sum_ / df) ** 0.5
    return (f"Within a row, seeds differ by {spread:.0f} (standard deviation), "
            f"by {rest:.0f} without what all runs of a seed have in common: "
            f"F({rows_df - df}, {df}) = {F:.1f}, p = {stats.f.sf(F, rows_df - df, df):.1g}.")


def main():
    print(HEADER)
    for program, folders in PROGRAMS.items():
        print(f"| **{program}** |" + " |" * (HEADER.splitlines()[0].count("|") - 2))
        variants = [Variant(folder, read_seeds(folder), UNTIL) for folder in folders]
        print_rows(*variants)
    # The last program is today's.
    with_model = [v for v in variants if v.runs[0].flags["beta"] > 0]
    print("\nToday's rows with a model:", shared_by_seeds(with_model))


if __name__ == "__main__":
    main()
