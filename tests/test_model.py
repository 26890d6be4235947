"""model.py: the network of GRU and MLP, the meta-model's fit and samples. More in test_m3po.py."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from model import HistoryNet, MetaModel, gaussian_nll, scale
from policy import MetaPolicy
from rollouts import EnvBuffer
from tests.conftest import constant_heads, fill, random_batch, real_steps, spy, torch_forward


# --- the network: GRU + MLP, all members at once --------------------------------------------------


@torch.no_grad()
def test_token_dim_hides_the_end_of_a_token_and_0_the_whole_history():
    tokens, mask, x = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), torch.randn(4, 2)
    other_reward, other_action = tokens.clone(), tokens.clone()
    other_reward[..., -1] += 1
    other_action[..., -2] += 1
    sees_all, sees_oa, blind = (HistoryNet(2, d, 2, 1, widths=(8,)) for d in (6, 5, 0))
    assert not torch.isclose(sees_all(tokens, mask, x), sees_all(other_reward, mask, x)).any()
    assert torch.equal(sees_oa(tokens, mask, x), sees_oa(other_reward, mask, x))
    assert not torch.isclose(sees_oa(tokens, mask, x), sees_oa(other_action, mask, x)).any()
    assert torch.equal(blind(tokens, mask, x), blind(torch.randn_like(tokens), ~mask, x))
    assert blind(tokens[:0], mask[:0], x).shape == (2, 4, 1)
    assert not hasattr(blind, "w_x") and blind.w[0].shape == (2, 2, 8)
    assert not sees_all.encode(tokens[:0], mask[:0]).any()  # L = 0: z = 0


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    net = HistoryNet(2, 5, 3, 2, widths=(8,)).double()
    batch = random_batch(2, 2, L=4, B=15, dtype=torch.float64)
    tokens, mask, x = batch.tokens[:-1], batch.mask[:-1], torch.randn(15, 3, dtype=torch.float64)
    order = torch.randperm(15)
    permuted = net(tokens[:, order], mask[:, order], x[order])
    assert torch.allclose(permuted, net(tokens, mask, x)[:, order], atol=1e-12)


# --- the meta-model -------------------------------------------------------------------------------


def noisy_world(n, holdout=0.1):
    """r = 2 o - a + 0.5 noise, o' - o = a + 0.1 + s noise with s = 0.2 for a < 0 and 0.5 above."""
    D_env = EnvBuffer(n, 1, 1, L=2, holdout=holdout)
    obs, action, noise = torch.randn(n), torch.rand(n) * 2 - 1, torch.randn(n, 2)
    reward = 2 * obs - action + 0.5 * noise[:, 0]
    change = action + 0.1 + torch.where(action < 0, 0.2, 0.5) * noise[:, 1]
    for row in range(n):
        D_env.add(obs[row, None], action[row, None], reward[row], obs[row, None] + change[row],
                  False, row % 10 == 9)
    return D_env


@pytest.mark.parametrize("literal", [True, False])
def test_a_fitted_model_samples_with_the_mean_and_the_variance_of_the_data(literal):
    """The three queries come with histories of the data: none of them tells anything here."""
    D_env = noisy_world(3_000)
    objective = dict(beta_nll=0.0, reward_weight=1.0) if literal else {}
    model = MetaModel(1, 1, widths=(32,), lr=1e-2, **objective)
    found = model.fit(D_env)
    assert found["explained_reward"] > 0.9  # 1 - 0.25 / 4.58 is all there is to explain
    n, history = 6_000, D_env.sample(6_000)
    for o, a in ((0.5, -0.6), (-1.0, 0.6), (0.0, 0.3)):
        reward, next_obs = model.sample(history.tokens[:-1], history.mask[:-1],
                                        torch.full((n, 1), o), torch.full((n, 1), a))
        assert abs(reward.mean() - (2 * o - a)) < 0.15
        assert abs(next_obs.mean() - (o + a + 0.1)) < 0.1
        assert 0.7 < reward.std() / 0.5 < 1.6
        assert 0.7 < next_obs.std() / (0.2 if a < 0 else 0.5) < 1.6


