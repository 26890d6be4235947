"""The exact verification of the bounds on small problems."""

import dataclasses
import itertools

import numpy as np
import pytest

import bounds
import bounds_check


# --- Lemma 3 and Eqs. 4-8 on problems solved by brute force ---------------------------------------


def small_problem(seed, horizon=2):
    return bounds_check.random_problem(np.random.default_rng(seed), horizon=horizon)


def brute_force_pomdp_return(problem, gamma):
    """Sum over every path of tasks, actions and observations: no belief, no history MDP."""
    prior, switch, next_obs, task_reward, _ = problem.tasks

    def value(h, task, t):  # expected discounted reward from t on
        total = 0.0
        for a in range(2):
            now = task_reward[task, h, a]
            if t == problem.steps:  # frozen: the same reward for ever
                later = gamma / (1 - gamma) * now
            else:
                later = gamma * sum(
                    next_obs[task, h, a, o]
                    * switch[task, new]
                    * value(problem.child[h, a, o], new, t + 1)
                    for o in range(2)
                    for new in range(len(prior))
                )
            total += problem.policy[h, a] * (now + later)
        return total

    return sum(
        problem.start[h] * prior[task] * value(h, task, 0)
        for h in np.flatnonzero(problem.start)
        for task in range(len(prior))
    )


@pytest.mark.parametrize("seed", range(4))
def test_lemma_3_value_of_the_history_mdp_is_the_value_of_the_pomdp(seed):
    problem, gamma = small_problem(seed), 0.9
    brute = brute_force_pomdp_return(problem, gamma)
    assert bounds_check.solve(problem, gamma, [1])["true"] == pytest.approx(brute, abs=1e-12)
    assert bounds_check.pomdp_return(problem, gamma) == pytest.approx(brute, abs=1e-12)


def slow_law(problem, law, policy, dynamics, steps):
    """{history: probability} after `steps` steps from `law`, one transition at a time."""
    for _ in range(steps):
        new = {}
        for (h, p), a, o in itertools.product(law.items(), range(2), range(2)):
            child = int(problem.child[h, a, o])
            new[child] = new.get(child, 0.0) + p * policy[h, a] * dynamics[h, a, o]
        law = new
    return law


@pytest.mark.parametrize("seed", range(3))
def test_returns_and_errors_equal_equations_4_to_8_written_out(seed):
    problem, gamma, ks, n = small_problem(seed), 0.6, (1, 2, 4), 60  # 0.6^60 = 5e-14
    start = {h: problem.start[h] for h in np.flatnonzero(problem.start)}
    s = bounds_check.solve(problem, gamma, ks)
    frozen = problem.steps  # laws stand still after that, so later ones need no computing
    data = [
        slow_law(problem, start, problem.data_policy, problem.real, t)
        for t in range(frozen + 1)
    ]

    def paid(law, policy):
        return sum(
            p * policy[h, a] * problem.reward[h, a] for h, p in law.items() for a in range(2)
        )

    for key, dynamics in (("true", problem.real), ("full", problem.model)):
        laws = [
            slow_law(problem, start, problem.policy, dynamics, min(t, frozen))
            for t in range(n)
        ]
        slow = sum(gamma**t * paid(law, problem.policy) for t, law in enumerate(laws))
        assert s[key] == pytest.approx(slow, abs=1e-11)
    for i, k in enumerate(ks):
        for key, last in (
            ("branched", problem.policy),
            ("branched_data_action", problem.data_policy),
        ):
            slow = paid(data[0], problem.data_policy)  # Eq. 4, t = 0
            for t in range(1, n):
                points = (
                    range(t) if t < k else range(t - k, t)
                )  # Eqs. 7 and 8: where branches leave
                rewards = [
                    paid(
                        slow_law(
                            problem,
                            data[min(u, frozen)],
                            problem.policy,
                            problem.model,
                            min(t - u, frozen),
                        ),
                        last,
                    )
                    for u in points
                ]
                slow += gamma**t * sum(rewards) / len(rewards)  # Eqs. 5 and 6
            assert s[key][i] == pytest.approx(slow, abs=1e-11)
    eps_m = max(
        sum(
            p * problem.data_policy[h, a] * abs(problem.real[h, a] - problem.model[h, a]).sum() / 2
            for h, p in law.items()
            for a in range(2)
        )
        for law in data
    )
    eps_pi = max(
        abs(problem.policy[h] - problem.data_policy[h]).sum() / 2 for h in range(len(problem.start))
    )
    assert (s["eps_m"], s["eps_pi"]) == pytest.approx((eps_m, eps_pi), abs=1e-12)


