"""baselines/l2a.py: the inner step, the gradient through it, the windows, MPPI, a tiny run."""

import math

import pytest
import torch

import figures
import m3po
import play
from baselines import l2a
from baselines.l2a import AdaptiveModel, Mppi, rows_ahead
from envs import never
from rollouts import EnvBuffer
from tests.conftest import assert_same_run, fill, read_rows

TINY = ["--N", "2", "--E", "40", "--warmup", "20", "--fit-every", "20", "--fit-steps", "3",
        "--windows", "4", "--width", "8", "--candidates", "16", "--eval-episodes", "2"]


def tiny_model(O=2, A=1, **kwargs):
    """In float64, with statistics that are not 0 and 1."""
    model = AdaptiveModel(O, A, widths=(5, 4), **kwargs).double()
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            continue  # angles
        buffer.normal_() if "mean" in name else buffer.uniform_(0.5, 2.0)
    return model


def windows(model, T=3, n=4):
    """Random tokens [T, n, D] with 0 .. T of them real, and the obs [n, O] after the last."""
    O, A = model.obs_dim, model.act_dim
    mask = torch.arange(T, 0, -1)[:, None] <= torch.arange(n) % (T + 1)
    return (torch.randn(T, n, O + A + 1, dtype=torch.double), mask,
            torch.randn(n, O, dtype=torch.double))


def slow_loss(model, theta, tokens, mask, obs):
    """The mean over the real steps of one window [T, D] by torch.nn.functional, number by number.
    theta: [w [in, out], b [1, out], ...]."""
    O, losses = model.obs_dim, []
    for t in range(len(tokens)):
        if not mask[t]:
            continue
        o, a, r = tokens[t].split([O, model.act_dim, 1])
        after = obs if t == len(tokens) - 1 else tokens[t + 1, :O]
        x = ((tokens[t] - model.token_mean) / model.token_std)[:-1].clamp(-10, 10)
        for i in range(0, len(theta), 2):
            x = torch.nn.functional.linear(x, theta[i].T, theta[i + 1][0])
            x = torch.nn.functional.silu(x) if i < len(theta) - 2 else x
        y = (torch.cat([r, after - o]) - model.target_mean) / model.target_std
        losses.append(sum(model.weight[i] * (x[i] - y[i]) ** 2 for i in range(O + 1)))
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.double)


# --- the inner step -------------------------------------------------------------------------------


def test_the_inner_step_is_minus_alpha_times_the_finite_difference_of_each_windows_own_loss():
    model = tiny_model(inner_rate=0.3)
    tokens, mask, obs = windows(model)
    adapted = model.adapt(tokens, mask, obs)
    theta = [p.detach()[0].clone() for p in model.theta]
    for b in range(4):
        loss = lambda: slow_loss(model, theta, tokens[:, b], mask[:, b], obs[b]).item()
        for k, p in enumerate(theta):
            for i in range(p.numel()):
                before, h = p.view(-1)[i].item(), 1e-6
                p.view(-1)[i] = before + h
                up = loss()
                p.view(-1)[i] = before - h
                slope = (up - loss()) / (2 * h)
                p.view(-1)[i] = before
                moved = adapted[k][b].view(-1)[i].item() - before
                assert moved == pytest.approx(-0.3 * slope, abs=1e-7)
    assert torch.equal(adapted[0][0], theta[0])  # its window is empty
    assert not torch.equal(adapted[0][3], theta[0])


def test_the_outer_gradient_goes_through_the_inner_step():
    model = tiny_model(inner_rate=0.5)
    D_env = EnvBuffer(60, 2, 1, L=3)
    D_env.tokens, D_env.next_obs = D_env.tokens.double(), D_env.next_obs.double()
    for row in range(40):
        D_env.add(torch.randn(2), torch.rand(1), torch.randn(()), torch.randn(2),
                  row % 9 == 8, False)
    rows = torch.tensor([4, 7, 9, 22, 30])
    loss = lambda: model.meta_loss(D_env, rows, K=3)[0]
    gradients = torch.autograd.grad(loss(), list(model.theta))
    first_order = first_order_gradient(model, D_env, rows)
    differs = False
    for p, g, g1 in zip(model.theta, gradients, first_order):
        for i in range(p.numel()):
            flat, h = p.data.view(-1), 1e-6
            before = flat[i].item()
            flat[i] = before + h
            up = loss().item()
            flat[i] = before - h
            slope = (up - loss().item()) / (2 * h)
            flat[i] = before
            assert g.view(-1)[i].item() == pytest.approx(slope, abs=1e-7)
            differs |= abs(g1.view(-1)[i].item() - slope) > 1e-3
    assert differs  # the first-order gradient would have failed


