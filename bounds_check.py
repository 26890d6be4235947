"""The exact check behind `python bounds.py --verify`: each bound held against solved problems.

    python bounds.py --verify --problems 1000 --seed 0

A meta-RL problem is drawn at random, small enough that every return can be computed to infinity
without sampling: its histories up to a few steps are listed one by one and are the states of an MDP
(Lemma 3). A wrong model and a new policy go with it. `verify` then compares |model return - true
return| with each bound C of bounds.py. `worst_case_problem` comes as close to the sharp ones as one
likes.

Axes: H histories, A actions, X next observations, K hidden tasks.
"""
import math
from dataclasses import dataclass

import numpy as np

from bounds import (branched_rollout_gap, checked, full_rollout_gap, janner_branched_gap,
                    sharp_branched_gap, sharp_full_gap, tight_gap)

# --- 1. the sum over time ------------------------------------------------------------------------


def branched_rollout_gap_series(eps_m, eps_pi, gamma, k, r_max=1.0, rtol=1e-16):
    """The plain sum over time whose closed form is Eq. 20: the test oracle, no algebra in it.

    Terms: Eq. 13 at t = 0, Eq. 16 for 1 <= t < k, Eq. 19 for t >= k. It stops once the rest of
    the sum is below `rtol` of what is there. Slow near gamma = 1 (about 40 / (1 - gamma) terms).
    """
    eps_m, eps_pi, gamma, k, r_max = checked(
        eps_m=eps_m, eps_pi=eps_pi, gamma=gamma, k=k, r_max=r_max)
    total, t = 2 * eps_pi + 0 * (eps_m + gamma + k), 0  # term A; the zeros only set the shape
    while True:
        t += 1
        total = total + gamma**t * (2 * t * eps_pi + (np.minimum(t, k) + 1) * (eps_pi + eps_m))
        # everything after t is below gamma^(t+1) sum_s gamma^s {2 (t+1+s) eps_pi + (k+1)(..)}
        level = 2 * (t + 1) * eps_pi + (k + 1) * (eps_pi + eps_m)
        slope = 2 * eps_pi * gamma / (1 - gamma)
        if np.all(gamma ** (t + 1) * (level + slope) / (1 - gamma) <= rtol * total):
            return r_max * total


# --- 2. problems small enough to solve exactly ---------------------------------------------------


@dataclass
class Problem:
    """A finite MDP whose states are histories: H of them, A actions, X next observations.

    Nothing moves after `steps` steps (or what moves is discounted below 1e-10), so sums to
    infinity are finite sums plus a geometric tail.
    """
    child: np.ndarray  # (H, A, X) index of the history reached
    real: np.ndarray  # (H, A, X) p(o' | h, a)
    model: np.ndarray  # (H, A, X) p_th(o' | h, a)
    reward: np.ndarray  # (H, A) expected reward
    data_policy: np.ndarray  # (H, A) pi_D
    policy: np.ndarray  # (H, A) pi
    start: np.ndarray  # (H,) law of h_0
    steps: int
    tasks: tuple = ()  # what Lemma 3 has summed out, see `pomdp_return`


