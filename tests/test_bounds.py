"""bounds.py: the closed forms, the claims of Sec. 5, and the command line."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import bounds
import bounds_check


GRID = [  # eps_m, eps_pi, gamma, k, r_max
    (0.1, 0.2, 0.95, 1, 1.0),
    (0.3, 0.0, 0.9, 5, 2.0),
    (0.0, 0.7, 0.85, 50, 1.0),
    (1, 1, 0.5, 3, 0.1),
    (0.01, 0.02, 0.99, 10, 7.0),
    (0.4, 0.6, 0.0, 2, 1.0),
    (0.2, 0.1, 0.3, 1, 1.0),
    (1e-6, 1e-4, 0.9, 20, 1.0),
    (0.0, 0.0, 0.95, 4, 1.0),
]


def slow_series(eps_m, eps_pi, gamma, k, r_max):
    """Eqs. 13, 15 and 18 branch by branch, no formula for any inner sum; plain Python floats."""
    terms, t = [2 * eps_pi], 1
    while gamma**t > 1e-22:
        n_branches = t if t < k else k
        real = 2 * t * eps_pi  # from p_pi to p_piD
        branches = sum(2 * (n_branches - i) * (eps_pi + eps_m) for i in range(n_branches))
        terms.append(gamma**t * (real + branches / n_branches))
        t += 1
    return r_max * math.fsum(terms)


def printed_table_1(eps_m, eps_pi, g, k, r_max):
    """C_Th2 letter by letter as the paper's Table 1 prints it."""
    return r_max * (
        (1 + g**2) / (1 - g) ** 2 * 2 * eps_pi
        + (g - k * g**k + (k - 1) * g ** (k + 1)) / (1 - g) ** 2 * (eps_pi + eps_m)
        + (g**k - g) / (g - 1) * (eps_pi + eps_m)
        + g**k / (1 - g) * (k + 1) * (eps_pi + eps_m)
    )


