"""baselines/ghp_mdp.py: inference by gradient steps, CEM, and what theta is trained on."""

import math

import pytest
import torch

import checkpoint
import m3po
from baselines import ghp_mdp
from baselines.ghp_mdp import LatentModel, Planner
from envs import never
from rollouts import EnvBuffer
from tests.conftest import (assert_same_run, constant_heads, needs_compiler, random_batch,
                            read_rows)


class LinearModel(LatentModel):
    """r = z a with standard deviation 0.3, o' = o exactly: z is the slope."""

    def __init__(self, **kwargs):
        super().__init__(1, 1, members=2, widths=(4,), z_dim=1, reward_weight=1.0, **kwargs)

    def predict(self, obs, actions, z):
        mean = torch.cat([z * actions, torch.zeros_like(obs)], -1)
        mean = mean.expand(2, *mean.shape[-2:])
        return mean, torch.full_like(mean, 2 * math.log(0.3))


class GoalModel(LatentModel):
    """r = -(a - goal - z)^2 / 10, o' = o + a, the same in both members."""

    def __init__(self, goal, act_dim=2):
        super().__init__(act_dim, act_dim, members=2, widths=(4,), z_dim=act_dim)
        self.goal = goal

    def predict(self, obs, actions, z):
        reward = -((actions - self.goal - z) ** 2).sum(-1, keepdim=True) / 10
        mean = torch.cat([reward, actions], -1)
        return mean.expand(2, *mean.shape[-2:]), torch.zeros(())

    def means(self, obs, actions, z):
        return self.predict(obs, actions, z)[0]


def slope_window(slopes, T=10, known=None):
    """T transitions with reward = slope * action, obs = 0; the oldest are masked beyond `known`."""
    tokens = torch.zeros(T, len(slopes), 3)
    tokens[..., 1] = torch.linspace(-1, 1, T)[:, None]
    tokens[..., 2] = tokens[..., 1] * slopes
    mask = torch.arange(T)[:, None] >= T - torch.as_tensor([T] * len(slopes) if known is None
                                                           else known)
    return tokens, mask, torch.zeros(len(slopes), 1)


# ---- q(z) ---------------------------------------------------------------------------------------


def test_inference_finds_the_hidden_slope_of_a_linear_system():
    model, slopes = LinearModel(J=200, rate=0.03), torch.tensor([-1.5, -0.5, 0.0, 0.7, 2.0])
    window = slope_window(slopes)
    precision = 1 + (torch.linspace(-1, 1, 10) ** 2).sum() / 0.09  # the posterior in closed form
    exact = (precision - 1) / precision * slopes
    mu, sigma = model.infer(*window)
    assert ((mu[:, 0] - exact).abs() < precision**-0.5).all()  # the gradient is a sampled one
    assert (sigma < 0.4).all()  # from 1; Adam remembers the first gradients for long
    # At the exact posterior the ELBO is stationary. It is quadratic in the noise: +-1 is the mean.
    mu = exact[:, None].requires_grad_()
    log_sigma = torch.full((5, 1), -precision.log().item() / 2, requires_grad=True)
    transitions = model.transitions(*window)
    elbo = sum(model.elbo(*transitions, window[1], mu, log_sigma, torch.full((5, 1), noise)) / 2
               for noise in (-1.0, 1.0)).sum()
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(elbo, (mu, log_sigma)))


def test_ten_steps_at_the_default_rate_tell_two_directions_apart():
    mu, _ = LinearModel().infer(*slope_window(torch.tensor([-1.0, 1.0])))
    assert mu[0] < -0.7 and mu[1] > 0.7


def test_an_empty_window_leaves_the_prior():
    model = LatentModel(1, 1, widths=(8,))
    tokens, mask, obs = slope_window(torch.ones(3), known=[0, 4, 0])
    mu, sigma = model.infer(tokens, mask, obs)
    for row in (0, 2):
        assert (mu[row] == 0).all() and (sigma[row] == 1).all()
    assert (mu[1] != 0).all()
    mu, sigma = model.infer(tokens[:0], mask[:0], obs)  # L = 0
    assert mu.shape == (3, 5) and (mu == 0).all() and (sigma == 1).all()


