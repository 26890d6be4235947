"""Eleven settings of M3PO tried together: 24 runs, each setting changed in half of them.

    python -m results.search.factorial             # what each change did, from the CSVs
    python -m results.search.factorial --commands  # the runs: patches to apply, command

One setting at a time would take 33 runs for three seeds of each. Here every run says something of
every setting: a change's effect is the mean of 12 runs with it minus that of the 12 without. The
plan is a Plackett-Burman design of 12 runs and its mirror image, so that no effect is mixed up with
another's or with what two changes do to each other. Each run has a seed of its own.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

from figures import read_run

CHANGES = {"G 20": "--G 20", "model-updates 4": "--model-updates 4", "retain 1000": "--retain 1000",
           "beta .25": "--beta .25", "k 2": "--k 2", "B 7": "--B 7",
           "fit-every 1000": "--fit-every 1000", "target-entropy -6": "--target-entropy -6",
           "uniform actions": "uniform-actions", "stretched variance": "stretched-variance",
           "cut histories": "cut-histories"}  # flags, or a patch of this folder
FIRST = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]  # Plackett and Burman 1946, N = 12


def design():
    """[24, 11] True where a run has the change."""
    rows = [np.roll(FIRST, i) for i in range(11)] + [np.zeros(11)]
    half = np.array(rows, dtype=bool)
    return np.concatenate([half, ~half])


def commands():
    for run, changed in enumerate(design()):
        words = [word for word, on in zip(CHANGES.values(), changed) if on]
        flags = " ".join(word for word in words if word.startswith("--"))
        yield " ".join(word for word in words if not word.startswith("--")), (
            "python experiments.py --results results/search --envs halfcheetah-fwd-bwd "
            f"--methods m3po --seeds {10 + run} --tag f{run:02d} -- --width 128 --G 10 --N 10 "
            f"--diagnose-every 0 {flags}")


def folder(run):
    return Path(__file__).parent / f"learned-bounds/m3po-f{run:02d}/seed{10 + run}"


def effects(x, y):
    """Of each column of x [n, 11] on y [n]: least squares, with half the width of the 95 % interval
    by Student's t."""
    X = np.column_stack([np.ones(len(x)), x])
    beta, *_ = np.linalg.lstsq(X, y, rcond=None)
    df = len(y) - X.shape[1]
    variance = ((y - X @ beta) ** 2).sum() / df
    error = np.sqrt(variance * np.diag(np.linalg.inv(X.T @ X)))
    return beta[1:], stats.t.ppf(0.975, df) * error[1:]


def main():
    if "--commands" in sys.argv:
        print("# At commit 24f2c9f, whose defaults these change. What it wrote to\n"
              "# results/search/halfcheetah-fwd-bwd lies in results/search/learned-bounds now.")
        for patches, command in commands():
            print(f"{patches or 'no patch'} | {command}")
        return
    done = [run for run in range(24) if folder(run).exists()]
    print(f"{len(done)} of 24 runs")
    x = design()[done].astype(float)
    if len(done) < 14 or np.linalg.matrix_rank(np.column_stack([np.ones(len(x)), x])) < 12:
        raise SystemExit("too few for eleven effects")
    if len(done) < 24:
        print("Until all have ended a change's effect is mixed up with what others do together.")
    # The five evaluations from 6,000 to 10,000 steps.
    y = np.array([read_run(folder(run)).progress["eval_return_mean"][-5:] for run in done])
    last_five, end = effects(x, y.mean(1)), effects(x, y[:, -1])
    print(f"mean return {y.mean():.0f}\n")
    print("| change | mean of 6,000 to 10,000 | at 10,000 |\n|---|---|---|")
    for i in np.argsort(-last_five[0]):
        print(f"| {list(CHANGES)[i]} | " + " | ".join(
            f"{effect[i]:+.0f} +- {half[i]:.0f}" for effect, half in (last_five, end)) + " |")


if __name__ == "__main__":
    main()