def random_errors(n=2_000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.random(n), rng.random(n) * 0.99, rng.integers(1, 60, n)


# --- the closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRID)
def test_tight_closed_form_equals_the_series_summed_branch_by_branch(case):
    slow = slow_series(*case)
    assert bounds_check.branched_rollout_gap_series(*case) == pytest.approx(slow, rel=1e-12, abs=0)
    assert bounds.branched_rollout_gap(*case, tight=True) == pytest.approx(slow, rel=1e-12, abs=0)


@pytest.mark.parametrize("case", GRID)
def test_default_closed_form_is_table_1_as_printed(case):
    assert bounds.branched_rollout_gap(*case) == pytest.approx(
        printed_table_1(*case), rel=1e-12, abs=0
    )


@pytest.mark.parametrize("case", GRID)
def test_table_1_exceeds_the_series_by_one_gamma_counted_twice(case):
    _, eps_pi, gamma, _, r_max = case
    extra = 2 * r_max * gamma * eps_pi / (1 - gamma) ** 2
    assert bounds.branched_rollout_gap(*case) == pytest.approx(
        slow_series(*case) + extra, rel=1e-12
    )
    assert extra >= 0


def test_full_rollout_gap_equals_its_sum_over_time():
    # Janner 4.1: sum of gamma^t {2 (t + 1) eps_pi + 2 (t + 1) eps_pi + 2 t eps_m}
    for eps_m, eps_pi, gamma, _, r_max in GRID:
        terms = [gamma**t * (4 * (t + 1) * eps_pi + 2 * t * eps_m) for t in range(6_000)]
        expected = r_max * math.fsum(terms)
        assert bounds.full_rollout_gap(eps_m, eps_pi, gamma, r_max) == pytest.approx(
            expected, rel=1e-12
        )


def test_janner_branched_gap_by_hand():
    # gamma 1/2, k 1: 2 {(1/4) / (1/4) eps_pi + (5/2) / (1/2) eps_pi + 2 (eps_m + 2 eps_pi)}
    assert bounds.janner_branched_gap(0.1, 0.01, 0.5, 1) == pytest.approx(2 * (0.01 + 0.05 + 0.24))


def test_sharp_bounds_equal_their_sums_over_time():
    for eps_m, eps_pi, gamma, k, r_max in GRID:
        ts = range(6_000)
        full = r_max * math.fsum(gamma**t * 2 * t * (eps_m + eps_pi) for t in ts)
        branched = r_max * (
            2 * eps_pi
            + math.fsum(gamma**t * (2 * t * eps_pi + (min(t, k) + 1) * eps_m) for t in ts[1:])
        )
        assert bounds.sharp_full_gap(eps_m, eps_pi, gamma, r_max) == pytest.approx(full, rel=1e-12)
        assert bounds.sharp_branched_gap(eps_m, eps_pi, gamma, k, r_max) == pytest.approx(
            branched, rel=1e-12
        )


def test_no_errors_no_gap():
    for gamma, k in itertools.product((0.0, 0.5, 0.99), (1, 7)):
        assert bounds.full_rollout_gap(0, 0, gamma) == 0 == bounds.sharp_full_gap(0, 0, gamma)
        for gap in (
            bounds.branched_rollout_gap,
            bounds_check.branched_rollout_gap_series,
            bounds.janner_branched_gap,
            bounds.sharp_branched_gap,
            bounds.tight_gap,
        ):
            assert gap(0, 0, gamma, k) == 0


def test_gap_is_proportional_to_r_max():
    for gap, case in (
        (bounds.full_rollout_gap, (0.1, 0.2, 0.9)),
        (bounds.branched_rollout_gap, (0.1, 0.2, 0.9, 3)),
        (bounds_check.branched_rollout_gap_series, (0.1, 0.2, 0.9, 3)),
        (bounds.janner_branched_gap, (0.1, 0.2, 0.9, 3)),
        (bounds.sharp_full_gap, (0.1, 0.2, 0.9)),
        (bounds.sharp_branched_gap, (0.1, 0.2, 0.9, 3)),
    ):
        assert gap(*case, r_max=5) == pytest.approx(5 * gap(*case))


def test_arrays_broadcast_and_agree_with_floats():
    eps_m, eps_pi, gamma = np.array([0.0, 0.3])[:, None, None], 0.1, np.array([0.5, 0.9])[:, None]
    ks = np.array([1, 2, 30])
    for gap in (
        bounds.branched_rollout_gap,
        bounds_check.branched_rollout_gap_series,
        bounds.janner_branched_gap,
        bounds.sharp_branched_gap,
    ):
        out = gap(eps_m, eps_pi, gamma, ks)
        assert out.shape == (2, 2, 3)
        assert out[1, 0, 2] == pytest.approx(gap(0.3, 0.1, 0.5, 30), rel=1e-13)
    assert bounds.full_rollout_gap([0.1, 0.2], [0.3, 0.4], 0.9).shape == (2,)
    assert bounds.best_k(np.full((3, 1), 0.2), np.full(2, 0.1), 0.9).shape == (3, 2)


# --- the claims of Sec. 5 -------------------------------------------------------------------------


def test_theorem_2_grows_with_k_by_a_known_step():
    eps_m, eps_pi, gamma, k = random_errors()
    step = bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k + 1) - bounds.branched_rollout_gap(
        eps_m, eps_pi, gamma, k
    )
    expected = gamma ** (k + 1) * (eps_m + eps_pi) / (1 - gamma)
    scale = bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k)
    assert np.all(expected >= 0)
    assert np.all(np.abs(step - expected) <= 1e-12 * scale)


def test_best_k_is_1_under_every_bound():
    eps_m, eps_pi, gamma, _ = random_errors(300)
    for gap in (
        bounds.branched_rollout_gap,
        bounds.tight_gap,
        bounds.janner_branched_gap,
        bounds.sharp_branched_gap,
    ):
        assert np.all(bounds.best_k(eps_m, eps_pi, gamma, gap=gap) == 1)


def test_best_k_finds_the_minimum_of_any_gap_and_the_smallest_k_of_a_tie():
    assert bounds.best_k(0.1, 0.1, 0.9, k_max=20, gap=lambda m, p, g, k: (k - 7.0) ** 2) == 7
    assert bounds.best_k(0.1, 0.1, 0.9, k_max=20, gap=lambda m, p, g, k: (k - 7.5) ** 2) == 7


def test_corollary_1_model_error_hurts_branches_of_one_step_less():
    eps_m, _, gamma, _ = random_errors()
    full, branched, difference = bounds.model_error_terms(eps_m, gamma, r_max=3.0)
    assert np.all(branched <= full)
    np.testing.assert_allclose(branched - full, difference, rtol=0, atol=1e-12 * full.max())
    # and they really are the eps_m terms of the two bounds
    np.testing.assert_allclose(full, bounds.full_rollout_gap(eps_m, 0, gamma, 3.0))
    np.testing.assert_allclose(branched, bounds.branched_rollout_gap(eps_m, 0, gamma, 1, 3.0))


