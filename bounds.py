"""The theory of M3PO, runnable: every return bound of the paper, Figure 4, and an exact check.

    python bounds.py                                         Table 1 and the comparison of Sec. 5.3
    python bounds.py --eps-m 0.1 --eps-pi 0.2 --gamma 0.95   the bounds for your own numbers
    python bounds.py --figure figure4.png                    draw Figure 4 (needs matplotlib)
    python bounds.py --verify                                solve 1,000 random problems exactly

Hiraoka et al., "Meta-Model-Based Meta-Policy Optimization" (ACML 2021), Sec. 5 and App. A.
Every bound C below says (Eq. 1):   true return >= model return - C.   All hold two-sided.

symbol   name      meaning
h_t      history   (o_0, a_0, .., o_t), the state of the derived MDP (Lemma 3)
pi_D, pi           the policy that collected the data; the policy being trained
p, p_th            the real history dynamics p(h_t+1 | a_t, h_t); the meta-model's
eps_m    eps_m     max over t of E[ TV(p, p_th) ], h_t, a_t from the data (Definition 1), in [0, 1]
eps_pi   eps_pi    max over h of TV(pi_D, pi) (Definition 2), in [0, 1]
gamma    gamma     discount, in [0, 1)
r_max    r_max     bound on |expected reward| (Sec. 5.1 prints no |.|; it is needed)
k        k         model steps per branch, a whole number >= 1

Assumed throughout: D_env holds infinitely many histories of pi_D, and imagined histories are paid
the true expected reward r(h, a). Where the model *predicts* the reward, wrong by at most delta at
every (h, a), add delta / (1 - gamma). A bound above 2 r_max / (1 - gamma) is true and says nothing.

Why the bounds hold (one argument for all of them). Draw three histories together: a data history,
a true one of pi, and an imagined one which leaves the data history d steps before t. Let all take
the same actions and see the same observations wherever their probabilities overlap. Per step pi
then differs from pi_D with probability <= eps_pi, in truth and in imagination alike, and the model
differs from p with probability <= eps_m while all three still agree. So at time t the true and the
imagined h_t differ with probability <= t eps_pi + d eps_m; given the same h_t, a_t has the same
law in both. A difference costs at most 2 r_max. Depth d is averaged over 1..min(t, k) (Eqs. 5-8),
mean (min(t, k) + 1) / 2. The sum over t of gamma^t times that is `sharp_branched_gap`; the paper's
bounds are larger. (Only data histories were compared, so eps_pi averaged over the data, as eps_m
is, would do.) `--verify` checks all of this by exact solution (bounds_check.py).
"""
import argparse
import math
import os
import sys

import numpy as np