def test_a_long_fit_still_tells_small_noise_from_smaller():
    """Where noise is small the weighted likelihood pulls little, so that any other term in the loss
    wins in the end: bounds that were pulled together met, and each variance became a constant."""
    O, n = 8, 256
    model = MetaModel(O, 1, members=2, widths=(16,), token_dim=0, lr=5e-3)
    for _ in range(1_500):
        x = torch.randn(2, n, O + 1)
        sd = torch.where(x[..., :1] > 0, 0.06, 0.02)
        loss = model.loss(None, None, x, sd * torch.randn(2, n, O + 1))
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
    x = torch.randn(1_000, O + 1)
    sd = torch.exp(0.5 * model.predict(None, None, x)[1].detach())
    loud, quiet = sd[:, x[:, 0] > 0.5].mean(1), sd[:, x[:, 0] < -0.5].mean(1)  # [E, O + 1] each
    assert (loud / 0.06 - 1).abs().max() < 0.3 and (quiet / 0.02 - 1).abs().max() < 0.3


@torch.no_grad()
def test_a_sampled_row_is_a_members_prediction_for_that_rows_own_history():
    model = MetaModel(2, 1, members=3, widths=(16,))
    model.min_logvar, model.max_logvar = -70.0, -60.0  # no noise
    for name in ("token", "target"):  # neither mean 0 nor std 1
        getattr(model, f"{name}_mean").normal_()
        getattr(model, f"{name}_std").uniform_(0.5, 2)
    batch = random_batch(2, 1, L=3, B=20)
    tokens, mask, (obs, actions, _) = batch.tokens[:-1], batch.mask[:-1], batch.split(2)
    reward, next_obs = model.sample(tokens, mask, obs, actions)
    all_means, _ = model.predict_mean(tokens, mask, obs, actions)
    mean, std = model.token_mean, model.token_std
    x = torch.cat([(obs - mean[:2]) / std[:2], (actions - mean[2:3]) / std[2:3]], -1)
    members = set()
    for b in range(20):
        matches = []
        for e in range(3):
            window = ((tokens[:, b] - mean) / std)[mask[:, b]]
            _, out = torch_forward(model.net, e, window, x[b])
            assert torch.allclose(all_means[e, b], out[:3], atol=1e-4)
            r, *change = out[:3] * model.target_std + model.target_mean
            matches.append(torch.allclose(reward[b], r, atol=1e-4)
                           and torch.allclose(next_obs[b], obs[b] + torch.stack(change), atol=1e-4))
        assert sum(matches) == 1
        members.add(matches.index(True))
    assert members == {0, 1, 2}


def test_samples_have_the_predicted_mean_and_standard_deviation_in_real_units():
    model = constant_heads(MetaModel(1, 1, widths=(4,)), [0.5] * 3, logvar=2 * math.log(0.2))
    model.target_mean.copy_(torch.tensor([10.0, -1.0]))
    model.target_std.copy_(torch.tensor([5.0, 2.0]))
    n = 40_000
    reward, next_obs = model.sample(torch.zeros(0, n, 3), torch.zeros(0, n, dtype=torch.bool),
                                    torch.full((n, 1), 7.0), torch.zeros(n, 1))
    assert abs(reward.mean() - (10 + 5 * 0.5)) < 0.03 and abs(reward.std() - 5 * 0.2) < 0.03
    assert abs(next_obs.mean() - (7 - 1 + 2 * 0.5)) < 0.02 and abs(next_obs.std() - 2 * 0.2) < 0.02
    assert abs(torch.corrcoef(torch.stack([reward, next_obs[:, 0]]))[0, 1]) < 0.03  # diagonal


@torch.no_grad()
def test_validation_is_the_mixtures_nll_and_the_explained_share_of_the_variance():
    D_env = noisy_world(300)
    model = MetaModel(1, 1, members=4, widths=(8,), elites=2)
    model.use_statistics(D_env.statistics())
    model.elite.copy_(torch.tensor([3, 1]))
    found = model.validate(D_env)
    rows = D_env.rows(holdout=True)
    tokens, mask, x, y = model.standardised(D_env.batch(rows))
    mean, logvar = model.predict(tokens, mask, x)
    chosen = Normal(mean[[1, 3]].transpose(0, 1), (logvar / 2).exp()[[1, 3]].transpose(0, 1))
    mixture = MixtureSameFamily(Categorical(torch.ones(len(rows), 2)), Independent(chosen, 1))
    assert torch.isclose(found["nll"], -mixture.log_prob(y).mean(), rtol=1e-4)
    ensemble = (mean[1] + mean[3]) / 2
    share = 1 - ((y - ensemble) ** 2).mean(0) / ((y - y.mean(0)) ** 2).mean(0)
    assert torch.isclose(found["explained_reward"], share[0], atol=1e-4)
    assert torch.isclose(found["explained_obs"], share[1], atol=1e-4)