def solve(problem, gamma, ks):
    """Returns, errors and distances of a Problem, exactly, for the branch lengths `ks`.

    Result (dict): true, full (floats), branched (len(ks),), eps_m, eps_pi, r_max, `eps_pi_data`
    (eps_pi averaged over the data as eps_m is), `branched_data_action` (a_t drawn from pi_D: the
    other reading of Eqs. 7-8, which print no law for a_t), `drift` (2, n + 1), n = steps +
    max(ks): sum of |p_pi - p_piD| over h_t and over (h_t, a_t).
    """
    p, n, k_max = problem, problem.steps + max(ks), max(ks)
    discounts = gamma ** np.arange(n + 1)
    discounts[n] /= 1 - gamma  # from t = n on every term is the same

    def laws(policy, dynamics):  # (n + 1, H): the law of h_t
        rows = [p.start]
        for _ in range(n):
            flow = rows[-1][:, None, None] * policy[:, :, None] * dynamics
            rows.append(np.bincount(p.child.ravel(), flow.ravel(), len(p.start)))
        return np.array(rows)

    def branched(last_reward):  # last_reward (H,): expected reward of a_t given h_t
        values = [last_reward]  # values[d] (H,): the expected reward after d imagined steps
        for _ in range(k_max):
            values.append(np.einsum("ha,hax,hax->h", p.policy, p.model, values[-1][p.child]))
        from_data = data @ np.array(values).T  # (n + 1, k_max + 1): branch point u, depth d
        at = np.zeros_like(from_data)  # the same by time t = u + d; d = 0 stays empty
        for d in range(1, k_max + 1):
            at[d:, d] = from_data[: n + 1 - d, d]
        at[0, 1] = data[0] @ reward_data  # Eq. 4: t = 0 is real data
        n_branches = np.minimum(np.maximum(np.arange(n + 1), 1)[:, None], ks)  # Eqs. 5 and 6
        return discounts @ (np.cumsum(at, axis=1)[:, ks] / n_branches)

    data, true = laws(p.data_policy, p.real), laws(p.policy, p.real)
    reward_pi, reward_data = ((pi * p.reward).sum(1) for pi in (p.policy, p.data_policy))
    tv_model = (p.data_policy * np.abs(p.real - p.model).sum(2)).sum(1) / 2  # (H,)
    tv_policy = np.abs(p.policy - p.data_policy).sum(1) / 2
    with_action = true[:, :, None] * p.policy - data[:, :, None] * p.data_policy
    imagined = laws(p.policy, p.model)
    return {
        "true": discounts @ true @ reward_pi, "full": discounts @ imagined @ reward_pi,
        "branched": branched(reward_pi), "branched_data_action": branched(reward_data),
        "eps_m": min((data @ tv_model).max(), 1), "eps_pi": min(tv_policy.max(), 1),
        "eps_pi_data": min((data @ tv_policy).max(), 1), "r_max": np.abs(p.reward).max(),
        "drift": np.array([np.abs(true - data).sum(1), np.abs(with_action).sum((1, 2))]),
    }


def history_tree(horizon, n_obs=2, n_actions=2):
    """All histories up to `horizon` actions, breadth first: child (H, A, X), depth (H,), rank (H,).

    `rank` counts within a depth, in base A * X digits, so rank % X is the newest observation.
    The leaves are their own children: there the clock, a part of o_t, has run out.
    """
    sizes = [n_obs * (n_obs * n_actions) ** t for t in range(horizon + 1)]
    depth = np.repeat(np.arange(horizon + 1), sizes)
    rank = np.concatenate([np.arange(size) for size in sizes])
    next_depth = np.cumsum(sizes)[depth]  # index at which the histories one step longer begin
    move = np.arange(n_actions)[:, None] * n_obs + np.arange(n_obs)  # (A, X)
    child = (next_depth + rank * move.size)[:, None, None] + move
    child[depth == horizon] = np.flatnonzero(depth == horizon)[:, None, None]
    return child, depth, rank


def random_problem(rng, horizon=4, n_obs=2, n_actions=2):
    """A random meta-RL problem (Sec. 4) as a Problem over histories, which is Lemma 3.

    2 or 3 hidden tasks; p(o' | tau, o, a), r(tau, o, a) and the switching p(tau' | tau) are random.
    After `horizon` steps observation and task stand still, and the rewards go on for ever.
    """
    child, depth, rank = history_tree(horizon, n_obs, n_actions)
    n_tasks, obs = rng.integers(2, 4), rank % n_obs
    next_obs = rng.dirichlet(np.full(n_obs, 0.5), (n_tasks, n_obs, n_actions))[:, obs]  # (K,H,A,X)
    task_reward = rng.uniform(-1, 1, (n_tasks, n_obs, n_actions))[:, obs]  # (K, H, A)
    switch = rng.dirichlet(np.full(n_tasks, 0.5), n_tasks)  # (K, K)
    prior, start = rng.dirichlet(np.ones(n_tasks)), np.zeros(len(depth))
    start[:n_obs] = rng.dirichlet(np.ones(n_obs))

    belief = np.tile(prior, (len(depth), 1))  # (H, K): p(tau_t | h_t), filled depth by depth
    for t in range(horizon):
        now = np.flatnonzero(depth == t)
        seen = np.einsum("hk,khax->haxk", belief[now], next_obs[:, now])  # p(tau_t, o' | h, a)
        belief[child[now]] = seen / seen.sum(-1, keepdims=True) @ switch
    real = np.einsum("hk,khax->hax", belief, next_obs)  # Eq. 21
    reward = np.einsum("hk,kha->ha", belief, task_reward)  # Eq. 22
    model, data_policy, policy = _agent(rng, child, depth, rank, real, reward)
    return Problem(child, real, model, reward, data_policy, policy, start, horizon,
                   tasks=(prior, switch, next_obs, task_reward, depth))