def test_history_tree_lists_every_history_once():
    child, depth, rank = bounds_check.history_tree(3)
    assert [int((depth == t).sum()) for t in range(4)] == [2, 8, 32, 128]
    inner = depth < 3
    reached = child[inner].ravel()
    assert len(set(reached)) == len(reached) == (depth > 0).sum()
    assert np.all(
        rank[child[inner]] % 2 == np.arange(2)
    )  # the newest observation is the branch taken
    assert np.all(child[~inner] == np.flatnonzero(~inner)[:, None, None])


# --- the verification -----------------------------------------------------------------------------


def test_every_bound_holds_on_random_problems_and_lemma_3_too():
    rows, lemma3, lemma1 = bounds_check.verify(n_problems=250, seed=7, ks=(1, 2, 5))
    assert len(rows) == 2 + 3 * 5
    for key, row in rows.items():
        assert row.shape == (250, 2) and np.all(np.isfinite(row)), key
        assert row[:, 0].max() <= 1 + 1e-9, key
        assert row[:, 0].max() > 0.005, key  # the check has something to measure
    assert lemma3 < 1e-11
    assert lemma1[0] == 0 and lemma1[1] > 0  # Eq. 14 holds for h_t, not for (h_t, a_t)


def test_worst_case_attains_the_sharp_bounds_for_small_errors():
    for ratio in (0.0, 0.3, 1.0):  # all policy error, mixed, all model error
        eps_m, eps_pi = 1e-5 * ratio, 1e-5 * (1 - ratio)
        problem = bounds_check.worst_case_problem(eps_m, eps_pi, 0.9)
        s, gaps = bounds_check.check_bounds(problem, 0.9, (1, 4))
        assert (s["eps_m"], s["eps_pi"]) == pytest.approx((eps_m, eps_pi), rel=1e-9)
        for (name, k), (gap, bound) in gaps.items():
            assert gap <= bound * (1 + 1e-6) + 1e-10
            if "sharp" in name:
                assert gap > 0.999 * bound


def test_worst_case_breaks_no_bound_for_large_errors_either():
    for eps_m, eps_pi, gamma in itertools.product((0.0, 0.1, 1.0), (0.0, 0.3, 1.0), (0.3, 0.9)):
        _, gaps = bounds_check.check_bounds(
            bounds_check.worst_case_problem(eps_m, eps_pi, gamma), gamma, (1, 2, 9)
        )
        for key, (gap, bound) in gaps.items():
            assert abs(gap) <= bound + 1e-9, key


def test_lemma_1_counts_one_action_too_few():
    s = bounds_check.solve(bounds_check.worst_case_problem(0.0, 0.1, 0.9), 0.9, (1,))
    over_h, over_h_and_a = s["drift"]
    assert over_h[1] == pytest.approx(2 * 0.1)  # 2 t eps_pi: right for h_t
    assert over_h_and_a[1] == pytest.approx(2 * (1 - 0.9**2))  # 0.38 > 2 t eps_pi = 0.2
    assert over_h_and_a[0] == pytest.approx(2 * 0.1)  # and 0.2 > 0 at t = t_sw = 0


def test_with_the_last_action_from_the_data_policy_the_tight_bound_is_attained_at_k_1():
    _, gaps = bounds_check.check_bounds(bounds_check.worst_case_problem(1e-5, 1e-5, 0.9), 0.9, (1,))
    gap, bound = gaps["Theorem 2, tight, a_t ~ pi_D", 1]
    assert 0.999 * bound < gap < bound
    sharp = gaps["Theorem 2, sharp (ours)", 1][1]
    assert gap > 1.05 * sharp  # the sharp bound needs a_t from pi


def test_r_max_must_bound_the_absolute_reward():
    problem = bounds_check.worst_case_problem(0.01, 0.01, 0.9)
    problem = dataclasses.replace(problem, reward=problem.reward - 1)  # rewards in [-2, 0]
    s = bounds_check.solve(problem, 0.9, (1,))
    gap = s["branched"][0] - s["true"]
    assert problem.reward.max() == 0  # Sec. 5.1 would allow any r_max > 0
    assert gap > bounds.branched_rollout_gap(s["eps_m"], s["eps_pi"], 0.9, 1, r_max=0.01)
    assert gap <= bounds.branched_rollout_gap(s["eps_m"], s["eps_pi"], 0.9, 1, r_max=2.0)


def test_verification_reports_a_bound_that_is_too_small(monkeypatch, capsys):
    def too_small(*args):
        return 1e-9 * bounds.full_rollout_gap(*args)

    monkeypatch.setattr(bounds_check, "FULL_BOUNDS", (("Wrong", "full", too_small, "eps_pi"),))
    assert bounds_check.print_verification(5, 0) == 1
    assert "BROKE: Wrong, k = -: 5 times" in capsys.readouterr().out