def test_one_step_branches_beat_full_rollouts_on_the_whole_grid_of_figure_4():
    panels = list(bounds.figure_panels())
    assert [gamma for _, gamma, *_ in panels] == [0.85, 0.9, 0.95] * 2
    for name, gamma, eps_m, k, difference in panels:
        assert difference.shape == (len(k), len(eps_m)) == (50, 101)
        assert (k[0], k[-1], eps_m[0], eps_m[-1]) == (1, 50, 0, 1)
        eps_pi = 0 * eps_m if name.startswith("(a)") else 1 - eps_m
        exact = -2 * ((1 - gamma) * eps_pi + gamma**2 * eps_m) / (1 - gamma) ** 2
        np.testing.assert_allclose(difference[0], exact, atol=1e-9)
        no_errors = (eps_m == 0) & (eps_pi == 0)
        assert np.all(difference[0][~no_errors] < 0)
        assert np.all(difference[0][no_errors] == 0)  # the one exception to the paper's "always"


def test_long_branches_lose_in_panel_b_and_win_in_panel_a():
    for name, _, eps_m, _, difference in bounds.figure_panels():
        inside = difference[:, (eps_m > 0)]
        assert (inside < 0).all() if name.startswith("(a)") else (inside[-1] > 0).any()


def test_longest_k_agrees_with_trying_every_k():
    for eps_m, eps_pi, gamma in (
        (0.1, 0.2, 0.95),
        (0.0, 1.0, 0.85),
        (0.05, 0.5, 0.9),
        (0.0, 0.3, 0.75),
    ):
        full, k = bounds.full_rollout_gap(eps_m, eps_pi, gamma), 0
        while bounds.branched_rollout_gap(eps_m, eps_pi, gamma, k + 1) < full:
            k += 1
        assert k >= 1 and bounds.longest_k(eps_m, eps_pi, gamma) == k
    assert bounds.longest_k(0.5, 0.0, 0.9) == math.inf
    assert bounds.longest_k(0.0, 0.0, 0.9) == 0  # a tie at 0 is no win


def test_sharp_below_tight_below_printed_and_below_janner():
    errors = random_errors()
    sharp, tight = bounds.sharp_branched_gap(*errors), bounds.tight_gap(*errors)
    slack = 1 + 1e-12
    assert np.all(sharp <= tight * slack)
    assert np.all(tight <= bounds.branched_rollout_gap(*errors) * slack)
    assert np.all(tight <= bounds.janner_branched_gap(*errors) * slack)
    assert np.all(
        bounds.sharp_full_gap(*errors[:3]) <= bounds.full_rollout_gap(*errors[:3]) * slack
    )


def test_sharp_against_sharp_only_the_first_real_action_speaks_for_full_rollouts():
    eps_m, eps_pi, gamma, k = random_errors()
    difference = bounds.sharp_branched_gap(eps_m, eps_pi, gamma, k) - bounds.sharp_full_gap(
        eps_m, eps_pi, gamma
    )
    expected = 2 * eps_pi - gamma * (gamma + gamma**k) * eps_m / (1 - gamma) ** 2
    np.testing.assert_allclose(difference, expected, rtol=1e-9, atol=1e-9)


# --- bad input ------------------------------------------------------------------------------------


BAD = [
    ("eps_m", -0.1, "[0, 1]"),
    ("eps_m", 1.1, "[0, 1]"),
    ("eps_m", math.nan, "[0, 1]"),
    ("eps_pi", -1e-9, "[0, 1]"),
    ("eps_pi", math.inf, "[0, 1]"),
    ("eps_pi", "x", "[0, 1]"),
    ("gamma", 1.0, "[0, 1)"),
    ("gamma", -0.1, "[0, 1)"),
    ("gamma", math.nan, "[0, 1)"),
    ("gamma", None, "[0, 1)"),
    ("eps_m", [0.5, 2.0], "[0, 1]"),
    ("k", 0, "whole number >= 1"),
    ("k", 1.5, "whole number >= 1"),
    ("k", math.nan, "whole number >= 1"),
    ("k", math.inf, "whole number >= 1"),
    ("r_max", 0, "finite and > 0"),
    ("r_max", math.inf, "finite and > 0"),
    ("r_max", math.nan, "finite and > 0"),
]


@pytest.mark.parametrize("name, value, text", BAD)
def test_bad_input_is_a_value_error_naming_argument_and_range(name, value, text):
    good = {"eps_m": 0.1, "eps_pi": 0.2, "gamma": 0.9, "k": 2, "r_max": 1.0}
    n_raised = 0
    for function, arguments in (
        (bounds.full_rollout_gap, ("eps_m", "eps_pi", "gamma", "r_max")),
        (bounds.sharp_full_gap, ("eps_m", "eps_pi", "gamma", "r_max")),
        (bounds.model_error_terms, ("eps_m", "gamma", "r_max")),
        (bounds.best_k, ("eps_m", "eps_pi", "gamma")),
        (bounds.branched_rollout_gap, tuple(good)),
        (bounds.janner_branched_gap, tuple(good)),
        (bounds_check.branched_rollout_gap_series, tuple(good)),
        (bounds.sharp_branched_gap, tuple(good)),
    ):
        if name in arguments:
            with pytest.raises(ValueError) as caught:
                function(**{**{a: good[a] for a in arguments}, name: value})
            assert name in str(caught.value) and text in str(caught.value)
            n_raised += 1
    assert n_raised >= 4