def _agent(rng, child, depth, rank, real, reward):
    """A wrong model, a data policy and a new policy that see the last L tokens, L random.

    Half of the time they are adversarial (and see everything): the model errs towards what looks
    best, the policy moves to the worst action.
    """
    (n, n_actions, n_obs), horizon, leaf = real.shape, depth.max(), depth == depth.max()
    adversarial = rng.random() < 0.5
    length = horizon if adversarial else rng.integers(0, horizon + 1)  # L
    window = depth * n + rank % (n_obs * (n_obs * n_actions) ** length)
    _, group = np.unique(window, return_inverse=True)  # equal h_{L:t}, equal group
    data_policy = rng.dirichlet(np.ones(n_actions), n)[group]
    if adversarial:  # the values of pi_D at discount 0.9 tell good from bad
        value = 10 * (data_policy * reward).sum(1)
        for _ in range(horizon):
            q = reward + 0.9 * (real * value[child]).sum(2)
            value = np.where(leaf, value, (data_policy * q).sum(1))
        bad_policy = np.eye(n_actions)[q.argmin(1)]
        bad_model = np.eye(n_obs)[value[child].argmax(2)]
    else:
        bad_policy = rng.dirichlet(np.full(n_actions, 0.5), n)[group]
        bad_model = rng.dirichlet(np.full(n_obs, 0.5), (n, n_actions))
    shift, error = 10 ** rng.uniform(-3, 0, 2)  # how far the policy and the model are off
    policy = (1 - shift) * data_policy + shift * bad_policy
    mixed = (1 - error) * real + error * bad_model
    total = np.zeros((group.max() + 1, n_actions, n_obs))
    np.add.at(total, group, mixed)
    model = (total / np.bincount(group)[:, None, None])[group]  # the mean over equal h_{L:t}
    model[leaf] = real[leaf]  # nothing moves there, so there is nothing to get wrong
    return model, data_policy, policy


def pomdp_return(problem, gamma):
    """The true return of a `random_problem` from its tasks, p(h_t, tau_t): no belief involved."""
    prior, switch, next_obs, task_reward, depth = problem.tasks
    joint, total, inner = problem.start[:, None] * prior, 0.0, depth < problem.steps  # joint (H, K)
    for t in range(problem.steps + 1):
        weight = gamma**t / (1 - gamma if t == problem.steps else 1)  # the last one is for ever
        total += weight * np.einsum("hk,ha,kha->", joint, problem.policy, task_reward)
        flow = np.einsum("hk,ha,khax,kj->haxj", joint, problem.policy, next_obs, switch)
        joint = np.zeros_like(joint)
        np.add.at(joint, problem.child[inner], flow[inner])
    return total


def worst_case_problem(eps_m, eps_pi, gamma):
    """A problem whose gaps tend to the two sharp bounds as the errors tend to 0 (gamma > 0).

    One task; the observations are N, F, bad (reward -1) and good (+1). The data always takes action
    0 (+1 in N and F). N leads to N, and to F with probability eps_m. From F the truth goes to bad,
    the model to good: all of eps_m. Action 1 (-1; pi takes it with probability eps_pi) truly leads
    to bad; the model, which never saw it, thinks it is action 0.
    """
    real = np.zeros((4, 2, 4))  # rows N, F, bad, good
    real[0, 0, :2] = 1 - eps_m, eps_m
    real[0, 1, 2] = real[1, :, 2] = real[2, :, 2] = real[3, :, 3] = 1
    model = real.copy()
    model[0, 1], model[1] = real[0, 0], real[3]
    reward = np.array([[1, -1], [1, -1], [-1, -1], [1, 1.0]])
    data_policy, policy = np.tile([1.0, 0.0], (4, 1)), np.tile([1 - eps_pi, eps_pi], (4, 1))
    steps = math.ceil(math.log(1e-10 * (1 - gamma) / 2) / math.log(gamma))  # the rest is < 1e-10
    child = np.broadcast_to(np.arange(4), (4, 2, 4))  # the newest observation says it all
    return Problem(child, real, model, reward, data_policy, policy,
                   np.array([1 - eps_m, eps_m, 0, 0]), steps)


# --- 3. the bounds against them ------------------------------------------------------------------

# name, key in solve's result, bound, which eps_pi of solve's result the bound is fed
FULL_BOUNDS = (("Theorem 1", "full", full_rollout_gap, "eps_pi"),
               ("Theorem 1, sharp (ours)", "full", sharp_full_gap, "eps_pi_data"))
BRANCHED_BOUNDS = (("Theorem 2, as printed", "branched", branched_rollout_gap, "eps_pi"),
                   ("Theorem 2, tight", "branched", tight_gap, "eps_pi"),
                   ("Theorem 2, tight, a_t ~ pi_D", "branched_data_action", tight_gap, "eps_pi"),
                   ("Theorem 2, sharp (ours)", "branched", sharp_branched_gap, "eps_pi_data"),
                   ("Janner 4.2", "branched", janner_branched_gap, "eps_pi"))