def test_statistics_are_those_of_the_rows_kept_and_inputs_are_standardised_with_them():
    for n in (20, 130):  # of a ring that is not full, and of one that has wrapped
        D_env = EnvBuffer(50, 3, 1, L=2)
        fill(D_env, n)
        model = MetaModel(3, 1, widths=(4,))
        model.use_statistics(D_env.statistics())
        batch = D_env.batch(torch.arange(max(0, n - 50), n))
        tokens, mask, x, y = model.standardised(batch)
        own = (batch.tokens[-1] - batch.tokens[-1].mean(0)) / batch.tokens[-1].std(0, correction=0)
        assert torch.allclose(x, own[:, :-1], atol=1e-4)  # reward apart: it is predicted, not shown
        change = batch.next_obs - batch.tokens[-1, :, :3]
        target = torch.cat([batch.tokens[-1, :, -1:], change], -1)
        spread = target.std(0, correction=0)
        spread[spread == 0] = 1  # o' - o is constantly 1 in the first dimension
        assert torch.allclose(y, (target - target.mean(0)) / spread, atol=1e-4)
        assert tokens.shape[0] == mask.shape[0] == 2 and torch.equal(mask, batch.mask[:-1])


def test_a_fit_takes_its_steps_per_new_row_and_goes_on_from_the_weights_it_has(monkeypatch):
    D_env = noisy_world(80)
    model, record = MetaModel(1, 1, widths=(4,), batch_size=7, steps_per_row=1.5), []
    spy(monkeypatch, model, "loss", record)
    assert model.fit(D_env)["gradient_steps"] == len(record) == 120
    assert all(args[3].shape == (3, 7, 2) for args, *_ in record)
    statistics = MetaModel(1, 1)
    statistics.use_statistics(D_env.statistics())
    assert torch.equal(model.token_mean, statistics.token_mean)
    assert torch.equal(model.target_std, statistics.target_std)
    longer = EnvBuffer(100, 1, 1, L=2)
    longer.load_state_dict(D_env.state_dict())
    for _ in range(20):  # whatever they do to the error, they are learned
        longer.add([50.0], [0.0], 90.0, [-50.0], False, False)
    before = copy.deepcopy(model)
    assert model.fit(longer)["gradient_steps"] == 30 == len(record) - 120
    for name, p in model.named_parameters():
        assert not torch.equal(p, before.get_parameter(name)), name
        assert (p - before.get_parameter(name)).abs().max() < 0.1, name  # 30 steps
    assert model.fit(longer)["gradient_steps"] == 1  # nothing new


def test_the_fresh_rows_are_judged_before_they_are_learned():
    D_env = EnvBuffer(500, 1, 1, L=2)
    world, model = noisy_world(500), MetaModel(1, 1, widths=(16,))
    for row in range(500):
        o, a, r = world.tokens[row].split(1)
        D_env.add(o, a, r.item(), world.next_obs[row], False, row % 10 == 9)
        if row == 399:
            assert not any(name.startswith("fresh") for name in model.fit(D_env))
            before = copy.deepcopy(model)
    found, rows = model.fit(D_env), torch.arange(400, 500)
    _, nll, residual, _ = before.score(D_env, rows)
    with torch.no_grad():
        tokens, mask, x, y = before.standardised(D_env.batch(rows))
        mean, _ = before.predict(tokens, mask, x)
    slow = 1 - ((mean.mean(0) - y) ** 2).mean(0)
    assert found["fresh_nll"] == nll.item()
    assert found["fresh_explained_reward"] == pytest.approx(slow[0].item(), abs=1e-5)
    assert found["fresh_explained_obs"] == pytest.approx(slow[1].item(), abs=1e-5)
    assert found["nll"] == model.validate(D_env)["nll"]
    assert found["nll_train"] == model.validate(D_env, holdout=False)["nll"] != found["nll"]