# --- the command line -----------------------------------------------------------------------------


def run_bounds(*args, code=None):
    command = (
        [sys.executable, "bounds.py", *args]
        if code is None
        else [sys.executable, "-c", code, *args]
    )
    folder = os.path.dirname(os.path.abspath(bounds.__file__))
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def test_cli_prints_table_1_and_the_comparison():
    run = run_bounds()
    assert run.returncode == 0 and run.stderr == ""
    assert "C_Th1" in run.stdout and "C_Th2" in run.stdout and "tight" in run.stdout
    assert f"{bounds.full_rollout_gap(0.5, 0.5, 0.95):.2f}" in run.stdout
    assert f"{bounds.branched_rollout_gap(0.5, 0.5, 0.95, 1):.2f}" in run.stdout


def test_cli_answers_for_ones_own_numbers():
    run = run_bounds(
        "--eps-m", "0.1", "--eps-pi", "0.2", "--gamma", "0.95", "--k", "3", "--r-max", "2"
    )
    assert run.returncode == 0 and run.stderr == ""
    for gap in (
        bounds.full_rollout_gap(0.1, 0.2, 0.95, 2),
        bounds.branched_rollout_gap(0.1, 0.2, 0.95, 3, 2),
        bounds.tight_gap(0.1, 0.2, 0.95, 3, 2),
        bounds.janner_branched_gap(0.1, 0.2, 0.95, 3, 2),
    ):
        assert f"{gap:.4f}" in run.stdout
    assert "best k of 1 to 50: 1" in run.stdout
    assert f"up to k = {bounds.longest_k(0.1, 0.2, 0.95)}" in run.stdout


def test_cli_verifies_and_reports_no_broken_bound():
    run = run_bounds("--verify", "--problems", "20", "--seed", "3")
    assert run.returncode == 0 and run.stderr == ""
    assert "20 random meta-RL problems (seed 3)" in run.stdout
    assert "held in every problem" in run.stdout and "BROKE" not in run.stdout
    assert "Janner 4.2" in run.stdout and "Lemma 3" in run.stdout


def test_cli_draws_figure_4_as_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure4.png"
    run = run_bounds("--figure", str(path))
    assert run.returncode == 0 and run.stderr == ""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 700)


def test_cli_without_matplotlib_says_how_to_get_it_in_one_line(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; import bounds; "
        "sys.exit(bounds.main(sys.argv[1:]))"
    )
    run = run_bounds("--figure", str(tmp_path / "x.png"), code=code)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "pip install matplotlib" in run.stderr


OWN = ["--eps-m", "0.1", "--eps-pi", "0.2", "--gamma", "0.9"]


@pytest.mark.parametrize(
    "args, words",
    [
        ([*OWN, "--gamma", "1"], ["--gamma", "[0, 1)"]),
        ([*OWN, "--eps-m", "nan"], ["--eps-m", "[0, 1]"]),
        ([*OWN, "--eps-pi", "-0.1"], ["--eps-pi", "[0, 1]"]),
        ([*OWN, "--k", "0"], ["--k", "whole number >= 1"]),
        ([*OWN, "--k", "x"], ["--k", "whole number >= 1"]),
        ([*OWN, "--r-max", "0"], ["--r-max", "> 0"]),
        (["--eps-m", "0.1"], ["--eps-pi", "--gamma"]),
        (["--verify", "--problems", "0"], ["--problems", ">= 1"]),
        (["--verify", "--seed", "-1"], ["--seed", ">= 0"]),
        (["--seed", "1"], ["--seed", "--verify"]),
        (["--verify", "--k", "2"], ["--verify", "--eps-m"]),
        (["--ver"], ["--ver"]),
        (["--figure", "/no/such/folder/f.png"], ["--figure", "No such file"]),
    ],
)
def test_cli_bad_values_are_one_line_and_exit_2(args, words, capsys):
    if args[0] == "--figure":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as caught:
        bounds.main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    for word in words:
        assert word in err


def test_cli_error_leaves_no_traceback_in_a_real_process():
    run = run_bounds("--eps-m", "2", "--eps-pi", "0", "--gamma", "0.9")
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "--eps-m" in run.stderr and "[0, 1]" in run.stderr