def test_what_stands_in_masked_slots_has_no_effect_not_even_nan():
    model = LatentModel(2, 1, widths=(8,))
    batch = random_batch(2, 1, 4, 6)
    window = batch.tokens[:-1].clone(), batch.mask[:-1], batch.split(2)[0]
    draw = lambda: model.infer(*window, generator=torch.Generator().manual_seed(1))
    before = draw()
    window[0][~window[1]] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(before, draw()))


def test_rows_are_inferred_independently_and_without_a_gradient_on_theta():
    model = LatentModel(2, 1, widths=(8,)).double()
    batch = random_batch(2, 1, 4, 6, torch.float64)
    window = batch.tokens[:-1], batch.mask[:-1], batch.split(2)[0]
    noise = torch.zeros(6, 5, dtype=torch.float64)
    mu = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.zeros_like(mu)
    o, a, y = model.transitions(*window)
    elbo = model.elbo(o, a, y, window[1], mu, log_sigma, noise)
    grad, = torch.autograd.grad(elbo[2], mu)
    assert (grad[[0, 1, 3, 4, 5]] == 0).all() and (grad[2] != 0).all()
    step = torch.zeros_like(mu)
    step[2, 3] = 1e-6
    at = lambda mu: model.elbo(o, a, y, window[1], mu, log_sigma, noise)[2]
    assert torch.isclose((at(mu + step) - at(mu - step)) / 2e-6, grad[2, 3], rtol=1e-5)
    model.infer(*window)
    assert all(p.grad is None for p in model.parameters())


def test_the_elbo_is_that_of_a_slow_loop():
    model = LatentModel(2, 1, widths=(8,), z_dim=3)
    batch = random_batch(2, 1, 4, 6)
    tokens, mask, obs = batch.tokens[:-1], batch.mask[:-1], batch.split(2)[0]
    mu, log_sigma, noise = torch.randn(3, 6, 3)
    o, a, y = model.transitions(tokens, mask, obs)
    got = model.elbo(o, a, y, mask, mu, log_sigma, noise)
    weight = torch.tensor([2.0, 1.0, 1.0]) / 4 * 3
    for i in range(6):
        q = torch.distributions.Normal(mu[i], log_sigma[i].exp())
        prior = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        expected = -torch.distributions.kl_divergence(q, prior).sum()
        z = mu[i] + log_sigma[i].exp() * noise[i]
        for t in mask[:, i].nonzero().flatten().tolist():
            after = tokens[t + 1, i, :2] if t < 3 else obs[i]
            target = torch.cat([tokens[t, i, 3:], after - tokens[t, i, :2]])
            mean, logvar = model.predict(tokens[t, i, None, :2], tokens[t, i, None, 2:3], z[None])
            p = torch.distributions.Normal(mean[:, 0], (logvar[:, 0] / 2).exp())
            expected += (p.log_prob(target) * weight).sum(-1).mean(0)
        assert torch.isclose(got[i], expected, rtol=1e-4, atol=1e-4)


def test_evaluation_may_infer_in_inference_mode():
    model = LatentModel(1, 1, widths=(8,))
    with torch.inference_mode():
        mu, _ = model.infer(*slope_window(torch.ones(2)))
    assert (mu != 0).all()


# ---- theta --------------------------------------------------------------------------------------