def first_order_gradient(model, D_env, rows):
    """The gradient with theta' - theta taken for a constant."""
    original = model.adapt

    def detached(tokens, mask, obs, second_order=False):
        steps = [a.detach() - p.detach() for a, p in zip(original(tokens, mask, obs), model.theta)]
        return [p + s for p, s in zip(model.theta, steps)]

    model.adapt = detached
    try:
        return torch.autograd.grad(model.meta_loss(D_env, rows, K=3)[0], list(model.theta))
    finally:
        del model.adapt


def test_the_reward_weighs_as_much_as_all_observations():
    weight = AdaptiveModel(7, 2, (4,)).weight
    assert weight[0] == pytest.approx(0.5) and weight[1:].sum() == pytest.approx(0.5)


def test_fifty_episodes_adapt_at_once_as_each_would_alone():
    model = tiny_model()
    tokens, mask, obs = windows(model, n=50)
    together = model.adapt(tokens, mask, obs)
    for b in (0, 3, 49):
        alone = model.adapt(tokens[:, b:b + 1], mask[:, b:b + 1], obs[b:b + 1])
        assert all(torch.allclose(t[b], a[0]) for t, a in zip(together, alone))


def test_on_a_line_with_a_hidden_slope_the_inner_step_finds_it():
    """r = slope * a, slope drawn anew each episode: after training, three steps tell it."""
    D_env = EnvBuffer(600, 1, 1, L=3)
    for row in range(600):
        slope = torch.randn(()) if row % 10 == 0 else slope
        action = torch.rand(1) * 2 - 1
        D_env.add([0.0], action, slope * action[0], [0.0], False, row % 10 == 9)
    model = AdaptiveModel(1, 1, (32, 32), inner_rate=0.3)
    model.fit(D_env, steps=400, windows=32, K=3)
    slopes = torch.linspace(-1.5, 1.5, 7)
    actions = torch.tensor([0.9, -0.7, 0.8])[:, None].expand(3, 7)
    tokens = torch.stack([torch.zeros(3, 7), actions, actions * slopes], -1)
    theta = model.adapt(tokens, torch.ones(3, 7, dtype=torch.bool), torch.zeros(7, 1))
    ask = lambda a: model.predict(theta, torch.zeros(7, 1, 1), torch.full((7, 1, 1), a))[0][:, 0]
    found = ((ask(0.8) - ask(-0.8)) / 1.6).detach()
    assert torch.corrcoef(torch.stack([found, slopes]))[0, 1] > 0.95
    assert (found[[0, 1, 2]] < 0).all() and (found[[4, 5, 6]] > 0).all()
    blind = model.adapt(tokens[:0], torch.ones(0, 7, dtype=torch.bool), torch.zeros(7, 1))
    assert all(torch.equal(w[0], w[-1]) for w in blind)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [300, 50])
def test_no_window_crosses_an_episodes_end_and_the_future_is_what_followed(capacity):
    """obs = [row, episode, task], so ids tell where a token comes from."""
    D_env, K = EnvBuffer(capacity, 3, 1, L=3), 4
    log = fill(D_env, 230)
    rows = D_env.kept()
    ahead, mask = rows_ahead(D_env, rows, K)
    tokens = D_env.gather(ahead, mask)
    crossed_a_switch = False
    for b, row in enumerate(rows.tolist()):
        episode = log[row][0]
        follow = [k for k in range(K) if row + k < 230 and log[row + k][0] == episode]
        assert mask[:, b].tolist() == [k in follow for k in range(K)] and mask[0, b]
        for k in follow:
            assert tokens[k, b].tolist() == log[row + k][1]
        past, real = D_env.window(rows[b:b + 1])
        assert all(log[int(t[0])][0] == episode for t in past[real])
        crossed_a_switch |= len({log[row + k][1][2] for k in follow}) > 1
    assert crossed_a_switch


def test_a_step_held_out_is_never_scored_in_training_but_validates():
    D_env, model = EnvBuffer(50, 3, 1, L=2), AdaptiveModel(3, 1, (4,))
    fill(D_env, 40)
    rows = D_env.kept()[:20]
    D_env.holdout[:] = True
    assert model.meta_loss(D_env, rows, 3)[0] == 0
    held, before = D_env.rows(holdout=True), model.validate(D_env)["explained_reward"]
    D_env.tokens[held[::2], -1] += 5.0  # what validates is what they hold
    assert len(held) == 40 and model.validate(D_env)["explained_reward"] != before


# --- MPPI -----------------------------------------------------------------------------------------


class RewardIsAction:
    """r = a + o, o' = o + 1; for rows whose action is above `nan_above` r is NaN."""

    act_dim, nan_above = 1, math.inf

    def predict(self, weights, obs, actions):
        reward = actions[..., 0] + obs[..., 0]
        return torch.where(actions[..., 0] > self.nan_above, math.nan, reward), obs + 1