GAMMAS = (0.85, 0.9, 0.95)  # the three discounts of Figure 4
RANGES = {
    "eps_m": ("in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "eps_pi": ("in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "gamma": ("in [0, 1)", lambda x: (x >= 0) & (x < 1)),
    "r_max": ("finite and > 0", lambda x: np.isfinite(x) & (x > 0)),
    "seed": ("a whole number >= 0", lambda x: np.isfinite(x) & (x >= 0) & (x == np.floor(x))),
    **dict.fromkeys(("k", "k_max", "problems"), (
        "a whole number >= 1", lambda x: np.isfinite(x) & (x >= 1) & (x == np.floor(x)))),
}


def checked(**arguments):
    """The arguments as float arrays. ValueError naming argument and range if one is outside."""
    arrays = []
    for name, value in arguments.items():
        text, inside = RANGES[name]
        try:
            array = np.asarray(value, dtype=float)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be {text}, got {value!r}") from None
        if not np.all(inside(array)):  # NaN fails every comparison, so it lands here too
            raise ValueError(f"{name} must be {text}, got {array[~inside(array)].flat[0]:g}")
        arrays.append(array)
    return arrays


# --- 1. the bounds: floats or arrays in (broadcast together), the gap C out ----------------------


def full_rollout_gap(eps_m, eps_pi, gamma, r_max=1.0):
    """C_Th1, Table 1: model rollouts from the first observation on (Theorem 1 = Janner 4.1).

    (Eqs. 2 and 23 print eps_m in the last term; Table 1 and Janner et al. have eps_pi.)
    """
    eps_m, eps_pi, gamma, r_max = checked(eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, r_max=r_max)
    return r_max * (2 * gamma * (eps_m + 2 * eps_pi) / (1 - gamma) ** 2 + 4 * eps_pi / (1 - gamma))


def branched_rollout_gap(eps_m, eps_pi, gamma, k, r_max=1.0, tight=False):
    """C_Th2, Table 1: k model steps branched off real histories (Theorems 2 and 3).

    Table 1:  r_max { (1 + g^2) / (1-g)^2 2 eps_pi                            (g is gamma)
                      + (g - k g^k + (k-1) g^(k+1)) / (1-g)^2 (eps_pi + eps_m)
                      + (g^k - g) / (g - 1) (eps_pi + eps_m) + g^k / (1-g) (k+1) (eps_pi + eps_m) }
    The last three terms add up to `_mean_depths` times (eps_pi + eps_m). The first counts one g
    twice: its own derivation, Eq. 20, gives (1 - g + g^2), which is `tight=True`. So
        printed = tight + 2 r_max g eps_pi / (1-g)^2,
    tight   = the plain sum over time, `bounds_check.branched_rollout_gap_series`.
    """
    eps_m, eps_pi, gamma, k, r_max = checked(
        eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, k=k, r_max=r_max)
    constant = 1 - gamma + gamma**2 if tight else 1 + gamma**2
    policy_term = constant / (1 - gamma) ** 2 * 2 * eps_pi
    return r_max * (policy_term + _mean_depths(gamma, k) * (eps_pi + eps_m))


def _mean_depths(gamma, k):
    """Sum over t >= 1 of gamma^t (min(t, k) + 1), where (min(t, k) + 1) / 2 is the mean depth."""
    return gamma * (2 - gamma - gamma**k) / (1 - gamma) ** 2


def janner_branched_gap(eps_m, eps_pi, gamma, k, r_max=1.0):
    """Theorem 4.2 of Janner et al. (2019), Eq. 3: each time step sees one branch, the longest.

    Never below C_Th2 with `tight=True`, so a true bound for the averaged branches of Eqs. 4-8 too.
    """
    eps_m, eps_pi, gamma, k, r_max = checked(
        eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, k=k, r_max=r_max)
    return 2 * r_max * (gamma ** (k + 1) / (1 - gamma) ** 2 * eps_pi
                        + (gamma**k + 2) / (1 - gamma) * eps_pi
                        + k / (1 - gamma) * (eps_m + 2 * eps_pi))


def sharp_full_gap(eps_m, eps_pi, gamma, r_max=1.0):
    """Ours, not the paper's: the sum over t of gamma^t 2t (eps_pi + eps_m). See the file's top."""
    eps_m, eps_pi, gamma, r_max = checked(eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, r_max=r_max)
    return r_max * 2 * gamma * (eps_m + eps_pi) / (1 - gamma) ** 2


def sharp_branched_gap(eps_m, eps_pi, gamma, k, r_max=1.0):
    """Ours, not the paper's: Theorem 2 without an eps_pi per imagined step. See the file's top.

    The paper goes from pi to pi_D and back to pi and pays for both ways; the true and the imagined
    history follow the same pi, so one way is enough. `bounds_check.worst_case_problem` comes as
    close to it as one likes for small errors, so no coefficient can be smaller.
    """
    eps_m, eps_pi, gamma, k, r_max = checked(
        eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, k=k, r_max=r_max)
    policy_term = (1 - gamma + gamma**2) / (1 - gamma) ** 2 * 2 * eps_pi
    return r_max * (policy_term + _mean_depths(gamma, k) * eps_m)


def model_error_terms(eps_m, gamma, r_max=1.0):
    """Corollary 1: the eps_m terms of C_Th1, of C_Th2 at k = 1, and their difference (Eqs. 25-27).

    The difference, second minus first, is -2 r_max gamma^2 eps_m / (1 - gamma)^2 <= 0.
    """
    eps_m, gamma, r_max = checked(eps_m=eps_m, gamma=gamma, r_max=r_max)
    full = r_max * 2 * gamma * eps_m / (1 - gamma) ** 2
    branched = r_max * gamma / (1 - gamma) * 2 * eps_m
    return full, branched, -2 * r_max * gamma**2 * eps_m / (1 - gamma) ** 2


def best_k(eps_m, eps_pi, gamma, k_max=50, gap=branched_rollout_gap):
    """The k in 1..k_max with the smallest gap(eps_m, eps_pi, gamma, k); the smallest k if tied.

    It is 1 for every bound here: C_Th2(k+1) - C_Th2(k) = r_max gamma^(k+1) (eps_pi + eps_m) /
    (1 - gamma), never negative, so Theorem 2's "tends to increase" is "never decreases".
    """
    eps_m, eps_pi, gamma, k_max = checked(eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, k_max=k_max)
    ks = np.arange(1, int(k_max) + 1)
    gaps = gap(eps_m[..., None], eps_pi[..., None], gamma[..., None], ks)
    return ks[np.argmin(gaps, axis=-1)]


def longest_k(eps_m, eps_pi, gamma, branched=branched_rollout_gap, full=full_rollout_gap):
    """The largest k whose branched gap is below the full one (floats only).

    0 if no k is, math.inf if every k is. Bisection, as no branched gap ever falls with k.
    """
    def wins(k):
        return branched(eps_m, eps_pi, gamma, k) < full(eps_m, eps_pi, gamma)

    low, high = 0, 10**15  # at the upper end gamma^k has long become 0
    if wins(high):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def tight_gap(*args):
    return branched_rollout_gap(*args, tight=True)


# --- 2. in the terminal --------------------------------------------------------------------------


def print_table():
    """`python bounds.py`: Table 1 and what Sec. 5.3 argues from it, r_max = 1."""
    print("""Table 1 (g = gamma): true return >= model return - C
  full rollouts      C_Th1 = r_max { 2 g (eps_m + 2 eps_pi) / (1-g)^2 + 4 eps_pi / (1-g) }
  k-step branches    C_Th2 = r_max { 2 eps_pi (1 + g^2) / (1-g)^2
                                     + (eps_pi + eps_m) (g - k g^k + (k-1) g^(k+1)) / (1-g)^2
                                     + (eps_pi + eps_m) (g^k - g) / (g - 1)
                                     + (eps_pi + eps_m) (k + 1) g^k / (1-g) }
                     tight: 1 - g + g^2 in place of 1 + g^2 (what Eq. 20 sums to)

Sec. 5.3, r_max = 1. Anything above "trivial" = 2 / (1-g) is true and says nothing.
 gamma  eps_m  eps_pi   trivial     C_Th1   C_Th2: k=1       k=5      k=50   tight, k=1  best k""")
    for gamma in GAMMAS:
        for eps_m, eps_pi in ((0.05, 0.0), (0.05, 0.05), (0.5, 0.0), (0.5, 0.5)):
            errors = (eps_m, eps_pi, gamma)
            gaps = [full_rollout_gap(*errors), *branched_rollout_gap(*errors, np.array([1, 5, 50]))]
            print(f"{gamma:6} {eps_m:6} {eps_pi:7} {2 / (1 - gamma):9.2f}",
                  "{:9.2f} {:12.2f} {:9.2f} {:9.2f}".format(*gaps),
                  f"{tight_gap(*errors, 1):12.2f} {best_k(*errors):7d}")
    print("\nFigure 4: C_Th2 - C_Th1 over eps_m in [0, 1]")
    for name, gamma, _, _, difference in figure_panels():
        low, high = difference.min(1), difference.max(1)
        print(f"  {name:22} gamma {gamma:4}   k=1: {low[0]:8.2f} to {high[0]:7.2f}"
              f"   k=50: {low[-1]:8.2f} to {high[-1]:7.2f}")
    print("k = 1 is below zero everywhere, except that both bounds are 0 where both errors are 0:\n"
          "C_Th2(k=1) - C_Th1 = -2 r_max {(1-g) eps_pi + g^2 eps_m} / (1-g)^2, for every gamma.")


def figure_panels():
    """Figure 4 as numbers: (name, gamma, eps_m (101,), k (50,), C_Th2 - C_Th1 (50, 101)), six."""
    eps_m, k = np.linspace(0, 1, 101), np.arange(1, 51)
    for name, eps_pi in (("(a) eps_pi = 0", 0 * eps_m), ("(b) eps_pi = 1 - eps_m", 1 - eps_m)):
        for gamma in GAMMAS:
            yield name, gamma, eps_m, k, (branched_rollout_gap(eps_m, eps_pi, gamma, k[:, None])
                                          - full_rollout_gap(eps_m, eps_pi, gamma))


def print_own_numbers(eps_m, eps_pi, gamma, k, r_max):
    """`--eps-m --eps-pi --gamma`: each bound, the best k, the longest k worth branching."""
    trivial, errors = 2 * r_max / (1 - gamma), (eps_m, eps_pi, gamma)
    print(f"eps_m = {eps_m:g}, eps_pi = {eps_pi:g}, gamma = {gamma:g}, r_max = {r_max:g}\n"
          f"Returns lie within +-{trivial / 2:.4g}, so a gap above {trivial:.4g} says nothing.\n")
    full, branches = "full rollouts      Theorem 1", f"branches, k = {k:<4}"
    for name, gap in (
            (full, full_rollout_gap(*errors, r_max)),
            (f"{full}, sharp (ours)", sharp_full_gap(*errors, r_max)),
            (f"{branches} Theorem 2, as printed", branched_rollout_gap(*errors, k, r_max)),
            (f"{branches} Theorem 2, tight", tight_gap(*errors, k, r_max)),
            (f"{branches} Theorem 2, sharp (ours)", sharp_branched_gap(*errors, k, r_max)),
            (f"{branches} Janner 4.2", janner_branched_gap(*errors, k, r_max))):
        print(f"{name:44} {gap:12.4f}{'   says nothing' if gap >= trivial else ''}")
    print(f"\nbest k of 1 to 50: {best_k(*errors)}\nbranching beats full rollouts")
    for name, *pair in (
            ("Theorem 2 as printed against Theorem 1", branched_rollout_gap, full_rollout_gap),
            ("Theorem 2 tight against Theorem 1", tight_gap, full_rollout_gap),
            ("sharp against sharp", sharp_branched_gap, sharp_full_gap)):
        longest = longest_k(*errors, *pair)
        words = {0: "for no k", math.inf: "for every k"}.get(longest, f"up to k = {longest}")
        print(f"  {name:40} {words}")


def draw_figure(path):
    """Figure 4: C_Th2 - C_Th1, (a) above and (b) below, one column per gamma. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for ax, (name, gamma, eps_m, k, difference) in zip(axes.flat, figure_panels()):
        limit = np.abs(difference).max()
        image = ax.pcolormesh(eps_m, k, difference, cmap="RdBu_r", vmin=-limit, vmax=limit)
        if difference.max() > 1e-9:
            ax.contour(eps_m, k, difference, levels=[0], colors="black")
        ax.set(title=f"{name}, gamma = {gamma}", yticks=[1, 10, 20, 30, 40, 50])
        figure.colorbar(image, ax=ax)
    figure.supxlabel("model error eps_m")
    figure.supylabel("model rollout length k")
    figure.suptitle("C_Th2 - C_Th1, r_max = 1. Blue: branching has the better guarantee; black: 0")
    figure.savefig(path, dpi=100, format=os.path.splitext(path)[1][1:] or "png")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"bounds.py: error: {message}\n")


def flags():
    """The command line, as a parser."""
    def number(name, kind=float):
        def parse(text):
            try:
                return kind(checked(**{name: text})[0])
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return parse

    parser = OneLineParser(description="Return bounds of M3PO (Sec. 5). Without flags: Table 1.",
                           allow_abbrev=False)
    parser.add_argument("--figure", metavar="PATH", help="draw Figure 4 to PATH")
    parser.add_argument("--eps-m", type=number("eps_m"), help="model error, in [0, 1]")
    parser.add_argument("--eps-pi", type=number("eps_pi"), help="policy divergence, in [0, 1]")
    parser.add_argument("--gamma", type=number("gamma"), help="discount, in [0, 1)")
    parser.add_argument("--k", type=number("k", int), help="model steps per branch (default 1)")
    parser.add_argument("--r-max", type=number("r_max"), help="bound on |reward| (default 1)")
    parser.add_argument("--verify", action="store_true", help="check on exactly solved problems")
    parser.add_argument("--problems", type=number("problems", int),
                        help="how many for --verify (default 1000)")
    parser.add_argument("--seed", type=number("seed", int), help="seed of --verify (default 0)")
    return parser


def main(args=None):
    """Run one of the four commands. Returns the exit code."""
    parser = flags()
    args = parser.parse_args(args)
    own = [args.eps_m, args.eps_pi, args.gamma]
    wants_own = any(x is not None for x in (*own, args.k, args.r_max))
    if wants_own + args.verify + (args.figure is not None) > 1:
        parser.error("--figure, --verify and own numbers (--eps-m ..) are separate commands")
    if wants_own and None in own:
        parser.error("own numbers need --eps-m, --eps-pi and --gamma together")
    if not args.verify and (args.problems is not None or args.seed is not None):
        parser.error("--problems and --seed belong to --verify")
    if args.verify:
        import bounds_check  # here, as only this command needs it
        return bounds_check.print_verification(args.problems or 1_000, args.seed or 0)
    if args.figure is not None:
        try:
            draw_figure(args.figure)
        except ImportError:
            parser.error("--figure needs matplotlib: python -m pip install matplotlib")
        except (OSError, ValueError) as error:  # no such folder; a file type it cannot write
            parser.error(f"--figure {args.figure}: " + " ".join(str(error).split()))
        print(f"Figure 4 written to {args.figure}")
    elif wants_own:
        print_own_numbers(*own, args.k or 1, args.r_max or 1.0)
    else:
        print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