def test_theta_is_scored_on_the_window_and_the_row_and_on_nothing_held_out():
    model, seen = LatentModel(1, 1, widths=(8,)), []
    D_env = EnvBuffer(200, 1, 1, L=3, holdout=0.4)
    for t in range(60):
        D_env.add([t], [0.0], t, [t + 1], False, t % 10 == 9)
    held = {t for t in range(60) if D_env.holdout[t]}
    assert 5 < len(held) < 55
    model.ensemble.loss = lambda tokens, mask, x, y: (
        seen.append(y[:, 0] * model.ensemble.target_std[0] + model.ensemble.target_mean[0]),
        model.ensemble.net.b[0].sum())[1]
    picked, batch_of = [], D_env.batch
    D_env.batch = lambda rows: (picked.append(rows), batch_of(rows))[1]
    model.fit(D_env, steps=3, batch_size=16)
    for rows, rewards in zip(picked, seen):
        expected = [t for row in rows.tolist() for t in range(max(row - 3, row // 10 * 10), row + 1)
                    if t not in held]
        assert sorted(rewards.round().int().tolist()) == sorted(expected)
    assert len(seen) == 3


def test_fit_standardises_by_the_statistics_of_d_env_and_leaves_z_as_it_is():
    model = LatentModel(1, 1, widths=(8,), z_dim=2)
    D_env = EnvBuffer(50, 1, 1, L=2)
    for t in range(50):
        D_env.add([t], [t % 2], 3 * t, [t + 1], False, False)
    model.fit(D_env, steps=1, batch_size=4)
    statistics = D_env.statistics()
    assert torch.equal(model.ensemble.token_mean[[0, 1, 4]], statistics["token_mean"])
    assert torch.equal(model.ensemble.token_std[[0, 1, 4]], statistics["token_std"])
    assert model.ensemble.token_mean[2:4].tolist() == [0, 0]
    assert model.ensemble.token_std[2:4].tolist() == [1, 1]


def test_fit_learns_a_reward_that_only_the_window_explains():
    D_env = EnvBuffer(600, 1, 1, L=3)
    for t in range(600):
        action, slope = float(torch.rand(()) * 2 - 1), (-1, 1)[t // 30 % 2]
        D_env.add([0.0], [action], slope * action, [0.0], False, t % 100 == 99)
    sighted = LatentModel(1, 1, widths=(32, 32), lr=1e-2)
    for _ in range(8):  # it takes a while until z means something
        sighted.fit(D_env, steps=100, batch_size=32)
        if sighted.validate(D_env)["explained_reward"] > 0.4:
            break
    assert sighted.validate(D_env)["explained_reward"] > 0.4
    D_env.lags, D_env.L = D_env.lags[-1:], 0  # the same rows without their windows
    assert sighted.validate(D_env)["explained_reward"] < 0.15  # z is what carries the task
    blind = LatentModel(1, 1, widths=(32, 32), lr=1e-2)
    blind.fit(D_env, steps=250, batch_size=32)
    assert blind.validate(D_env)["explained_reward"] < 0.15


# ---- CEM ----------------------------------------------------------------------------------------


def zero_z(n, z_dim=2):
    return torch.zeros(2, n, z_dim)


def test_cem_finds_the_optimum_of_a_quadratic_for_each_episode_on_its_own():
    planner = Planner(GoalModel(torch.tensor([0.3, -0.6])), never, H=4)
    z = zero_z(3)
    z[:, 1] = 0.2  # another optimum in the second episode
    plan = planner.plan(torch.zeros(3, 4, 2), torch.zeros(3, 2), z)
    for _ in range(3):
        plan = planner.plan(plan, torch.zeros(3, 2), z)
    goal = torch.tensor([[0.3, -0.6], [0.5, -0.4], [0.3, -0.6]])[:, None]
    assert (plan - goal).abs().max() < 0.12


def test_cem_is_that_of_a_slow_loop():
    model = LatentModel(2, 1, widths=(8,))
    ends = lambda obs: obs[..., 0] > 0.3
    planner = Planner(model, ends, H=3, candidates=12, elites=4, iterations=2, alpha=0.1)
    obs, z, start = torch.randn(2, 2) * 0.2, torch.randn(3, 2, 5), torch.randn(2, 3, 1) * 0.3
    got = planner.plan(start, obs, z, torch.Generator().manual_seed(5))

    draws, generator = [], torch.Generator().manual_seed(5)
    for _ in range(2):
        draws.append(torch.randn(2, 12, 3, 1, generator=generator))
    for i in range(2):
        mean, std = start[i], torch.ones(3, 1)
        for draw in draws:
            plans = [(mean + std * noise).clamp(-1, 1) for noise in draw[i]]
            returns = []
            for plan in plans:
                total = 0.0
                for b in range(3):
                    o = obs[i]
                    for a in plan:
                        y = model.predict(o[None], a[None], z[b, i, None])[0][b, 0]
                        total, o = total + y[0].item() / 3, o + y[1:]
                        if ends(o):
                            break
                returns.append(total)
            best = sorted(range(12), key=lambda j: -returns[j])[:4]
            elites = torch.stack([plans[j] for j in best])
            mean = 0.1 * mean + 0.9 * elites.mean(0)
            std = 0.1 * std + 0.9 * elites.std(0, correction=0)
        assert torch.allclose(got[i], mean, atol=1e-5)


def test_many_episodes_are_scored_as_each_alone():
    model = LatentModel(2, 1, widths=(8,))
    planner = Planner(model, lambda obs: obs[..., 0] > 0.3, H=3)
    obs, z, plans = torch.randn(12, 2) * 0.2, torch.randn(3, 12, 5), torch.randn(12, 6, 3, 1)
    alone = [planner.score(obs[i:i + 1], z[:, i:i + 1], plans[i:i + 1]) for i in range(12)]
    assert torch.allclose(planner.score(obs, z, plans), torch.cat(alone), atol=1e-6)
    step = obs, plans[:, 0, 0], z[0]
    assert torch.equal(model.means(*step), model.predict(*step)[0])


def test_a_dead_branch_earns_nothing_and_its_last_reward_counts():
    model = LatentModel(1, 1, members=2, widths=(4,), z_dim=1)
    constant_heads(model.ensemble, [1.0, 1.0])  # r = 1, o' = o + 1, whatever is done
    planner = Planner(model, lambda obs: obs[..., 0] > 2.5, H=6)
    obs = torch.tensor([[0.0], [2.0], [-9.0]])
    score = planner.score(obs, zero_z(3, 1), torch.zeros(3, 4, 6, 1))
    assert score[:, 0].tolist() == [3, 1, 6]


@pytest.mark.parametrize("output", [0, 1])
def test_what_is_not_finite_costs_most_unless_the_branch_is_dead(output):
    class Breaks(GoalModel):
        def predict(self, obs, actions, z):
            mean, logvar = super().predict(obs, actions, z)
            breaks = (actions > 0.5) & (torch.arange(2) == output)
            return torch.where(breaks, math.nan, mean), logvar

    planner = Planner(Breaks(0.9, 1), never, H=3)
    plans = torch.zeros(1, 4, 3, 1)
    plans[0, 1, 2], plans[0, 2] = 0.9, -1.0
    score = planner.score(torch.zeros(1, 1), zero_z(1, 1), plans)[0]
    assert score[1] == -math.inf and torch.isfinite(score[[0, 2, 3]]).all()
    plan = planner.plan(torch.zeros(1, 3, 1), torch.zeros(1, 1), zero_z(1, 1))
    assert 0.2 < plan.min() and plan.max() <= 0.5  # as near to the goal as is safe
    dead = Planner(Breaks(0.9, 1), lambda obs: torch.ones_like(obs[..., 0], dtype=torch.bool), H=3)
    assert torch.isfinite(dead.score(torch.zeros(1, 1), zero_z(1, 1), plans)).all()


def test_the_plan_is_kept_shifted_by_a_step_and_begun_anew_where_the_window_is_empty():
    planner, started = Planner(GoalModel(torch.tensor([0.3])), never, H=3), []
    planner.model.infer = lambda tokens, mask, obs, generator: torch.zeros(2, len(obs), 2).unbind()
    better = torch.tensor([[0.1], [0.2], [0.3]])
    planner.plan = lambda mean, *_: (started.append(mean), mean + better)[1]
    tokens, obs = torch.zeros(2, 2, 5), torch.zeros(2, 2)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    first = planner.act(tokens, mask, obs)
    mask[-1, 0] = True  # the second episode is at its beginning still
    planner.act(tokens, mask, obs)
    assert torch.allclose(first, torch.full((2, 2), 0.1)) and (started[0] == 0).all()
    assert torch.allclose(started[1][0, :, 0], torch.tensor([0.2, 0.3, 0.0]))
    assert (started[1][1] == 0).all()


def test_evaluation_plans_alike_whatever_was_drawn_before_and_draws_nothing_itself():
    planner = Planner(LatentModel(1, 1, widths=(8,)), never, H=2, candidates=30)
    tokens, mask, obs = slope_window(torch.ones(2), known=[0, 0])
    state = torch.get_rng_state()
    first = planner.act(tokens, mask, obs, deterministic=True)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(7)
    assert torch.equal(first, planner.act(tokens, mask, obs, deterministic=True))


# ---- the run ------------------------------------------------------------------------------------

TINY = ["--N", "2", "--E", "30", "--warmup", "30", "--fit-every", "30", "--fit-steps", "2",
        "--J", "2", "--width", "8", "--horizon", "2", "--candidates", "10", "--elites", "3",
        "--model-batch", "8", "--eval-episodes", "1", "--eval-every", "2"]


def run(out, *flags):
    flags = [str(flag) for flag in ("--out", out, *flags)]
    flags = flags if "--resume" in flags else [*TINY, *flags]
    assert ghp_mdp.main(*m3po.parse_args(flags, "ghp_mdp")) is None
    return out


def test_resuming_in_the_middle_of_an_episode_is_never_having_stopped(tmp_path):
    a = run(tmp_path / "a", "--N", 3)
    b = run(tmp_path / "b")
    assert len(checkpoint.read(b / "checkpoint.pt", "run")["progress"]["actions"]) == 60
    run(b, "--resume", b, "--N", 3)
    assert_same_run(a, b)


def test_a_tiny_run_trains_every_part_logs_it_and_can_be_loaded(tmp_path):
    out = run(tmp_path / "a", "--N", 3, "--eval-every", 3)
    rows = read_rows(out)
    assert [row["global_step"] for row in rows] == ["30", "60", "90"]
    assert all(math.isfinite(float(rows[-1][name])) for name in (
        "model_loss", "model_explained_reward", "model_explained_obs", "eval_return_mean"))
    planner, _, env, args = ghp_mdp.load(out)
    torch.manual_seed(args.seed)
    untrained = ghp_mdp.build(args, env, "cpu")
    for name, weight in untrained.named_parameters():
        assert not torch.equal(weight, dict(planner.named_parameters())[name]), name


@needs_compiler
def test_a_compiled_run_is_the_eager_one_up_to_rounding(tmp_path):
    eager, compiled = (read_rows(run(tmp_path / on, "--compile", on))[-1] for on in ("off", "on"))
    for name in ("model_loss", "model_explained_reward", "eval_return_mean"):
        assert float(compiled[name]) == pytest.approx(float(eager[name]), rel=1e-3, abs=1e-4), name


def test_more_elites_than_candidates_are_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--elites", 11)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--elites" in message and message.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_evaluation_leaves_training_alone_and_a_blind_run_works(tmp_path):
    states = [checkpoint.read(run(tmp_path / str(n), "--L", 0, "--eval-episodes", n)
                              / "checkpoint.pt", "run") for n in (0, 1)]
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    assert all(torch.equal(states[0]["policy"][name], weight)
               for name, weight in states[1]["policy"].items())
