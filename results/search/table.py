"""Every setting that was tried one at a time on half-cheetah, beside its control: one table.

    python -m results.search.table

All after 10,000 env steps, from the CSVs in results/. Runs of three programs cannot be compared
with each other, so each has its own control: docs/RESULTS.md says what lies between them. What
the columns mean: results/compare.py.
"""

from pathlib import Path

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
        "retain-1000")),
        NEW / "imagined-alone-screen", OLD / "k5", OLD / "m3po-h", OLD / "recurrent-sac",
        OLD / "oracle", NEW / "oracle-no-model"],
}


def main():
    print(HEADER)
    for program, folders in PROGRAMS.items():
        print(f"| **{program}** |" + " |" * (HEADER.splitlines()[0].count("|") - 2))
        print_rows(*(Variant(folder, read_seeds(folder), UNTIL) for folder in folders))


if __name__ == "__main__":
    main()