def test_what_never_varies_is_not_counted_among_the_fresh_outputs():
    D_env, model = EnvBuffer(300, 2, 1, L=2), MetaModel(2, 1, widths=(4,), steps_per_row=0.1)
    for row in range(300):
        D_env.add([1.0, torch.randn(()).item()], torch.rand(1), torch.rand(()).item(),
                  [1.0, torch.randn(()).item()], False, row % 20 == 19)
        if row == 199:
            model.fit(D_env)
    residual = model.score(D_env, torch.arange(200, 300))[2]
    assert model.fit(D_env)["fresh_explained_obs"] == pytest.approx(1 - residual[2].item())


def test_the_elites_are_the_members_with_the_least_holdout_error():
    D_env = noisy_world(200)
    model = MetaModel(1, 1, members=4, widths=(4,), elites=2, token_dim=0, lr=0.0)
    constant_heads(model, [3.0, 0.25, -2.0, 1.0])  # standardised targets are 0 in the mean
    model.fit(D_env)
    assert model.elite.tolist() == [1, 3]
    model.target_mean.zero_(), model.target_std.fill_(1)
    n = 1_000
    reward, _ = model.sample(torch.zeros(0, n, 3), torch.zeros(0, n, dtype=torch.bool),
                             torch.zeros(n, 1), torch.zeros(n, 1))
    assert sorted(Counter(reward.tolist()).items()) == [(0.25, n // 2), (1.0, n // 2)]


@pytest.mark.parametrize("case", ["no holdout", "all holdout", "one row", "constant", "few rows"])
def test_odd_data_never_divides_by_zero(case):
    holdout = {"no holdout": 0.0, "all holdout": 1.0}.get(case, 0.1)
    n = {"one row": 1, "few rows": 5}.get(case, 300)
    D_env = EnvBuffer(1_000, 2, 1, L=3, holdout=holdout)
    for row in range(n):
        first = 4.0 if case == "constant" else torch.randn(()).item()
        D_env.add([first, row % 5], torch.rand(1), row % 3, [first, (row + 1) % 5], False,
                  row % 8 == 7)
    model = MetaModel(2, 1, widths=(8,), steps_per_row=0.2)
    found = model.fit(D_env)
    assert math.isfinite(found["nll"]) and math.isfinite(found["explained_reward"])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if case == "constant":
        assert model.token_std[0] == model.target_std[1] == 1
    batch = D_env.sample(64)
    obs, actions, _ = batch.split(2)
    reward, next_obs = model.sample(batch.tokens[:-1], batch.mask[:-1], obs, actions)
    assert reward.isfinite().all() and next_obs.isfinite().all()


def test_a_fit_to_an_empty_d_env_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        MetaModel(1, 1, widths=(4,)).fit(EnvBuffer(10, 1, 1, L=2))


def test_a_fit_stops_at_an_error_that_is_not_finite():
    D_env, model = noisy_world(50), MetaModel(1, 1, widths=(4,))
    with torch.no_grad():
        model.net.b[-1][1] = math.nan
    with pytest.raises(FloatingPointError, match="meta-model"):
        model.fit(D_env)


def test_what_is_seldom_seen_is_standardised_to_at_most_10():
    model = MetaModel(1, 1, widths=(4,))
    model.token_mean.fill_(1.0), model.token_std.fill_(0.5)
    scaled = model.standardise(torch.tensor([[[3.0, -9.0, 99.0]]]), torch.tensor([[0.0]]))
    assert scaled.tolist() == [[[4.0, -10.0, 10.0]]]
    x = model.standardise_step(torch.tensor([[3.0]]), torch.tensor([[-9.0]]))
    assert x.tolist() == [[4.0, -10.0]]


@pytest.mark.parametrize("n", [2, 3, 4])  # an observation, with its action, a token
def test_of_an_angle_the_nets_read_sine_and_cosine_whatever_its_statistics(n):
    x, mean, std = 3 * torch.randn(5, n).double(), torch.randn(4).double(), torch.rand(4).double()
    shown = scale(x, mean, std, torch.tensor([1]))
    plain = scale(x, mean, std, torch.tensor([], dtype=torch.long))
    assert shown.shape == (5, n + 1) and plain.shape == (5, n)
    assert torch.allclose(shown[:, 0], 2**0.5 * x[:, 1].cos())
    assert torch.allclose(shown[:, 2], 2**0.5 * x[:, 1].sin())
    others = [i for i in range(n) if i != 1]
    assert torch.equal(shown[:, 1:][:, others], plain[:, others])
    assert torch.allclose(plain[:, 1], ((x[:, 1] - mean[1]) / std[1]).clamp(-10, 10))


@torch.no_grad()
def test_a_full_turn_is_the_same_pose_to_the_model_but_not_without_angles():
    """Of a cheetah on its back: one that fell forwards, one that fell backwards."""
    batch, turn = random_batch(3, 2, L=3, B=9), torch.tensor([0, 2 * math.pi, 0])
    turned = torch.cat([batch.tokens[..., :3] + turn, batch.tokens[..., 3:]], -1)
    for angles in ((), (1,)):
        model = MetaModel(3, 2, widths=(8,), newest=True, changes=True, angles=angles)
        before, after = (model.predict_mean(tokens[:-1], batch.mask[:-1], tokens[-1, :, :3],
                                            tokens[-1, :, 3:5]) for tokens in (batch.tokens, turned))
        assert [torch.allclose(*pair, atol=1e-4) for pair in zip(before, after)] == 2 * [bool(angles)]


def test_gaussian_nll_is_that_of_torch_distributions():
    mean, logvar, y = torch.randn(3, 50).double()
    slow = -Normal(mean, (0.5 * logvar).exp()).log_prob(y)
    assert torch.allclose(gaussian_nll(mean, logvar, y), slow)


def test_with_changes_a_token_holds_what_it_brought_about():
    model = MetaModel(2, 1, widths=(4,), changes=True)
    model.target_mean.fill_(0.5), model.target_std.fill_(2.0)
    window, obs = torch.randn(3, 5, 4), torch.randn(5, 2)
    tokens = model.standardise(window, obs)
    assert tokens.shape == (3, 5, 6) and torch.equal(tokens[..., 2:], window)
    for i in range(3):
        following = obs if i == 2 else window[i + 1, :, :2]
        assert torch.allclose(tokens[i, :, :2], (following - window[i, :, :2] - 0.5) / 2)
    batch = random_batch(2, 1, L=3, B=5)
    seen = model.standardised(batch)[0]  # the last window ends where its own step begins
    own = (batch.tokens[-1, :, :2] - batch.tokens[-2, :, :2] - 0.5) / 2
    assert torch.allclose(seen[-1, :, :2], own)
    blind = MetaModel(2, 1, widths=(4,), token_dim=0, changes=True)
    assert blind.standardise(window, obs).shape == (3, 5, 4)


def test_the_newest_token_joins_z_and_is_0_where_there_is_none():
    torch.manual_seed(0)
    net = HistoryNet(2, 4, 3, 1, (8,), newest=True)
    tokens, mask, x = torch.randn(3, 6, 5), torch.rand(3, 6) < 0.5, torch.randn(6, 3)
    mask[-1, :2] = torch.tensor([True, False])
    z, out = net.encode(tokens, mask), net(tokens, mask, x)
    for e in range(2):
        for i in range(6):
            newest = tokens[-1, i, :4] * mask[-1, i]  # of its 5 numbers the net reads 4
            v = torch.cat([z[e, i], newest, x[i]]) @ net.w[0][e] + net.b[0][e, 0]
            slow = v * torch.sigmoid(v) @ net.w[1][e] + net.b[1][e, 0]
            assert torch.allclose(out[e, i], slow, atol=1e-5)
    by_member = net(tokens.expand(2, 3, 6, 5), mask.expand(2, 3, 6), x.expand(2, 6, 3))
    assert torch.allclose(by_member, out, atol=1e-6)


def test_layer_norm_scales_each_hidden_row_and_only_in_q():
    torch.manual_seed(0)
    net = HistoryNet(2, 4, 3, 1, (8, 8), layer_norm=True)
    tokens, mask, x = torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.bool), torch.randn(2, 6, 3)
    z, out = net.encode(tokens, mask), net(tokens, mask, x)
    for e in range(2):
        for i in range(6):
            v = torch.cat([z[e, i], x[e, i]])
            for w, b in zip(net.w[:-1], net.b[:-1]):
                v = v @ w[e] + b[e, 0]
                v = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()
                v = v * torch.sigmoid(v)
            assert torch.allclose(out[e, i], v @ net.w[-1][e] + net.b[-1][e, 0], atol=1e-5)
    policy = MetaPolicy(3, 2, widths=(8,), layer_norm=True)
    assert (policy.qf.layer_norm, policy.qf_target.layer_norm, policy.actor.layer_norm) == (
        True, True, False)