def planner(terminated_fn=never):
    return Mppi(RewardIsAction(), terminated_fn, H=4, candidates=6, kappa=2.0)


def test_mppi_smooths_and_weighs_as_a_loop_does():
    agent = planner()
    n, N, H = 3, 6, 4
    mean, obs, noise = torch.randn(n, H, 1) * 0.3, torch.randn(n, 1), torch.randn(n, N, H, 1)
    found = agent.plan(None, mean, obs, noise)
    for b in range(n):
        plans, returns = [], []
        for k in range(N):
            before, plan, o, S = 0.0, [], obs[b].item(), 0.0
            for t in range(H):
                before = 0.7 * 0.8 * noise[b, k, t].item() + 0.3 * before
                plan.append(min(max(mean[b, t].item() + before, -1.0), 1.0))
                S, o = S + plan[-1] + o, o + 1
            plans.append(plan), returns.append(S)
        w = [math.exp(2.0 * (S - max(returns))) for S in returns]
        expected = [sum(w[k] * plans[k][t] for k in range(N)) / sum(w) for t in range(H)]
        assert found[b, :, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_dead_branches_earn_nothing():
    agent = planner(lambda obs: obs[..., 0] >= 2)  # o' = 2 after the second step from o = 0
    plans = torch.tensor([[[[0.5], [0.25], [1.0], [1.0]]]])
    assert agent.score(None, torch.zeros(1, 1), plans).item() == pytest.approx(0.5 + 1.25)


def test_a_plan_that_is_not_finite_weighs_nothing():
    agent = planner()
    agent.model.nan_above = 0.5
    noise = torch.tensor([2.0, -2.0])[None, :, None, None].expand(1, 2, 4, 1)
    plan = agent.plan(None, torch.zeros(1, 4, 1), torch.zeros(1, 1), noise)
    assert torch.isfinite(plan).all() and (plan < 0).all()


def test_the_mean_plan_moves_on_by_a_step_and_a_new_episode_begins_with_zeros(monkeypatch):
    model = AdaptiveModel(1, 1, (4,))
    agent, seen = Mppi(model, never, H=3, candidates=5), []

    def plan(weights, mean, obs, noise):
        seen.append(mean.clone())
        return torch.tensor([1.0, 2.0, 3.0])[None, :, None].expand(len(obs), 3, 1) / 10

    monkeypatch.setattr(agent, "plan", plan)
    tokens, mask = torch.zeros(2, 2, 3), torch.tensor([[False, False], [True, False]])
    assert torch.allclose(agent.act(tokens, mask, torch.zeros(2, 1)), torch.tensor(0.1))
    agent.act(tokens, mask, torch.zeros(2, 1))
    assert seen[0].abs().sum() == 0
    assert torch.allclose(seen[1][0, :, 0], torch.tensor([0.2, 0.3, 0.3]))
    assert seen[1][1].abs().sum() == 0  # the second episode's window is empty


def test_evaluation_draws_the_same_numbers_in_every_call_and_none_of_trainings():
    agent = Mppi(AdaptiveModel(2, 1, (4,)), never, H=3, candidates=5)
    empty = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 2)
    before = torch.get_rng_state()
    with torch.inference_mode():  # as evaluation does
        first = agent.act(*empty, deterministic=True)
        assert torch.equal(first, agent.act(*empty, deterministic=True))
    assert torch.equal(before, torch.get_rng_state())


# --- the run --------------------------------------------------------------------------------------


def run(out, *flags):
    assert l2a.main(*m3po.parse_args([*TINY, *flags, "--out", str(out)], "l2a")) is None
    return out


@pytest.mark.parametrize("L", ["3", "0"])
def test_a_tiny_run_learns_logs_and_loads(tmp_path, L):
    folder = run(tmp_path / "a", "--L", L)
    first, last = read_rows(folder)
    assert all(math.isfinite(float(row["meta_loss"])) for row in (first, last))
    if L == "0":
        assert last["meta_loss"] == last["unadapted_loss"]  # nothing to adapt to
    policy, _, env, args = play.load(folder)
    action = policy.act(torch.zeros(args.L, 1, 3), torch.zeros(args.L, 1, dtype=torch.bool),
                        torch.zeros(1, 1), deterministic=True)
    assert action.shape == (1, 1) and args.method == "l2a"
    assert "L2A" in str(figures.read_runs([folder])[0]["point-fwd-bwd"].keys())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    """Epochs of 30 steps end within an episode of 100, so that the plan must be kept too."""
    short = run(tmp_path / "b", "--E", "30", "--N", "2")
    whole = run(tmp_path / "a", "--E", "30", "--N", "3")
    args = m3po.parse_args(["--resume", str(short), "--N", "3"], "l2a")
    assert l2a.main(*args) is None
    assert_same_run(whole, short)