def check_bounds(problem, gamma, ks):
    """(solve's result, {(name, k): (model - true, C)}); k is "-" for full rollouts."""
    s, gaps = solve(problem, gamma, ks), {}
    for name, key, bound, eps_pi in FULL_BOUNDS:
        gaps[name, "-"] = s[key] - s["true"], bound(s["eps_m"], s[eps_pi], gamma, s["r_max"])
    for i, k in enumerate(ks):
        for name, key, bound, eps_pi in BRANCHED_BOUNDS:
            limit = bound(s["eps_m"], s[eps_pi], gamma, k, s["r_max"])
            gaps[name, k] = s[key][i] - s["true"], limit
    return s, gaps


def verify(n_problems=1_000, seed=0, ks=(1, 2, 3, 5, 10)):
    """Solve random problems and hold every bound against |model return - true return|.

    Returns (rows, lemma3, lemma1). rows: (name, k) -> (n, 2) of gap / C and C / (2 r_max / (1 -
    gamma)). lemma3: the largest difference between the returns of history MDP and POMDP. lemma1
    (2,): in how many problems sum |p_pi - p_piD| exceeds 2 t eps_pi (Eq. 14) at some t >= 1, over
    h_t and over (h_t, a_t).
    """
    rng, rows, lemma3, lemma1 = np.random.default_rng(seed), {}, 0.0, np.zeros(2, int)
    for _ in range(n_problems):
        gamma, problem = rng.choice([0.5, 0.8, 0.9, 0.95, 0.99]), random_problem(rng)
        s, gaps = check_bounds(problem, gamma, ks)
        for key, (gap, bound) in gaps.items():
            trivial = 2 * s["r_max"] / (1 - gamma)
            rows.setdefault(key, []).append((abs(gap) / bound, bound / trivial))
        lemma3 = max(lemma3, abs(s["true"] - pomdp_return(problem, gamma)))
        t = np.arange(1, s["drift"].shape[1])
        lemma1 += (s["drift"][:, 1:] > 2 * t * s["eps_pi"] + 1e-12).any(1)
    return {key: np.array(value) for key, value in rows.items()}, lemma3, lemma1


def print_verification(n_problems, seed):
    """`--verify`. Returns the exit code: 0 if no bound broke, 1 otherwise."""
    rows, lemma3, lemma1 = verify(n_problems, seed)
    n_broken = {key: int((row[:, 0] > 1 + 1e-9).sum()) for key, row in rows.items()}
    print(f"""{n_problems} random meta-RL problems (seed {seed}): 2 or 3 hidden tasks that switch, \
682 histories as states,
gamma 0.5 to 0.99, a wrong model, a new policy. Returns are exact, to infinity.
Lemma 3: history MDP and POMDP returns differ by at most {lemma3:.0e}.

{'|model - true| / C':29} k  broken      min   median      max   says something*""")
    for (name, k), row in rows.items():
        low, median, high = np.quantile(row[:, 0], [0, 0.5, 1])
        print(f"{name:28} {k!s:>2} {n_broken[name, k]:7d} {low:8.1e} {median:8.4f} {high:8.4f}"
              f" {(row[:, 1] < 1).mean():14.0%}")
    print("""* share of problems where C is below 2 r_max / (1 - gamma), which needs no proof.

The worst case we could build (eps_m = eps_pi = 1e-5, gamma = 0.9): (model - true) / C""")
    _, gaps = check_bounds(worst_case_problem(1e-5, 1e-5, 0.9), 0.9, (1, 5))
    for (name, k), (gap, bound) in gaps.items():
        print(f"{name:28} {k!s:>2} {gap / bound:34.4f}")
    broken = [f"{name}, k = {k}: {count} times" for (name, k), count in n_broken.items() if count]
    print(f"""
Inequality (1) {"BROKE: " + "; ".join(broken) if broken else "held in every problem, for every C"}.
A step of its proof did not: Eq. 14, by Lemma 1: sum |p_pi - p_piD| <= 2 t eps_pi
  over h_t         broken at some t >= 1 in {lemma1[0]} problems
  over (h_t, a_t)  broken at some t >= 1 in {lemma1[1]} problems (this is what the paper writes)
From h_0 to (h_t, a_t) there are t + 1 actions, Lemma 1 counts t. The theorems survive: in the true
return and in the branch a_t comes from the same pi, so it is enough to compare the laws of h_t.""")
    return int(bool(broken))
